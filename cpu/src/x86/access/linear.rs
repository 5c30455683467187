// SPDX-License-Identifier: Apache-2.0
//! Loads and stores of one value at a linear address.

use super::{Access, SYSTEM};
use crate::mem::{host_load, host_store};
use crate::x86::flags::Int;
use crate::x86::op::{Res, Stop};
use crate::x86::state::{Cpu, sreg};

impl Cpu {
    /// Loads from a linear address. `seg` only decides between #SS and #GP for non-canonical addresses.
    #[inline(always)]
    pub fn load_at<T: Int>(&mut self, seg: u8, linear: u64) -> Result<T, Stop> {
        match self.engine.hit::<T>(linear, Access::Read) {
            // SAFETY: `hit` gives mapped memory.
            Some(p) => Ok(unsafe { host_load(p) }),
            None => self.load_slow(self.mmu, seg, linear),
        }
    }

    /// Stores to a linear address.
    #[inline(always)]
    pub fn store_at<T: Int>(&mut self, seg: u8, linear: u64, v: T) -> Res {
        match self.engine.hit::<T>(linear, Access::Write) {
            // SAFETY: `hit` gives mapped memory.
            Some(p) => {
                unsafe { host_store(p, v) };
                Ok(())
            }
            None => self.store_slow(self.mmu, seg, linear, v),
        }
    }

    /// Implicit supervisor load (descriptor tables, TSS, IDT).
    pub fn load_system<T: Int>(&mut self, linear: u64) -> Result<T, Stop> {
        self.load_bank(SYSTEM, sreg::DS as u8, linear)
    }

    /// Implicit supervisor store.
    pub fn store_system<T: Int>(&mut self, linear: u64, v: T) -> Res {
        self.store_bank(SYSTEM, sreg::DS as u8, linear, v)
    }

    /// Loads with an explicit MMU index.
    #[inline(always)]
    pub fn load_bank<T: Int>(&mut self, mmu: usize, seg: u8, linear: u64) -> Result<T, Stop> {
        let e = self.engine.tlb.entry(mmu, linear);
        if e.read == self.engine.tlb.tag(linear.wrapping_add(T::BYTES as u64 - 1)) {
            // SAFETY: a filled entry maps its whole page to registered memory, and first and last byte are in it.
            Ok(unsafe { host_load(e.addend.wrapping_add(linear) as *const T) })
        } else {
            self.load_slow(mmu, seg, linear)
        }
    }

    /// Stores with an explicit MMU index.
    #[inline(always)]
    pub fn store_bank<T: Int>(&mut self, mmu: usize, seg: u8, linear: u64, v: T) -> Res {
        let e = self.engine.tlb.entry(mmu, linear);
        if e.write == self.engine.tlb.tag(linear.wrapping_add(T::BYTES as u64 - 1)) {
            // SAFETY: as in `load_bank`.
            unsafe { host_store(e.addend.wrapping_add(linear) as *mut T, v) };
            Ok(())
        } else {
            self.store_slow(mmu, seg, linear, v)
        }
    }

    /// Whether an access of `size` bytes needs one translation and no alignment check.
    #[inline(always)]
    fn plain(mmu: usize, linear: u64, size: usize) -> bool {
        mmu != 3 && (linear & 0xfff) as usize + size <= 4096
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Int>(&mut self, mmu: usize, seg: u8, linear: u64) -> Result<T, Stop> {
        if Self::plain(mmu, linear, T::BYTES) {
            let linear = self.wrap(linear);
            let host = self.translate(mmu, seg, linear, T::BYTES, Access::Read)?;
            // SAFETY: translate gives an address in a registered page; the access ends in it.
            return Ok(unsafe { host_load(host as *const T) });
        }
        let mut bytes = [0u8; 8];
        self.read_bytes(mmu, seg, linear, &mut bytes[..T::BYTES])?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Int>(&mut self, mmu: usize, seg: u8, linear: u64, v: T) -> Res {
        if Self::plain(mmu, linear, T::BYTES) {
            let linear = self.wrap(linear);
            let host = self.translate(mmu, seg, linear, T::BYTES, Access::Write)?;
            // A page without code has its translation in the TLB now.
            let code = self.engine.tlb.entry(mmu, linear).write != self.engine.tlb.tag(linear);
            if code {
                self.engine.before_code_write(host, T::BYTES)?;
            }
            // SAFETY: as in `load_slow`.
            unsafe { host_store(host as *mut T, v) };
            if code {
                self.engine.after_code_write(host, T::BYTES);
            }
            return Ok(());
        }
        self.write_bytes(mmu, seg, linear, &v.to_u64().to_le_bytes()[..T::BYTES])
    }

    /// Host address of `linear` and the bytes left in its page, when the page is in the TLB and needs no slow path (no
    /// code in it for writes, no breakpoint, no alignment checks): what bulk copies work on.
    #[inline]
    pub fn span(&self, linear: u64, access: Access) -> Option<(*mut u8, usize)> {
        let linear = self.wrap(linear);
        let e = self.engine.tlb.entry(self.mmu, linear);
        let tag = if access == Access::Write { e.write } else { e.read };
        (tag == self.engine.tlb.tag(linear))
            .then(|| (e.addend.wrapping_add(linear) as *mut u8, 4096 - (linear & 0xfff) as usize))
    }
}
