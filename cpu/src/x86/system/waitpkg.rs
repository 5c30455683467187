// SPDX-License-Identifier: Apache-2.0
//! UMONITOR, UMWAIT and TPAUSE (SDM vol. 2; CPUID WAITPKG): Intel's instructions, an extension of this processor that is
//! off unless the hypervisor turns it on ([`Cpu::waitpkg`]). Off, they are undefined, as on AMD's processors.
//!
//! A monitored line is marked like one that holds decoded code (`engine::code`), so a store of any processor, or of the
//! host by way of the machine, is noticed whatever it stores. What the host writes unseen is noticed by comparing the
//! line now and then. Anything that is pending ends a wait: that is allowed at any time.

use crate::clock::{self, clock_ns};
use crate::mem::host_load;
use crate::x86::access::Access;
use crate::x86::op::{Op, Res};
use crate::x86::state::{Cpu, LINE, Monitor, cr4, reg};

/// IA32_UMWAIT_CONTROL: C0.2 is not allowed, C0.1 takes its place.
pub const CONTROL_C02_DISABLED: u32 = 1;
/// IA32_UMWAIT_CONTROL: the longest wait in ticks of the TSC, a multiple of four; 0 for no limit.
pub const CONTROL_MAX_TIME: u32 = !3;

/// A waiting processor looks this often for what doesn't wake it: the host's plain stores.
const LOOK_AGAIN_NS: u64 = 1_000_000;
/// C0.1 is left sooner than C0.2: so long the thread stays awake.
const C01_AWAKE_NS: u64 = 20_000;
/// How often UMONITOR gives the host's processor away for the other processors to learn of the line.
const YIELDS: u32 = 100;

impl Cpu {
    /// #UD while the hypervisor has not turned the instructions on.
    #[inline]
    fn has_waitpkg(&mut self) -> Res {
        if self.waitpkg { Ok(()) } else { Err(self.ud()) }
    }

    /// The eight words of a line of memory.
    fn line(&self, host: usize) -> [u64; LINE / 8] {
        // SAFETY: callers name lines of registered memory.
        core::array::from_fn(|n| unsafe { host_load((host as *const u64).add(n)) })
    }

    /// Whether nothing has been stored to the monitored line since UMONITOR. Any decoded code that has changed, on any
    /// processor, counts as a store, as does an exit: from there on the line may be another one's.
    fn monitor_holds(&self) -> bool {
        let m = &self.sys.monitor;
        m.armed
            && m.stamp == self.engine.stamp
            && self.engine.regions.contains(m.line, LINE)
            && self.line(m.line) == m.contents
    }

    /// Whether something is pending that ends a wait: an interrupt of any kind, whether it is masked or not, or what
    /// other processors ask of this one.
    fn wait_is_over(&self) -> bool {
        self.ctl.v_irq || self.engine.shared.is_pending()
    }

    /// When the clock will have ticked `ticks` of the guest's TSC on from `now`, in ns: not sooner.
    fn after_ticks(&self, now: u64, ticks: u64) -> u64 {
        let host = ((ticks as u128) << 32).div_ceil((self.tsc_ratio as u128).max(1));
        let ns = host.saturating_mul(1_000_000).div_ceil(clock::tsc_khz() as u128);
        now.saturating_add(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

/// UMONITOR: the checks are those of a load of one byte.
pub(super) fn umonitor(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.has_waitpkg()?;
    let address = cpu.reg::<u64>(op.src);
    let offset = match op.asize {
        8 => address,
        4 => address as u32 as u64,
        _ => address as u16 as u64,
    };
    let linear = cpu.seg_lin(op.seg, offset, 1, Access::Read)?;
    cpu.load_at::<u8>(op.seg, linear)?;
    let linear = if cpu.long_mode() { linear } else { linear as u32 as u64 };
    let mmu = if cpu.mmu == 3 { 2 } else { cpu.mmu };
    let line = cpu.translate(mmu, op.seg, linear, 1, Access::Read)? & !(LINE - 1);
    cpu.sys.monitor.armed = false;
    let Some(watched) = cpu.engine.watch(line) else { return Ok(()) };
    for _ in 0..YIELDS {
        if cpu.engine.settled(watched) {
            let contents = cpu.line(line);
            cpu.sys.monitor = Monitor { armed: true, line, stamp: cpu.engine.stamp, contents };
            break;
        }
        // One that has not heard of it yet might store without being noticed. While two of them wait for each other,
        // neither has a monitor: their UMWAITs end at once.
        std::thread::yield_now();
    }
    Ok(())
}

/// UMWAIT: as TPAUSE, if nothing has been stored to the monitored line; until then, too.
pub(super) fn umwait(cpu: &mut Cpu, op: &Op) -> Res {
    wait(cpu, op, true)
}

/// TPAUSE: until the TSC reaches EDX:EAX, but not longer than IA32_UMWAIT_CONTROL allows. CF says that this ended it.
pub(super) fn tpause(cpu: &mut Cpu, op: &Op) -> Res {
    wait(cpu, op, false)
}

fn wait(cpu: &mut Cpu, op: &Op, monitored: bool) -> Res {
    cpu.has_waitpkg()?;
    let state = cpu.reg::<u64>(op.src) as u32;
    if state & !1 != 0 || (cpu.cpl != 0 && cpu.cr4 & cr4::TSD != 0) {
        return Err(cpu.gp(0));
    }
    if cpu.avic.enabled {
        // One may have come since the block began.
        cpu.avic_evaluate();
    }
    let control = cpu.rb.umwait_control;
    let wanted = cpu.rb.gpr[reg::RAX] & 0xffff_ffff | cpu.rb.gpr[reg::RDX] << 32;
    let limit = match control & CONTROL_MAX_TIME {
        0 => u64::MAX,
        ticks => cpu.tsc().saturating_add(ticks as u64),
    };
    let deadline = wanted.min(limit);
    let begun = clock_ns();
    let awake = if state == 1 || control & CONTROL_C02_DISABLED != 0 { C01_AWAKE_NS } else { 0 };
    let mut expired;
    loop {
        let tsc = cpu.tsc();
        expired = tsc >= deadline;
        if expired || cpu.wait_is_over() || monitored && !cpu.monitor_holds() {
            break;
        }
        let now = clock_ns();
        if now < begun.saturating_add(awake) {
            std::thread::yield_now();
            continue;
        }
        let until = cpu.after_ticks(now, deadline - tsc).min(now + LOOK_AGAIN_NS);
        let (machine, shared) = (&cpu.engine.machine, &cpu.engine.shared);
        machine.bus().stand(shared, || shared.wait_watching(until));
    }
    cpu.sys.monitor.armed &= !monitored;
    // CF, and the other arithmetic flags are clear.
    cpu.lf.set_all((expired && limit < wanted) as u64);
    Err(cpu.end_block(op))
}
