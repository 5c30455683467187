// SPDX-License-Identifier: Apache-2.0
//! Read-modify-write accesses, plain and locked.

use super::Access;
use crate::mem::{host_cas, host_load, host_store};
use crate::x86::flags::Int;
use crate::x86::op::{Op, Res};
use crate::x86::state::Cpu;

impl Cpu {
    /// Reads the memory operand, applies `f`, writes the result back; not atomic. `f` may change flags and registers:
    /// by then the write cannot fault.
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
                let new = f(self, host_load(p));
                host_store(p, new);
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
        let new = f(self, old);
        self.store_bank(if self.mmu == 3 { 2 } else { self.mmu }, seg, linear, new)
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
        let fast = e.write == self.engine.tlb.tag(linear.wrapping_add(T::BYTES as u64 - 1));
        let p = if fast {
            e.addend.wrapping_add(linear)
        } else {
            self.prepare_write(seg, linear, T::BYTES)?;
            if (linear & 0xfff) as usize + T::BYTES > 4096 {
                return self.modify_split(seg, linear, f);
            }
            let mmu = if self.mmu == 3 { 2 } else { self.mmu };
            self.translate(mmu, seg, linear, T::BYTES, Access::Write)? as u64
        } as *mut T;
        let machine = (cfg!(not(target_arch = "x86_64")) && p as usize % T::BYTES != 0)
            .then(|| self.engine.machine.clone());
        let _guard = machine.as_ref().map(|m| m.split_lock.lock());
        // SAFETY: as in `load_bank`.
        unsafe {
            let mut old = host_load(p);
            loop {
                let new = f(self, old);
                let found = host_cas(p, old, new);
                if found == old {
                    break;
                }
                old = found;
            }
        }
        drop(_guard);
        if !fast {
            self.engine.after_code_write(p as usize, T::BYTES);
        }
        Ok(())
    }

    /// A locked operation across two pages: atomic only towards its own kind (a real bus lock stops everybody).
    fn modify_split<T: Int>(&mut self, seg: u8, linear: u64, mut f: impl FnMut(&mut Cpu, T) -> T) -> Res {
        let machine = self.engine.machine.clone();
        let _guard = machine.split_lock.lock();
        let mmu = if self.mmu == 3 { 2 } else { self.mmu };
        let old = self.load_bank::<T>(mmu, seg, linear)?;
        let new = f(self, old);
        self.store_bank(mmu, seg, linear, new)
    }
}
