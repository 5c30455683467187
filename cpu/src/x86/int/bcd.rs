// SPDX-License-Identifier: Apache-2.0
//! Decimal adjustments (APM vol. 3: AAA, AAS, AAM, AAD, DAA, DAS), not in 64-bit code.

use iced_x86::{Instruction, Mnemonic};

use crate::x86::flags::rf;
use crate::x86::op::{Handler, Op, Res, handler_registers};
use crate::x86::state::{Cpu, vector};

/// Writes the flags of a byte result with the given carries; OF, undefined, is cleared.
fn set(cpu: &mut Cpu, al: u8, cf: bool, af: bool) {
    cpu.lf.set_result(al, cf, false, af);
}

/// AAA and AAS: (AX, carry) from AX and AF.
pub fn ascii_adjust<const SUBTRACT: bool>(ax: u16, af: bool) -> (u16, bool) {
    let adjust = ax & 0xf > 9 || af;
    let ax = match (adjust, SUBTRACT) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    (ax & 0xff0f, adjust)
}

/// DAA and DAS: (AL, CF, AF) from AL, CF and AF.
pub fn decimal_adjust<const SUBTRACT: bool>(old: u8, cf: bool, af: bool) -> (u8, bool, bool) {
    let (mut al, mut carry) = (old, false);
    let low = old & 0xf > 9 || af;
    if low {
        let (v, out) = if SUBTRACT { al.overflowing_sub(6) } else { al.overflowing_add(6) };
        al = v;
        carry = cf || out;
    }
    if old > 0x99 || cf {
        al = if SUBTRACT { al.wrapping_sub(0x60) } else { al.wrapping_add(0x60) };
        carry = true;
    } else if !SUBTRACT {
        carry = false;
    }
    (al, carry, low)
}

fn aa<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> Res {
    let (ax, carry) = ascii_adjust::<SUBTRACT>(cpu.reg::<u16>(0), cpu.lf.af());
    cpu.set_reg(0, ax);
    set(cpu, ax as u8, carry, carry);
    Ok(())
}

fn da<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> Res {
    let (al, cf, af) = decimal_adjust::<SUBTRACT>(cpu.reg::<u8>(0), cpu.lf.cf(), cpu.lf.af());
    cpu.set_reg(0, al);
    set(cpu, al, cf, af);
    Ok(())
}

fn aam(cpu: &mut Cpu, op: &Op) -> Res {
    let base = op.imm as u8;
    if base == 0 {
        return Err(cpu.fault(vector::DE, None));
    }
    let al = cpu.reg::<u8>(0);
    cpu.set_reg(0, u16::from_le_bytes([al % base, al / base]));
    set(cpu, al % base, false, false);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Res {
    let [al, ah] = cpu.reg::<u16>(0).to_le_bytes();
    let v = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    cpu.set_reg(0, v as u16);
    set(cpu, v, false, false);
    Ok(())
}

/// SALC (undocumented, not in 64-bit code): AL = CF ? 0xFF : 0.
fn salc(cpu: &mut Cpu, _: &Op) -> Res {
    let v = if cpu.rflags() & rf::CF != 0 { 0xffu8 } else { 0 };
    cpu.set_reg(0, v);
    Ok(())
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Aaa => handler_registers(aa::<false>),
        Mnemonic::Aas => handler_registers(aa::<true>),
        Mnemonic::Daa => handler_registers(da::<false>),
        Mnemonic::Das => handler_registers(da::<true>),
        Mnemonic::Aam => {
            op.imm = i.immediate8() as u64;
            handler_registers(aam)
        }
        Mnemonic::Aad => {
            op.imm = i.immediate8() as u64;
            handler_registers(aad)
        }
        Mnemonic::Salc => handler_registers(salc),
        _ => return None,
    })
}
