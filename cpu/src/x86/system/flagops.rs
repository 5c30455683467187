// SPDX-License-Identifier: Apache-2.0
//! Instructions on RFLAGS whose effect depends on privilege: CLI, STI, PUSHF, POPF, CLAC, STAC
//! (APM vol. 2, 8.11 for the virtual interrupt flag; vol. 3).

use super::exitcode;
use super::far::writable_flags;
use crate::x86::flags::rf;
use crate::x86::op::{Op, Res};
use crate::x86::state::{Cpu, cr4, reg};

/// Which flag CLI and STI work on.
enum InterruptFlag {
    Real,
    Virtual,
}

fn interrupt_flag(cpu: &mut Cpu) -> Result<InterruptFlag, crate::x86::op::Stop> {
    let iopl = (cpu.rflags >> 12 & 3) as u8;
    if !cpu.protected() || cpu.cpl <= iopl {
        return Ok(InterruptFlag::Real);
    }
    let extension = if cpu.v86() { cr4::VME } else { cr4::PVI };
    if cpu.cpl == 3 && cpu.cr4 & extension != 0 { Ok(InterruptFlag::Virtual) } else { Err(cpu.gp(0)) }
}

/// CLI.
pub(super) fn cli(cpu: &mut Cpu, _: &Op) -> Res {
    match interrupt_flag(cpu)? {
        InterruptFlag::Real => cpu.rflags &= !rf::IF,
        InterruptFlag::Virtual => cpu.rflags &= !rf::VIF,
    }
    cpu.update_attention();
    Ok(())
}

/// STI: interrupts are held off for one more instruction.
pub(super) fn sti(cpu: &mut Cpu, op: &Op) -> Res {
    match interrupt_flag(cpu)? {
        InterruptFlag::Real => {
            if cpu.rflags & rf::IF != 0 {
                return Ok(());
            }
            cpu.rflags |= rf::IF;
            cpu.shadow = true;
            cpu.update_attention();
            Err(cpu.end_block(op))
        }
        InterruptFlag::Virtual => {
            if cpu.rflags & rf::VIP != 0 {
                return Err(cpu.gp(0));
            }
            cpu.rflags |= rf::VIF;
            Ok(())
        }
    }
}

/// PUSHF.
pub(super) fn pushf(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.intercept(exitcode::PUSHF)?;
    let mut image = cpu.rflags() & !(rf::RF | rf::VM);
    if cpu.v86() && cpu.rflags & rf::IOPL != rf::IOPL {
        if cpu.cr4 & cr4::VME == 0 || op.osize() != 2 {
            return Err(cpu.gp(0));
        }
        let vif = image & rf::VIF != 0;
        image = (image & !rf::IF) | rf::IOPL | if vif { rf::IF } else { 0 };
    }
    match op.osize() {
        2 => cpu.push::<u16>(image as u16),
        4 => cpu.push::<u32>(image as u32),
        _ => cpu.push::<u64>(image),
    }
}

/// POPF.
pub(super) fn popf(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.intercept(exitcode::POPF)?;
    let mut image = cpu.peek_item(0, op.osize())?;
    let mut mask = writable_flags(cpu, op.osize());
    if cpu.v86() {
        mask &= !rf::IF;
        if cpu.rflags & rf::IOPL == rf::IOPL {
            mask |= rf::IF;
        } else {
            let pending = image & rf::IF != 0 && cpu.rflags & rf::VIP != 0;
            if cpu.cr4 & cr4::VME == 0 || op.osize() != 2 || pending || image & rf::TF != 0 {
                return Err(cpu.gp(0));
            }
            image = (image & !rf::VIF) | if image & rf::IF != 0 { rf::VIF } else { 0 };
            mask |= rf::VIF;
        }
    }
    image &= !rf::RF;
    let sp = cpu.rb.gpr[reg::RSP].wrapping_add(op.osize() as u64);
    cpu.set_sp(sp);
    let old = cpu.rflags();
    let new = (old & !mask & !rf::RF) | (image & mask);
    cpu.set_rflags(new);
    // Only what the run loop looks at between blocks needs the block to end.
    if new & !old & (rf::IF | rf::TF) != 0 { Err(cpu.end_block(op)) } else { Ok(()) }
}

/// CLAC or STAC.
pub(super) fn set_ac<const SET: bool>(cpu: &mut Cpu, _: &Op) -> Res {
    if cpu.cpl != 0 || !cpu.protected() {
        return Err(cpu.ud());
    }
    if SET {
        cpu.rflags |= rf::AC;
    } else {
        cpu.rflags &= !rf::AC;
    }
    cpu.update_mmu();
    Ok(())
}
