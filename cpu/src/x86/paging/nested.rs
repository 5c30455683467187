// SPDX-License-Identifier: Apache-2.0
//! The nested tables (APM vol. 2, 15.25).

use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::{ADDRESS, LARGE_MASK, NPF_TABLE, PHYS_MASK, RESERVED_HIGH, VMEXIT_NPF, error, pte};
use crate::engine::tlb::{GpaEntry, INVALID, LARGE_SHIFT, PAGE_MASK};
use crate::x86::op::Stop;
use crate::x86::state::Cpu;

/// Result of a nested walk.
#[derive(Clone, Copy)]
pub(super) struct Nested {
    /// Host address of the 4 KiB page.
    pub(super) host: u64,
    /// Writes allowed, and the dirty bit is set.
    pub(super) write: bool,
    pub(super) exec: bool,
    /// The 2 MiB around it are mapped by one leaf, to registered memory.
    pub(super) large: bool,
}

impl Cpu {
    /// The host address of a guest-physical address, for `write`s or reads or fetches; `origin` says what kind of NPF.
    pub(super) fn nested(&mut self, gpa: u64, write: bool, fetch: bool, origin: u64) -> Result<Nested, Stop> {
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
                return Err(self.vmexit(crate::x86::system::exitcode::SHUTDOWN, 0, 0));
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
    pub(super) fn entry_host(&mut self, gpa: u64) -> Result<u64, Stop> {
        let n = self.nested(gpa, true, false, NPF_TABLE)?;
        Ok(n.host | (gpa & 0xfff))
    }
}
