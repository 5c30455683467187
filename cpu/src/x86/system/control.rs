// SPDX-License-Identifier: Apache-2.0
//! Control and debug registers (APM vol. 2, chapters 3 and 13; intercepts: 15.8 and 15.9).

use super::debug::{dr6, dr7};
use super::exitcode;
use crate::x86::access::Align;
use crate::x86::op::{Op, Res, Stop, flag};
use crate::x86::paging::PHYS_BITS;
use crate::x86::state::{Cpu, Exception, cr0, cr4, efer, reg, vector};
use crate::x86::x87::validate_xcr0;

/// CR0 bits that exist.
const CR0_BITS: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// CR4 bits that this processor has; the others are reserved.
pub const CR4_BITS: u64 = cr4::VME
    | cr4::PVI
    | cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP
    | cr4::PKE;
/// CR4 bits that translations depend on.
const CR4_PAGING: u64 =
    cr4::PSE | cr4::PAE | cr4::PGE | cr4::LA57 | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE;
/// With PCIDE: the TLB is left alone by a write of CR3.
const CR3_NO_FLUSH: u64 = 1 << 63;
/// Decode assist: the exit was by MOV CRx.
const MOV_CR: u64 = 1 << 63;

impl Cpu {
    /// Forgets every translation of this ASID, then makes the context in force current.
    fn flush_paging(&mut self) {
        self.flush_asid();
        self.switch_tlb();
    }

    /// Writes PKRU; whether translations were forgotten for it. The TLB has the keys' rights folded in, so it must go
    /// when the rights of a key change that a page has had.
    pub fn write_pkru(&mut self, v: u32) -> bool {
        let changed = self.rb.pkru ^ v;
        self.rb.pkru = v;
        let stale = (0..16).any(|key| self.keys >> key & 1 != 0 && changed >> (2 * key) & 3 != 0);
        if stale {
            self.flush_paging();
        }
        stale
    }

    /// Writes CR0 with the manual's checks (APM vol. 2, 3.1.1 and 14.6).
    pub(super) fn write_cr0(&mut self, v: u64) -> Res {
        let bad = v >> 32 != 0 || v & (cr0::PG | cr0::PE) == cr0::PG || v & (cr0::NW | cr0::CD) == cr0::NW;
        if bad {
            return Err(self.gp(0));
        }
        let v = v & CR0_BITS | cr0::ET;
        let old = self.cr0;
        let changed = old ^ v;
        let mut new_efer = self.efer;
        if changed & cr0::PG != 0 {
            if v & cr0::PG != 0 {
                if self.efer & efer::LME != 0 {
                    // Activating long mode needs PAE and a code segment that isn't 64-bit already.
                    if self.cr4 & cr4::PAE == 0 || self.seg[1].long() {
                        return Err(self.gp(0));
                    }
                    new_efer |= efer::LMA;
                }
            } else {
                if self.code_size == 8 || self.cr4 & cr4::PCIDE != 0 {
                    return Err(self.gp(0));
                }
                new_efer &= !efer::LMA;
            }
        }
        self.cr0 = v;
        self.efer = new_efer;
        if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.flush_paging();
        }
        if changed & cr0::PE != 0 && v & cr0::PE == 0 {
            self.cpl = 0;
        }
        self.update_mode();
        Ok(())
    }

    /// Writes CR3 (bit 63: with PCIDE, keep the TLB). PAE paging's four PDPTEs are not loaded: under nested paging the
    /// table walk reads them on demand (APM vol. 2, 15.25.10).
    pub(super) fn load_cr3(&mut self, v: u64) -> Res {
        let pcide = self.cr4 & cr4::PCIDE != 0;
        let no_flush = pcide && v & CR3_NO_FLUSH != 0;
        let mut v = if pcide { v & !CR3_NO_FLUSH } else { v };
        if self.long_mode() {
            if v >> PHYS_BITS != 0 {
                return Err(self.gp(0));
            }
        } else {
            v &= 0xffff_ffff;
        }
        self.cr3 = v;
        self.switch_tlb();
        if !no_flush {
            let pcid = self.pcid();
            self.flush_pcid(pcid);
        }
        Ok(())
    }

    /// Writes CR4 with the manual's checks (APM vol. 2, 3.1.3 and 5.5.1).
    pub(super) fn write_cr4(&mut self, v: u64) -> Res {
        let changed = self.cr4 ^ v;
        let sets_pcide = changed & v & cr4::PCIDE != 0;
        let bad = v & !CR4_BITS & changed != 0
            || v >> 32 != 0
            || (self.long_mode() && (v & cr4::PAE == 0 || changed & cr4::LA57 != 0))
            || (sets_pcide && (!self.long_mode() || self.cr3 & 0xfff != 0));
        if bad {
            return Err(self.gp(0));
        }
        self.cr4 = v;
        if changed & CR4_PAGING != 0 {
            self.flush_paging();
        }
        self.update_mode();
        Ok(())
    }

    /// Writes CR8, the virtual task priority.
    fn write_cr8(&mut self, v: u64) -> Res {
        if v & !15 != 0 {
            return Err(self.gp(0));
        }
        self.ctl.v_tpr = v as u8;
        if self.avic.enabled {
            self.avic_set_v_tpr();
        }
        self.update_attention();
        Ok(())
    }

    /// #VMEXIT CR_WRITE_TRAP after `op` wrote control register `n`, if that is intercepted; else the end of the block.
    fn after_cr_write(&mut self, op: &Op, n: u8, value: u64) -> Stop {
        let stop = self.end_block(op);
        let code = exitcode::CR0_WRITE_TRAP + n as u64;
        if self.intercepted(code) {
            self.vmexit(code, value, 0);
            return Stop::ExitAfter;
        }
        stop
    }
}

/// MOV r, CRn (`op.dst` = GPR, `op.aux` = n).
pub(super) fn mov_from_cr(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.privileged()?;
    let n = op.aux & 15;
    if cpu.intercepted(exitcode::CR0_READ + n as u64) {
        return Err(cpu.vmexit(exitcode::CR0_READ + n as u64, MOV_CR | (op.dst >> 3) as u64, 0));
    }
    let v = match n {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        _ => cpu.ctl.v_tpr as u64,
    };
    write_gpr(cpu, op, v);
    Ok(())
}

fn write_gpr(cpu: &mut Cpu, op: &Op, v: u64) {
    if op.has(flag::CODE64) { cpu.set_reg::<u64>(op.dst, v) } else { cpu.set_reg::<u32>(op.dst, v as u32) }
}

fn read_gpr(cpu: &Cpu, op: &Op) -> u64 {
    if op.has(flag::CODE64) { cpu.reg::<u64>(op.src) } else { cpu.reg::<u32>(op.src) as u64 }
}

/// MOV CRn, r (`op.src` = GPR, `op.aux` = n).
pub(super) fn mov_to_cr(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.privileged()?;
    let n = op.aux & 15;
    let v = read_gpr(cpu, op);
    let info = MOV_CR | (op.src >> 3) as u64;
    if cpu.intercepted(exitcode::CR0_WRITE + n as u64) {
        return Err(cpu.vmexit(exitcode::CR0_WRITE + n as u64, info, 0));
    }
    match n {
        0 => {
            if cpu.intercepted(exitcode::CR0_SEL_WRITE)
                && (cpu.cr0 ^ v) & CR0_BITS & !(cr0::TS | cr0::MP | cr0::ET) != 0
            {
                return Err(cpu.vmexit(exitcode::CR0_SEL_WRITE, info, 0));
            }
            cpu.write_cr0(v)?;
        }
        2 => cpu.cr2 = v,
        3 => {
            let v = if cpu.long_mode() { v } else { v & 0xffff_ffff };
            cpu.load_cr3(v)?;
        }
        4 => cpu.write_cr4(v)?,
        _ => cpu.write_cr8(v)?,
    }
    Err(cpu.after_cr_write(op, n, v))
}

/// LMSW.
pub(super) fn lmsw(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.privileged()?;
    cpu.intercept(exitcode::CR0_WRITE)?;
    cpu.intercept(exitcode::CR0_SEL_WRITE)?;
    let v = if op.aux != 0 { cpu.load::<u16>(op)? } else { cpu.reg::<u16>(op.src) } as u64;
    // PE can be set, not cleared.
    let v = (cpu.cr0 & !0xe) | (v & 0xf);
    cpu.write_cr0(v)?;
    Err(cpu.after_cr_write(op, 0, v))
}

/// SMSW.
pub(super) fn smsw(cpu: &mut Cpu, op: &Op) -> Res {
    if cpu.cpl != 0 && cpu.cr4 & cr4::UMIP != 0 {
        return Err(cpu.gp(0));
    }
    cpu.intercept(exitcode::CR0_READ)?;
    let v = cpu.cr0;
    if op.aux != 0 {
        return cpu.store::<u16>(op, v as u16);
    }
    super::segment::set_register(cpu, op, v);
    Ok(())
}

/// CLTS.
pub(super) fn clts(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.privileged()?;
    cpu.intercept(exitcode::CR0_WRITE)?;
    cpu.cr0 &= !cr0::TS;
    let v = cpu.cr0;
    Err(cpu.after_cr_write(op, 0, v))
}

/// The debug register that number `n` names: DR4 and DR5 are DR6 and DR7 unless CR4.DE. Checks privilege, the
/// intercept and general detection.
fn debug_register(cpu: &mut Cpu, op: &Op, gpr: u8, exit: u64) -> Result<u8, Stop> {
    let mut n = op.aux & 15;
    if n > 7 {
        return Err(cpu.ud());
    }
    if n == 4 || n == 5 {
        if cpu.cr4 & cr4::DE != 0 {
            return Err(cpu.ud());
        }
        n += 2;
    }
    cpu.privileged()?;
    if cpu.dr7 & dr7::GD != 0 {
        cpu.exception = Exception { vector: vector::DB, error: None, address: dr6::BD };
        return Err(Stop::Fault);
    }
    let code = exit + (op.aux & 15) as u64;
    if cpu.intercepted(code) {
        return Err(cpu.vmexit(code, (gpr >> 3) as u64, 0));
    }
    Ok(n)
}

/// MOV r, DRn.
pub(super) fn mov_from_dr(cpu: &mut Cpu, op: &Op) -> Res {
    let n = debug_register(cpu, op, op.dst, exitcode::DR0_READ)?;
    let v = match n {
        0..=3 => cpu.rb.dr[n as usize],
        6 => cpu.dr6,
        _ => cpu.dr7,
    };
    write_gpr(cpu, op, v);
    Ok(())
}

/// MOV DRn, r.
pub(super) fn mov_to_dr(cpu: &mut Cpu, op: &Op) -> Res {
    let n = debug_register(cpu, op, op.src, exitcode::DR0_WRITE)?;
    let v = read_gpr(cpu, op);
    if n >= 6 && v >> 32 != 0 {
        return Err(cpu.gp(0));
    }
    match n {
        0..=3 => cpu.rb.dr[n as usize] = v,
        6 => cpu.dr6 = v & (dr6::HITS | dr6::BD | dr6::BS | dr6::BT) | dr6::FIXED,
        _ => cpu.dr7 = v & dr7::BITS | dr7::FIXED,
    }
    cpu.update_attention();
    if cpu.dr7 & dr7::ENABLES != 0 {
        // Watched pages must miss the TLB's fast path.
        cpu.flush_paging();
    }
    Err(cpu.end_block(op))
}

/// INVLPG. The linear address goes without the segment's checks.
pub(super) fn invlpg(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.privileged()?;
    let linear = cpu.system_linear(cpu.ea(op).wrapping_add(cpu.ea_base[op.seg as usize & 7]));
    if cpu.intercepted(exitcode::INVLPG) {
        return Err(cpu.vmexit(exitcode::INVLPG, linear, 0));
    }
    cpu.engine.tlb.flush_page(linear);
    Err(cpu.end_block(op))
}

/// INVPCID (`op.dst` = register with the type).
pub(super) fn invpcid(cpu: &mut Cpu, op: &Op) -> Res {
    if !cpu.protected() {
        return Err(cpu.ud());
    }
    cpu.privileged()?;
    cpu.intercept(exitcode::INVPCID)?;
    let kind = if op.has(flag::CODE64) { cpu.reg::<u64>(op.dst) } else { cpu.reg::<u32>(op.dst) as u64 };
    let [pcid, linear] = cpu.load128(op, Align::Any)?;
    let without = cpu.cr4 & cr4::PCIDE == 0 && pcid & 0xfff != 0;
    let bad = kind > 3 || pcid >> 12 != 0 || (kind < 2 && without) || (kind == 0 && !cpu.canonical(linear));
    if bad {
        return Err(cpu.gp(0));
    }
    match kind {
        0 => {
            // The TLB forgets the page in every context.
            cpu.engine.tlb.flush_page(linear);
        }
        1 => cpu.flush_pcid(pcid as u16),
        _ => cpu.flush_paging(),
    }
    Err(cpu.end_block(op))
}

/// XGETBV: XCR0, and with ECX = 1 those of its components that are in use.
pub(super) fn xgetbv(cpu: &mut Cpu, _: &Op) -> Res {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    let v = match cpu.rb.gpr[reg::RCX] as u32 {
        0 => cpu.rb.xcr0,
        1 => cpu.rb.xcr0 & cpu.xinuse(),
        _ => return Err(cpu.gp(0)),
    };
    super::msr::set_edx_eax(cpu, v);
    Ok(())
}

/// XSETBV.
pub(super) fn xsetbv(cpu: &mut Cpu, op: &Op) -> Res {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    cpu.privileged()?;
    cpu.intercept(exitcode::XSETBV)?;
    let v = super::msr::edx_eax(cpu);
    if cpu.rb.gpr[reg::RCX] as u32 != 0 || !validate_xcr0(v) {
        return Err(cpu.gp(0));
    }
    cpu.rb.xcr0 = v;
    Err(cpu.end_block(op))
}

fn protection_keys(cpu: &mut Cpu) -> Res {
    if cpu.cr4 & cr4::PKE == 0 {
        return Err(cpu.ud());
    }
    if cpu.rb.gpr[reg::RCX] as u32 != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

/// RDPKRU.
pub(super) fn rdpkru(cpu: &mut Cpu, _: &Op) -> Res {
    protection_keys(cpu)?;
    let v = cpu.rb.pkru as u64;
    super::msr::set_edx_eax(cpu, v);
    Ok(())
}

/// WRPKRU.
pub(super) fn wrpkru(cpu: &mut Cpu, op: &Op) -> Res {
    protection_keys(cpu)?;
    if cpu.rb.gpr[reg::RDX] as u32 != 0 {
        return Err(cpu.gp(0));
    }
    let v = cpu.rb.gpr[reg::RAX] as u32;
    cpu.write_pkru(v);
    Err(cpu.end_block(op))
}
