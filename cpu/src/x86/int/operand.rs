// SPDX-License-Identifier: Apache-2.0
//! Operand forms: what the translators of this family share to pick a handler by size, address form and condition.

use iced_x86::{Instruction, OpKind, Register};

use crate::mem::lost::{load_for, store_for};
use crate::x86::access::Access;
use crate::x86::flags::Int;
use crate::x86::op::{Op, Res, SLOT_ZERO, Stop, flag};
use crate::x86::state::{Cpu, sreg};
use crate::x86::translate::gpr;

/// How a memory operand is accessed; chosen once, at translation.
///
/// [`Any`] does everything. The others are the fast halves of a [`handler_pair`]: they return [`Stop::Slow`] before
/// anything is changed when the page isn't in the TLB.
///
/// [`handler_pair`]: crate::x86::op::handler_pair
pub trait Ea: Copy + 'static {
    /// Loads the memory operand.
    fn load<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Stop>;
    /// Stores the memory operand.
    fn store<T: Int>(cpu: &mut Cpu, op: &Op, v: T) -> Res;
    /// Reads, applies `f`, writes back; see [`Cpu::modify`].
    fn modify<T: Int>(cpu: &mut Cpu, op: &Op, f: impl FnOnce(&mut Cpu, T) -> T) -> Res;
}

/// Everything: any mode, any segment, page crossings, misses, faults.
#[derive(Clone, Copy)]
pub struct Any;

impl Ea for Any {
    #[inline(always)]
    fn load<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Stop> {
        cpu.load(op)
    }
    #[inline(always)]
    fn store<T: Int>(cpu: &mut Cpu, op: &Op, v: T) -> Res {
        cpu.store(op, v)
    }
    #[inline(always)]
    fn modify<T: Int>(cpu: &mut Cpu, op: &Op, f: impl FnOnce(&mut Cpu, T) -> T) -> Res {
        cpu.modify(op, f)
    }
}

#[inline(always)]
fn modify_fast<T: Int>(cpu: &mut Cpu, op: &Op, linear: u64, f: impl FnOnce(&mut Cpu, T) -> T) -> Res {
    let Some(addend) = cpu.engine.addend(linear, T::BYTES, Access::Write) else { return Err(Stop::Slow) };
    // SAFETY: memory that the TLB maps is registered, writable, and its loss is expected.
    unsafe {
        let old = load_for(op, addend, linear);
        let (new, flags) = cpu.before_store(|cpu| f(cpu, old));
        store_for(op, addend, linear, new);
        cpu.lf = flags;
    }
    Ok(())
}

macro_rules! fast {
    ($($(#[$doc:meta])* $name:ident |$cpu:ident, $op:ident| $linear:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $name;
        impl Ea for $name {
            #[inline(always)]
            fn load<T: Int>($cpu: &mut Cpu, $op: &Op) -> Result<T, Stop> {
                $cpu.engine.load($op, $linear).ok_or(Stop::Slow)
            }
            #[inline(always)]
            fn store<T: Int>($cpu: &mut Cpu, $op: &Op, v: T) -> Res {
                let linear = $linear;
                $cpu.engine.store($op, linear, v).ok_or(Stop::Slow)
            }
            #[inline(always)]
            fn modify<T: Int>($cpu: &mut Cpu, $op: &Op, f: impl FnOnce(&mut Cpu, T) -> T) -> Res {
                let linear = $linear;
                modify_fast($cpu, $op, linear, f)
            }
        }
    )*};
}

fast! {
    /// 64-bit code, flat segment: base + displacement.
    Base |cpu, op| cpu.reg::<u64>(op.base).wrapping_add(op.disp as i64 as u64);
    /// 64-bit code, flat segment: base + index * scale + displacement.
    Index |cpu, op| cpu.ea_raw(op);
    /// 64-bit code, FS or GS.
    Based |cpu, op| cpu.ea_raw(op).wrapping_add(cpu.ea_base[(op.seg & 7) as usize]);
}

/// The address forms, for translators.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum EaKind {
    /// [`Base`].
    Base,
    /// [`Index`].
    Index,
    /// [`Based`].
    Based,
    /// [`Any`] only.
    Any,
}

/// The cheapest address form that is right for the op's memory operand.
pub fn ea_kind(op: &Op) -> EaKind {
    if op.has(flag::LEGACY_EA) {
        EaKind::Any
    } else if op.seg >= sreg::FS as u8 {
        EaKind::Based
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

/// `memory!(op, |E| function::<E>)`: the handler for the op's address form, with a fast half where there is one.
macro_rules! memory {
    // The second function is the complete half, where it isn't the same with E = Any.
    ($op:expr, |$e:ident| $f:block or $c:block) => {
        match $crate::x86::int::operand::ea_kind($op) {
            $crate::x86::int::operand::EaKind::Base => memory!(@pair Base, $e, $f, $c),
            $crate::x86::int::operand::EaKind::Index => memory!(@pair Index, $e, $f, $c),
            $crate::x86::int::operand::EaKind::Based => memory!(@pair Based, $e, $f, $c),
            $crate::x86::int::operand::EaKind::Any => {
                type $e = $crate::x86::int::operand::Any;
                $crate::x86::op::handler($c)
            }
        }
    };
    ($op:expr, |$e:ident| $f:expr) => {
        memory!($op, |$e| { $f } or { $f })
    };
    (@pair $kind:ident, $e:ident, $f:block, $c:block) => {
        $crate::x86::op::handler_pair(
            {
                type $e = $crate::x86::int::operand::$kind;
                $f
            },
            {
                type $e = $crate::x86::int::operand::Any;
                $c
            },
        )
    };
}

/// As `memory!`, with one fast half for all of 64-bit code: for less frequent instructions.
macro_rules! memory_small {
    ($op:expr, |$e:ident| $f:expr) => {
        if $crate::x86::int::operand::ea_kind($op) == $crate::x86::int::operand::EaKind::Any {
            type $e = $crate::x86::int::operand::Any;
            $crate::x86::op::handler($f)
        } else {
            memory!(@pair Based, $e, { $f }, { $f })
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

pub(super) use {conditional, memory, memory_small, sized, sized_word};
