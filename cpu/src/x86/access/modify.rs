// SPDX-License-Identifier: Apache-2.0
//! Read-modify-write accesses, plain and locked.

use super::Access;
use crate::mem::{PATIENCE, host_cas, host_load, host_store, is_atomic};
use crate::x86::flags::{Int, LazyFlags};
use crate::x86::op::{Op, Res, Stop};
use crate::x86::state::{Cpu, LINE};
use crate::x86::system::exitcode;

impl Cpu {
    /// What `f` returns, and the flags that hold when that has been stored: memory may be lost until then.
    #[inline(always)]
    pub(in crate::x86) fn before_store<T: Int>(&mut self, f: impl FnOnce(&mut Cpu) -> T) -> (T, LazyFlags) {
        let before = self.lf;
        let new = f(self);
        (new, core::mem::replace(&mut self.lf, before))
    }

    /// Reads the memory operand, applies `f`, writes the result back; not atomic. `f` may change flags, which hold when
    /// the write is done, and nothing else.
    #[inline(always)]
    pub fn modify<T: Int>(&mut self, op: &Op, f: impl FnOnce(&mut Cpu, T) -> T) -> Res {
        let linear = self.lin(op, T::BYTES, Access::Write)?;
        self.modify_at(op.seg, linear, f)
    }

    /// As [`Cpu::modify`], at a linear address.
    #[inline(always)]
    pub fn modify_at<T: Int>(&mut self, seg: u8, linear: u64, f: impl FnOnce(&mut Cpu, T) -> T) -> Res {
        match self.engine.hit::<T>(linear, Access::Write) {
            // SAFETY: `hit` gives mapped memory; `f` doesn't unmap it.
            Some(p) => unsafe {
                let old = host_load(p);
                let (new, flags) = self.before_store(|cpu| f(cpu, old));
                host_store(p, new);
                self.lf = flags;
                Ok(())
            },
            None => self.modify_slow(seg, linear, f),
        }
    }

    #[cold]
    #[inline(never)]
    fn modify_slow<T: Int>(&mut self, seg: u8, linear: u64, f: impl FnOnce(&mut Cpu, T) -> T) -> Res {
        self.prepare_write(seg, linear, T::BYTES)?;
        let old = self.load_bank::<T>(if self.mmu == 3 { 2 } else { self.mmu }, seg, linear)?;
        let (new, flags) = self.before_store(|cpu| f(cpu, old));
        self.store_bank(if self.mmu == 3 { 2 } else { self.mmu }, seg, linear, new)?;
        self.lf = flags;
        Ok(())
    }

    /// As [`Cpu::modify`], atomic towards other processors (LOCK). `f` may be called several times.
    #[inline(always)]
    pub fn modify_locked<T: Int>(&mut self, op: &Op, f: impl FnMut(&mut Cpu, T) -> T) -> Res {
        let linear = self.lin(op, T::BYTES, Access::Write)?;
        self.modify_locked_at(op.seg, linear, f)
    }

    /// As [`Cpu::modify_locked`], at a linear address.
    #[inline(always)]
    pub fn modify_locked_at<T: Int>(
        &mut self,
        seg: u8,
        linear: u64,
        mut f: impl FnMut(&mut Cpu, T) -> T,
    ) -> Res {
        let linear = self.wrap(linear);
        let e = self.engine.tlb.entry(self.mmu, linear);
        if e.write == self.engine.tlb.tag(linear.wrapping_add(T::BYTES as u64 - 1)) {
            let p = e.addend.wrapping_add(linear) as *mut T;
            // SAFETY: as in `load_bank`.
            if is_atomic(p) && unsafe { self.exchange(p, &mut f) } {
                return Ok(());
            }
        }
        self.modify_locked_slow(seg, linear, f)
    }

    /// Replaces what is at `p`; false if other processors were always faster. `f` may be called several times.
    ///
    /// # Safety
    /// `p` must be writable memory, on which [`host_cas`] is atomic.
    #[inline(always)]
    pub unsafe fn exchange<T: Int>(&mut self, p: *mut T, f: &mut impl FnMut(&mut Cpu, T) -> T) -> bool {
        // SAFETY: given.
        let mut old = unsafe { host_load(p) };
        for _ in 0..PATIENCE {
            let (new, flags) = self.before_store(|cpu| f(cpu, old));
            // SAFETY: given.
            let found = unsafe { host_cas(p, old, new) };
            if found == old {
                self.lf = flags;
                return true;
            }
            old = found;
        }
        false
    }

    #[cold]
    #[inline(never)]
    fn modify_locked_slow<T: Int>(
        &mut self,
        seg: u8,
        linear: u64,
        mut f: impl FnMut(&mut Cpu, T) -> T,
    ) -> Res {
        self.prepare_write(seg, linear, T::BYTES)?;
        let mmu = if self.mmu == 3 { 2 } else { self.mmu };
        if (linear & 0xfff) as usize + T::BYTES <= 4096 {
            let p = self.translate(mmu, seg, linear, T::BYTES, Access::Write)? as *mut T;
            // SAFETY: `translate` gives the host address of registered memory, in one page.
            if is_atomic(p) && unsafe { self.exchange(p, &mut f) } {
                self.engine.after_code_write(p as usize, T::BYTES);
                return Ok(());
            }
        }
        if linear as usize % LINE + T::BYTES > LINE {
            self.count_bus_lock()?;
        }
        // SAFETY: an instruction has nothing to drop.
        unsafe {
            self.with_bus(|cpu| {
                let old = cpu.load_bank::<T>(mmu, seg, linear)?;
                let (new, flags) = cpu.before_store(|cpu| f(cpu, old));
                cpu.store_bank(mmu, seg, linear, new)?;
                cpu.lf = flags;
                Ok(())
            })
        }?
    }

    /// A locked operation is about to take the bus as it goes across cache lines: #VMEXIT before it when the guest has
    /// none left (Bus Lock Threshold: APM vol. 2, 15.14.5).
    fn count_bus_lock(&mut self) -> Res {
        if self.intercepted(exitcode::BUSLOCK) {
            match self.ctl.bus_locks.checked_sub(1) {
                Some(left) => self.ctl.bus_locks = left,
                None => return Err(self.vmexit(exitcode::BUSLOCK, 0, 0)),
            }
        }
        Ok(())
    }

    /// Calls `f` while no other processor executes anything ([`Bus::lock`]).
    ///
    /// # Safety
    /// `f` has nothing to drop while it touches guest memory.
    ///
    /// [`Bus::lock`]: crate::mem::Bus::lock
    #[cold]
    pub unsafe fn with_bus<R>(&mut self, f: impl FnOnce(&mut Cpu) -> R) -> Result<R, Stop> {
        let engine = &self.engine;
        let (machine, shared, regions) =
            (engine.machine.clone(), engine.shared.clone(), engine.regions.clone());
        // SAFETY: given.
        unsafe { machine.bus().lock(&shared, &regions, || f(self)) }.map_err(|lost| self.machine_check(lost))
    }
}
