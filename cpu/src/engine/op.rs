// SPDX-License-Identifier: Apache-2.0
//! The decoded form of an instruction, and how handlers are chained.
//!
//! A block is a run of [`Op`]s ended by one that leaves it. Every handler is an ordinary function
//! `fn(&mut Cpu, &Op) -> Result<(), Stop>`; [`handler`] wraps it so that, on `Ok`, it calls the next op's handler as
//! its last act, and at a block's linked exit the next block's first ([`Cpu::chain`]). The compiler turns that into a
//! jump, so blocks run without a dispatch loop; should it not (debug builds), the depth is bounded by [`super::block::CHAIN`].
//!
//! Contract of a handler: it changes no guest-visible state before everything that can fail has succeeded (faults
//! restart the instruction), unless the manual itself says that partial progress is visible (string instructions).

use crate::x86::state::{Cpu, LINK_NONE, LINK_RETURN};

/// Why a run of ops stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Stop {
    /// The instruction completed and wrote `cpu.rip`; look up the next block. Where a run stopped so, `cpu.link` names
    /// the exit taken.
    EndBlock = 1,
    /// The same through exit 0 of the block, which leads to the same target every time. Only handlers return this.
    Exit0,
    /// The same through exit 1.
    Exit1,
    /// The same by a return to where the call that [`super::returns`] names comes back.
    Return,
    /// The instruction raised the exception in `cpu.exception`; it did not retire, `cpu.rip` is not changed yet.
    Fault,
    /// The instruction retired and then raised the trap in `cpu.exception` (`cpu.rip` is already the next one's).
    Trap,
    /// #VMEXIT as described in `cpu.exit`; the instruction did not retire.
    Exit,
    /// #VMEXIT after the instruction retired (`cpu.rip` already written).
    ExitAfter,
    /// The instruction made progress but is not done (REP); restart it at the same RIP after looking for events.
    Restart,
    /// The instruction is about to write into its own block; run it again alone.
    SelfModify,
    /// The short half of a [`handler_pair`] gives up; nothing is changed, the complete half takes over.
    Slow,
}

/// The result of a handler.
pub type Res = Result<(), Stop>;

/// Most ops in one block.
pub const MAX_OPS: usize = 64;

/// A threaded handler: runs its op and, unless it stops, all the following ones of the block.
///
/// # Safety
/// The pointer must point into a block's op array that ends with an op whose handler never returns `Ok`.
pub type Handler = unsafe fn(&mut Cpu, *const Op) -> Stop;

/// Bits of [`Op::flags`].
pub mod flag {
    /// The effective address needs the legacy path: truncation to the address size in `asize`, segment base, limit
    /// and type checks, wrap-around. Not set in 64-bit mode with 64-bit addresses.
    pub const LEGACY_EA: u8 = 1;
    /// LOCK prefix (or implicitly locked XCHG).
    pub const LOCK: u8 = 2;
    /// REP/REPE prefix.
    pub const REP: u8 = 4;
    /// REPNE prefix.
    pub const REPNE: u8 = 8;
    /// The block is 64-bit code.
    pub const CODE64: u8 = 16;
    /// Operand size: bits 5-6: 0 = 16, 1 = 32, 2 = 64 bits (what the decoder found as effective operand size).
    pub const OSIZE_SHIFT: u8 = 5;
}

/// One decoded instruction, 32 bytes.
///
/// `dst`, `src`, `aux`, `base` and `index` of general registers are *byte offsets* into the register file
/// (`reg * 8`, plus 1 for AH/CH/DH/BH); slot 16 (offset 128) always reads zero, slot 17 (offset 136) holds the RIP of
/// the block's first instruction. For SIMD, x87, MMX, segment and control registers they are plain numbers.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    /// The threaded handler.
    pub f: Handler,
    /// Immediate, branch displacement from the block's start, or whatever the handler's translator put there.
    pub imm: u64,
    /// Displacement of the memory operand (RIP-relative ones are relative to the block's start, base = slot 17).
    pub disp: i32,
    /// Offset of the *next* instruction from the block's start: `ip_base + next` is the next RIP.
    pub next: u16,
    /// Length of this instruction in bytes.
    pub len: u8,
    /// See [`flag`].
    pub flags: u8,
    /// Destination register.
    pub dst: u8,
    /// Source register.
    pub src: u8,
    /// Third operand, condition, or anything else.
    pub aux: u8,
    /// Base register of the memory operand (byte offset; 128 = none).
    pub base: u8,
    /// Index register of the memory operand (byte offset; 128 = none).
    pub index: u8,
    /// log2 of the index scale.
    pub scale: u8,
    /// Segment register number (0 ES, 1 CS, 2 SS, 3 DS, 4 FS, 5 GS).
    pub seg: u8,
    /// Address size in bytes (2, 4, 8).
    pub asize: u8,
}

/// Register-file slot (byte offset) that always reads zero.
pub const SLOT_ZERO: u8 = 128;
/// Register-file slot (byte offset) that holds the RIP of the block's first instruction.
pub const SLOT_IP: u8 = 136;

impl Op {
    /// Effective operand size in bytes (2, 4 or 8).
    #[inline(always)]
    pub fn osize(&self) -> u32 {
        2 << ((self.flags >> flag::OSIZE_SHIFT) & 3)
    }

    /// Whether the op carries any of these [`flag`] bits.
    #[inline(always)]
    pub fn has(&self, bits: u8) -> bool {
        self.flags & bits != 0
    }
}

/// Wraps an instruction's function into a threaded [`Handler`].
///
/// `F` must be a function item or a non-capturing closure (a zero-sized type).
pub const fn handler<F>(f: F) -> Handler
where
    F: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
{
    let _ = core::mem::ManuallyDrop::new(f);
    thread::<F>
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
unsafe fn thread<F>(cpu: &mut Cpu, op: *const Op) -> Stop
where
    F: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
{
    let f = function::<F>();
    // SAFETY: the caller passes a pointer into a live block.
    match f(cpu, unsafe { &*op }) {
        // SAFETY: an op that returns Ok is not the block's last, so op + 1 is in the block too.
        Ok(()) => unsafe {
            let next = op.add(1);
            ((*next).f)(cpu, next)
        },
        // SAFETY: the caller passed a live block's op.
        Err(stop) => unsafe { leave(cpu, op, stop) },
    }
}

/// Leaves the block at `op`: on to the next one where that is linked, else back to the run loop.
///
/// # Safety
/// See [`Handler`].
#[inline(always)]
unsafe fn leave(cpu: &mut Cpu, op: *const Op, stop: Stop) -> Stop {
    let link = match stop {
        Stop::EndBlock => LINK_NONE,
        Stop::Exit0 => 0,
        Stop::Exit1 => 1,
        Stop::Return => LINK_RETURN,
        _ => {
            cpu.stop_op = op;
            return stop;
        }
    };
    let next = if link == LINK_NONE { core::ptr::null() } else { cpu.chain(link) };
    // SAFETY: `chain` gives the first op of a live block; the caller passed a live block's op.
    unsafe { if next.is_null() { leave_far(cpu, op, link) } else { ((*next).f)(cpu, next) } }
}

/// A [`Handler`] for an op and the branch behind it, with the op and the branch as its arguments. `fast` returns the
/// branch's stop; or [`Stop::Slow`], having changed nothing, to have `first` do its op and the branch its own.
pub const fn handler_fused<F, C>(fast: F, first: C) -> Handler
where
    F: Fn(&mut Cpu, &Op, &Op) -> Res + Copy + 'static,
    C: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
{
    let _ = core::mem::ManuallyDrop::new((fast, first));
    thread_fused::<F, C>
}

/// Runs `F` for the op and the branch behind it, or `C` when `F` gives up.
///
/// # Safety
/// See [`Handler`]; the next op must be a branch.
unsafe fn thread_fused<F, C>(cpu: &mut Cpu, op: *const Op) -> Stop
where
    F: Fn(&mut Cpu, &Op, &Op) -> Res + Copy + 'static,
    C: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
{
    let f = function::<F>();
    // SAFETY: as in `thread`.
    unsafe {
        let branch = op.add(1);
        match f(cpu, &*op, &*branch) {
            Ok(()) | Err(Stop::Slow) => thread_slow::<C>(cpu, op),
            Err(stop) => leave(cpu, branch, stop),
        }
    }
}

/// [`leave`] when it takes more than following a link; out of line, so that its registers are not saved on the short way.
///
/// # Safety
/// See [`Handler`].
#[inline(never)]
unsafe fn leave_far(cpu: &mut Cpu, op: *const Op, link: u8) -> Stop {
    cpu.link = link;
    let next = cpu.chain_far(op);
    if next.is_null() {
        cpu.stop_op = op;
        return Stop::EndBlock;
    }
    // SAFETY: `chain_far` gives the first op of a live block.
    unsafe { ((*next).f)(cpu, next) }
}

/// A [`Handler`] in two parts: `fast` does the whole instruction and returns true, or it changes nothing and returns
/// false; then `slow` does the instruction. A `fast` that calls nothing needs no stack frame.
pub const fn handler_fast<Q, F>(fast: Q, slow: F) -> Handler
where
    Q: Fn(&mut Cpu, &Op) -> bool + Copy + 'static,
    F: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
{
    let _ = core::mem::ManuallyDrop::new((fast, slow));
    thread_fast::<Q, F>
}

/// Runs `Q`, or `F` in its place, and goes on with the next op.
///
/// # Safety
/// See [`Handler`].
unsafe fn thread_fast<Q, F>(cpu: &mut Cpu, op: *const Op) -> Stop
where
    Q: Fn(&mut Cpu, &Op) -> bool + Copy + 'static,
    F: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
{
    let fast = function::<Q>();
    // SAFETY: as in `thread`.
    unsafe {
        if fast(cpu, &*op) {
            let next = op.add(1);
            ((*next).f)(cpu, next)
        } else {
            thread_slow::<F>(cpu, op)
        }
    }
}

/// [`thread`] out of line, so that its registers are not saved on the fast way.
///
/// # Safety
/// See [`Handler`].
#[cold]
#[inline(never)]
unsafe fn thread_slow<F>(cpu: &mut Cpu, op: *const Op) -> Stop
where
    F: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
{
    // SAFETY: the same contract.
    unsafe { thread::<F>(cpu, op) }
}

/// As [`handler_fast`], for instructions of which the fast part can fail or end the block: it returns [`Stop::Slow`],
/// having changed nothing, to hand over to `complete`.
pub const fn handler_pair<F, C>(fast: F, complete: C) -> Handler
where
    F: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
    C: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
{
    let _ = core::mem::ManuallyDrop::new((fast, complete));
    thread_pair::<F, C>
}

/// Runs `F` for the op, or `C` when `F` gives up, and goes on with the next one.
///
/// # Safety
/// See [`Handler`].
unsafe fn thread_pair<F, C>(cpu: &mut Cpu, op: *const Op) -> Stop
where
    F: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
    C: Fn(&mut Cpu, &Op) -> Res + Copy + 'static,
{
    let f = function::<F>();
    // SAFETY: as in `thread`.
    unsafe {
        match f(cpu, &*op) {
            Ok(()) => {
                let next = op.add(1);
                ((*next).f)(cpu, next)
            }
            Err(Stop::Slow) => thread_slow::<C>(cpu, op),
            Err(stop) => leave(cpu, op, stop),
        }
    }
}
