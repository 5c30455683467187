// SPDX-License-Identifier: Apache-2.0
//! Accesses of any size and alignment, page by page; nothing is changed when one faults.

use super::Access;
use crate::mem::{host_load, host_read, host_store, host_touch, host_write};
use crate::x86::op::{Res, Stop};
use crate::x86::state::{Cpu, sreg, vector};

impl Cpu {
    /// Checks CR0.AM alignment (MMU index 3) and returns the bank to translate with.
    fn check_alignment(&mut self, mmu: usize, linear: u64, size: usize) -> Result<usize, Stop> {
        if mmu != 3 {
            return Ok(mmu);
        }
        if size.is_power_of_two() && size <= 8 && linear & (size as u64 - 1) != 0 {
            return Err(self.fault(vector::AC, Some(0)));
        }
        Ok(2)
    }

    /// A non-canonical last byte comes before what the first page has to say.
    fn check_end(&mut self, seg: u8, linear: u64, size: usize) -> Res {
        let last = linear.wrapping_add(size as u64).wrapping_sub(1);
        if self.long_mode() && self.canonical(linear) && !self.canonical(last) {
            let vector = if seg as usize == sreg::SS { vector::SS } else { vector::GP };
            return Err(self.fault(vector, Some(0)));
        }
        Ok(())
    }

    /// Reads up to 4096 bytes, any alignment; nothing is changed when it faults.
    pub fn read_bytes(&mut self, mmu: usize, seg: u8, linear: u64, out: &mut [u8]) -> Res {
        let mmu = self.check_alignment(mmu, linear, out.len())?;
        let linear = self.wrap(linear);
        let first = (4096 - (linear & 0xfff) as usize).min(out.len());
        self.check_end(seg, linear, out.len())?;
        let a = self.translate(mmu, seg, linear, first, Access::Read)?;
        let b = if first < out.len() {
            let second = self.wrap(linear.wrapping_add(first as u64));
            Some(self.translate(mmu, seg, second, out.len() - first, Access::Read)?)
        } else {
            None
        };
        // SAFETY: translate returns host addresses of registered pages; first and the rest stay within one page each.
        // An access within a page is done in one piece where it is a power of two, so that it is as atomic as a move.
        unsafe {
            match (b, out.len()) {
                (None, 1) => out[0] = host_load(a as *const u8),
                (None, 2) => out.copy_from_slice(&host_load(a as *const u16).to_le_bytes()),
                (None, 4) => out.copy_from_slice(&host_load(a as *const u32).to_le_bytes()),
                (None, 8) => out.copy_from_slice(&host_load(a as *const u64).to_le_bytes()),
                _ => {
                    host_read(a as *const u8, &mut out[..first]);
                    if let Some(b) = b {
                        host_read(b as *const u8, &mut out[first..]);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes up to 4096 bytes, any alignment; nothing is changed when it faults.
    pub fn write_bytes(&mut self, mmu: usize, seg: u8, linear: u64, data: &[u8]) -> Res {
        let mmu = self.check_alignment(mmu, linear, data.len())?;
        let linear = self.wrap(linear);
        let first = (4096 - (linear & 0xfff) as usize).min(data.len());
        self.check_end(seg, linear, data.len())?;
        let a = self.translate(mmu, seg, linear, first, Access::Write)?;
        let b = if first < data.len() {
            let second = self.wrap(linear.wrapping_add(first as u64));
            Some(self.translate(mmu, seg, second, data.len() - first, Access::Write)?)
        } else {
            None
        };
        self.engine.before_code_write(a, first)?;
        if let Some(b) = b {
            self.engine.before_code_write(b, data.len() - first)?;
        }
        // SAFETY: as in `read_bytes`.
        unsafe {
            match (b, data.len()) {
                (None, 1) => host_store(a as *mut u8, data[0]),
                (None, 2) => host_store(a as *mut u16, u16::from_le_bytes([data[0], data[1]])),
                (None, 4) => {
                    host_store(a as *mut u32, u32::from_le_bytes([data[0], data[1], data[2], data[3]]))
                }
                (None, 8) => {
                    let mut v = [0; 8];
                    v.copy_from_slice(data);
                    host_store(a as *mut u64, u64::from_le_bytes(v));
                }
                _ => {
                    host_write(&data[..first], a as *mut u8);
                    if let Some(b) = b {
                        host_write(&data[first..], b as *mut u8);
                    }
                }
            }
        }
        self.engine.after_code_write(a, first);
        if let Some(b) = b {
            self.engine.after_code_write(b, data.len() - first);
        }
        Ok(())
    }

    /// Checks that `size` bytes can be written, without writing (probes both pages).
    pub fn probe_write(&mut self, seg: u8, linear: u64, size: usize) -> Res {
        let mmu = self.check_alignment(self.mmu, linear, 1)?;
        let linear = self.wrap(linear);
        let first = (4096 - (linear & 0xfff) as usize).min(size);
        self.check_end(seg, linear, size)?;
        self.translate(mmu, seg, linear, first, Access::Write)?;
        if first < size {
            let second = self.wrap(linear.wrapping_add(first as u64));
            self.translate(mmu, seg, second, size - first, Access::Write)?;
        }
        Ok(())
    }

    /// Makes sure that a following write of the same bytes neither faults nor asks for [`Stop::SelfModify`], and if memory
    /// is lost, has not begun.
    pub fn prepare_write(&mut self, seg: u8, linear: u64, size: usize) -> Res {
        let mmu = self.check_alignment(self.mmu, linear, size)?;
        let linear = self.wrap(linear);
        let first = (4096 - (linear & 0xfff) as usize).min(size);
        self.check_end(seg, linear, size)?;
        let a = self.translate(mmu, seg, linear, first, Access::Write)?;
        self.engine.before_code_write(a, first)?;
        if first < size {
            let second = self.wrap(linear.wrapping_add(first as u64));
            let b = self.translate(mmu, seg, second, size - first, Access::Write)?;
            self.engine.before_code_write(b, size - first)?;
            // Memory must not be lost between the two halves of a write that is not the same when done again.
            // SAFETY: as in `read_bytes`.
            unsafe { host_touch(b as *mut u8) };
        }
        Ok(())
    }
}
