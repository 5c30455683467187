// SPDX-License-Identifier: Apache-2.0
//! The virtual APIC backing page: a local APIC's registers in memory, one at every 16 bytes (APM vol. 2, 15.29.3).
//!
//! Other processors set bits of the IRR; everything else belongs to the processor that runs the guest.

use std::sync::atomic::{AtomicU32, Ordering};

/// Offsets of registers (APM vol. 2, table 16-2).
pub mod register {
    #![allow(missing_docs)]
    pub const ID: u16 = 0x020;
    pub const VERSION: u16 = 0x030;
    pub const TPR: u16 = 0x080;
    pub const APR: u16 = 0x090;
    pub const PPR: u16 = 0x0A0;
    pub const EOI: u16 = 0x0B0;
    pub const RRR: u16 = 0x0C0;
    pub const LDR: u16 = 0x0D0;
    pub const DFR: u16 = 0x0E0;
    pub const SVR: u16 = 0x0F0;
    pub const ISR: u16 = 0x100;
    pub const TMR: u16 = 0x180;
    pub const IRR: u16 = 0x200;
    pub const IRR_END: u16 = 0x270;
    pub const ESR: u16 = 0x280;
    pub const ICR_LOW: u16 = 0x300;
    pub const ICR_HIGH: u16 = 0x310;
    pub const LVT_TIMER: u16 = 0x320;
    pub const LVT_ERROR: u16 = 0x370;
    pub const INITIAL_COUNT: u16 = 0x380;
    pub const DIVIDE: u16 = 0x3E0;
    /// x2APIC mode only.
    pub const SELF_IPI: u16 = 0x3F0;
}

/// What an access to a register does (APM vol. 2, tables 15-22 and 15-23).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handling {
    /// The page is read or written, no more.
    Allowed,
    /// A write that the processor acts on, if it can.
    Accelerated,
    /// #VMEXIT behind the write.
    Trap,
    /// #VMEXIT in the access's place.
    Fault,
}

/// How the register at `offset` of the page is read.
pub fn reads(offset: u16) -> Handling {
    use register::*;
    match offset {
        ID | VERSION | TPR..=SVR | ISR..=ESR | ICR_LOW..=INITIAL_COUNT | DIVIDE => Handling::Allowed,
        _ => Handling::Fault,
    }
}

/// How it is written.
pub fn writes(offset: u16) -> Handling {
    use register::*;
    match offset {
        ICR_HIGH => Handling::Allowed,
        TPR | EOI | ICR_LOW => Handling::Accelerated,
        ID | RRR..=SVR | ESR | LVT_TIMER..=INITIAL_COUNT | DIVIDE => Handling::Trap,
        _ => Handling::Fault,
    }
}

/// A backing page in registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingPage(usize);

impl BackingPage {
    /// # Safety
    /// `address` must be that of a page of registered memory as long as the value is used.
    pub unsafe fn new(address: usize) -> BackingPage {
        BackingPage(address)
    }

    /// Its host address.
    pub fn address(self) -> usize {
        self.0
    }

    fn word(self, offset: u16) -> &'static AtomicU32 {
        // SAFETY: offsets are those of registers, inside of the page; whoever has the value keeps to its lifetime.
        unsafe { AtomicU32::from_ptr((self.0 + (offset & 0xFF0) as usize) as *mut u32) }
    }

    /// Reads a register.
    pub fn get(self, offset: u16) -> u32 {
        self.word(offset).load(Ordering::SeqCst)
    }

    /// Writes a register.
    pub fn set(self, offset: u16, value: u32) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// Writes a register that mostly has the value already.
    pub fn keep(self, offset: u16, value: u32) {
        let word = self.word(offset);
        if word.load(Ordering::Relaxed) != value {
            word.store(value, Ordering::Release);
        }
    }

    /// The highest bit of a bitmap of 256.
    pub fn highest(self, bitmap: u16) -> Option<u8> {
        (0..8u16).rev().find_map(|n| {
            let word = self.get(bitmap + 16 * n);
            (word != 0).then(|| (32 * n) as u8 + (31 - word.leading_zeros()) as u8)
        })
    }

    /// Whether a bit of a bitmap is set.
    pub fn test(self, bitmap: u16, vector: u8) -> bool {
        self.get(bitmap + 16 * (vector as u16 / 32)) >> (vector % 32) & 1 != 0
    }

    /// Sets a bit of a bitmap.
    pub fn raise(self, bitmap: u16, vector: u8) {
        self.word(bitmap + 16 * (vector as u16 / 32)).fetch_or(1 << (vector % 32), Ordering::SeqCst);
    }

    /// Clears a bit of a bitmap.
    pub fn clear(self, bitmap: u16, vector: u8) {
        self.word(bitmap + 16 * (vector as u16 / 32)).fetch_and(!(1 << (vector % 32)), Ordering::SeqCst);
    }
}
