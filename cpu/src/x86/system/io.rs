// SPDX-License-Identifier: Apache-2.0
//! Port I/O: IN, OUT, INS, OUTS (APM vol. 2, 12.2.4 and 12.2.5 for protection, 15.10 for the intercept).
//!
//! The processor has no physical ports: what is not intercepted reads all ones, and writes go nowhere.

use super::descriptor::kind;
use super::exitcode;
use crate::x86::access::Access;
use crate::x86::flags::rf;
use crate::x86::op::{Op, Res, SLOT_ZERO, Stop, flag};
use crate::x86::state::{Cpu, reg, sreg};

/// EXITINFO1 of VMEXIT_IOIO.
mod info {
    pub const IN: u64 = 1 << 0;
    pub const STRING: u64 = 1 << 2;
    pub const REP: u64 = 1 << 3;
    pub const SIZE_SHIFT: u32 = 4;
    pub const ADDRESS_SHIFT: u32 = 7;
    pub const SEGMENT_SHIFT: u32 = 10;
    pub const PORT_SHIFT: u32 = 16;
}

/// The port operand: an immediate, or DX.
fn port(cpu: &Cpu, op: &Op) -> u16 {
    if op.src == SLOT_ZERO { op.imm as u16 } else { cpu.rb.gpr[reg::RDX] as u16 }
}

/// #GP(0) unless IOPL or the TSS's permission map allows `size` bytes at `port`.
fn check_permission(cpu: &mut Cpu, port: u16, size: u32) -> Res {
    let iopl = (cpu.rflags >> 12 & 3) as u8;
    if !cpu.protected() || (cpu.cpl <= iopl && cpu.rflags & rf::VM == 0) {
        return Ok(());
    }
    let wide = cpu.tr.present() && cpu.tr.kind() | 2 == kind::TSS_BUSY;
    let limit = cpu.tr.limit as u64;
    if !wide || limit < 0x67 {
        return Err(cpu.gp(0));
    }
    let base = cpu.tr.base;
    let map = cpu.load_system::<u16>(cpu.system_linear(base.wrapping_add(0x66)))? as u64;
    let at = map + port as u64 / 8;
    if at + 1 > limit {
        return Err(cpu.gp(0));
    }
    let bits = cpu.load_system::<u16>(cpu.system_linear(base.wrapping_add(at)))?;
    let mask = (1u16 << size) - 1;
    if bits >> (port & 7) & mask != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

/// #VMEXIT IOIO when the I/O permission map of the VMCB marks any of the ports.
fn check_intercept(cpu: &mut Cpu, op: &Op, port: u16, size: u32, more: u64) -> Res {
    if !cpu.intercepted(exitcode::IOIO) {
        return Ok(());
    }
    let at = (cpu.ctl.iopm & !0xfff) + port as u64 / 8;
    let mask = (1u16 << size) - 1;
    if cpu.map_value::<u16>(at).is_some_and(|bits| bits >> (port & 7) & mask == 0) {
        return Ok(());
    }
    let address = op.asize as u64 / 2;
    let info1 = more
        | (size as u64) << info::SIZE_SHIFT
        | address << info::ADDRESS_SHIFT
        | (port as u64) << info::PORT_SHIFT;
    let next = cpu.mask_ip(cpu.next_ip(op));
    Err(cpu.vmexit(exitcode::IOIO, info1, next))
}

/// IN (`op.aux` = bytes).
pub(super) fn input(cpu: &mut Cpu, op: &Op) -> Res {
    let port = port(cpu, op);
    let size = op.aux as u32;
    check_permission(cpu, port, size)?;
    check_intercept(cpu, op, port, size, info::IN)?;
    cpu.note_port_access(port, size);
    match size {
        1 => cpu.set_reg::<u8>(0, u8::MAX),
        2 => cpu.set_reg::<u16>(0, u16::MAX),
        _ => cpu.set_reg::<u32>(0, u32::MAX),
    }
    Ok(())
}

/// OUT.
pub(super) fn output(cpu: &mut Cpu, op: &Op) -> Res {
    let port = port(cpu, op);
    check_permission(cpu, port, op.aux as u32)?;
    check_intercept(cpu, op, port, op.aux as u32, 0)?;
    cpu.note_port_access(port, op.aux as u32);
    Ok(())
}

/// A register truncated to the address size.
fn masked(v: u64, asize: u8) -> u64 {
    match asize {
        8 => v,
        4 => v as u32 as u64,
        _ => v as u16 as u64,
    }
}

/// Adds to an address-size register.
fn advance(cpu: &mut Cpu, n: usize, by: u64, asize: u8) {
    let old = cpu.rb.gpr[n];
    cpu.rb.gpr[n] = super::stack::merge_sp(old, old.wrapping_add(by), asize);
}

/// INS or OUTS, one iteration at a time.
pub(super) fn string<const IN: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    let size = op.aux as u32;
    let port = cpu.rb.gpr[reg::RDX] as u16;
    let repeated = op.has(flag::REP | flag::REPNE);
    let count = masked(cpu.rb.gpr[reg::RCX], op.asize);
    if repeated && count == 0 {
        return Ok(());
    }
    check_permission(cpu, port, size)?;
    let seg = if IN { sreg::ES as u8 } else { op.seg };
    let mut more = info::STRING | (seg as u64) << info::SEGMENT_SHIFT;
    if IN {
        more |= info::IN;
    }
    if repeated {
        more |= info::REP;
    }
    check_intercept(cpu, op, port, size, more)?;
    let pointer = if IN { reg::RDI } else { reg::RSI };
    let offset = masked(cpu.rb.gpr[pointer], op.asize);
    let linear = cpu.seg_lin(seg, offset, size as usize, if IN { Access::Write } else { Access::Read })?;
    match (IN, size) {
        (true, 1) => cpu.store_at(seg, linear, u8::MAX)?,
        (true, 2) => cpu.store_at(seg, linear, u16::MAX)?,
        (true, _) => cpu.store_at(seg, linear, u32::MAX)?,
        (false, 1) => drop(cpu.load_at::<u8>(seg, linear)?),
        (false, 2) => drop(cpu.load_at::<u16>(seg, linear)?),
        (false, _) => drop(cpu.load_at::<u32>(seg, linear)?),
    }
    cpu.note_port_access(port, size);
    let step = if cpu.rflags & rf::DF != 0 { (size as u64).wrapping_neg() } else { size as u64 };
    advance(cpu, pointer, step, op.asize);
    if repeated {
        advance(cpu, reg::RCX, u64::MAX, op.asize);
        if count > 1 {
            return Err(Stop::Restart);
        }
    }
    Ok(())
}
