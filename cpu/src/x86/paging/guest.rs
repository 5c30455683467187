// SPDX-License-Identifier: Apache-2.0
//! The guest's page tables (APM vol. 2, chapter 5).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::entry::{ADDRESS, RESERVED_HIGH, TableRights, error, pte};
use crate::engine::tlb::{Directory, PAGE_MASK};
use crate::x86::access::Access;
use crate::x86::op::Stop;
use crate::x86::state::{Cpu, cr0, cr4, efer};

/// Result of a guest walk.
pub(super) struct Guest {
    pub(super) gpa: u64,
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) exec: bool,
    /// log2 of the page size.
    pub(super) size: u8,
}

/// Why a guest walk did not give a translation.
pub(super) enum Failure {
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
    /// Walks the guest's page tables for one access.
    #[inline(always)]
    pub(super) fn walk_guest(&mut self, bank: usize, linear: u64, access: Access) -> Result<Guest, Failure> {
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
        let known = if long { self.engine.tlb.directory(linear) } else { None };
        if let Some(d) = known {
            (level, rights, nx) = (1, d.rights.bits, d.rights.nx);
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
                    let rights = TableRights { bits: above, nx: nx_above };
                    self.engine.tlb.set_directory(linear, Directory { host: host & PAGE_MASK, rights });
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
            self.engine.after_code_write(v.host as usize, 8);
        }
        let dirty = leaf.dirty || access == Access::Write;
        Ok(Guest { gpa: leaf.gpa, read, write: write && dirty, exec, size: leaf.size })
    }
}
