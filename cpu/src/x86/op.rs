// SPDX-License-Identifier: Apache-2.0
//! Ops of x86 instructions.

use crate::engine::architecture;
use crate::x86::state::Cpu;

pub use crate::engine::op::{LINK_NONE, LINK_RETURN, Res, Stop};
pub use crate::engine::thread::{handler, handler_fast, handler_fused, handler_pair, handler_registers};

/// One decoded instruction.
pub type Op = crate::engine::op::Op<Cpu>;
/// A threaded handler.
pub type Handler = crate::engine::op::Handler<Cpu>;

/// Bits of [`Operands::flags`].
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

/// What an op's handler works with.
///
/// `dst`, `src`, `aux`, `base` and `index` of general registers are *byte offsets* into the register file
/// (`reg * 8`, plus 1 for AH/CH/DH/BH); slot 16 (offset 128) always reads zero, slot 17 (offset 136) holds the RIP of
/// the block's first instruction. For SIMD, x87, MMX, segment and control registers they are plain numbers.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Operands {
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

impl Operands {
    /// Those of an instruction without any.
    pub const NONE: Operands = Operands {
        imm: 0,
        disp: 0,
        next: 0,
        len: 0,
        flags: 0,
        dst: SLOT_ZERO,
        src: SLOT_ZERO,
        aux: 0,
        base: SLOT_ZERO,
        index: SLOT_ZERO,
        scale: 0,
        seg: 0,
        asize: 0,
    };

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

impl architecture::Operands for Operands {
    fn end(offset: u16) -> Operands {
        Operands { next: offset, ..Operands::NONE }
    }
    #[inline(always)]
    fn next(&self) -> u16 {
        self.next
    }
    #[inline(always)]
    fn length(&self) -> u8 {
        self.len
    }
}

impl Cpu {
    /// RIP of the instruction after `op`.
    #[inline(always)]
    pub fn next_ip(&self, op: &Op) -> u64 {
        self.rb.gpr[17].wrapping_add(op.next as u64)
    }

    /// RIP of `op` itself.
    #[inline(always)]
    pub fn this_ip(&self, op: &Op) -> u64 {
        self.rb.gpr[17].wrapping_add(op.next as u64 - op.len as u64)
    }

    /// Ends the block with a jump to `target` through exit `link` of the block (0 or 1: same target every time;
    /// [`LINK_RETURN`] or [`LINK_NONE`]).
    #[inline(always)]
    pub fn jump(&mut self, target: u64, link: u8) -> Stop {
        self.rip = target;
        match link {
            0 => Stop::Exit0,
            1 => Stop::Exit1,
            LINK_RETURN => Stop::Return,
            _ => Stop::EndBlock,
        }
    }

    /// Ends the block after `op`, going on with the next instruction, by look-up (used after mode or TLB changes).
    #[inline(always)]
    pub fn end_block(&mut self, op: &Op) -> Stop {
        let next = self.next_ip(op);
        self.rip = self.mask_ip(next);
        Stop::EndBlock
    }
}
