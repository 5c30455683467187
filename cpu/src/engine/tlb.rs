// SPDX-License-Identifier: Apache-2.0
//! The software TLB: direct-mapped, four banks (one per MMU index, see [`crate::x86::state::Cpu::mmu`]), tagged by context.
//!
//! A tag is the linear page | context number (11 bits). Bit 11 set makes the fast path miss on purpose: the page needs
//! the slow path on every such access (it holds decoded code, or a data breakpoint is armed on it). A context stands
//! for one (ASID, PCID) pair; flushing a context gives the pair a new number.

use std::collections::HashMap;

/// log2 of the entries in a bank.
pub const TLB_BITS: usize = 12;
const TLB_SIZE: usize = 1 << TLB_BITS;
/// Banks that are ever filled.
pub const BANKS: usize = 3;
/// Mask of the page number.
pub const PAGE_MASK: u64 = !0xfff;
/// In a tag: take the slow path.
pub const SLOW: u64 = 1 << 11;
/// A tag that no access matches.
pub const INVALID: u64 = u64::MAX;
const CONTEXTS: u64 = 0x7ff;

/// One translation, for reads, writes and instruction fetch.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Entry {
    /// Tag for reads.
    pub read: u64,
    /// Tag for writes.
    pub write: u64,
    /// Tag for fetches.
    pub exec: u64,
    /// Host address minus linear address.
    pub addend: u64,
}

/// log2 of the bytes of linear addresses that are searched together for entries of a large page.
const WINDOW_SHIFT: u32 = 22;
const LARGE_WINDOWS: usize = 4096;

const EMPTY: Entry = Entry { read: INVALID, write: INVALID, exec: INVALID, addend: 0 };

/// Host frame of a guest-physical page.
#[derive(Clone, Copy)]
pub struct GpaEntry {
    /// Guest-physical page | 1 when writable (and dirty) | 2 when executable, or [`INVALID`].
    pub gpa: u64,
    /// Host address of the page.
    pub host: u64,
}

/// Where the last-level table for 2 MiB of linear addresses lies (the paging-structure cache of APM vol. 2, 5.5.3).
#[derive(Clone, Copy)]
pub struct Directory {
    /// Linear address >> 21, over the context number.
    key: u64,
    /// Valid while this is the TLB's epoch.
    epoch: u64,
    /// Host address of the table.
    pub host: u64,
    /// W and U gathered above it.
    pub rights: u64,
    /// No-execute gathered above it.
    pub nx: bool,
}

const DIRECTORIES: usize = 256;
const GPA_BITS: usize = 10;
const LARGE_BITS: usize = 8;
/// log2 of the bytes that one large entry covers.
pub const LARGE_SHIFT: u32 = 21;

/// The TLB of one processor.
pub struct Tlb {
    entries: Box<[Entry]>,
    gpas: Box<[GpaEntry]>,
    /// The same for 2 MiB pieces of large nested leaves.
    large_gpas: Box<[GpaEntry]>,
    /// Context number in force, in tag position.
    pub context: u64,
    contexts: HashMap<(u32, u16), u64>,
    current: (u32, u16),
    next: u64,
    directories: Box<[Directory]>,
    /// Directories from before the last flush of anything do not count.
    epoch: u64,
    /// Epoch and context in one word of which bits 1:0 are clear: as long as it is the same, so are translations.
    pub key: u64,
    /// log2 of the guest page size behind each entry, 12 for empty ones.
    sizes: Box<[u8]>,
    /// Where entries of large guest pages may be, since the last whole flush: bit (linear >> 22) & 4095 for pages of up
    /// to 4 MiB.
    large: Box<[u64; LARGE_WINDOWS / 64]>,
    /// Bit (linear >> 30) & 63: the same for pages of 1 GiB.
    giant: u64,
    /// Fills, for statistics.
    pub fills: u64,
    /// Whole flushes, for statistics.
    pub flushes: u64,
}

impl Default for Tlb {
    fn default() -> Self {
        Tlb {
            entries: vec![EMPTY; TLB_SIZE * (BANKS + 1)].into_boxed_slice(),
            gpas: vec![GpaEntry { gpa: INVALID, host: 0 }; 1 << GPA_BITS].into_boxed_slice(),
            large_gpas: vec![GpaEntry { gpa: INVALID, host: 0 }; 1 << LARGE_BITS].into_boxed_slice(),
            context: 0,
            contexts: HashMap::new(),
            current: (u32::MAX, 0),
            next: 0,
            directories: vec![Directory { key: 0, epoch: 0, host: 0, rights: 0, nx: false }; DIRECTORIES]
                .into_boxed_slice(),
            epoch: 1,
            key: 0,
            sizes: vec![12; TLB_SIZE * (BANKS + 1)].into_boxed_slice(),
            large: Box::new([0; LARGE_WINDOWS / 64]),
            giant: 0,
            fills: 0,
            flushes: 0,
        }
    }
}

/// Number of the entry in its bank that would hold `linear`.
#[inline(always)]
pub fn index(linear: u64) -> usize {
    (linear >> 12) as usize & (TLB_SIZE - 1)
}

/// Number of the window that `linear` lies in, modulo [`LARGE_WINDOWS`].
fn window(linear: u64) -> usize {
    (linear >> WINDOW_SHIFT) as usize & (LARGE_WINDOWS - 1)
}

impl Tlb {
    /// The entry that would hold `linear` in `bank`.
    #[inline(always)]
    pub fn entry(&self, bank: usize, linear: u64) -> &Entry {
        debug_assert!(bank <= BANKS);
        // SAFETY: bank <= 3 (see `Cpu::update_mmu`) and index < TLB_SIZE.
        unsafe { self.entries.get_unchecked((bank << TLB_BITS) + index(linear)) }
    }

    /// The first entry of `bank`, valid as long as the TLB.
    pub fn bank(&self, bank: usize) -> *const Entry {
        self.entries[bank << TLB_BITS..].as_ptr()
    }

    /// The same, for filling. Bank 3 must stay empty.
    #[inline]
    pub fn entry_mut(&mut self, bank: usize, linear: u64) -> &mut Entry {
        &mut self.entries[(bank << TLB_BITS) + index(linear)]
    }

    /// What a tag must be for an access whose last byte is at `last`.
    #[inline(always)]
    pub fn tag(&self, last: u64) -> u64 {
        (last & PAGE_MASK) | self.context
    }

    /// Looks up a guest-physical page.
    #[inline]
    pub fn gpa(&self, gpa: u64) -> &GpaEntry {
        &self.gpas[(gpa >> 12) as usize & ((1 << GPA_BITS) - 1)]
    }

    /// Looks up the 2 MiB piece around a guest-physical address.
    #[inline]
    pub fn large_gpa(&self, gpa: u64) -> &GpaEntry {
        &self.large_gpas[(gpa >> LARGE_SHIFT) as usize & ((1 << LARGE_BITS) - 1)]
    }

    /// Remembers a 2 MiB piece; `gpa` and `host` are its first addresses (with the rights in `gpa`).
    pub fn set_large_gpa(&mut self, entry: GpaEntry) {
        self.large_gpas[(entry.gpa >> LARGE_SHIFT) as usize & ((1 << LARGE_BITS) - 1)] = entry;
    }

    /// Remembers a guest-physical page.
    pub fn set_gpa(&mut self, gpa: u64, entry: GpaEntry) {
        self.gpas[(gpa >> 12) as usize & ((1 << GPA_BITS) - 1)] = entry;
    }

    fn directory_key(&self, linear: u64) -> u64 {
        (linear >> 21) << 11 | self.context
    }

    /// The directory for `linear`, if one is remembered.
    #[inline]
    pub fn directory(&self, linear: u64) -> Option<Directory> {
        let d = self.directories[(linear >> 21) as usize % DIRECTORIES];
        (d.epoch == self.epoch && d.key == self.directory_key(linear)).then_some(d)
    }

    /// Remembers where the last-level table for `linear` lies; the entries above it have their accessed bits set.
    pub fn set_directory(&mut self, linear: u64, host: u64, rights: u64, nx: bool) {
        let d = Directory { key: self.directory_key(linear), epoch: self.epoch, host, rights, nx };
        self.directories[(linear >> 21) as usize % DIRECTORIES] = d;
    }

    /// Empties every bank.
    fn clear_entries(&mut self) {
        self.entries.fill(EMPTY);
        self.sizes.fill(12);
        self.large.fill(0);
        self.giant = 0;
    }

    /// Forgets everything of every context.
    pub fn flush_all(&mut self) {
        self.clear_entries();
        self.flush_gpas();
        self.contexts.clear();
        self.next = 0;
        self.flushes += 1;
        let current = self.current;
        self.current = (u32::MAX, 0);
        self.switch(current.0, current.1);
    }

    /// Something is flushed.
    fn advance(&mut self) {
        self.epoch += 1;
        self.renew_key();
    }

    fn renew_key(&mut self) {
        self.key = self.epoch << 13 | self.context << 2;
    }

    /// Forgets guest-physical translations only (they are all of one nested CR3).
    pub fn flush_gpas(&mut self) {
        self.advance();
        self.gpas.fill(GpaEntry { gpa: INVALID, host: 0 });
        self.large_gpas.fill(GpaEntry { gpa: INVALID, host: 0 });
    }

    /// Makes (ASID, PCID) the pair that accesses belong to.
    pub fn switch(&mut self, asid: u32, pcid: u16) {
        if self.current == (asid, pcid) {
            return;
        }
        self.current = (asid, pcid);
        self.context = match self.contexts.get(&(asid, pcid)) {
            Some(c) => *c,
            None => self.new_context(),
        };
        self.renew_key();
    }

    fn new_context(&mut self) -> u64 {
        self.advance();
        if self.next >= CONTEXTS {
            self.clear_entries();
            self.contexts.clear();
            self.next = 0;
        }
        let c = self.next;
        self.next += 1;
        self.contexts.insert(self.current, c);
        c
    }

    /// Forgets the translations of the pair in force (global ones too: a TLB may).
    pub fn flush_current(&mut self) {
        self.context = self.new_context();
        self.renew_key();
        self.flushes += 1;
    }

    /// Forgets one PCID of the ASID in force.
    pub fn flush_pcid(&mut self, pcid: u16) {
        if self.current.1 == pcid {
            self.flush_current();
        } else {
            self.contexts.remove(&(self.current.0, pcid));
            self.advance();
        }
    }

    /// Forgets every PCID of the ASID in force.
    pub fn flush_asid(&mut self) {
        let asid = self.current.0;
        self.contexts.retain(|k, _| k.0 != asid);
        self.flush_current();
    }

    /// Forgets the page of `linear`, in every context, whatever its size.
    pub fn flush_page(&mut self, linear: u64) {
        self.advance();
        for bank in 0..BANKS {
            *self.entry_mut(bank, linear) = EMPTY;
        }
        // The entries of a large page are as far apart as their addresses, modulo the size of a bank.
        let (first, count) = if self.giant >> (linear >> 30 & 63) & 1 != 0 {
            (0, TLB_SIZE)
        } else if self.large[window(linear) / 64] >> (window(linear) % 64) & 1 != 0 {
            let count = TLB_SIZE.min(1 << (WINDOW_SHIFT - 12));
            (index(linear) & !(count - 1), count)
        } else {
            return;
        };
        for bank in 0..BANKS {
            let at = (bank << TLB_BITS) + first;
            let sizes = &mut self.sizes[at..at + count];
            // Eight sizes at a time: most are 12.
            for (sizes, entries) in sizes.chunks_exact_mut(8).zip(self.entries[at..].chunks_exact_mut(8)) {
                if sizes == [12; 8] {
                    continue;
                }
                for (size, e) in sizes.iter_mut().zip(entries) {
                    let tag = if e.read != INVALID { e.read } else { e.exec };
                    if *size > 12 && (tag == INVALID || (tag ^ linear) >> *size == 0) {
                        *e = EMPTY;
                        *size = 12;
                    }
                }
            }
        }
    }

    /// Notes the guest page size (log2) behind the entry of `linear` in `bank`.
    pub fn note_size(&mut self, bank: usize, linear: u64, size: u8) {
        self.sizes[(bank << TLB_BITS) + index(linear)] = size;
        if size as u32 > WINDOW_SHIFT {
            self.giant |= 1 << (linear >> 30 & 63);
        } else if size > 12 {
            self.large[window(linear) / 64] |= 1 << (window(linear) % 64);
        }
    }

    /// Forgets every writable translation of the host page at `host` (it holds code now).
    pub fn protect_host_page(&mut self, host: u64) {
        for e in self.entries.iter_mut() {
            if e.write != INVALID && (e.write & PAGE_MASK).wrapping_add(e.addend) == host {
                e.write |= SLOW;
            }
        }
    }

    /// Forgets every writable translation.
    pub fn protect_all(&mut self) {
        for e in self.entries.iter_mut() {
            e.write = INVALID;
        }
    }
}
