// SPDX-License-Identifier: Apache-2.0
//! Frames on the stack: pushed whole or not at all, and the stacks that a TSS holds for inner privilege levels.

use super::descriptor::{error_selector, null_segment};
use crate::x86::access::Access;
use crate::x86::op::Stop;
use crate::x86::state::{Cpu, Segment, cr4, reg, sreg, vector};

/// Most items of a frame: a call gate's 31 parameters and four words.
const MAX_ITEMS: usize = 36;

/// A stack that a frame is to be pushed on.
pub(super) struct Stack {
    pub ss: Segment,
    pub sp: u64,
    /// Bytes of the stack pointer: 2, 4 or 8.
    pub size: u8,
    /// Privilege level of the pushes.
    pub cpl: u8,
    /// Error code of #SS.
    pub error: u32,
}

/// `new` in the bits of a stack pointer of `size` bytes, `old` in the others (a 32-bit one clears them).
pub(super) fn merge_sp(old: u64, new: u64, size: u8) -> u64 {
    match size {
        8 => new,
        4 => new as u32 as u64,
        _ => (old & !0xffff) | (new & 0xffff),
    }
}

fn in_limit(ss: &Segment, offset: u64, size: u64) -> bool {
    let last = offset + size - 1;
    if ss.attrib & 0xc == 4 {
        let top = if ss.db() { u32::MAX as u64 } else { 0xffff };
        offset > ss.limit as u64 && last <= top
    } else {
        last <= ss.limit as u64
    }
}

impl Cpu {
    /// MMU index of explicit accesses at privilege level `cpl`, without alignment checks.
    pub(super) fn bank_at(&self, cpl: u8) -> usize {
        if cpl == 3 {
            2
        } else if self.cr4 & cr4::SMAP != 0 && self.rflags & crate::x86::flags::rf::AC == 0 {
            0
        } else {
            1
        }
    }

    /// The stack in force.
    pub(super) fn current_stack(&self, error: u32) -> Stack {
        Stack {
            ss: self.seg[sreg::SS],
            sp: self.rb.gpr[reg::RSP],
            size: self.stack_size(),
            cpl: self.cpl,
            error,
        }
    }

    /// Pushes `items`, each `width` bytes, the first one first. Returns the new stack pointer; changes no register,
    /// and no memory when it faults.
    pub(super) fn push_frame(&mut self, stack: &Stack, items: &[u64], width: u64) -> Result<u64, Stop> {
        let bank = self.bank_at(stack.cpl);
        let items = &items[..items.len().min(MAX_ITEMS)];
        let total = items.len() as u64 * width;
        let low = stack.sp.wrapping_sub(total);
        let mask = match stack.size {
            8 => u64::MAX,
            4 => 0xffff_ffff,
            _ => 0xffff,
        };
        let low = low & mask;
        let base = if stack.size == 8 { 0 } else { stack.ss.base };
        if stack.size == 8 || low + (total - 1) <= mask {
            let good = if stack.size == 8 {
                self.canonical(low) && self.canonical(low.wrapping_add(total - 1))
            } else {
                in_limit(&stack.ss, low, total)
            };
            if !good {
                return Err(self.fault(vector::SS, Some(stack.error)));
            }
            let mut bytes = [0u8; MAX_ITEMS * 8];
            for (n, item) in items.iter().rev().enumerate() {
                let at = n * width as usize;
                bytes[at..at + width as usize].copy_from_slice(&item.to_le_bytes()[..width as usize]);
            }
            let linear = self.system_linear(base.wrapping_add(low));
            self.write_bytes(bank, sreg::SS as u8, linear, &bytes[..total as usize])?;
            return Ok(merge_sp(stack.sp, low, stack.size));
        }
        // The frame wraps around the segment's end: check every item, then write.
        for pass in 0..2 {
            let mut sp = stack.sp;
            for item in items {
                sp = sp.wrapping_sub(width) & mask;
                let linear = self.system_linear(base.wrapping_add(sp));
                if pass == 0 {
                    if !in_limit(&stack.ss, sp, width) {
                        return Err(self.fault(vector::SS, Some(stack.error)));
                    }
                    let host = self.translate(bank, sreg::SS as u8, linear, 1, Access::Write)?;
                    self.engine.before_code_write(host, 1)?;
                    let last = self.system_linear(linear.wrapping_add(width - 1));
                    let host = self.translate(bank, sreg::SS as u8, last, 1, Access::Write)?;
                    self.engine.before_code_write(host, 1)?;
                } else {
                    self.write_bytes(bank, sreg::SS as u8, linear, &item.to_le_bytes()[..width as usize])?;
                }
            }
        }
        Ok(merge_sp(stack.sp, low, stack.size))
    }

    /// The item of `width` bytes that lies `skip` bytes above the top of the stack in force.
    pub(super) fn peek_item(&mut self, skip: u64, width: u32) -> Result<u64, Stop> {
        Ok(match width {
            2 => self.peek::<u16>(skip)? as u64,
            4 => self.peek::<u32>(skip)? as u64,
            _ => self.peek::<u64>(skip)?,
        })
    }

    /// A 64-bit stack pointer at `offset` in the TSS; #TS(TR) beyond its limit.
    fn tss_pointer(&mut self, offset: u64, ext: u32) -> Result<u64, Stop> {
        if offset + 7 > self.tr.limit as u64 {
            let error = error_selector(self.tr.selector) | ext;
            return Err(self.fault(vector::TS, Some(error)));
        }
        self.load_system::<u64>(self.tr.base.wrapping_add(offset))
    }

    /// The interrupt stack table's entry `ist` (1..7) (APM vol. 2, 8.9.4); the stack segment is the caller's.
    pub(super) fn ist_pointer(&mut self, ist: u8, ext: u32) -> Result<u64, Stop> {
        self.tss_pointer(28 + 8 * (ist & 7) as u64, ext)
    }

    /// The stack that the TSS holds for the inner privilege level `cpl` (0..2).
    pub(super) fn inner_stack(&mut self, cpl: u8, ext: u32) -> Result<Stack, Stop> {
        if self.long_mode() {
            let sp = self.tss_pointer(4 + 8 * (cpl & 3) as u64, ext)?;
            return Ok(Stack { ss: null_stack(cpl), sp, size: 8, cpl, error: ext });
        }
        let wide = self.tr.kind() & 8 != 0;
        let (offset, size) = if wide { (4 + 8 * cpl as u64, 6) } else { (2 + 4 * cpl as u64, 4) };
        if offset + size - 1 > self.tr.limit as u64 {
            let error = error_selector(self.tr.selector) | ext;
            return Err(self.fault(vector::TS, Some(error)));
        }
        let at = self.tr.base.wrapping_add(offset);
        let (sp, selector) = if wide {
            (self.load_system::<u32>(self.system_linear(at))? as u64, self.system_linear(at.wrapping_add(4)))
        } else {
            (self.load_system::<u16>(self.system_linear(at))? as u64, self.system_linear(at.wrapping_add(2)))
        };
        let selector = self.load_system::<u16>(selector)?;
        let ss = self.stack_descriptor(selector, cpl, vector::TS, ext)?;
        let size = if ss.db() { 4 } else { 2 };
        Ok(Stack { ss, sp, size, cpl, error: error_selector(selector) | ext })
    }
}

/// SS after a switch to an inner stack in long mode: null, with the new RPL and DPL.
pub(super) fn null_stack(cpl: u8) -> Segment {
    Segment { attrib: (cpl as u16 & 3) << 5, ..null_segment(cpl as u16 & 3) }
}
