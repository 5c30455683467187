// SPDX-License-Identifier: Apache-2.0
//! Memory accesses and register access for the fast halves of handlers: a TLB hit in 64-bit mode, or nothing.

use super::super::flags::Int;
use super::super::op::{Op, SLOT_ZERO, flag};
use super::super::state::{Cpu, cr0, cr4, sreg};
use super::vector::V;

/// Whether the linear address is base plus displacement: 64-bit code and addresses, no index, no FS or GS.
pub fn is_simple(op: &Op) -> bool {
    !op.has(flag::LEGACY_EA) && op.index == SLOT_ZERO && !matches!(op.seg as usize, sreg::FS | sreg::GS)
}

impl Cpu {
    /// Whether SSE instructions may run.
    #[inline(always)]
    pub fn sse_enabled(&self) -> bool {
        self.cr0 & (cr0::EM | cr0::TS) == 0 && self.cr4 & cr4::OSFXSR != 0
    }

    /// Linear address of the memory operand in 64-bit mode. `SIMPLE`: base and displacement only, see [`is_simple`].
    #[inline(always)]
    fn quick_lin<const SIMPLE: bool>(&self, op: &Op) -> Option<u64> {
        if SIMPLE {
            return Some(self.reg::<u64>(op.base).wrapping_add(op.disp as i64 as u64));
        }
        (op.flags & flag::LEGACY_EA == 0)
            .then(|| self.ea_raw(op).wrapping_add(self.ea_base[(op.seg & 7) as usize]))
    }

    /// The memory operand, if it is in the TLB and within a page.
    #[inline(always)]
    pub fn quick_load<T: Int, const SIMPLE: bool>(&self, op: &Op) -> Option<T> {
        self.engine.load(op, self.quick_lin::<SIMPLE>(op)?)
    }

    /// Stores the memory operand, if it is in the TLB and within a page.
    #[inline(always)]
    pub fn quick_store<T: Int, const SIMPLE: bool>(&mut self, op: &Op, v: T) -> bool {
        self.quick_lin::<SIMPLE>(op).and_then(|linear| self.engine.store(op, linear, v)).is_some()
    }

    /// The 16-byte memory operand, if it is in the TLB, within a page and aligned where it must be.
    #[inline(always)]
    pub fn quick_load128<const ALIGNED: bool, const SIMPLE: bool>(&self, op: &Op) -> Option<V> {
        let linear = self.quick_lin::<SIMPLE>(op)?;
        if ALIGNED && linear & 15 != 0 { None } else { self.engine.load128(op, linear) }
    }

    /// Stores 16 bytes, if the operand is in the TLB, within a page and aligned where it must be.
    #[inline(always)]
    pub fn quick_store128<const ALIGNED: bool, const SIMPLE: bool>(&mut self, op: &Op, v: V) -> bool {
        let Some(linear) = self.quick_lin::<SIMPLE>(op) else { return false };
        !(ALIGNED && linear & 15 != 0) && self.engine.store128(op, linear, v).is_some()
    }
}
