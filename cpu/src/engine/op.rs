// SPDX-License-Identifier: Apache-2.0
//! The decoded form of an instruction.
//!
//! A block is a run of [`Op`]s ended by one that leaves it. Every handler is an ordinary function
//! `fn(&mut P, &Op<P>) -> Result<(), Stop>` of the architecture; [`super::thread`] chains them.
//!
//! Contract of a handler: it changes no guest-visible state before everything that can fail has succeeded (faults
//! restart the instruction), unless the manual itself says that partial progress is visible (string instructions).

use core::ops::{Deref, DerefMut};

use super::architecture::{Architecture, OP_BYTES};

/// Why a run of ops stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Stop {
    /// The instruction completed and wrote the program counter; look up the next block. Where a run stopped so,
    /// [`super::state::Engine::link`] names the exit taken.
    EndBlock = 1,
    /// The same through exit 0 of the block, which leads to the same target every time. Only handlers return this.
    Exit0,
    /// The same through exit 1.
    Exit1,
    /// The same by a return to where the call that [`super::returns`] names comes back.
    Return,
    /// The instruction raised a fault, which the processor holds; it did not retire, the program counter is not changed
    /// yet.
    Fault,
    /// The instruction retired and then raised a trap, which the processor holds (the program counter is already the
    /// next one's).
    Trap,
    /// The guest is left, why is in the processor; the instruction did not retire.
    Exit,
    /// The guest is left after the instruction retired (the program counter is already written).
    ExitAfter,
    /// The instruction made progress but is not done (x86's REP); restart it at the same place after looking for events.
    Restart,
    /// The instruction is about to write into its own block; run it again alone.
    SelfModify,
    /// The short half of a [`super::thread::handler_pair`] gives up; nothing is changed, the complete half takes over.
    Slow,
}

/// The result of a handler.
pub type Res = Result<(), Stop>;

/// A block's exit that does not always go on at the same place.
pub const LINK_NONE: u8 = 2;
/// The same, but it is where the call that is noted ([`super::returns`]) comes back.
pub const LINK_RETURN: u8 = 3;

/// A threaded handler: runs its op and, unless it stops, all the following ones of the block.
///
/// # Safety
/// The pointer must point into a block's op array that ends with an op whose handler never returns `Ok`.
pub type Handler<P> = unsafe fn(&mut P, *const Op<P>) -> Stop;

/// One decoded instruction, in [`OP_BYTES`] bytes. The architecture's handlers see nothing in it but its operands.
#[repr(C)]
pub struct Op<P: Architecture> {
    /// The threaded handler.
    pub f: Handler<P>,
    /// What the handler works with.
    pub operands: P::Operands,
}

impl<P: Architecture> Op<P> {
    /// An op of its two parts.
    #[inline(always)]
    pub fn new(f: Handler<P>, operands: P::Operands) -> Self {
        const {
            assert!(
                size_of::<Self>() == OP_BYTES,
                "operands take 17 to OPERANDS_BYTES bytes, aligned to 8 at most"
            )
        };
        Op { f, operands }
    }
}

impl<P: Architecture> Clone for Op<P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P: Architecture> Copy for Op<P> {}

impl<P: Architecture> Deref for Op<P> {
    type Target = P::Operands;
    #[inline(always)]
    fn deref(&self) -> &P::Operands {
        &self.operands
    }
}

impl<P: Architecture> DerefMut for Op<P> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut P::Operands {
        &mut self.operands
    }
}
