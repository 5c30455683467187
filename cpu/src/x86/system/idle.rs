// SPDX-License-Identifier: Apache-2.0
//! Waiting and hints: HLT, PAUSE, MONITOR, MWAIT; cache control; CPUID; and the instructions of AMD-V itself.

use super::exitcode;
use crate::clock::clock_ns;
use crate::mem::Wake;
use crate::x86::access::Access;
use crate::x86::flags::rf;
use crate::x86::op::{Op, Res, Stop};
use crate::x86::state::{Cpu, cr4, reg};
use crate::x86::x87::{compacted_size, xsave_size};

/// A processor that waits in HLT looks this often for what doesn't wake it.
const LOOK_AGAIN_NS: u64 = 1_000_000;

/// CPUID.
pub(super) fn cpuid(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.intercept(exitcode::CPUID)?;
    let leaf = cpu.rb.gpr[reg::RAX] as u32;
    let subleaf = cpu.rb.gpr[reg::RCX] as u32;
    let mut v = super::cpuid::cpuid(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => {
            v[1] |= cpu.index << 24;
            if cpu.cr4 & cr4::OSXSAVE != 0 {
                v[2] |= 1 << 27;
            }
        }
        (7, 0) if cpu.cr4 & cr4::PKE != 0 => v[2] |= 1 << 4,
        (0xD, 0) => v[1] = xsave_size(cpu.rb.xcr0) as u32,
        (0xD, 1) => v[1] = compacted_size(cpu.rb.xcr0) as u32,
        _ => {}
    }
    for (n, r) in [reg::RAX, reg::RBX, reg::RCX, reg::RDX].into_iter().enumerate() {
        cpu.rb.gpr[r] = v[n] as u64;
    }
    Ok(())
}

/// HLT: not intercepted, it waits for a physical event or a virtual interrupt that can be taken.
pub(super) fn hlt(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.privileged()?;
    if cpu.avic.enabled {
        // One may have come since the block began.
        cpu.avic_evaluate();
    }
    let virtual_interrupt = cpu.ctl.v_irq
        && cpu.rflags & rf::IF != 0
        && (cpu.ctl.v_ign_tpr || cpu.ctl.v_intr_prio > cpu.ctl.v_tpr);
    if !virtual_interrupt {
        cpu.intercept(exitcode::IDLE_HLT)?;
    }
    cpu.intercept(exitcode::HLT)?;
    if !virtual_interrupt {
        let (machine, shared) = (&cpu.engine.machine, &cpu.engine.shared);
        // Only a kick wakes the thread: look for the rest now and then.
        machine.bus().stand(shared, || {
            while shared.wait_for(u32::MAX, Some(clock_ns() + LOOK_AGAIN_NS)) != Wake::Event {}
        });
        let (kicked, rung) = (shared.kicked(), shared.rung());
        if rung && cpu.avic.enabled {
            cpu.avic_evaluate();
        }
        let woken = rung && cpu.ctl.v_irq && cpu.rflags & rf::IF != 0;
        if !kicked && !woken {
            // What another processor wants is no interrupt: the guest waits on.
            return Err(Stop::Restart);
        }
    }
    Err(cpu.end_block(op))
}

/// PAUSE, with the pause filter (APM vol. 2, 15.14.4). A cycle of this processor is an instruction: what spins is told
/// from what doesn't by what the guest does, not by how fast the host is.
pub(super) fn pause(cpu: &mut Cpu, op: &Op) -> Res {
    if cpu.intercepted(exitcode::PAUSE) {
        if cpu.ctl.pause_threshold != 0 {
            let now = cpu.engine.instructions_before(op);
            if now.wrapping_sub(cpu.sys.pause_last) > cpu.ctl.pause_threshold as u64 {
                cpu.sys.pause_left = cpu.ctl.pause_count;
            }
            cpu.sys.pause_last = now;
        }
        match cpu.sys.pause_left.checked_sub(1) {
            Some(left) => cpu.sys.pause_left = left,
            None => return Err(cpu.vmexit(exitcode::PAUSE, 0, 0)),
        }
    }
    core::hint::spin_loop();
    Ok(())
}

/// MONITOR: at CPL 0 only.
pub(super) fn monitor(cpu: &mut Cpu, op: &Op) -> Res {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    cpu.intercept(exitcode::MONITOR)?;
    if cpu.rb.gpr[reg::RCX] as u32 != 0 {
        return Err(cpu.gp(0));
    }
    let offset = match op.asize {
        8 => cpu.rb.gpr[reg::RAX],
        4 => cpu.rb.gpr[reg::RAX] as u32 as u64,
        _ => cpu.rb.gpr[reg::RAX] as u16 as u64,
    };
    let linear = cpu.seg_lin(op.seg, offset, 1, Access::Read)?;
    cpu.load_at::<u8>(op.seg, linear)?;
    cpu.sys.monitor_armed = true;
    Ok(())
}

/// MWAIT: not intercepted, it ends at once (any reason to leave is allowed).
pub(super) fn mwait(cpu: &mut Cpu, op: &Op) -> Res {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    cpu.intercept(exitcode::MWAIT)?;
    if cpu.sys.monitor_armed {
        cpu.intercept(exitcode::MWAIT_CONDITIONAL)?;
    }
    if cpu.rb.gpr[reg::RCX] as u32 & !1 != 0 {
        return Err(cpu.gp(0));
    }
    cpu.sys.monitor_armed = false;
    std::thread::yield_now();
    Err(cpu.end_block(op))
}

/// INVD: caches are not modelled.
pub(super) fn invd(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.privileged()?;
    cpu.intercept(exitcode::INVD)
}

/// WBINVD and WBNOINVD.
pub(super) fn wbinvd(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.privileged()?;
    cpu.intercept(exitcode::WBINVD)
}

/// RSM outside system-management mode.
pub(super) fn rsm(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.intercept(exitcode::RSM)?;
    Err(cpu.ud())
}

/// VMMCALL: #UD when nobody intercepts it.
pub(super) fn vmmcall(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.intercept(exitcode::VMMCALL)?;
    Err(cpu.ud())
}

/// VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, INVLPGA: privileged, intercepted, or else undefined: this processor
/// doesn't nest by itself. `op.imm` is the exit code.
pub(super) fn svm(cpu: &mut Cpu, op: &Op) -> Res {
    if cpu.real_or_v86() {
        return Err(cpu.ud());
    }
    cpu.privileged()?;
    cpu.intercept(op.imm)?;
    Err(cpu.ud())
}

/// RDPRU: not among this processor's features, but the intercept comes first.
pub(super) fn rdpru(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.intercept(exitcode::RDPRU)?;
    Err(cpu.ud())
}
