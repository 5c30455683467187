// SPDX-License-Identifier: Apache-2.0
//! The stack: its pointer and its accesses.

use super::Access;
use crate::x86::flags::Int;
use crate::x86::op::{Res, Stop};
use crate::x86::state::{Cpu, reg, sreg};

impl Cpu {
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
