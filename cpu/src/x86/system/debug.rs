// SPDX-License-Identifier: Apache-2.0
//! Debug registers: breakpoint matching and single steps (APM vol. 2, 13.1).

use crate::x86::state::{Cpu, cr4, sreg};

/// DR6 bits.
pub mod dr6 {
    #![allow(missing_docs)]
    pub const HITS: u64 = 0xf;
    pub const BD: u64 = 1 << 13;
    pub const BS: u64 = 1 << 14;
    pub const BT: u64 = 1 << 15;
    /// Bits that always read one.
    pub const FIXED: u64 = 0xffff_0ff0;
}

/// DR7 bits.
pub mod dr7 {
    #![allow(missing_docs)]
    pub const GD: u64 = 1 << 13;
    /// Any of the local and global enables.
    pub const ENABLES: u64 = 0xff;
    /// Bit that always reads one.
    pub const FIXED: u64 = 1 << 10;
    /// Bits that can be set.
    pub const BITS: u64 = 0xffff_2bff;
}

/// What breakpoint `n` (0..3) watches: R/W field (0 execute, 1 write, 2 I/O, 3 read or write) and length in bytes.
fn condition(dr7: u64, n: u32) -> (u64, u64) {
    let field = dr7 >> (16 + 4 * n);
    (field & 3, [1, 2, 8, 4][(field >> 2 & 3) as usize])
}

impl Cpu {
    /// DR6 hit bits of the enabled breakpoints that `accept` (given the R/W field) and that overlap the bytes
    /// `address..address + size`.
    fn breakpoint_hits(&self, address: u64, size: u64, accept: impl Fn(u64) -> bool) -> u64 {
        let mut hits = 0;
        for n in 0..4 {
            let (kind, length) = condition(self.dr7, n);
            if self.dr7 >> (2 * n) & 3 == 0 || !accept(kind) {
                continue;
            }
            let start = self.rb.dr[n as usize] & !(length - 1);
            if start.wrapping_sub(address) < size || address.wrapping_sub(start) < length {
                hits |= 1 << n;
            }
        }
        hits
    }

    /// DR6 hit bits of a data access at a linear address. Its #DB comes after the instruction.
    pub fn data_breakpoints(&self, linear: u64, size: usize, write: bool) -> u64 {
        if self.dr7 & dr7::ENABLES == 0 {
            return 0;
        }
        self.breakpoint_hits(linear, size as u64, |kind| if write { kind & 1 != 0 } else { kind == 3 })
    }

    /// Notes the I/O breakpoints (CR4.DE) that an access to `size` ports hits; their #DB comes after the instruction.
    pub(super) fn note_port_access(&mut self, port: u16, size: u32) {
        if self.dr7 & dr7::ENABLES != 0 && self.cr4 & cr4::DE != 0 {
            self.debug_hits |= self.breakpoint_hits(port as u64, size as u64, |kind| kind == 2);
        }
    }

    /// DR6 hit bits of the instruction breakpoints at `self.rip`; RFLAGS.RF is the caller's business.
    pub fn instruction_breakpoints(&self) -> u64 {
        if self.dr7 & dr7::ENABLES == 0 {
            return 0;
        }
        let rip = self.rip;
        let linear = match self.code_size {
            8 => rip,
            _ => (self.seg[sreg::CS].base as u32).wrapping_add(rip as u32) as u64,
        };
        self.breakpoint_hits(linear, 1, |kind| kind == 0)
    }
}
