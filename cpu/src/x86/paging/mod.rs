// SPDX-License-Identifier: Apache-2.0
//! Address translation: the guest's page tables (APM vol. 2, chapter 5) and the nested ones below them (15.25).

use std::sync::atomic::Ordering;

use super::access::Access;
use super::op::Stop;
use super::state::{Cpu, attention, cr4, efer, sreg, vector};
use crate::engine::tlb::{INVALID, PAGE_MASK, SLOW};
use entry::NPF_FINAL;
use guest::Failure;

mod entry;
mod guest;
mod nested;

pub use entry::{PHYS_BITS, VMEXIT_NPF, error, pte};

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
}
