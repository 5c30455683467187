// SPDX-License-Identifier: Apache-2.0
//! Two-operand and one-operand arithmetic and logic (APM vol. 3: ADD ... XOR, CMP, TEST, INC, DEC, NEG, NOT, XADD,
//! CMPXCHG, CMPXCHG8B/16B, ADCX, ADOX).

use iced_x86::{Instruction, Mnemonic};

use super::operand::{Ea, Place, memory, place, reg, size, sized, sized_word, two};
use crate::x86::access::Access;
use crate::x86::flags::{Int, LazyFlags};
use crate::x86::op::{Handler, Op, Res, Stop, flag, handler, handler_registers};
use crate::x86::state::{Cpu, reg as r};

/// An operation on two values that sets flags.
pub trait Binary: Copy + 'static {
    /// Whether the result is written back (CMP and TEST only set flags).
    const WRITES: bool = true;
    /// Sets the flags and returns the result.
    fn run<T: Int>(lf: &mut LazyFlags, a: T, b: T) -> T;
}

macro_rules! binary {
    ($($name:ident $writes:literal |$lf:ident, $a:ident, $b:ident| $body:expr;)*) => {$(
        #[doc = concat!("The operation of ", stringify!($name), ".")]
        #[derive(Clone, Copy)]
        pub struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn run<T: Int>($lf: &mut LazyFlags, $a: T, $b: T) -> T {
                $body
            }
        }
    )*};
}

binary! {
    Add true |lf, a, b| {
        let r = T::from_u64(a.to_u64().wrapping_add(b.to_u64()));
        lf.set_add(a, b, r);
        r
    };
    Adc true |lf, a, b| {
        let r = T::from_u64(a.to_u64().wrapping_add(b.to_u64()).wrapping_add(lf.cf() as u64));
        lf.set_add(a, b, r);
        r
    };
    Sub true |lf, a, b| {
        let r = T::from_u64(a.to_u64().wrapping_sub(b.to_u64()));
        lf.set_sub(a, b, r);
        r
    };
    Sbb true |lf, a, b| {
        let r = T::from_u64(a.to_u64().wrapping_sub(b.to_u64()).wrapping_sub(lf.cf() as u64));
        lf.set_sub(a, b, r);
        r
    };
    Cmp false |lf, a, b| {
        lf.set_sub(a, b, T::from_u64(a.to_u64().wrapping_sub(b.to_u64())));
        a
    };
    And true |lf, a, b| {
        let r = T::from_u64(a.to_u64() & b.to_u64());
        lf.set_logic(r);
        r
    };
    Or true |lf, a, b| {
        let r = T::from_u64(a.to_u64() | b.to_u64());
        lf.set_logic(r);
        r
    };
    Xor true |lf, a, b| {
        let r = T::from_u64(a.to_u64() ^ b.to_u64());
        lf.set_logic(r);
        r
    };
    Test false |lf, a, b| {
        lf.set_logic(T::from_u64(a.to_u64() & b.to_u64()));
        a
    };
}

pub(super) fn reg_reg<A: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    let v = A::run(&mut cpu.lf, a, b);
    if A::WRITES {
        cpu.set_reg(op.dst, v);
    }
    Ok(())
}

pub(super) fn reg_imm<A: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let a = cpu.reg::<T>(op.dst);
    let v = A::run(&mut cpu.lf, a, T::from_u64(op.imm));
    if A::WRITES {
        cpu.set_reg(op.dst, v);
    }
    Ok(())
}

#[inline]
pub(super) fn reg_mem<A: Binary, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let b = E::load::<T>(cpu, op)?;
    let a = cpu.reg::<T>(op.dst);
    let v = A::run(&mut cpu.lf, a, b);
    if A::WRITES {
        cpu.set_reg(op.dst, v);
    }
    Ok(())
}

#[inline(always)]
fn mem_value<A: Binary, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op, b: T) -> Res {
    if A::WRITES {
        E::modify::<T>(cpu, op, |cpu, a| A::run(&mut cpu.lf, a, b))
    } else {
        let a = E::load::<T>(cpu, op)?;
        A::run(&mut cpu.lf, a, b);
        Ok(())
    }
}

#[inline]
pub(super) fn mem_reg<A: Binary, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let b = cpu.reg::<T>(op.src);
    mem_value::<A, E, T>(cpu, op, b)
}

#[inline]
pub(super) fn mem_imm<A: Binary, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    mem_value::<A, E, T>(cpu, op, T::from_u64(op.imm))
}

#[inline(always)]
fn locked<A: Binary, T: Int>(cpu: &mut Cpu, op: &Op, b: T) -> Res {
    cpu.modify_locked::<T>(op, |cpu, a| A::run(&mut cpu.lf, a, b))
}

fn locked_reg<A: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let b = cpu.reg::<T>(op.src);
    locked::<A, T>(cpu, op, b)
}

fn locked_imm<A: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    locked::<A, T>(cpu, op, T::from_u64(op.imm))
}

/// XOR r, r and SUB r, r: zero, whatever was there.
fn zero<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.set_reg(op.dst, T::from_u64(0));
    cpu.lf.set_logic(T::from_u64(0));
    Ok(())
}

/// TEST r, r (also AND r, r and OR r, r, which change nothing but, for 32 bits, the upper half).
fn test_self<const WRITES: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let a = cpu.reg::<T>(op.dst);
    if WRITES && T::BITS == 32 {
        cpu.set_reg(op.dst, a);
    }
    cpu.lf.set_logic(a);
    Ok(())
}

fn binary<A: Binary>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let (d, s, n) = two(i, op)?;
    let lock = A::WRITES && op.has(flag::LOCK);
    Some(match (d, s) {
        (Place::Reg, Place::Reg) if op.dst == op.src => match i.mnemonic() {
            Mnemonic::Xor | Mnemonic::Sub => sized!(n, |T| handler_registers(zero::<T>)),
            Mnemonic::Test => sized!(n, |T| handler_registers(test_self::<false, T>)),
            Mnemonic::And | Mnemonic::Or => sized!(n, |T| handler_registers(test_self::<true, T>)),
            _ => sized!(n, |T| handler_registers(reg_reg::<A, T>)),
        },
        (Place::Reg, Place::Reg) => sized!(n, |T| handler_registers(reg_reg::<A, T>)),
        (Place::Reg, Place::Imm) => sized!(n, |T| handler_registers(reg_imm::<A, T>)),
        (Place::Reg, Place::Mem) => sized!(n, |T| memory!(op, |E| reg_mem::<A, E, T>)),
        (Place::Mem, Place::Reg) if lock => sized!(n, |T| handler(locked_reg::<A, T>)),
        (Place::Mem, Place::Imm) if lock => sized!(n, |T| handler(locked_imm::<A, T>)),
        (Place::Mem, Place::Reg) => sized!(n, |T| memory!(op, |E| mem_reg::<A, E, T>)),
        (Place::Mem, Place::Imm) => sized!(n, |T| memory!(op, |E| mem_imm::<A, E, T>)),
        _ => return None,
    })
}

/// An operation on one value.
pub trait Unary: Copy + 'static {
    /// Sets the flags, if the instruction does, and returns the result.
    fn run<T: Int>(lf: &mut LazyFlags, a: T) -> T;
}

macro_rules! unary {
    ($($name:ident |$lf:ident, $a:ident| $body:expr;)*) => {$(
        #[doc = concat!("The operation of ", stringify!($name), ".")]
        #[derive(Clone, Copy)]
        pub struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn run<T: Int>($lf: &mut LazyFlags, $a: T) -> T {
                $body
            }
        }
    )*};
}

unary! {
    Inc |lf, a| {
        let r = T::from_u64(a.to_u64().wrapping_add(1));
        lf.set_inc(a, r);
        r
    };
    Dec |lf, a| {
        let r = T::from_u64(a.to_u64().wrapping_sub(1));
        lf.set_dec(a, r);
        r
    };
    Neg |lf, a| {
        let r = T::from_u64(a.to_u64().wrapping_neg());
        lf.set_sub(T::from_u64(0), a, r);
        r
    };
    Not |_lf, a| T::from_u64(!a.to_u64());
}

pub(super) fn unary_reg<A: Unary, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let a = cpu.reg::<T>(op.dst);
    let v = A::run(&mut cpu.lf, a);
    cpu.set_reg(op.dst, v);
    Ok(())
}

#[inline]
fn unary_mem<A: Unary, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    E::modify::<T>(cpu, op, |cpu, a| A::run(&mut cpu.lf, a))
}

fn unary_locked<A: Unary, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.modify_locked::<T>(op, |cpu, a| A::run(&mut cpu.lf, a))
}

fn unary<A: Unary>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let n = size(i, 0);
    Some(match place(i, 0)? {
        Place::Reg => {
            op.dst = reg(i, 0);
            sized!(n, |T| handler_registers(unary_reg::<A, T>))
        }
        _ if op.has(flag::LOCK) => sized!(n, |T| handler(unary_locked::<A, T>)),
        _ => sized!(n, |T| memory!(op, |E| unary_mem::<A, E, T>)),
    })
}

// ---- XADD, CMPXCHG ---------------------------------------------------------------------------------------------

fn xadd_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    let sum = Add::run(&mut cpu.lf, a, b);
    cpu.set_reg(op.src, a);
    cpu.set_reg(op.dst, sum);
    Ok(())
}

#[inline]
fn xadd_mem<const LOCK: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let b = cpu.reg::<T>(op.src);
    let mut old = b;
    let f = |cpu: &mut Cpu, a: T| {
        old = a;
        Add::run(&mut cpu.lf, a, b)
    };
    if LOCK {
        cpu.modify_locked(op, f)?;
    } else {
        cpu.modify(op, f)?;
    }
    cpu.set_reg(op.src, old);
    Ok(())
}

fn xadd(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let (d, _, n) = two(i, op)?;
    Some(match d {
        Place::Reg => sized!(n, |T| handler_registers(xadd_reg::<T>)),
        _ if op.has(flag::LOCK) => sized!(n, |T| handler(xadd_mem::<true, T>)),
        _ => sized!(n, |T| handler(xadd_mem::<false, T>)),
    })
}

fn cmpxchg_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let (accumulator, old) = (cpu.reg::<T>(0), cpu.reg::<T>(op.dst));
    Cmp::run(&mut cpu.lf, accumulator, old);
    if accumulator == old {
        let new = cpu.reg::<T>(op.src);
        cpu.set_reg(op.dst, new);
    } else {
        cpu.set_reg(0, old);
    }
    Ok(())
}

#[inline]
fn cmpxchg_mem<const LOCK: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let (accumulator, new) = (cpu.reg::<T>(0), cpu.reg::<T>(op.src));
    let mut found = accumulator;
    let f = |_: &mut Cpu, old: T| {
        found = old;
        if old == accumulator { new } else { old }
    };
    if LOCK {
        cpu.modify_locked(op, f)?;
    } else {
        cpu.modify(op, f)?;
    }
    Cmp::run(&mut cpu.lf, accumulator, found);
    if found != accumulator {
        cpu.set_reg(0, found);
    }
    Ok(())
}

fn cmpxchg(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let (d, _, n) = two(i, op)?;
    Some(match d {
        Place::Reg => sized!(n, |T| handler_registers(cmpxchg_reg::<T>)),
        _ if op.has(flag::LOCK) => sized!(n, |T| handler(cmpxchg_mem::<true, T>)),
        _ => sized!(n, |T| handler(cmpxchg_mem::<false, T>)),
    })
}

fn pair(low: u64, high: u64) -> u64 {
    low as u32 as u64 | high << 32
}

fn cmpxchg8b<const LOCK: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    let g = &cpu.rb.gpr;
    let expected = pair(g[r::RAX], g[r::RDX]);
    let new = pair(g[r::RBX], g[r::RCX]);
    let mut found = expected;
    let f = |_: &mut Cpu, old: u64| {
        found = old;
        if old == expected { new } else { old }
    };
    if LOCK {
        cpu.modify_locked::<u64>(op, f)?;
    } else {
        cpu.modify::<u64>(op, f)?;
    }
    cpu.lf.set_zf(found == expected);
    if found != expected {
        cpu.rb.gpr[r::RAX] = found as u32 as u64;
        cpu.rb.gpr[r::RDX] = found >> 32;
    }
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Res {
    let linear = cpu.lin(op, 16, Access::Write)?;
    if linear & 15 != 0 {
        return Err(cpu.gp(0));
    }
    cpu.prepare_write(op.seg, linear, 16)?;
    let mmu = if cpu.mmu == 3 { 2 } else { cpu.mmu };
    let p = cpu.translate(mmu, op.seg, linear, 16, Access::Write)? as *mut u64;
    let g = &cpu.rb.gpr;
    let expected = [g[r::RAX], g[r::RDX]];
    let new = [g[r::RBX], g[r::RCX]];
    // SAFETY: translate gives the host address of 16 bytes (aligned, so in one page) of registered memory.
    let found = unsafe { cas128(cpu, p, expected, new) }?;
    cpu.engine.after_code_write(p as usize, 16);
    cpu.lf.set_zf(found == expected);
    if found != expected {
        cpu.rb.gpr[r::RAX] = found[0];
        cpu.rb.gpr[r::RDX] = found[1];
    }
    Ok(())
}

/// 16-byte compare and exchange: one host instruction where there is one, else while other processors stand. Returns
/// what was found.
///
/// # Safety
/// `p` must be aligned to 16 bytes, mapped and writable.
unsafe fn cas128(cpu: &mut Cpu, p: *mut u64, expected: [u64; 2], new: [u64; 2]) -> Result<[u64; 2], Stop> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("cmpxchg16b") {
        let (mut low, mut high) = (expected[0], expected[1]);
        // SAFETY: given; RBX, which the compiler keeps for itself, is put back.
        unsafe {
            core::arch::asm!(
                "xchg rsi, rbx",
                "lock cmpxchg16b [rdi]",
                "mov rbx, rsi",
                in("rdi") p,
                inout("rsi") new[0] => _,
                in("rcx") new[1],
                inout("rax") low,
                inout("rdx") high,
            );
        }
        return Ok([low, high]);
    }
    // SAFETY: given.
    unsafe {
        cpu.with_bus(|_| {
            let found = crate::mem::host_load128(p);
            if found == expected {
                crate::mem::host_store128(p, new);
            }
            found
        })
    }
}

// ---- ADCX, ADOX ------------------------------------------------------------------------------------------------

#[inline(always)]
fn add_carry<const OVERFLOW: bool, T: Int>(cpu: &mut Cpu, op: &Op, b: T) {
    let a = cpu.reg::<T>(op.dst);
    let carry = if OVERFLOW { cpu.lf.of() } else { cpu.lf.cf() };
    let wide = a.to_u64() as u128 + b.to_u64() as u128 + carry as u128;
    let out = wide >> T::BITS != 0;
    if OVERFLOW {
        cpu.lf.set_of(out);
    } else {
        cpu.lf.set_cf(out);
    }
    cpu.set_reg(op.dst, T::from_u64(wide as u64));
}

fn adx_reg<const OVERFLOW: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let b = cpu.reg::<T>(op.src);
    add_carry::<OVERFLOW, T>(cpu, op, b);
    Ok(())
}

#[inline]
fn adx_mem<const OVERFLOW: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let b = cpu.load::<T>(op)?;
    add_carry::<OVERFLOW, T>(cpu, op, b);
    Ok(())
}

fn adx<const OVERFLOW: bool>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let (_, s, n) = two(i, op)?;
    Some(match s {
        Place::Reg => sized_word!(n, |T| handler_registers(adx_reg::<OVERFLOW, T>)),
        _ => sized_word!(n, |T| handler(adx_mem::<OVERFLOW, T>)),
    })
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op) -> Option<Handler> {
    match i.mnemonic() {
        Mnemonic::Add => binary::<Add>(i, op),
        Mnemonic::Or => binary::<Or>(i, op),
        Mnemonic::Adc => binary::<Adc>(i, op),
        Mnemonic::Sbb => binary::<Sbb>(i, op),
        Mnemonic::And => binary::<And>(i, op),
        Mnemonic::Sub => binary::<Sub>(i, op),
        Mnemonic::Xor => binary::<Xor>(i, op),
        Mnemonic::Cmp => binary::<Cmp>(i, op),
        Mnemonic::Test => binary::<Test>(i, op),
        Mnemonic::Inc => unary::<Inc>(i, op),
        Mnemonic::Dec => unary::<Dec>(i, op),
        Mnemonic::Neg => unary::<Neg>(i, op),
        Mnemonic::Not => unary::<Not>(i, op),
        Mnemonic::Xadd => xadd(i, op),
        Mnemonic::Cmpxchg => cmpxchg(i, op),
        Mnemonic::Cmpxchg8b => {
            Some(if op.has(flag::LOCK) { handler(cmpxchg8b::<true>) } else { handler(cmpxchg8b::<false>) })
        }
        Mnemonic::Cmpxchg16b => Some(handler(cmpxchg16b)),
        Mnemonic::Adcx => adx::<false>(i, op),
        Mnemonic::Adox => adx::<true>(i, op),
        _ => None,
    }
}
