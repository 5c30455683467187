// SPDX-License-Identifier: Apache-2.0
//! Effective and linear addresses, with the segment checks of the mode.

use super::Access;
use crate::x86::op::{Op, Stop, flag};
use crate::x86::state::{Cpu, sreg, vector};

impl Cpu {
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
            // An access that wraps around at the end of 4 GiB is beyond the limit, in compatibility mode too.
            last <= limit
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

    /// Linear addresses outside 64-bit mode are 32 bits wide.
    #[inline(always)]
    pub(super) fn wrap(&self, linear: u64) -> u64 {
        if self.long_mode() { linear } else { linear as u32 as u64 }
    }
}
