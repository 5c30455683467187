// SPDX-License-Identifier: Apache-2.0
//! The nested tables (APM vol. 2, 15.25).

use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::{ADDRESS, LARGE_MASK, NPF_TABLE, PHYS_MASK, RESERVED_HIGH, VMEXIT_NPF, error, pte};
use crate::engine::tlb::{Frame, LARGE_SHIFT, PAGE_MASK};
use crate::x86::op::Stop;
use crate::x86::state::Cpu;

impl Cpu {
    /// The host address of a guest-physical address, for `write`s or reads or fetches; `origin` says what kind of NPF.
    pub(super) fn nested(&mut self, gpa: u64, write: bool, fetch: bool, origin: u64) -> Result<Frame, Stop> {
        if let Some(frame) = self.engine.tlb.frames().find(gpa, write, fetch) {
            return Ok(frame);
        }
        let page = gpa & PAGE_MASK;
        if !self.ctl.nested_paging {
            if !self.engine.regions.contains(page as usize, 4096) {
                return Err(self.vmexit(crate::x86::system::exitcode::SHUTDOWN, 0, 0));
            }
            return Ok(Frame { host: page, write: true, exec: true, large: false });
        }
        let n = self.walk_nested(gpa, write, fetch, origin)?;
        self.engine.tlb.frames_mut().remember(gpa, n);
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
    fn walk_nested(&mut self, gpa: u64, write: bool, fetch: bool, origin: u64) -> Result<Frame, Stop> {
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
                if !self.engine.table_in_memory(at as usize) {
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
                    if !self.engine.in_memory(host as usize, 4096) {
                        return Err(self.npf(gpa, error::P | error::RSV, write, fetch, origin));
                    }
                    let dirty = (e | need) & pte::D != 0;
                    let large = shift >= LARGE_SHIFT
                        && self.engine.in_memory((host & !LARGE_MASK) as usize, 1 << LARGE_SHIFT);
                    return Ok(Frame { host, write: rights & pte::W != 0 && dirty, exec: !nx, large });
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
