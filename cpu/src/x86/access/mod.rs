// SPDX-License-Identifier: Apache-2.0
//! Guest memory accesses: effective and linear addresses, loads, stores, read-modify-writes, the stack.
//!
//! The fast path is a tag compare and one host access. Everything else (misses, page crossings, alignment checks, code
//! pages, data breakpoints) goes through [`Cpu::translate`](super::state::Cpu::translate).

mod address;
mod bytes;
mod linear;
mod modify;
mod operand;
mod stack;

pub use crate::engine::architecture::Access;
pub use operand::Align;

/// MMU index of implicit supervisor accesses (descriptor tables, TSS): never subject to AC, always to SMAP.
pub const SYSTEM: usize = 0;
