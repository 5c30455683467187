// SPDX-License-Identifier: Apache-2.0
//! Operand forms: what the translators of this family share to pick a handler by size, address form and condition.

use iced_x86::{Instruction, OpKind, Register};

use crate::x86::access::Access;
use crate::x86::flags::Int;
use crate::x86::op::{Op, Res, SLOT_ZERO, Stop, flag};
use crate::x86::state::{Cpu, sreg};
use crate::x86::translate::gpr;

/// How the address of a memory operand is computed; chosen once, at translation.
pub trait Ea: Copy + 'static {
    /// Linear address of the operand of `size` bytes.
    fn lin(cpu: &mut Cpu, op: &Op, size: usize, access: Access) -> Result<u64, Stop>;
}

/// 64-bit code, flat segment: base + displacement.
#[derive(Clone, Copy)]
pub struct Base;
/// 64-bit code, flat segment: base + index * scale + displacement.
#[derive(Clone, Copy)]
pub struct Index;
/// Everything else: FS and GS, truncated addresses, segments with limits.
#[derive(Clone, Copy)]
pub struct Any;

impl Ea for Base {
    #[inline(always)]
    fn lin(cpu: &mut Cpu, op: &Op, _: usize, _: Access) -> Result<u64, Stop> {
        Ok(cpu.reg::<u64>(op.base).wrapping_add(op.disp as i64 as u64))
    }
}
impl Ea for Index {
    #[inline(always)]
    fn lin(cpu: &mut Cpu, op: &Op, _: usize, _: Access) -> Result<u64, Stop> {
        Ok(cpu.ea_raw(op))
    }
}
impl Ea for Any {
    #[inline(always)]
    fn lin(cpu: &mut Cpu, op: &Op, size: usize, access: Access) -> Result<u64, Stop> {
        cpu.lin(op, size, access)
    }
}

/// Loads the memory operand.
#[inline(always)]
pub fn load<E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Stop> {
    let linear = E::lin(cpu, op, T::BYTES, Access::Read)?;
    cpu.load_at(op.seg, linear)
}

/// Stores the memory operand.
#[inline(always)]
pub fn store<E: Ea, T: Int>(cpu: &mut Cpu, op: &Op, v: T) -> Res {
    let linear = E::lin(cpu, op, T::BYTES, Access::Write)?;
    cpu.store_at(op.seg, linear, v)
}

/// Reads, applies `f`, writes back; see [`Cpu::modify`].
#[inline(always)]
pub fn modify<E: Ea, T: Int>(cpu: &mut Cpu, op: &Op, f: impl FnOnce(&mut Cpu, T) -> T) -> Res {
    let linear = E::lin(cpu, op, T::BYTES, Access::Write)?;
    cpu.modify_at(op.seg, linear, f)
}

/// The three address forms, for translators.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum EaKind {
    /// [`Base`].
    Base,
    /// [`Index`].
    Index,
    /// [`Any`].
    Any,
}

/// The cheapest address form that is right for the op's memory operand.
pub fn ea_kind(op: &Op) -> EaKind {
    if op.has(flag::LEGACY_EA) || op.seg >= sreg::FS as u8 {
        EaKind::Any
    } else if op.index == SLOT_ZERO {
        EaKind::Base
    } else {
        EaKind::Index
    }
}

/// Where a source or destination is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// General register.
    Reg,
    /// Memory.
    Mem,
    /// Immediate.
    Imm,
}

/// Place of operand `n`; None for what this family doesn't handle (segment registers, far pointers ...).
pub fn place(i: &Instruction, n: u32) -> Option<Place> {
    match i.op_kind(n) {
        OpKind::Register if i.op_register(n).is_gpr() => Some(Place::Reg),
        OpKind::Memory => Some(Place::Mem),
        OpKind::Immediate8
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate32to64
        | OpKind::Immediate64 => Some(Place::Imm),
        _ => None,
    }
}

/// Size in bytes of operand `n`, a register or memory.
pub fn size(i: &Instruction, n: u32) -> usize {
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size(),
        _ => i.memory_size().size(),
    }
}

/// Register offset of operand `n`.
pub fn reg(i: &Instruction, n: u32) -> u8 {
    gpr(i.op_register(n))
}

/// Places of a two-operand instruction, with `dst`, `src` and `imm` of the op filled in, and the operand size.
pub fn two(i: &Instruction, op: &mut Op) -> Option<(Place, Place, usize)> {
    let (d, s) = (place(i, 0)?, place(i, 1)?);
    let n = size(i, 0);
    if d == Place::Reg {
        op.dst = reg(i, 0);
    }
    match s {
        Place::Reg => op.src = reg(i, 1),
        Place::Imm => op.imm = i.immediate(1),
        Place::Mem => {}
    }
    Some((d, s, n))
}

/// Whether `r` is a general register of any size.
pub fn is_general(r: Register) -> bool {
    r.is_gpr()
}

/// `sized!(bytes, |T| expression)`: the expression with `T` = u8, u16, u32 or u64.
macro_rules! sized {
    ($n:expr, |$t:ident| $e:expr) => {
        match $n {
            1 => {
                type $t = u8;
                $e
            }
            2 => {
                type $t = u16;
                $e
            }
            4 => {
                type $t = u32;
                $e
            }
            _ => {
                type $t = u64;
                $e
            }
        }
    };
}

/// As `sized!`, without the byte.
macro_rules! sized_word {
    ($n:expr, |$t:ident| $e:expr) => {
        match $n {
            2 => {
                type $t = u16;
                $e
            }
            4 => {
                type $t = u32;
                $e
            }
            _ => {
                type $t = u64;
                $e
            }
        }
    };
}

/// `addressed!(op, |E| expression)`: the expression with `E` = the op's address form.
macro_rules! addressed {
    ($op:expr, |$e:ident| $x:expr) => {
        match $crate::x86::int::operand::ea_kind($op) {
            $crate::x86::int::operand::EaKind::Base => {
                type $e = $crate::x86::int::operand::Base;
                $x
            }
            $crate::x86::int::operand::EaKind::Index => {
                type $e = $crate::x86::int::operand::Index;
                $x
            }
            $crate::x86::int::operand::EaKind::Any => {
                type $e = $crate::x86::int::operand::Any;
                $x
            }
        }
    };
}

/// `conditional!(cc, |CC| expression)`: the expression with the constant `CC` = 0..15.
macro_rules! conditional {
    ($cc:expr, |$c:ident| $x:expr) => {
        conditional!(@ $cc, $c, $x, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $cc:expr, $c:ident, $x:expr, $($n:literal)*) => {
        match $cc {
            $($n => { const $c: u8 = $n; $x })*
            _ => return None,
        }
    };
}

pub(super) use {addressed, conditional, sized, sized_word};
