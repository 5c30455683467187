// SPDX-License-Identifier: Apache-2.0
//! Address translation: the guest's page tables (APM vol. 2, chapter 5) and the nested ones below them (15.25).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::access::Access;
use super::op::{Res, Stop};
use super::state::{Cpu, attention, cr0, cr4, efer, sreg, vector};
use super::tlb::{GpaEntry, INVALID, LARGE_SHIFT, PAGE_MASK, SLOW};

/// Physical address bits of the processor, guest-physical and nested.
pub const PHYS_BITS: u32 = 48;
const PHYS_MASK: u64 = (1 << PHYS_BITS) - 1;
const LARGE_MASK: u64 = (1 << LARGE_SHIFT) - 1;
const ADDRESS: u64 = PHYS_MASK & PAGE_MASK;
const RESERVED_HIGH: u64 = ((1 << 52) - 1) & !PHYS_MASK;

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
const NPF_FINAL: u64 = 1 << 32;
const NPF_TABLE: u64 = 1 << 33;

/// Result of a nested walk.
#[derive(Clone, Copy)]
struct Nested {
    /// Host address of the 4 KiB page.
    host: u64,
    /// Writes allowed, and the dirty bit is set.
    write: bool,
    exec: bool,
    /// The 2 MiB around it are mapped by one leaf, to registered memory.
    large: bool,
}

/// Result of a guest walk.
struct Guest {
    gpa: u64,
    read: bool,
    write: bool,
    exec: bool,
    /// log2 of the page size.
    size: u8,
}

/// Why a guest walk did not give a translation.
enum Failure {
    Fault(u32),
    Stop(Stop),
    /// An entry changed under the walk.
    Again,
}

impl From<Stop> for Failure {
    fn from(s: Stop) -> Failure {
        Failure::Stop(s)
    }
}

/// Where one guest entry was read, to set its accessed and dirty bits once the walk has succeeded.
#[derive(Clone, Copy, Default)]
struct Visited {
    host: u64,
    value: u64,
}

/// The bank that instruction fetches use at this privilege level.
#[inline(always)]
pub fn fetch_bank(cpl: u8) -> usize {
    if cpl == 3 { 2 } else { 0 }
}

impl Cpu {
    /// Whether `linear` is canonical (or short, outside long mode).
    #[inline(always)]
    pub fn canonical(&self, linear: u64) -> bool {
        let shift = if self.cr4 & cr4::LA57 != 0 { 7 } else { 16 };
        ((linear << shift) as i64 >> shift) as u64 == linear
    }

    /// Translates `linear` for an access of `size` bytes that stays in its page, fills the TLB, and returns the host
    /// address. Raises #PF, #GP or #SS as the access would, or leaves with VMEXIT_NPF.
    ///
    /// `mmu` is a bank (0..2): see [`Cpu::mmu`]. `seg` decides between #SS and #GP.
    pub fn translate(
        &mut self,
        mmu: usize,
        seg: u8,
        linear: u64,
        size: usize,
        access: Access,
    ) -> Result<usize, Stop> {
        let bank = mmu & 3;
        debug_assert!(bank < 3);
        if self.attention & attention::DEBUG != 0 && access != Access::Fetch {
            self.note_data_access(linear, size, access == Access::Write);
        }
        let want = self.tlb.tag(linear);
        let e = self.tlb.entry(bank, linear);
        let tag = match access {
            Access::Read => e.read,
            Access::Write => e.write,
            Access::Fetch => e.exec,
        };
        if tag & !SLOW == want && tag != INVALID {
            if tag & SLOW != 0 && self.attention & attention::DEBUG == 0 {
                self.try_fast_again(bank, linear, want);
            }
            let e = self.tlb.entry(bank, linear);
            return Ok(e.addend.wrapping_add(linear) as usize);
        }
        if self.long_mode() && !self.canonical(linear) {
            return Err(if seg as usize == sreg::SS && access != Access::Fetch {
                self.fault(vector::SS, Some(0))
            } else {
                self.gp(0)
            });
        }
        self.tlb.fills += 1;
        let guest = loop {
            match self.walk_guest(bank, linear, access) {
                Ok(g) => break g,
                Err(Failure::Again) => continue,
                Err(Failure::Stop(s)) => return Err(s),
                Err(Failure::Fault(code)) => {
                    let mut code = code;
                    if access == Access::Write {
                        code |= error::W;
                    }
                    if bank == 2 {
                        code |= error::U;
                    }
                    let nx = self.efer & efer::NXE != 0 && self.cr4 & cr4::PAE != 0;
                    if access == Access::Fetch && (nx || self.cr4 & cr4::SMEP != 0) {
                        code |= error::ID;
                    }
                    return Err(self.pf(linear, code));
                }
            }
        };
        let write = access == Access::Write;
        let nested = self.nested(guest.gpa | (linear & 0xfff), write, access == Access::Fetch, NPF_FINAL)?;
        let page = nested.host;
        let addend = page.wrapping_sub(linear & PAGE_MASK);
        let writable = guest.write && nested.write;
        let code = writable
            && self
                .regions
                .page_near(page as usize, &mut self.region_guess)
                .is_some_and(|p| p.code.load(Ordering::SeqCst) != 0);
        let entry = self.tlb.entry_mut(bank, linear);
        let same = entry.addend == addend
            && [entry.read, entry.write, entry.exec].iter().all(|t| *t == INVALID || *t & !SLOW == want);
        if !same {
            entry.read = INVALID;
            entry.write = INVALID;
            entry.exec = INVALID;
            entry.addend = addend;
        }
        if guest.read {
            entry.read = want;
        }
        if writable {
            entry.write = if code { want | SLOW } else { want };
        }
        if guest.exec && nested.exec {
            entry.exec = want;
        }
        self.tlb.note_size(bank, linear, guest.size);
        if self.attention & attention::DEBUG != 0 {
            // Watched pages keep missing the fast path; which bytes are watched is asked on each access.
            let e = self.tlb.entry_mut(bank, linear);
            e.read |= SLOW;
            e.write |= SLOW;
        }
        Ok(page as usize | (linear & 0xfff) as usize)
    }

    /// Takes the slow-path mark off an entry whose reason is gone (the page's code was written, breakpoints are off).
    fn try_fast_again(&mut self, bank: usize, linear: u64, want: u64) {
        let e = *self.tlb.entry(bank, linear);
        let page = e.addend.wrapping_add(linear & PAGE_MASK) as usize;
        let code = self.regions.page(page).is_none_or(|p| p.code.load(Ordering::SeqCst) != 0);
        let entry = self.tlb.entry_mut(bank, linear);
        if entry.read & !SLOW == want {
            entry.read = want;
        }
        if entry.write & !SLOW == want && !code {
            entry.write = want;
        }
    }

    /// The host address of a guest-physical address, for `write`s or reads or fetches; `origin` says what kind of NPF.
    fn nested(&mut self, gpa: u64, write: bool, fetch: bool, origin: u64) -> Result<Nested, Stop> {
        let page = gpa & PAGE_MASK;
        let piece = gpa & !LARGE_MASK;
        let cached = *self.tlb.large_gpa(gpa);
        if cached.gpa & !0xfff == piece && cached.gpa != INVALID {
            let host = cached.host | (gpa & LARGE_MASK & PAGE_MASK);
            let n = Nested { host, write: cached.gpa & 1 != 0, exec: cached.gpa & 2 != 0, large: true };
            if (!write || n.write) && (!fetch || n.exec) {
                return Ok(n);
            }
        }
        let cached = *self.tlb.gpa(gpa);
        if cached.gpa & !0xfff == page && cached.gpa != INVALID {
            let n = Nested {
                host: cached.host,
                write: cached.gpa & 1 != 0,
                exec: cached.gpa & 2 != 0,
                large: false,
            };
            if (!write || n.write) && (!fetch || n.exec) {
                return Ok(n);
            }
        }
        if !self.ctl.nested_paging {
            if !self.regions.contains(page as usize, 4096) {
                return Err(self.vmexit(super::system::exitcode::SHUTDOWN, 0, 0));
            }
            return Ok(Nested { host: page, write: true, exec: true, large: false });
        }
        let n = self.walk_nested(gpa, write, fetch, origin)?;
        let rights = n.write as u64 | (n.exec as u64) << 1;
        if n.large {
            self.tlb.set_large_gpa(GpaEntry { gpa: piece | rights, host: n.host & !LARGE_MASK });
        } else {
            self.tlb.set_gpa(gpa, GpaEntry { gpa: page | rights, host: n.host });
        }
        Ok(n)
    }

    #[cold]
    fn npf(&mut self, gpa: u64, code: u32, write: bool, fetch: bool, origin: u64) -> Stop {
        let mut info = origin | (code | error::U) as u64;
        if write {
            info |= error::W as u64;
        }
        if fetch {
            info |= error::ID as u64;
        }
        self.vmexit(VMEXIT_NPF, info, gpa)
    }

    /// Walks the nested tables. All accesses are user accesses; A and D bits are set atomically.
    fn walk_nested(&mut self, gpa: u64, write: bool, fetch: bool, origin: u64) -> Result<Nested, Stop> {
        if gpa & !PHYS_MASK != 0 {
            return Err(self.npf(gpa, 0, write, fetch, origin));
        }
        'again: loop {
            let mut table = self.ctl.nested_cr3 & ADDRESS;
            let mut rights = pte::W | pte::U;
            let mut nx = false;
            let mut level = 4u32;
            loop {
                let shift = 12 + 9 * (level - 1);
                let at = table + ((gpa >> shift) & 0x1ff) * 8;
                if !self.regions.contains(at as usize, 8) {
                    return Err(self.npf(gpa, error::P | error::RSV, write, fetch, origin));
                }
                // SAFETY: the entry lies in registered memory and is 8-byte aligned.
                let slot = unsafe { AtomicU64::from_ptr(at as *mut u64) };
                let e = slot.load(Ordering::Acquire);
                if e & pte::P == 0 {
                    return Err(self.npf(gpa, 0, write, fetch, origin));
                }
                let leaf = level == 1 || (e & pte::PS != 0 && level <= 3);
                let low_reserved = if leaf && level > 1 { ((1u64 << shift) - 1) & !0x1fff } else { 0 };
                if e & (RESERVED_HIGH | low_reserved) != 0 || (level == 4 && e & pte::PS != 0) {
                    return Err(self.npf(gpa, error::P | error::RSV, write, fetch, origin));
                }
                rights &= e;
                nx |= e & pte::NX != 0;
                if leaf {
                    if rights & pte::U == 0 || (write && rights & pte::W == 0) || (fetch && nx) {
                        return Err(self.npf(gpa, error::P, write, fetch, origin));
                    }
                    let need = pte::A | if write { pte::D } else { 0 };
                    if e & need != need
                        && slot.compare_exchange(e, e | need, Ordering::SeqCst, Ordering::SeqCst).is_err()
                    {
                        continue 'again;
                    }
                    let size_mask = (1u64 << shift) - 1;
                    let host = (e & ADDRESS & !size_mask) | (gpa & size_mask & PAGE_MASK);
                    if !self.regions.contains(host as usize, 4096) {
                        return Err(self.npf(gpa, error::P | error::RSV, write, fetch, origin));
                    }
                    let dirty = (e | need) & pte::D != 0;
                    let large = shift >= LARGE_SHIFT
                        && self.regions.contains((host & !LARGE_MASK) as usize, 1 << LARGE_SHIFT);
                    return Ok(Nested { host, write: rights & pte::W != 0 && dirty, exec: !nx, large });
                }
                if e & pte::A == 0
                    && slot.compare_exchange(e, e | pte::A, Ordering::SeqCst, Ordering::SeqCst).is_err()
                {
                    continue 'again;
                }
                table = e & ADDRESS;
                level -= 1;
            }
        }
    }

    /// Host address of a guest page-table entry. Table walks are writes to the nested level (APM vol. 2, 15.25.5).
    fn entry_host(&mut self, gpa: u64) -> Result<u64, Stop> {
        let n = self.nested(gpa, true, false, NPF_TABLE)?;
        Ok(n.host | (gpa & 0xfff))
    }

    /// Walks the guest's page tables for one access.
    fn walk_guest(&mut self, bank: usize, linear: u64, access: Access) -> Result<Guest, Failure> {
        if self.cr0 & cr0::PG == 0 {
            return Ok(Guest { gpa: linear & PAGE_MASK, read: true, write: true, exec: true, size: 12 });
        }
        let pae = self.cr4 & cr4::PAE != 0;
        if !pae {
            return self.walk_legacy(bank, linear, access);
        }
        let long = self.long_mode();
        let mut visited = [Visited::default(); 5];
        let mut count = 0;
        let top = match (long, self.cr4 & cr4::LA57 != 0) {
            (true, true) => 5,
            (true, false) => 4,
            _ => 3,
        };
        let mut table = if long { self.cr3 & ADDRESS } else { self.cr3 & 0xffff_ffe0 };
        let mut rights = pte::W | pte::U;
        let mut nx = false;
        let nxe = self.efer & efer::NXE != 0;
        let mut level = top;
        let known = if long { self.tlb.directory(linear) } else { None };
        if let Some(d) = known {
            (level, rights, nx) = (1, d.rights, d.nx);
        }
        loop {
            let shift = 12 + 9 * (level - 1);
            let slot = ((linear >> shift) & 0x1ff) * 8;
            let host = match known {
                Some(d) => d.host | slot,
                None => self.entry_host(table + slot)?,
            };
            let (above, nx_above) = (rights, nx);
            // SAFETY: entry_host gives an address in registered memory; gpa is a multiple of 8.
            let e = unsafe { AtomicU64::from_ptr(host as *mut u64) }.load(Ordering::Acquire);
            if e & pte::P == 0 {
                return Err(Failure::Fault(0));
            }
            let pdpte = !long && level == 3;
            let leaf = level == 1 || (e & pte::PS != 0 && level <= 3 && !pdpte);
            let mut reserved = RESERVED_HIGH;
            if !nxe {
                reserved |= pte::NX;
            }
            if !long {
                reserved |= 0x7ff0_0000_0000_0000;
            }
            if pdpte {
                reserved |= 0x1e6 | pte::NX;
            }
            if level >= 4 {
                reserved |= pte::PS;
            }
            if leaf && level > 1 {
                reserved |= ((1u64 << shift) - 1) & !0x1fff;
            }
            if e & reserved != 0 {
                return Err(Failure::Fault(error::P | error::RSV));
            }
            if !pdpte {
                rights &= e;
                visited[count] = Visited { host, value: e };
                count += 1;
            }
            nx |= e & pte::NX != 0;
            if leaf {
                let key = (e >> 59 & 15) as u32;
                let mask = (1u64 << shift) - 1;
                let gpa = (e & ADDRESS & !mask) | (linear & mask & PAGE_MASK);
                let dirty = e & pte::D != 0;
                let done = self.finish(
                    bank,
                    access,
                    &visited[..count],
                    Leaf { gpa, rights, nx, key, dirty, size: shift as u8 },
                );
                if long && level == 1 && known.is_none() && done.is_ok() {
                    self.tlb.set_directory(linear, host & PAGE_MASK, above, nx_above);
                }
                return done;
            }
            table = e & ADDRESS;
            level -= 1;
        }
    }

    /// Two-level paging with 32-bit entries.
    fn walk_legacy(&mut self, bank: usize, linear: u64, access: Access) -> Result<Guest, Failure> {
        let pse = self.cr4 & cr4::PSE != 0;
        let read = |cpu: &mut Cpu, gpa: u64| -> Result<Visited, Failure> {
            let host = cpu.entry_host(gpa)?;
            // SAFETY: as in `walk_guest`, a multiple of 4.
            let value = unsafe { AtomicU32::from_ptr(host as *mut u32) }.load(Ordering::Acquire) as u64;
            Ok(Visited { host, value })
        };
        let directory = read(self, (self.cr3 & 0xffff_f000) + ((linear >> 22) & 0x3ff) * 4)?;
        let d = directory.value;
        if d & pte::P == 0 {
            return Err(Failure::Fault(0));
        }
        if d & pte::PS != 0 && pse {
            if d & (1 << 21) != 0 {
                return Err(Failure::Fault(error::P | error::RSV));
            }
            let base = (d & 0xffc0_0000) | (d >> 13 & 0xff) << 32;
            let gpa = base | (linear & 0x3f_f000);
            let leaf = Leaf {
                gpa,
                rights: d & (pte::W | pte::U),
                nx: false,
                key: 0,
                dirty: d & pte::D != 0,
                size: 22,
            };
            return self.finish(bank, access, &[directory], leaf);
        }
        let table = read(self, (d & 0xffff_f000) + ((linear >> 12) & 0x3ff) * 4)?;
        let t = table.value;
        if t & pte::P == 0 {
            return Err(Failure::Fault(0));
        }
        let leaf = Leaf {
            gpa: t & 0xffff_f000,
            rights: d & t & (pte::W | pte::U),
            nx: false,
            key: 0,
            dirty: t & pte::D != 0,
            size: 12,
        };
        self.finish(bank, access, &[directory, table], leaf)
    }

    /// Permission checks, then accessed and dirty bits.
    fn finish(
        &mut self,
        bank: usize,
        access: Access,
        visited: &[Visited],
        leaf: Leaf,
    ) -> Result<Guest, Failure> {
        let user_page = leaf.rights & pte::U != 0;
        let writable = leaf.rights & pte::W != 0;
        let wp = self.cr0 & cr0::WP != 0;
        let user = bank == 2;
        let data = if user { user_page } else { !(user_page && bank == 0 && self.cr4 & cr4::SMAP != 0) };
        let mut read = data;
        let mut write = data && (writable || (!user && !wp));
        let exec = !leaf.nx && if user { user_page } else { !(user_page && self.cr4 & cr4::SMEP != 0) };
        let mut key_fault = false;
        if self.cr4 & cr4::PKE != 0 && self.long_mode() && user_page {
            self.keys |= 1 << leaf.key;
            let bits = self.rb.pkru >> (leaf.key * 2);
            let no_access = bits & 1 != 0;
            let no_write = no_access || (bits & 2 != 0 && (user || wp));
            // Whether or not the page's own rights allow it (SDM vol. 3, 4.7).
            key_fault = match access {
                Access::Read => no_access,
                Access::Write => no_write,
                Access::Fetch => false,
            };
            read &= !no_access;
            write &= !no_write;
        }
        let ok = match access {
            Access::Read => read,
            Access::Write => write,
            Access::Fetch => exec,
        };
        if !ok {
            return Err(Failure::Fault(error::P | if key_fault { error::PK } else { 0 }));
        }
        let wide = self.cr4 & cr4::PAE != 0;
        for (n, v) in visited.iter().enumerate() {
            let last = n + 1 == visited.len();
            let need = pte::A | if last && access == Access::Write { pte::D } else { 0 };
            if v.value & need == need {
                continue;
            }
            // SAFETY: `visited` holds addresses that `entry_host` gave in this walk.
            let changed = unsafe {
                if wide {
                    AtomicU64::from_ptr(v.host as *mut u64)
                        .compare_exchange(v.value, v.value | need, Ordering::SeqCst, Ordering::SeqCst)
                        .is_err()
                } else {
                    AtomicU32::from_ptr(v.host as *mut u32)
                        .compare_exchange(
                            v.value as u32,
                            (v.value | need) as u32,
                            Ordering::SeqCst,
                            Ordering::SeqCst,
                        )
                        .is_err()
                }
            };
            if changed {
                return Err(Failure::Again);
            }
            self.after_code_write(v.host as usize, 8);
        }
        let dirty = leaf.dirty || access == Access::Write;
        Ok(Guest { gpa: leaf.gpa, read, write: write && dirty, exec, size: leaf.size })
    }
}

/// A leaf entry with the rights gathered on the way to it.
struct Leaf {
    gpa: u64,
    rights: u64,
    nx: bool,
    key: u32,
    dirty: bool,
    size: u8,
}

impl Cpu {
    /// Before a write of `size` bytes at a host address: [`Stop::SelfModify`] if it hits the running block.
    #[inline]
    pub fn before_code_write(&mut self, host: usize, size: usize) -> Res {
        if self.single || self.block.is_null() {
            return Ok(());
        }
        // SAFETY: `block` is the running block, alive until the run loop changes it.
        let b = unsafe { &*self.block };
        if b.overlaps(host, size) { Err(Stop::SelfModify) } else { Ok(()) }
    }

    /// After a write through the slow path: tells every processor if it hit decoded code.
    #[inline]
    pub fn after_code_write(&mut self, host: usize, size: usize) {
        let Some(page) = self.regions.page_near(host, &mut self.region_guess) else { return };
        let mask = crate::mem::chunk_mask(host & 0xfff, size);
        if page.code.load(Ordering::SeqCst) & mask != 0 {
            page.code.fetch_and(!mask, Ordering::SeqCst);
            self.code_written();
        }
    }

    #[cold]
    fn code_written(&mut self) {
        self.stamp = self.stamp.wrapping_add(1);
        self.blocks.invalidations += 1;
        self.machine.signal(Some(&self.shared), super::state::pending::CODE_CHANGED);
    }
}
