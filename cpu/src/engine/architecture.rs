// SPDX-License-Identifier: Apache-2.0
//! What an architecture names for the engine: types and sizes, no behaviour (that is [`super::processor`]).

use core::hash::Hash;

/// The types of an architecture. Its processor is the type that handlers get.
pub trait Architecture: Sized + 'static {
    /// What an op carries for its handler: it fills the op, so it takes 17 to [`OPERANDS_BYTES`] bytes.
    type Operands: Operands;
    /// What translations belong to, a number for the guest and one for its address space: x86's (ASID, PCID), arm64's
    /// (VMID, ASID).
    type Space: Space;
    /// The rights that the tables above the last level leave.
    type Rights: Copy + Default;
    /// Bytes of the longest instruction, at most 16.
    const MAX_INSTRUCTION: usize;
    /// log2 of the bytes that a last-level table of the guest translates, at the least.
    const TABLE_SHIFT: u32;
}

/// What translations belong to.
pub trait Space: Copy + Eq + Hash {
    /// The number of the guest.
    fn guest(&self) -> u32;
}

/// An op: two of them make a cache line.
pub const OP_BYTES: usize = 32;

/// Room for an op's operands, beside the address of its handler.
pub const OPERANDS_BYTES: usize = OP_BYTES - size_of::<usize>();

/// The part of an op's operands that the engine looks at.
pub trait Operands: Copy {
    /// The operands of the op behind the last instruction of a block, at `offset` from the block's start; its length is 0.
    fn end(offset: u16) -> Self;
    /// Offset of the *next* instruction from the block's start.
    fn next(&self) -> u16;
    /// Bytes of the instruction; 0: the op is none.
    fn length(&self) -> u8;
}

/// What an access is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write (also the read half of a read-modify-write).
    Write,
    /// Instruction fetch.
    Fetch,
}
