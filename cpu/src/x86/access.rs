// SPDX-License-Identifier: Apache-2.0
//! Guest memory accesses: effective and linear addresses, loads, stores, read-modify-writes, the stack.
//!
//! The fast path is a tag compare and one host access. Everything else (misses, page crossings, alignment checks, code
//! pages, data breakpoints) goes through [`Cpu::translate`] in `paging.rs`.

use super::flags::Int;
use super::op::{Op, Res, Stop, flag};
use super::state::{Cpu, reg, sreg, vector};
use super::tlb::index;
use crate::mem::{host_cas, host_load, host_store};

/// What an access is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write (also the read half of a read-modify-write).
    Write,
    /// Instruction fetch.
    Fetch,
}

/// MMU index of implicit supervisor accesses (descriptor tables, TSS): never subject to AC, always to SMAP.
pub const SYSTEM: usize = 0;

impl Cpu {
    // ---- addresses ---------------------------------------------------------------------------------------------

    /// Base + index * scale + displacement, not truncated.
    #[inline(always)]
    pub fn ea_raw(&self, op: &Op) -> u64 {
        self.reg::<u64>(op.base)
            .wrapping_add(self.reg::<u64>(op.index) << op.scale)
            .wrapping_add(op.disp as i64 as u64)
    }

    /// The effective address truncated to the address size: what LEA computes.
    #[inline(always)]
    pub fn ea(&self, op: &Op) -> u64 {
        let ea = self.ea_raw(op);
        match op.asize {
            8 => ea,
            4 => ea as u32 as u64,
            _ => ea as u16 as u64,
        }
    }

    /// Linear address of the memory operand of `size` bytes, with the segment checks of the mode.
    #[inline(always)]
    pub fn lin(&mut self, op: &Op, size: usize, access: Access) -> Result<u64, Stop> {
        if op.flags & flag::LEGACY_EA == 0 {
            // In 64-bit mode `ea_base` is 0 but for FS and GS.
            Ok(self.ea_raw(op).wrapping_add(self.ea_base[(op.seg & 7) as usize]))
        } else {
            let ea = self.ea(op);
            self.seg_lin(op.seg, ea, size, access)
        }
    }

    /// Linear address of `size` bytes at `offset` in segment `seg`, with the mode's checks.
    ///
    /// 64-bit mode: no limits (canonicality is checked on the access). Otherwise: null/type/limit checks, #SS(0) for
    /// SS and #GP(0) for the others (APM vol. 2, 4.7 and 4.12).
    #[cold]
    #[inline(never)]
    pub fn seg_lin(&mut self, seg: u8, offset: u64, size: usize, access: Access) -> Result<u64, Stop> {
        let s = &self.seg[seg as usize % 6];
        if self.code_size == 8 {
            return Ok(offset.wrapping_add(self.ea_base[seg as usize & 7]));
        }
        let offset = offset as u32;
        let last = offset as u64 + size as u64 - 1;
        let linear = (s.base as u32).wrapping_add(offset) as u64;
        // 4-KByte granular or not, the cached limit is in bytes. Real and virtual-8086 mode have it too.
        let kind = s.kind();
        let expand_down = kind & 0xc == 4;
        let limit = s.limit as u64;
        let in_limit = if expand_down {
            let top = if s.db() { u32::MAX as u64 } else { 0xffff };
            offset as u64 > limit && last <= top
        } else {
            // What happens at the end of 4 GiB is up to the processor: in compatibility mode accesses wrap around.
            last <= limit || (s.limit == u32::MAX && self.long_mode())
        };
        let allowed = if self.real_or_v86() {
            true
        } else {
            s.present()
                && match access {
                    Access::Read => kind & 8 == 0 || kind & 2 != 0,
                    Access::Write => kind & 0xa == 2,
                    Access::Fetch => true,
                }
        };
        if in_limit && allowed {
            Ok(linear)
        } else if seg as usize == sreg::SS {
            Err(self.fault(vector::SS, Some(0)))
        } else {
            Err(self.gp(0))
        }
    }

    /// Host address of a data access that needs nothing but a translation in the TLB; None: take the slow path.
    #[inline(always)]
    pub fn hit<T: Int>(&self, linear: u64, access: Access) -> Option<*mut T> {
        // SAFETY: `bank` points to the first entry of a whole bank (see `Cpu::update_mmu`), `index` stays inside.
        let e = unsafe { &*self.bank.add(index(linear)) };
        let tag = if access == Access::Write { e.write } else { e.read };
        // A filled entry maps its whole page to registered memory; the tag is that of the last byte's page, the entry
        // that of the first's: they agree only if both bytes are in it.
        (tag == self.tlb.tag(linear.wrapping_add(T::BYTES as u64 - 1)))
            .then(|| e.addend.wrapping_add(linear) as *mut T)
    }

    // ---- by linear address -------------------------------------------------------------------------------------

    /// Loads from a linear address. `seg` only decides between #SS and #GP for non-canonical addresses.
    #[inline(always)]
    pub fn load_at<T: Int>(&mut self, seg: u8, linear: u64) -> Result<T, Stop> {
        match self.hit::<T>(linear, Access::Read) {
            // SAFETY: `hit` gives mapped memory.
            Some(p) => Ok(unsafe { host_load(p) }),
            None => self.load_slow(self.mmu, seg, linear),
        }
    }

    /// Stores to a linear address.
    #[inline(always)]
    pub fn store_at<T: Int>(&mut self, seg: u8, linear: u64, v: T) -> Res {
        match self.hit::<T>(linear, Access::Write) {
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
        let e = self.tlb.entry(mmu, linear);
        if e.read == self.tlb.tag(linear.wrapping_add(T::BYTES as u64 - 1)) {
            // SAFETY: a filled entry maps its whole page to registered memory, and first and last byte are in it.
            Ok(unsafe { host_load(e.addend.wrapping_add(linear) as *const T) })
        } else {
            self.load_slow(mmu, seg, linear)
        }
    }

    /// Stores with an explicit MMU index.
    #[inline(always)]
    pub fn store_bank<T: Int>(&mut self, mmu: usize, seg: u8, linear: u64, v: T) -> Res {
        let e = self.tlb.entry(mmu, linear);
        if e.write == self.tlb.tag(linear.wrapping_add(T::BYTES as u64 - 1)) {
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
            let code = self.tlb.entry(mmu, linear).write != self.tlb.tag(linear);
            if code {
                self.before_code_write(host, T::BYTES)?;
            }
            // SAFETY: as in `load_slow`.
            unsafe { host_store(host as *mut T, v) };
            if code {
                self.after_code_write(host, T::BYTES);
            }
            return Ok(());
        }
        self.write_bytes(mmu, seg, linear, &v.to_u64().to_le_bytes()[..T::BYTES])
    }

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
                    core::ptr::copy_nonoverlapping(a as *const u8, out.as_mut_ptr(), first);
                    if let Some(b) = b {
                        let rest = out.len() - first;
                        core::ptr::copy_nonoverlapping(b as *const u8, out.as_mut_ptr().add(first), rest);
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
        self.before_code_write(a, first)?;
        if let Some(b) = b {
            self.before_code_write(b, data.len() - first)?;
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
                    core::ptr::copy_nonoverlapping(data.as_ptr(), a as *mut u8, first);
                    if let Some(b) = b {
                        let rest = data.len() - first;
                        core::ptr::copy_nonoverlapping(data.as_ptr().add(first), b as *mut u8, rest);
                    }
                }
            }
        }
        self.after_code_write(a, first);
        if let Some(b) = b {
            self.after_code_write(b, data.len() - first);
        }
        Ok(())
    }

    /// Linear addresses outside 64-bit mode are 32 bits wide.
    #[inline(always)]
    fn wrap(&self, linear: u64) -> u64 {
        if self.long_mode() { linear } else { linear as u32 as u64 }
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

    // ---- by operand --------------------------------------------------------------------------------------------

    /// Loads the memory operand.
    #[inline(always)]
    pub fn load<T: Int>(&mut self, op: &Op) -> Result<T, Stop> {
        let linear = self.lin(op, T::BYTES, Access::Read)?;
        self.load_at(op.seg, linear)
    }

    /// Stores the memory operand.
    #[inline(always)]
    pub fn store<T: Int>(&mut self, op: &Op, v: T) -> Res {
        let linear = self.lin(op, T::BYTES, Access::Write)?;
        self.store_at(op.seg, linear, v)
    }

    /// Loads a 16-byte memory operand as (low, high); `aligned` raises #GP(0) when it isn't on 16 bytes.
    #[inline(always)]
    pub fn load128(&mut self, op: &Op, aligned: bool) -> Result<[u64; 2], Stop> {
        let linear = self.lin(op, 16, Access::Read)?;
        if aligned && linear & 15 != 0 {
            return Err(self.gp(0));
        }
        let e = self.tlb.entry(self.mmu, linear);
        if e.read == self.tlb.tag(linear.wrapping_add(15)) {
            let p = e.addend.wrapping_add(linear) as *const u64;
            // SAFETY: as in `load_bank`.
            return Ok(unsafe { [host_load(p), host_load(p.add(1))] });
        }
        let mut b = [0u8; 16];
        self.read_bytes(self.mmu, op.seg, linear, &mut b)?;
        let v = u128::from_le_bytes(b);
        Ok([v as u64, (v >> 64) as u64])
    }

    /// Stores a 16-byte memory operand.
    #[inline(always)]
    pub fn store128(&mut self, op: &Op, v: [u64; 2], aligned: bool) -> Res {
        let linear = self.lin(op, 16, Access::Write)?;
        if aligned && linear & 15 != 0 {
            return Err(self.gp(0));
        }
        let e = self.tlb.entry(self.mmu, linear);
        if e.write == self.tlb.tag(linear.wrapping_add(15)) {
            let p = e.addend.wrapping_add(linear) as *mut u64;
            // SAFETY: as in `load_bank`.
            unsafe {
                host_store(p, v[0]);
                host_store(p.add(1), v[1]);
            }
            return Ok(());
        }
        let v = (v[0] as u128) | (v[1] as u128) << 64;
        self.write_bytes(self.mmu, op.seg, linear, &v.to_le_bytes())
    }

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
        match self.hit::<T>(linear, Access::Write) {
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

    /// Makes sure that a following write of the same bytes neither faults nor asks for [`Stop::SelfModify`].
    pub fn prepare_write(&mut self, seg: u8, linear: u64, size: usize) -> Res {
        let mmu = self.check_alignment(self.mmu, linear, size)?;
        let linear = self.wrap(linear);
        let first = (4096 - (linear & 0xfff) as usize).min(size);
        self.check_end(seg, linear, size)?;
        let a = self.translate(mmu, seg, linear, first, Access::Write)?;
        self.before_code_write(a, first)?;
        if first < size {
            let second = self.wrap(linear.wrapping_add(first as u64));
            let b = self.translate(mmu, seg, second, size - first, Access::Write)?;
            self.before_code_write(b, size - first)?;
        }
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
        let e = self.tlb.entry(self.mmu, linear);
        let fast = e.write == self.tlb.tag(linear.wrapping_add(T::BYTES as u64 - 1));
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
        let machine =
            (cfg!(not(target_arch = "x86_64")) && p as usize % T::BYTES != 0).then(|| self.machine.clone());
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
            self.after_code_write(p as usize, T::BYTES);
        }
        Ok(())
    }

    /// Host address of `linear` and the bytes left in its page, when the page is in the TLB and needs no slow path (no
    /// code in it for writes, no breakpoint, no alignment checks): what bulk copies work on.
    #[inline]
    pub fn span(&self, linear: u64, access: Access) -> Option<(*mut u8, usize)> {
        let linear = self.wrap(linear);
        let e = self.tlb.entry(self.mmu, linear);
        let tag = if access == Access::Write { e.write } else { e.read };
        (tag == self.tlb.tag(linear))
            .then(|| (e.addend.wrapping_add(linear) as *mut u8, 4096 - (linear & 0xfff) as usize))
    }

    /// A locked operation across two pages: atomic only towards its own kind (a real bus lock stops everybody).
    fn modify_split<T: Int>(&mut self, seg: u8, linear: u64, mut f: impl FnMut(&mut Cpu, T) -> T) -> Res {
        let machine = self.machine.clone();
        let _guard = machine.split_lock.lock();
        let mmu = if self.mmu == 3 { 2 } else { self.mmu };
        let old = self.load_bank::<T>(mmu, seg, linear)?;
        let new = f(self, old);
        self.store_bank(mmu, seg, linear, new)
    }

    // ---- the stack ---------------------------------------------------------------------------------------------

    /// Bytes of the stack pointer in force: 8, 4 or 2.
    #[inline(always)]
    pub fn stack_size(&self) -> u8 {
        if self.code_size == 8 {
            8
        } else if self.seg[sreg::SS].db() {
            4
        } else {
            2
        }
    }

    /// Replaces the stack pointer, keeping the bits that the stack size leaves alone.
    #[inline(always)]
    pub fn set_sp(&mut self, v: u64) {
        let size = self.stack_size();
        let sp = &mut self.rb.gpr[reg::RSP];
        match size {
            8 => *sp = v,
            4 => *sp = v as u32 as u64,
            _ => *sp = (*sp & !0xffff) | (v & 0xffff),
        }
    }

    /// Linear address of `size` stack bytes at stack pointer value `sp`.
    #[inline(always)]
    pub fn stack_lin(&mut self, sp: u64, size: usize, access: Access) -> Result<u64, Stop> {
        if self.code_size == 8 {
            return Ok(sp);
        }
        let sp = if self.seg[sreg::SS].db() { sp as u32 as u64 } else { sp as u16 as u64 };
        self.seg_lin(sreg::SS as u8, sp, size, access)
    }

    /// Pushes one value of size T.
    #[inline(always)]
    pub fn push<T: Int>(&mut self, v: T) -> Res {
        let sp = self.rb.gpr[reg::RSP].wrapping_sub(T::BYTES as u64);
        let linear = self.stack_lin(sp, T::BYTES, Access::Write)?;
        self.store_at(sreg::SS as u8, linear, v)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Reads the top of the stack without popping; `skip` bytes above it.
    #[inline(always)]
    pub fn peek<T: Int>(&mut self, skip: u64) -> Result<T, Stop> {
        let sp = self.rb.gpr[reg::RSP].wrapping_add(skip);
        let linear = self.stack_lin(sp, T::BYTES, Access::Read)?;
        self.load_at(sreg::SS as u8, linear)
    }

    /// Pops one value of size T.
    #[inline(always)]
    pub fn pop<T: Int>(&mut self) -> Result<T, Stop> {
        let v = self.peek::<T>(0)?;
        let sp = self.rb.gpr[reg::RSP].wrapping_add(T::BYTES as u64);
        self.set_sp(sp);
        Ok(v)
    }
}
