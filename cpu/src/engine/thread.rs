// SPDX-License-Identifier: Apache-2.0
//! How handlers are chained.
//!
//! [`handler`] and its kin wrap an instruction's function so that, on `Ok`, it calls the next op's handler as its last
//! act, and at a block's linked exit the next block's first ([`super::chain`]). The compiler turns that into a jump, so
//! blocks run without a dispatch loop; should it not (debug builds), the depth is bounded by [`super::block::CHAIN`].
//! For that a wrapper has nothing on its own stack: what an instruction needs there is on that of a function apart.
//!
//! An op may be left at any access to guest memory ([`super::run::guarded`]), which has to know it: complete functions
//! run with the op noted in [`Engine::stop_op`](super::state::Engine::stop_op), fast halves name it with the access
//! ([`Engine::load`](super::state::Engine::load) and its kin), and [`handler_registers`] is for what makes none.

use super::chain::{chain, chain_far};
use super::op::{Handler, LINK_NONE, LINK_RETURN, Op, Res, Stop};
use super::processor::Processor;

/// Wraps an instruction's function into a threaded [`Handler`].
///
/// `F` must be a function item or a non-capturing closure (a zero-sized type).
pub const fn handler<P, F>(f: F) -> Handler<P>
where
    P: Processor,
    F: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    let _ = core::mem::ManuallyDrop::new(f);
    thread::<P, F>
}

/// As [`handler`], for a function that touches no guest memory.
pub const fn handler_registers<P, F>(f: F) -> Handler<P>
where
    P: Processor,
    F: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    let _ = core::mem::ManuallyDrop::new(f);
    thread_registers::<P, F>
}

/// The function that a handler has been made of, by its type alone: as it captures nothing, it has no size.
#[inline(always)]
fn function<F: Copy>() -> F {
    const { assert!(size_of::<F>() == 0, "a handler must not capture") };
    // SAFETY: F has no size, so any aligned address has a value of it; `handler` and its kin were given one.
    unsafe { *core::ptr::NonNull::<F>::dangling().as_ref() }
}

/// Runs `F` for the op and goes on with the next one.
///
/// # Safety
/// See [`Handler`].
unsafe fn thread<P, F>(cpu: &mut P, op: *const Op<P>) -> Stop
where
    P: Processor,
    F: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    cpu.engine_mut().stop_op = op;
    // SAFETY: the caller passes a pointer into a live block.
    match apart::<P, F>(cpu, unsafe { &*op }) {
        // SAFETY: an op that returns Ok is not the block's last, so op + 1 is in the block too.
        Ok(()) => unsafe {
            let next = op.add(1);
            ((*next).f)(cpu, next)
        },
        // SAFETY: the caller passed a live block's op.
        Err(stop) => unsafe { leave(cpu, op, stop) },
    }
}

/// Runs `F` on a stack frame of its own.
#[inline(never)]
fn apart<P, F>(cpu: &mut P, op: &Op<P>) -> Res
where
    P: Processor,
    F: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    function::<F>()(cpu, op)
}

/// [`thread`] for what touches no guest memory, with `F` in place.
///
/// # Safety
/// See [`Handler`].
unsafe fn thread_registers<P, F>(cpu: &mut P, op: *const Op<P>) -> Stop
where
    P: Processor,
    F: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    let f = function::<F>();
    unnoted(cpu);
    // SAFETY: as in `thread`.
    match f(cpu, unsafe { &*op }) {
        // SAFETY: as in `thread`.
        Ok(()) => unsafe {
            let next = op.add(1);
            ((*next).f)(cpu, next)
        },
        // SAFETY: the caller passed a live block's op.
        Err(stop) => unsafe { leave(cpu, op, stop) },
    }
}

/// For checks: accesses that do not name their op are wrong now.
#[inline(always)]
fn unnoted<P: Processor>(cpu: &mut P) {
    if cfg!(debug_assertions) {
        cpu.engine_mut().stop_op = core::ptr::null();
    }
}

/// Leaves the block at `op`: on to the next one where that is linked, else back to the run loop.
///
/// # Safety
/// See [`Handler`].
#[inline(always)]
unsafe fn leave<P: Processor>(cpu: &mut P, op: *const Op<P>, stop: Stop) -> Stop {
    let link = match stop {
        Stop::EndBlock => LINK_NONE,
        Stop::Exit0 => 0,
        Stop::Exit1 => 1,
        Stop::Return => LINK_RETURN,
        _ => {
            cpu.engine_mut().stop_op = op;
            return stop;
        }
    };
    let next = if link == LINK_NONE { core::ptr::null() } else { chain(cpu, link) };
    // SAFETY: `chain` gives the first op of a live block; the caller passed a live block's op.
    unsafe { if next.is_null() { leave_far(cpu, op, link) } else { ((*next).f)(cpu, next) } }
}

/// A [`Handler`] for an op and the branch behind it, with the op and the branch as its arguments. `fast` returns the
/// branch's stop; or [`Stop::Slow`], having changed nothing, to have `first` do its op and the branch its own.
pub const fn handler_fused<P, F, C>(fast: F, first: C) -> Handler<P>
where
    P: Processor,
    F: Fn(&mut P, &Op<P>, &Op<P>) -> Res + Copy + 'static,
    C: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    let _ = core::mem::ManuallyDrop::new((fast, first));
    thread_fused::<P, F, C>
}

/// Runs `F` for the op and the branch behind it, or `C` when `F` gives up.
///
/// # Safety
/// See [`Handler`]; the next op must be a branch.
unsafe fn thread_fused<P, F, C>(cpu: &mut P, op: *const Op<P>) -> Stop
where
    P: Processor,
    F: Fn(&mut P, &Op<P>, &Op<P>) -> Res + Copy + 'static,
    C: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    let f = function::<F>();
    unnoted(cpu);
    // SAFETY: as in `thread`.
    unsafe {
        let branch = op.add(1);
        match f(cpu, &*op, &*branch) {
            Ok(()) | Err(Stop::Slow) => thread_slow::<P, C>(cpu, op),
            Err(stop) => leave(cpu, branch, stop),
        }
    }
}

/// [`leave`] when it takes more than following a link; out of line, so that its registers are not saved on the short way.
///
/// # Safety
/// See [`Handler`].
#[inline(never)]
unsafe fn leave_far<P: Processor>(cpu: &mut P, op: *const Op<P>, link: u8) -> Stop {
    cpu.engine_mut().link = link;
    let next = chain_far(cpu, op);
    if next.is_null() {
        cpu.engine_mut().stop_op = op;
        return Stop::EndBlock;
    }
    // SAFETY: `chain_far` gives the first op of a live block.
    unsafe { ((*next).f)(cpu, next) }
}

/// A [`Handler`] in two parts: `fast` does the whole instruction and returns true, or it changes nothing and returns
/// false; then `slow` does the instruction. A `fast` that calls nothing needs no stack frame.
pub const fn handler_fast<P, Q, F>(fast: Q, slow: F) -> Handler<P>
where
    P: Processor,
    Q: Fn(&mut P, &Op<P>) -> bool + Copy + 'static,
    F: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    let _ = core::mem::ManuallyDrop::new((fast, slow));
    thread_fast::<P, Q, F>
}

/// Runs `Q`, or `F` in its place, and goes on with the next op.
///
/// # Safety
/// See [`Handler`].
unsafe fn thread_fast<P, Q, F>(cpu: &mut P, op: *const Op<P>) -> Stop
where
    P: Processor,
    Q: Fn(&mut P, &Op<P>) -> bool + Copy + 'static,
    F: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    let fast = function::<Q>();
    unnoted(cpu);
    // SAFETY: as in `thread`.
    unsafe {
        if fast(cpu, &*op) {
            let next = op.add(1);
            ((*next).f)(cpu, next)
        } else {
            thread_slow::<P, F>(cpu, op)
        }
    }
}

/// [`thread`] out of line, so that its registers are not saved on the fast way.
///
/// # Safety
/// See [`Handler`].
#[cold]
#[inline(never)]
unsafe fn thread_slow<P, F>(cpu: &mut P, op: *const Op<P>) -> Stop
where
    P: Processor,
    F: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    // SAFETY: the same contract.
    unsafe { thread::<P, F>(cpu, op) }
}

/// As [`handler_fast`], for instructions of which the fast part can fail or end the block: it returns [`Stop::Slow`],
/// having changed nothing, to hand over to `complete`.
pub const fn handler_pair<P, F, C>(fast: F, complete: C) -> Handler<P>
where
    P: Processor,
    F: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
    C: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    let _ = core::mem::ManuallyDrop::new((fast, complete));
    thread_pair::<P, F, C>
}

/// Runs `F` for the op, or `C` when `F` gives up, and goes on with the next one.
///
/// # Safety
/// See [`Handler`].
unsafe fn thread_pair<P, F, C>(cpu: &mut P, op: *const Op<P>) -> Stop
where
    P: Processor,
    F: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
    C: Fn(&mut P, &Op<P>) -> Res + Copy + 'static,
{
    let f = function::<F>();
    unnoted(cpu);
    // SAFETY: as in `thread`.
    unsafe {
        match f(cpu, &*op) {
            Ok(()) => {
                let next = op.add(1);
                ((*next).f)(cpu, next)
            }
            Err(Stop::Slow) => thread_slow::<P, C>(cpu, op),
            Err(stop) => leave(cpu, op, stop),
        }
    }
}
