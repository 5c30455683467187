// SPDX-License-Identifier: Apache-2.0
//! Instructions on segment registers, descriptor-table registers and selectors (APM vol. 3).

use super::descriptor::{Descriptor, attrib, error_selector, is_null, kind, null_segment};
use super::exitcode;
use super::stack::merge_sp;
use crate::x86::access::Access;
use crate::x86::flags::rf;
use crate::x86::op::{Op, Res, Stop, flag};
use crate::x86::state::{Cpu, Segment, TableRegister, cr4, reg, sreg, vector};

/// The r/m16 source operand; `op.aux` is non-zero for memory.
fn source16(cpu: &mut Cpu, op: &Op) -> Result<u16, Stop> {
    if op.aux != 0 { cpu.load::<u16>(op) } else { Ok(cpu.reg::<u16>(op.src)) }
}

/// Stores a selector-like value: 16 bits to memory, operand-size bits to a register.
fn store_selector(cpu: &mut Cpu, op: &Op, v: u64) -> Res {
    if op.aux != 0 {
        return cpu.store::<u16>(op, v as u16);
    }
    set_register(cpu, op, v);
    Ok(())
}

/// Writes the destination register with the operand size.
pub(super) fn set_register(cpu: &mut Cpu, op: &Op, v: u64) {
    match op.osize() {
        2 => cpu.set_reg::<u16>(op.dst, v as u16),
        4 => cpu.set_reg::<u32>(op.dst, v as u32),
        _ => cpu.set_reg::<u64>(op.dst, v),
    }
}

impl Cpu {
    /// #GP(0) unless at CPL 0.
    pub(in super::super) fn privileged(&mut self) -> Res {
        if self.cpl == 0 { Ok(()) } else { Err(self.gp(0)) }
    }

    /// #UD in real and virtual-8086 mode.
    fn protected_only(&mut self) -> Res {
        if self.real_or_v86() { Err(self.ud()) } else { Ok(()) }
    }

    /// #GP(0) outside CPL 0 when CR4.UMIP hides the system's registers.
    fn umip(&mut self) -> Res {
        if self.cpl != 0 && self.cr4 & cr4::UMIP != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    /// Writes ZF, leaving the other flags.
    pub(super) fn set_zf(&mut self, zf: bool) {
        let bits = self.lf.bits() & !rf::ZF;
        self.lf.set_all(bits | if zf { rf::ZF } else { 0 });
    }
}

/// MOV Sreg, r/m16 (`op.dst` = segment register).
pub(super) fn mov_to_sreg(cpu: &mut Cpu, op: &Op) -> Res {
    let selector = source16(cpu, op)?;
    load(cpu, op, op.dst as usize, selector)
}

fn load(cpu: &mut Cpu, op: &Op, n: usize, selector: u16) -> Res {
    cpu.load_segment(n, selector)?;
    if n == sreg::SS { Err(shadow(cpu, op)) } else { Ok(()) }
}

/// Ends the block with the next instruction in the interrupt shadow.
fn shadow(cpu: &mut Cpu, op: &Op) -> Stop {
    cpu.shadow = true;
    // MOV SS and POP SS hold off the single-step trap too (APM vol. 2, 13.1.4), unlike STI.
    cpu.sys.no_step = true;
    cpu.update_attention();
    cpu.end_block(op)
}

/// MOV r/m, Sreg (`op.src` = segment register).
pub(super) fn mov_from_sreg(cpu: &mut Cpu, op: &Op) -> Res {
    let selector = cpu.seg[op.src as usize % 6].selector;
    store_selector(cpu, op, selector as u64)
}

/// PUSH Sreg.
pub(super) fn push_sreg(cpu: &mut Cpu, op: &Op) -> Res {
    let selector = cpu.seg[op.src as usize % 6].selector;
    match op.osize() {
        2 => cpu.push::<u16>(selector),
        4 => cpu.push::<u32>(selector as u32),
        _ => cpu.push::<u64>(selector as u64),
    }
}

/// POP Sreg.
pub(super) fn pop_sreg(cpu: &mut Cpu, op: &Op) -> Res {
    let selector = cpu.peek::<u16>(0)?;
    let size = cpu.stack_size();
    let n = op.dst as usize;
    cpu.load_segment(n, selector)?;
    // The pop counts with the stack size from before SS changed.
    let sp = cpu.rb.gpr[reg::RSP];
    let next = sp.wrapping_add(op.osize() as u64);
    cpu.rb.gpr[reg::RSP] = merge_sp(sp, next, size);
    if n == sreg::SS { Err(shadow(cpu, op)) } else { Ok(()) }
}

fn mask(osize: u32) -> u64 {
    match osize {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Loads a far pointer operand from memory: (selector, offset).
pub(super) fn memory_pointer(cpu: &mut Cpu, op: &Op) -> Result<(u16, u64), Stop> {
    let size = op.osize() as usize;
    let linear = cpu.lin(op, size + 2, Access::Read)?;
    let mut bytes = [0u8; 16];
    let bank = if cpu.mmu == 3 { 2 } else { cpu.mmu };
    cpu.read_bytes(bank, op.seg, linear, &mut bytes[..size + 2])?;
    let v = u128::from_le_bytes(bytes);
    let offset = v as u64 & mask(op.osize());
    Ok(((v >> (8 * size)) as u16, offset))
}

/// LES, LDS, LSS, LFS, LGS (`op.aux` = segment register).
pub(super) fn load_far_pointer(cpu: &mut Cpu, op: &Op) -> Res {
    let (selector, offset) = memory_pointer(cpu, op)?;
    cpu.load_segment(op.aux as usize, selector)?;
    set_register(cpu, op, offset);
    Ok(())
}

// ---- descriptor-table registers ------------------------------------------------------------------------------------

/// SGDT or SIDT: `IDT` chooses.
pub(super) fn store_table<const IDT: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.umip()?;
    cpu.intercept(if IDT { exitcode::IDTR_READ } else { exitcode::GDTR_READ })?;
    let table = if IDT { cpu.idtr } else { cpu.gdtr };
    let size = if op.has(flag::CODE64) { 10 } else { 6 };
    let linear = cpu.lin(op, size, Access::Write)?;
    let mut bytes = [0u8; 10];
    bytes[..2].copy_from_slice(&(table.limit as u16).to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let mmu = if cpu.mmu == 3 { 2 } else { cpu.mmu };
    cpu.write_bytes(mmu, op.seg, linear, &bytes[..size])
}

/// LGDT or LIDT.
pub(super) fn load_table<const IDT: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.privileged()?;
    cpu.intercept(if IDT { exitcode::IDTR_WRITE } else { exitcode::GDTR_WRITE })?;
    let size = if op.has(flag::CODE64) { 10 } else { 6 };
    let linear = cpu.lin(op, size, Access::Read)?;
    let mut bytes = [0u8; 16];
    let mmu = if cpu.mmu == 3 { 2 } else { cpu.mmu };
    cpu.read_bytes(mmu, op.seg, linear, &mut bytes[..size])?;
    let v = u128::from_le_bytes(bytes);
    let mut base = (v >> 16) as u64;
    if size == 6 && op.osize() == 2 {
        base &= 0xff_ffff;
    }
    if size == 10 && !cpu.canonical(base) {
        return Err(cpu.gp(0));
    }
    let table = TableRegister { base, limit: v as u16 as u32 };
    if IDT {
        cpu.idtr = table;
    } else {
        cpu.gdtr = table;
    }
    Ok(())
}

/// SLDT or STR: `TR` chooses.
pub(super) fn store_system_register<const TR: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.protected_only()?;
    cpu.umip()?;
    cpu.intercept(if TR { exitcode::TR_READ } else { exitcode::LDTR_READ })?;
    let selector = if TR { cpu.tr.selector } else { cpu.ldtr.selector };
    store_selector(cpu, op, selector as u64)
}

/// A system segment as its register holds it, with the 64-bit base of long mode.
fn system_segment(cpu: &mut Cpu, selector: u16, d: Descriptor) -> Result<Segment, Stop> {
    let mut segment = d.segment(selector);
    if cpu.long_mode() {
        segment.base |= cpu.descriptor_high(selector, 0)? << 32;
        if !cpu.canonical(segment.base) {
            return Err(cpu.gp(error_selector(selector)));
        }
    }
    Ok(segment)
}

/// LLDT.
pub(super) fn lldt(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.protected_only()?;
    cpu.privileged()?;
    cpu.intercept(exitcode::LDTR_WRITE)?;
    let selector = source16(cpu, op)?;
    cpu.ldtr =
        if is_null(selector) { null_segment(selector) } else { ldt_segment(cpu, selector, vector::GP)? };
    Ok(())
}

/// Fetches and checks an LDT's descriptor; a bad one raises `vector`.
pub(super) fn ldt_segment(cpu: &mut Cpu, selector: u16, fault: u8) -> Result<Segment, Stop> {
    let error = Some(error_selector(selector));
    if selector & 4 != 0 {
        return Err(cpu.fault(fault, error));
    }
    let d = cpu.descriptor(selector, fault, 0)?;
    if d.is_segment() || d.kind() != kind::LDT {
        return Err(cpu.fault(fault, error));
    }
    if !d.present() {
        return Err(cpu.fault(if fault == vector::GP { vector::NP } else { fault }, error));
    }
    system_segment(cpu, selector, d)
}

/// LTR.
pub(super) fn ltr(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.protected_only()?;
    cpu.privileged()?;
    cpu.intercept(exitcode::TR_WRITE)?;
    let selector = source16(cpu, op)?;
    if is_null(selector) {
        return Err(cpu.gp(0));
    }
    let error = error_selector(selector);
    if selector & 4 != 0 {
        return Err(cpu.gp(error));
    }
    let d = cpu.descriptor(selector, vector::GP, 0)?;
    let good = d.kind() == kind::TSS || (d.kind() == kind::TSS16 && !cpu.long_mode());
    if d.is_segment() || !good {
        return Err(cpu.gp(error));
    }
    if !d.present() {
        return Err(cpu.fault(vector::NP, Some(error)));
    }
    let mut segment = system_segment(cpu, selector, d)?;
    if let Some(address) = cpu.descriptor_address(selector, 8) {
        cpu.set_system_bits(address.wrapping_add(5), 2)?;
    }
    segment.attrib |= 2;
    cpu.tr = segment;
    Ok(())
}

// ---- looking at descriptors ----------------------------------------------------------------------------------------

/// Bit n: LAR and LSL know system descriptors of type n, in legacy and in long mode.
const LAR_TYPES: [u16; 2] = [0b0001_1010_0011_1110, 0b0001_1010_0000_0100];
const LSL_TYPES: [u16; 2] = [0b0000_1010_0000_1110, 0b0000_1010_0000_0100];

/// The descriptor that LAR, LSL, VERR and VERW may look at, if they may.
fn visible(cpu: &mut Cpu, selector: u16, types: [u16; 2]) -> Result<Option<Descriptor>, Stop> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(d) = cpu.try_descriptor(selector)? else { return Ok(None) };
    let known = d.is_segment() || types[cpu.long_mode() as usize] >> d.kind() & 1 != 0;
    let least = cpu.cpl.max(selector as u8 & 3);
    Ok((known && (d.is_conforming() || d.dpl() >= least)).then_some(d))
}

/// LAR.
pub(super) fn lar(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.protected_only()?;
    let selector = source16(cpu, op)?;
    let found = visible(cpu, selector, LAR_TYPES)?;
    if let Some(d) = found {
        set_register(cpu, op, d.0 >> 32 & 0x00ff_ff00);
    }
    cpu.set_zf(found.is_some());
    Ok(())
}

/// LSL.
pub(super) fn lsl(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.protected_only()?;
    let selector = source16(cpu, op)?;
    let found = visible(cpu, selector, LSL_TYPES)?;
    if let Some(d) = found {
        set_register(cpu, op, d.limit() as u64);
    }
    cpu.set_zf(found.is_some());
    Ok(())
}

/// VERR or VERW: `WRITE` chooses.
pub(super) fn verify<const WRITE: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.protected_only()?;
    let selector = source16(cpu, op)?;
    let found = visible(cpu, selector, [0, 0])?;
    cpu.set_zf(found.is_some_and(|d| if WRITE { d.is_writable_data() } else { d.is_readable() }));
    Ok(())
}

/// ARPL.
pub(super) fn arpl(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.protected_only()?;
    let rpl = cpu.reg::<u16>(op.src) & 3;
    let raise = |v: u16| if v & 3 < rpl { (v & !3) | rpl } else { v };
    let changed;
    if op.aux != 0 {
        // Written only if it changes, as processors do.
        let v = cpu.load::<u16>(op)?;
        changed = raise(v) != v;
        if changed {
            cpu.store(op, raise(v))?;
        }
    } else {
        let v = cpu.reg::<u16>(op.dst);
        changed = raise(v) != v;
        cpu.set_reg::<u16>(op.dst, raise(v));
    }
    cpu.set_zf(changed);
    Ok(())
}

// ---- bases ---------------------------------------------------------------------------------------------------------

fn fsgsbase(cpu: &mut Cpu, op: &Op) -> Res {
    if op.has(flag::CODE64) && cpu.cr4 & cr4::FSGSBASE != 0 { Ok(()) } else { Err(cpu.ud()) }
}

/// RDFSBASE, RDGSBASE (`op.aux` = segment register).
pub(super) fn read_base(cpu: &mut Cpu, op: &Op) -> Res {
    fsgsbase(cpu, op)?;
    let base = cpu.seg[op.aux as usize % 6].base;
    set_register(cpu, op, base);
    Ok(())
}

/// WRFSBASE, WRGSBASE.
pub(super) fn write_base(cpu: &mut Cpu, op: &Op) -> Res {
    fsgsbase(cpu, op)?;
    let base = cpu.reg::<u64>(op.src);
    let base = if op.osize() == 4 { base as u32 as u64 } else { base };
    if !cpu.canonical(base) {
        return Err(cpu.gp(0));
    }
    set_base(cpu, op.aux as usize, base);
    Ok(())
}

/// Replaces the base of FS or GS.
pub(super) fn set_base(cpu: &mut Cpu, n: usize, base: u64) {
    cpu.seg[n % 6].base = base;
    cpu.ea_base[n % 6] = base;
}

/// SWAPGS.
pub(super) fn swapgs(cpu: &mut Cpu, op: &Op) -> Res {
    if !op.has(flag::CODE64) {
        return Err(cpu.ud());
    }
    cpu.privileged()?;
    let base = core::mem::replace(&mut cpu.msr.kernel_gs_base, cpu.seg[sreg::GS].base);
    set_base(cpu, sreg::GS, base);
    Ok(())
}

/// Whether the segment must be nulled on a return to privilege level `cpl` (APM vol. 3, RET and IRET).
pub(super) fn unreachable_from(segment: &Segment, cpl: u8) -> bool {
    let conforming = segment.attrib & (attrib::CODE | attrib::DC) == attrib::CODE | attrib::DC;
    segment.present() && segment.attrib & attrib::S != 0 && !conforming && segment.dpl() < cpl
}
