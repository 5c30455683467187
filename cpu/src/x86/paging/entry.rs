// SPDX-License-Identifier: Apache-2.0
//! Page-table entries and fault codes.

use crate::engine::tlb::{LARGE_SHIFT, PAGE_MASK};

/// Physical address bits of the processor, guest-physical and nested.
pub const PHYS_BITS: u32 = 48;
pub(super) const PHYS_MASK: u64 = (1 << PHYS_BITS) - 1;
pub(super) const LARGE_MASK: u64 = (1 << LARGE_SHIFT) - 1;
pub(super) const ADDRESS: u64 = PHYS_MASK & PAGE_MASK;
pub(super) const RESERVED_HIGH: u64 = ((1 << 52) - 1) & !PHYS_MASK;

/// Page-table entry bits.
pub mod pte {
    #![allow(missing_docs)]
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const NX: u64 = 1 << 63;
}

/// #PF and NPF error code bits.
pub mod error {
    #![allow(missing_docs)]
    pub const P: u32 = 1;
    pub const W: u32 = 2;
    pub const U: u32 = 4;
    pub const RSV: u32 = 8;
    pub const ID: u32 = 16;
    pub const PK: u32 = 32;
}

/// EXITCODE of a nested page fault and the bits that say where it happened.
pub const VMEXIT_NPF: u64 = 0x400;
pub(super) const NPF_FINAL: u64 = 1 << 32;
pub(super) const NPF_TABLE: u64 = 1 << 33;

/// What the tables above the last level leave of a page's rights.
#[derive(Clone, Copy, Default)]
pub struct TableRights {
    /// [`pte::W`] and [`pte::U`].
    pub bits: u64,
    /// No execution.
    pub nx: bool,
}
