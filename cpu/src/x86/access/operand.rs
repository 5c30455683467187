// SPDX-License-Identifier: Apache-2.0
//! Loads and stores of an op's memory operand.

use crate::engine::architecture::Access;
use crate::mem::{host_load128, host_store128};
use crate::x86::flags::Int;
use crate::x86::op::{Op, Res, Stop};
use crate::x86::state::{Cpu, mxcsr, vector};

/// What a 16-byte operand that isn't on 16 bytes raises. Where it isn't #GP(0), it is #AC(0) if alignment is checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// #GP(0) always: moves that demand it.
    Always,
    /// #GP(0) unless MXCSR.MM: operands of anything else that computes with vectors (APM vol. 1, 4.2.2 and 4.3.2).
    Masked,
    /// Nothing.
    Any,
}

impl Cpu {
    /// Raises what a 16-byte operand does that isn't on 16 bytes.
    #[inline(never)]
    fn misaligned(&mut self, align: Align) -> Res {
        if align == Align::Always || align == Align::Masked && self.rb.mxcsr & mxcsr::MM == 0 {
            return Err(self.gp(0));
        }
        if self.mmu == 3 { Err(self.fault(vector::AC, Some(0))) } else { Ok(()) }
    }

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

    /// Loads a 16-byte memory operand as (low, high).
    #[inline(always)]
    pub fn load128(&mut self, op: &Op, align: Align) -> Result<[u64; 2], Stop> {
        let linear = self.lin(op, 16, Access::Read)?;
        if linear & 15 != 0 {
            self.misaligned(align)?;
        }
        let e = self.engine.tlb.entry(self.mmu, linear);
        if e.read == self.engine.tlb.tag(linear.wrapping_add(15)) {
            let p = e.addend.wrapping_add(linear) as *const u64;
            // SAFETY: as in `load_bank`.
            return Ok(unsafe { host_load128(p) });
        }
        let mut b = [0u8; 16];
        self.read_bytes(self.mmu, op.seg, linear, &mut b)?;
        let v = u128::from_le_bytes(b);
        Ok([v as u64, (v >> 64) as u64])
    }

    /// Stores a 16-byte memory operand.
    #[inline(always)]
    pub fn store128(&mut self, op: &Op, v: [u64; 2], align: Align) -> Res {
        let linear = self.lin(op, 16, Access::Write)?;
        if linear & 15 != 0 {
            self.misaligned(align)?;
        }
        let e = self.engine.tlb.entry(self.mmu, linear);
        if e.write == self.engine.tlb.tag(linear.wrapping_add(15)) {
            let p = e.addend.wrapping_add(linear) as *mut u64;
            // SAFETY: as in `load_bank`.
            unsafe { host_store128(p, v) };
            return Ok(());
        }
        let v = (v[0] as u128) | (v[1] as u128) << 64;
        self.write_bytes(self.mmu, op.seg, linear, &v.to_le_bytes())
    }
}
