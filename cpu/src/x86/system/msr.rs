// SPDX-License-Identifier: Apache-2.0
//! Model-specific registers: the permission map, and the ones that the processor itself holds.

use super::exitcode;
use super::segment::set_base;
use crate::mem::host_load;
use crate::x86::flags::Int;
use crate::x86::op::{Op, Res};
use crate::x86::state::{Cpu, TSC_RATIO_ONE, cr0, cr4, efer, reg, sreg};

/// MSR numbers (APM vol. 2, appendix A).
pub mod index {
    #![allow(missing_docs)]
    pub const TSC: u32 = 0x10;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const DEBUGCTL: u32 = 0x1D9;
    pub const PAT: u32 = 0x277;
    pub const EFER: u32 = 0xC000_0080;
    pub const STAR: u32 = 0xC000_0081;
    pub const LSTAR: u32 = 0xC000_0082;
    pub const CSTAR: u32 = 0xC000_0083;
    pub const SFMASK: u32 = 0xC000_0084;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    pub const TSC_AUX: u32 = 0xC000_0103;
}

/// The ranges of the MSR permission map: first MSR of each 2 KiB (APM vol. 2, 15.11).
const MAP_RANGES: [u32; 3] = [0, 0xC000_0000, 0xC001_0000];

/// EFER bits that software may write.
const EFER_BITS: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE | efer::SVME;

/// EDX:EAX.
pub(super) fn edx_eax(cpu: &Cpu) -> u64 {
    cpu.rb.gpr[reg::RAX] & 0xffff_ffff | cpu.rb.gpr[reg::RDX] << 32
}

/// Writes EDX:EAX, clearing the upper halves.
pub(super) fn set_edx_eax(cpu: &mut Cpu, v: u64) {
    cpu.rb.gpr[reg::RAX] = v & 0xffff_ffff;
    cpu.rb.gpr[reg::RDX] = v >> 32;
}

impl Cpu {
    /// Reads a value of a permission map at a host-physical address; None outside registered memory.
    pub(super) fn map_value<T: Int>(&self, address: u64) -> Option<T> {
        let at = usize::try_from(address).ok()?;
        // SAFETY: the region table says that the bytes are registered memory.
        self.engine.regions.contains(at, T::BYTES).then(|| unsafe { host_load(at as *const T) })
    }

    /// Whether the MSR permission map intercepts an access. MSRs outside the map's ranges always are.
    fn msr_intercepted(&self, msr: u32, write: bool) -> bool {
        if !self.intercepted(exitcode::MSR) {
            return false;
        }
        let Some(range) = MAP_RANGES.iter().position(|first| msr.wrapping_sub(*first) < 0x2000) else {
            return true;
        };
        let bit = (msr & 0x1fff) as u64 * 2 + write as u64;
        let at = (self.ctl.msrpm & !0xfff) + range as u64 * 0x800 + bit / 8;
        self.map_value::<u8>(at).is_none_or(|b| b >> (bit & 7) & 1 != 0)
    }

    /// Reads an MSR that the processor holds.
    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        Some(match msr {
            index::TSC => self.tsc(),
            index::SYSENTER_CS => self.msr.sysenter_cs,
            index::SYSENTER_ESP => self.msr.sysenter_esp,
            index::SYSENTER_EIP => self.msr.sysenter_eip,
            index::DEBUGCTL => self.msr.debugctl,
            index::PAT => self.msr.pat,
            index::EFER => self.efer,
            index::STAR => self.msr.star,
            index::LSTAR => self.msr.lstar,
            index::CSTAR => self.msr.cstar,
            index::SFMASK => self.msr.sfmask,
            index::FS_BASE => self.seg[sreg::FS].base,
            index::GS_BASE => self.seg[sreg::GS].base,
            index::KERNEL_GS_BASE => self.msr.kernel_gs_base,
            index::TSC_AUX => self.rb.tsc_aux,
            _ => return None,
        })
    }

    /// Writes an MSR that the processor holds; None raises #GP(0).
    fn write_msr(&mut self, msr: u32, v: u64) -> Option<()> {
        let canonical = self.canonical(v);
        match msr {
            // The physical counter is the host's clock, which a guest cannot turn.
            index::TSC => {}
            index::SYSENTER_CS => self.msr.sysenter_cs = v & 0xffff,
            index::SYSENTER_ESP => self.msr.sysenter_esp = v & 0xffff_ffff,
            index::SYSENTER_EIP => self.msr.sysenter_eip = v & 0xffff_ffff,
            index::DEBUGCTL => self.msr.debugctl = v & 0x3f,
            index::PAT if valid_pat(v) => self.msr.pat = v,
            index::EFER => return self.write_efer(v),
            index::STAR => self.msr.star = v,
            index::LSTAR if canonical => self.msr.lstar = v,
            index::CSTAR if canonical => self.msr.cstar = v,
            index::SFMASK => self.msr.sfmask = v & 0xffff_ffff,
            index::FS_BASE if canonical => set_base(self, sreg::FS, v),
            index::GS_BASE if canonical => set_base(self, sreg::GS, v),
            index::KERNEL_GS_BASE if canonical => self.msr.kernel_gs_base = v,
            index::TSC_AUX if v >> 32 == 0 => self.rb.tsc_aux = v,
            _ => return None,
        }
        Some(())
    }

    fn write_efer(&mut self, v: u64) -> Option<()> {
        let changed = self.efer ^ v;
        if v & !EFER_BITS != 0 || (changed & efer::LME != 0 && self.cr0 & cr0::PG != 0) {
            return None;
        }
        self.efer = (v & !efer::LMA) | (self.efer & efer::LMA);
        if changed & efer::NXE != 0 {
            self.flush_asid();
            self.switch_tlb();
        }
        self.update_mode();
        Some(())
    }

    /// The guest's time-stamp counter: the processor's times the TSC ratio, and the offset (APM vol. 2, 15.30.5).
    pub fn tsc(&self) -> u64 {
        let tsc = crate::clock::tsc();
        let scaled = if self.tsc_ratio == TSC_RATIO_ONE {
            tsc
        } else {
            ((tsc as u128 * self.tsc_ratio as u128) >> 32) as u64
        };
        scaled.wrapping_add(self.ctl.tsc_offset)
    }

    /// #GP(0) when CR4.TSD keeps the counter from this privilege level.
    fn tsc_allowed(&mut self) -> Res {
        if self.cpl != 0 && self.cr4 & cr4::TSD != 0 { Err(self.gp(0)) } else { Ok(()) }
    }
}

/// Whether every byte of a PAT value is a memory type.
fn valid_pat(v: u64) -> bool {
    v.to_le_bytes().iter().all(|b| matches!(b, 0 | 1 | 4..=7))
}

/// RDMSR.
pub(super) fn rdmsr(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.privileged()?;
    let msr = cpu.rb.gpr[reg::RCX] as u32;
    if cpu.msr_intercepted(msr, false) {
        return Err(cpu.vmexit(exitcode::MSR, 0, 0));
    }
    if cpu.x2avic_msr(msr) {
        let v = cpu.x2avic_read(msr)?;
        set_edx_eax(cpu, v);
        return Ok(());
    }
    match cpu.read_msr(msr) {
        Some(v) => {
            set_edx_eax(cpu, v);
            Ok(())
        }
        None => Err(cpu.gp(0)),
    }
}

/// WRMSR.
pub(super) fn wrmsr(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.privileged()?;
    let msr = cpu.rb.gpr[reg::RCX] as u32;
    if cpu.msr_intercepted(msr, true) {
        return Err(cpu.vmexit(exitcode::MSR, 1, 0));
    }
    let v = edx_eax(cpu);
    if cpu.x2avic_msr(msr) {
        return Err(cpu.x2avic_write(op, msr, v));
    }
    if cpu.write_msr(msr, v).is_none() {
        return Err(cpu.gp(0));
    }
    if msr == index::EFER && cpu.intercepted(exitcode::EFER_WRITE_TRAP) {
        cpu.end_block(op);
        cpu.vmexit(exitcode::EFER_WRITE_TRAP, v, 0);
        return Err(crate::x86::op::Stop::ExitAfter);
    }
    if msr == index::EFER { Err(cpu.end_block(op)) } else { Ok(()) }
}

/// RDTSC.
pub(super) fn rdtsc(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.tsc_allowed()?;
    cpu.intercept(exitcode::RDTSC)?;
    let v = cpu.tsc();
    set_edx_eax(cpu, v);
    Ok(())
}

/// RDTSCP.
pub(super) fn rdtscp(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.tsc_allowed()?;
    cpu.intercept(exitcode::RDTSCP)?;
    let v = cpu.tsc();
    set_edx_eax(cpu, v);
    cpu.rb.gpr[reg::RCX] = cpu.rb.tsc_aux & 0xffff_ffff;
    Ok(())
}

/// RDPID.
pub(super) fn rdpid(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.rb.tsc_aux & 0xffff_ffff;
    cpu.set_reg::<u64>(op.dst, v);
    Ok(())
}

/// RDPMC: four counters that never count.
pub(super) fn rdpmc(cpu: &mut Cpu, _: &Op) -> Res {
    if cpu.cpl != 0 && cpu.cr4 & cr4::PCE == 0 {
        return Err(cpu.gp(0));
    }
    cpu.intercept(exitcode::RDPMC)?;
    if cpu.rb.gpr[reg::RCX] as u32 > 3 {
        return Err(cpu.gp(0));
    }
    set_edx_eax(cpu, 0);
    Ok(())
}
