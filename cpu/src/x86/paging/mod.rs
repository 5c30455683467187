// SPDX-License-Identifier: Apache-2.0
//! Address translation: the guest's page tables (APM vol. 2, chapter 5) and the nested ones below them (15.25).

use super::access::Access;
use super::op::Stop;
use super::state::{Cpu, attention, cr4, efer, sreg, vector};
use crate::engine::fill::Mapping;
use crate::engine::tlb::PAGE_MASK;
use crate::mem::PATIENCE;
use entry::NPF_FINAL;
use guest::{Failure, Guest};

mod entry;
mod guest;
mod nested;
mod space;

pub use entry::{PHYS_BITS, TableRights, VMEXIT_NPF, error, pte};
pub use space::Space;

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
        if self.engine.attention & attention::DEBUG != 0 && access != Access::Fetch {
            self.note_data_access(linear, size, access == Access::Write);
        }
        let watched = self.engine.attention & attention::DEBUG != 0;
        if let Some(host) = self.engine.translated(bank, linear, access, watched) {
            return Ok(host);
        }
        if self.long_mode() && !self.canonical(linear) {
            return Err(if seg as usize == sreg::SS && access != Access::Fetch {
                self.fault(vector::SS, Some(0))
            } else {
                self.gp(0)
            });
        }
        self.engine.tlb.fills += 1;
        let guest = loop {
            match self.walk_patiently(bank, linear, access) {
                Ok(g) => break g,
                // Only the host can have changed the tables: it does not do that for ever.
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
        // The registers of a virtual APIC are never in the TLB, but for fetches.
        let apic = guest.gpa & PAGE_MASK == self.avic.bar;
        if apic && access != Access::Fetch {
            return self.avic_access(linear, size, access);
        }
        let mapping = Mapping {
            host: nested.host,
            physical: guest.gpa,
            read: guest.read && !apic,
            write: guest.write && nested.write && !apic,
            exec: guest.exec && nested.exec,
            size: guest.size,
        };
        Ok(self.engine.fill(bank, linear, mapping, watched))
    }

    /// Walks the guest's tables; if other processors keep changing them under the walk, in the end while they stand.
    #[inline(always)]
    fn walk_patiently(&mut self, bank: usize, linear: u64, access: Access) -> Result<Guest, Failure> {
        match self.walk_guest(bank, linear, access) {
            Err(Failure::Again) => self.walk_again(bank, linear, access),
            done => done,
        }
    }

    #[cold]
    fn walk_again(&mut self, bank: usize, linear: u64, access: Access) -> Result<Guest, Failure> {
        let walk = |cpu: &mut Cpu| cpu.walk_guest(bank, linear, access);
        for _ in 1..PATIENCE {
            match walk(self) {
                Err(Failure::Again) => {}
                done => return done,
            }
        }
        // SAFETY: a walk has nothing to drop.
        unsafe { self.with_bus(walk) }?
    }
}
