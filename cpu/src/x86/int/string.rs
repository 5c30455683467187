// SPDX-License-Identifier: Apache-2.0
//! String instructions (APM vol. 3: MOVS, STOS, LODS, CMPS, SCAS) and their REP forms.
//!
//! A REP form updates the registers after each completed iteration, the flags of a comparison too, so a fault finds them
//! precise and the instruction restarts where it was. MOVS and STOS work on runs of elements within a page; after a bounded amount of work
//! the instruction looks for events, and stops with [`Stop::Restart`] if there are any.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{sized, sized_word};
use crate::mem::{host_fill, host_load, host_move, host_store};
use crate::x86::access::Access;
use crate::x86::flags::{Int, LazyFlags, rf};
use crate::x86::op::{Handler, Op, Res, Stop, flag, handler};
use crate::x86::state::{Cpu, attention, reg as r, sreg};
use crate::x86::translate::segment;

/// Iterations of a REP form before it looks for events.
const MAX_ITERATIONS: u64 = 4096;
/// Bytes moved by bulk copies before that.
const MAX_BYTES: u64 = 64 << 10;

const RCX: u8 = r::RCX as u8 * 8;
const RSI: u8 = r::RSI as u8 * 8;
const RDI: u8 = r::RDI as u8 * 8;
const ES: u8 = sreg::ES as u8;

/// What a string instruction does with one element.
trait Element: Copy + 'static {
    /// Reads seg:[rSI].
    const SOURCE: bool;
    /// Uses ES:[rDI].
    const DESTINATION: bool;
    /// Compares: ends a REPE/REPNE by ZF.
    const COMPARES: bool = false;
    /// Does one element; the flags of a comparison go to `lf`.
    fn run<A: Int, T: Int>(cpu: &mut Cpu, op: &Op, lf: &mut LazyFlags) -> Res;
    /// Does up to `count` elements at once where possible, upwards or downwards; returns how many (0: do one by one).
    #[inline(always)]
    fn bulk<A: Int, T: Int>(_: &mut Cpu, _: &Op, _: u64, _upwards: bool) -> u64 {
        0
    }
}

/// Linear address of the element at `offset` in `seg`. `A` = the address size.
#[inline(always)]
fn element_lin<A: Int>(
    cpu: &mut Cpu,
    op: &Op,
    seg: u8,
    offset: A,
    size: usize,
    access: Access,
) -> Result<u64, Stop> {
    if op.has(flag::CODE64) {
        Ok(offset.to_u64().wrapping_add(cpu.ea_base[(seg & 7) as usize]))
    } else {
        cpu.seg_lin(seg, offset.to_u64(), size, access)
    }
}

#[inline(always)]
fn load_source<A: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Stop> {
    let offset = cpu.reg::<A>(RSI);
    let linear = element_lin(cpu, op, op.seg, offset, T::BYTES, Access::Read)?;
    cpu.load_at(op.seg, linear)
}

#[inline(always)]
fn load_destination<A: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Stop> {
    let offset = cpu.reg::<A>(RDI);
    let linear = element_lin(cpu, op, ES, offset, T::BYTES, Access::Read)?;
    cpu.load_at(ES, linear)
}

#[inline(always)]
fn store_destination<A: Int, T: Int>(cpu: &mut Cpu, op: &Op, v: T) -> Res {
    let offset = cpu.reg::<A>(RDI);
    let linear = element_lin(cpu, op, ES, offset, T::BYTES, Access::Write)?;
    cpu.store_at(ES, linear, v)
}

/// Host memory of the elements from `offset` on: pointer to the first and how many whole ones, at most `count`, lie in
/// its page upwards or downwards.
#[inline(always)]
fn run_of<A: Int, T: Int>(
    cpu: &mut Cpu,
    op: &Op,
    seg: u8,
    offset: A,
    count: u64,
    access: Access,
    upwards: bool,
) -> Option<(*mut u8, u64)> {
    let size = T::BYTES as u64;
    let linear = if op.has(flag::CODE64) {
        offset.to_u64().wrapping_add(cpu.ea_base[(seg & 7) as usize])
    } else {
        // The first element alone, then the whole run below: what the limit cuts off goes one by one.
        let before = cpu.exception;
        let linear = cpu.seg_lin(seg, offset.to_u64(), T::BYTES, access);
        cpu.exception = before;
        linear.ok()?
    };
    let (p, bytes) = cpu.span(linear, access)?;
    let bytes = bytes as u64;
    // Up to where the offset wraps around.
    let n = if upwards {
        let to_wrap = A::from_u64(offset.to_u64().wrapping_neg()).to_u64();
        let bytes = if to_wrap != 0 { bytes.min(to_wrap) } else { bytes };
        (bytes / size).min(count)
    } else if bytes >= size {
        (((4096 - bytes).min(offset.to_u64())) / size + 1).min(count)
    } else {
        0
    };
    if n == 0 {
        return None;
    }
    if !op.has(flag::CODE64) {
        let lowest = if upwards { offset.to_u64() } else { offset.to_u64() - (n - 1) * size };
        let before = cpu.exception;
        let fits = cpu.seg_lin(seg, lowest, (n * size) as usize, access);
        cpu.exception = before;
        fits.ok()?;
    }
    Some((p, n))
}

#[inline(always)]
fn advance<A: Int>(cpu: &mut Cpu, register: u8, bytes: u64) {
    let v = cpu.reg::<A>(register);
    cpu.set_reg(register, A::from_u64(v.to_u64().wrapping_add(bytes)));
}

#[derive(Clone, Copy)]
struct Movs;
#[derive(Clone, Copy)]
struct Stos;
#[derive(Clone, Copy)]
struct Lods;
#[derive(Clone, Copy)]
struct Cmps;
#[derive(Clone, Copy)]
struct Scas;

impl Element for Movs {
    const SOURCE: bool = true;
    const DESTINATION: bool = true;
    #[inline(always)]
    fn run<A: Int, T: Int>(cpu: &mut Cpu, op: &Op, _: &mut LazyFlags) -> Res {
        let v = load_source::<A, T>(cpu, op)?;
        store_destination::<A, T>(cpu, op, v)
    }
    #[inline(always)]
    fn bulk<A: Int, T: Int>(cpu: &mut Cpu, op: &Op, count: u64, upwards: bool) -> u64 {
        let (si, di) = (cpu.reg::<A>(RSI), cpu.reg::<A>(RDI));
        let Some((from, n)) = run_of::<A, T>(cpu, op, op.seg, si, count, Access::Read, upwards) else {
            return 0;
        };
        let Some((to, n)) = run_of::<A, T>(cpu, op, ES, di, n, Access::Write, upwards) else { return 0 };
        // SAFETY: both runs are n elements of registered memory.
        unsafe {
            if upwards {
                copy_upwards::<T>(from, to, n as usize);
            } else {
                copy_downwards::<T>(from, to, n as usize);
            }
        }
        n
    }
}

impl Element for Stos {
    const SOURCE: bool = false;
    const DESTINATION: bool = true;
    #[inline(always)]
    fn run<A: Int, T: Int>(cpu: &mut Cpu, op: &Op, _: &mut LazyFlags) -> Res {
        let v = cpu.reg::<T>(0);
        store_destination::<A, T>(cpu, op, v)
    }
    #[inline(always)]
    fn bulk<A: Int, T: Int>(cpu: &mut Cpu, op: &Op, count: u64, upwards: bool) -> u64 {
        let di = cpu.reg::<A>(RDI);
        let Some((to, n)) = run_of::<A, T>(cpu, op, ES, di, count, Access::Write, upwards) else { return 0 };
        let v = cpu.reg::<T>(0);
        let lowest = if upwards { to } else { to.wrapping_sub((n as usize - 1) * T::BYTES) };
        // SAFETY: the run is n elements of registered memory.
        unsafe { fill::<T>(lowest, v, n as usize) };
        n
    }
}

impl Element for Lods {
    const SOURCE: bool = true;
    const DESTINATION: bool = false;
    #[inline(always)]
    fn run<A: Int, T: Int>(cpu: &mut Cpu, op: &Op, _: &mut LazyFlags) -> Res {
        let v = load_source::<A, T>(cpu, op)?;
        cpu.set_reg(0, v);
        Ok(())
    }
}

impl Element for Cmps {
    const SOURCE: bool = true;
    const DESTINATION: bool = true;
    const COMPARES: bool = true;
    #[inline(always)]
    fn run<A: Int, T: Int>(cpu: &mut Cpu, op: &Op, lf: &mut LazyFlags) -> Res {
        // The first operand is the one to fault when both would.
        let a = load_source::<A, T>(cpu, op)?;
        let b = load_destination::<A, T>(cpu, op)?;
        lf.set_sub(a, b, T::from_u64(a.to_u64().wrapping_sub(b.to_u64())));
        Ok(())
    }
}

impl Element for Scas {
    const SOURCE: bool = false;
    const DESTINATION: bool = true;
    const COMPARES: bool = true;
    #[inline(always)]
    fn run<A: Int, T: Int>(cpu: &mut Cpu, op: &Op, lf: &mut LazyFlags) -> Res {
        let a = cpu.reg::<T>(0);
        let b = load_destination::<A, T>(cpu, op)?;
        lf.set_sub(a, b, T::from_u64(a.to_u64().wrapping_sub(b.to_u64())));
        Ok(())
    }
}

/// Copies `n` elements upwards as if one by one, whatever the overlap.
///
/// # Safety
/// Both ranges must be mapped, the destination writable.
#[inline]
unsafe fn copy_upwards<T: Int>(from: *const u8, to: *mut u8, n: usize) {
    let bytes = n * T::BYTES;
    let distance = (to as usize).wrapping_sub(from as usize);
    // SAFETY: given.
    unsafe {
        if distance >= bytes {
            // Apart, or the destination is below: reading is always ahead of writing.
            host_move(from, to, bytes);
        } else {
            // What was written is read again later on: a pattern repeats.
            let (from, to) = (from.cast::<T>(), to.cast::<T>());
            for k in 0..n {
                host_store(to.add(k), host_load(from.add(k)));
            }
        }
    }
}

/// The same downwards, from the elements at `from` and `to` on.
///
/// # Safety
/// As for [`copy_upwards`].
#[inline]
unsafe fn copy_downwards<T: Int>(from: *const u8, to: *mut u8, n: usize) {
    let bytes = n * T::BYTES;
    let distance = (from as usize).wrapping_sub(to as usize);
    // SAFETY: given.
    unsafe {
        if distance >= bytes {
            // Apart, or the destination is above.
            let below = bytes - T::BYTES;
            host_move(from.sub(below), to.sub(below), bytes);
        } else {
            let (from, to) = (from.cast::<T>(), to.cast::<T>());
            for k in 0..n {
                host_store(to.sub(k), host_load(from.sub(k)));
            }
        }
    }
}

/// Fills `n` elements with `v`.
///
/// # Safety
/// The range must be mapped and writable.
#[inline]
unsafe fn fill<T: Int>(to: *mut u8, v: T, n: usize) {
    let low = v.to_u64() as u8;
    let uniform = T::from_u64(low as u64 * 0x0101_0101_0101_0101);
    // SAFETY: given.
    unsafe {
        if uniform == v {
            host_fill(to, low, n * T::BYTES);
        } else {
            let to = to.cast::<T>();
            for k in 0..n {
                host_store(to.add(k), v);
            }
        }
    }
}

/// Distance to the next element, by DF.
#[inline(always)]
fn step<T: Int>(cpu: &Cpu) -> u64 {
    if cpu.rflags & rf::DF == 0 { T::BYTES as u64 } else { (T::BYTES as u64).wrapping_neg() }
}

#[inline(always)]
fn move_on<S: Element, A: Int>(cpu: &mut Cpu, bytes: u64) {
    if S::SOURCE {
        advance::<A>(cpu, RSI, bytes);
    }
    if S::DESTINATION {
        advance::<A>(cpu, RDI, bytes);
    }
}

/// Without REP.
fn once<S: Element, A: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let mut lf = cpu.lf;
    S::run::<A, T>(cpu, op, &mut lf)?;
    if S::COMPARES {
        cpu.lf = lf;
    }
    let bytes = step::<T>(cpu);
    move_on::<S, A>(cpu, bytes);
    Ok(())
}

/// With REP, REPE or REPNE.
#[inline(never)]
fn repeated<S: Element, A: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let bytes = step::<T>(cpu);
    let upwards = cpu.rflags & rf::DF == 0;
    // Traps come after every iteration.
    let alone = cpu.engine.attention & (attention::STEP | attention::DEBUG) != 0;
    let until_zf = op.has(flag::REPNE);
    let mut iterations = 0;
    let mut moved = 0;
    let mut lf = cpu.lf;
    while cpu.reg::<A>(RCX).to_u64() != 0 {
        if iterations >= MAX_ITERATIONS || moved >= MAX_BYTES || (alone && iterations > 0) {
            if alone || cpu.engine.needs_attention() {
                if S::COMPARES {
                    cpu.lf = lf;
                }
                return Err(Stop::Restart);
            }
            (iterations, moved) = (0, 0);
        }
        let count = cpu.reg::<A>(RCX).to_u64();
        if !alone {
            let n = S::bulk::<A, T>(cpu, op, count, upwards);
            if n != 0 {
                move_on::<S, A>(cpu, n.wrapping_mul(bytes));
                cpu.set_reg(RCX, A::from_u64(count - n));
                moved += n * T::BYTES as u64;
                continue;
            }
        }
        // On a fault the flags are those of the last comparison.
        let done = S::run::<A, T>(cpu, op, &mut lf);
        if done.is_err() && S::COMPARES {
            cpu.lf = lf;
        }
        done?;
        move_on::<S, A>(cpu, bytes);
        cpu.set_reg(RCX, A::from_u64(count - 1));
        iterations += 1;
        if S::COMPARES && lf.zf() == until_zf {
            break;
        }
        // A register of the virtual APIC is acted on before anything else, a fault of the next iteration included.
        if cpu.avic.written != 0 {
            return Err(Stop::Restart);
        }
    }
    if S::COMPARES {
        cpu.lf = lf;
    }
    Ok(())
}

fn string<S: Element>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let mut address = 0;
    let mut bytes = 0;
    for n in 0..i.op_count() {
        let a = match i.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemoryESDI => 2,
            OpKind::MemorySegESI | OpKind::MemoryESEDI => 4,
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => 8,
            _ => continue,
        };
        address = a;
        bytes = i.memory_size().size();
    }
    if address == 0 {
        return None;
    }
    op.asize = address;
    op.seg = segment(i.memory_segment());
    if op.has(flag::CODE64) && op.seg < sreg::FS as u8 {
        // Overrides with the four flat segments are ignored.
        op.seg = sreg::DS as u8;
    }
    Some(if op.has(flag::REP | flag::REPNE) {
        sized_word!(address, |A| sized!(bytes, |T| handler(repeated::<S, A, T>)))
    } else {
        sized_word!(address, |A| sized!(bytes, |T| handler(once::<S, A, T>)))
    })
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op) -> Option<Handler> {
    match i.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => string::<Movs>(i, op),
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => string::<Stos>(i, op),
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => string::<Lods>(i, op),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => string::<Cmps>(i, op),
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => string::<Scas>(i, op),
        _ => None,
    }
}
