// SPDX-License-Identifier: Apache-2.0
//! Hardware task switches of legacy mode (APM vol. 2, chapter 12) and their intercept (15.14.1).
//!
//! One simplification: faults of the incoming task's segments are raised before the switch, in the outgoing task
//! (the manual raises them as #TS and friends in the incoming one). Hypervisors intercept task switches, KVM always.

use super::descriptor::{Descriptor, attrib, error_selector, is_null, kind, null_segment};
use super::exitcode;
use super::segment::ldt_segment;
use crate::x86::access::{Access, SYSTEM};
use crate::x86::flags::rf;
use crate::x86::op::{Res, Stop};
use crate::x86::state::{Cpu, Segment, cr0, reg, sreg, vector};

/// What asks for a task switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reason {
    Call,
    Jump,
    Return,
    Gate,
}

/// Bits of EXITINFO2 of VMEXIT_TASK_SWITCH (APM vol. 2, 15.14.1).
mod info {
    pub const IRET: u64 = 1 << 36;
    pub const JUMP: u64 = 1 << 38;
    pub const ERROR_CODE: u64 = 1 << 44;
    pub const RF: u64 = 1 << 48;
}

/// The registers of a TSS, widened to 32 bits.
struct Image {
    cr3: u32,
    ip: u32,
    flags: u32,
    gpr: [u32; 8],
    /// ES, CS, SS, DS, FS, GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// Offsets and sizes of a TSS's dynamic part: 16-bit then 32-bit.
struct Layout {
    width: usize,
    /// IP, FLAGS, then the eight registers and the selectors.
    dynamic: usize,
    selectors: usize,
    ldt: usize,
    size: usize,
}
const TSS16: Layout = Layout { width: 2, dynamic: 0x0E, selectors: 4, ldt: 0x2A, size: 0x2C };
const TSS32: Layout = Layout { width: 4, dynamic: 0x20, selectors: 6, ldt: 0x60, size: 0x68 };

fn layout(kind: u8) -> &'static Layout {
    if kind & 8 != 0 { &TSS32 } else { &TSS16 }
}

fn get(bytes: &[u8], at: usize, width: usize) -> u32 {
    let mut v = [0u8; 4];
    v[..width].copy_from_slice(&bytes[at..at + width]);
    u32::from_le_bytes(v)
}

impl Cpu {
    /// Switches to the task of `selector`; `next` is what the outgoing task will resume at. With `error` its value is
    /// pushed on the new task's stack. `self.rip` is the new task's on `Ok`.
    pub(super) fn task_switch(
        &mut self,
        selector: u16,
        reason: Reason,
        error: Option<u32>,
        next: u64,
    ) -> Res {
        let bad = if reason == Reason::Return { vector::TS } else { vector::GP };
        let code = Some(error_selector(selector));
        if selector & 4 != 0 || is_null(selector) {
            return Err(self.fault(bad, code));
        }
        let d = self.descriptor(selector, bad, 0)?;
        let wanted: [u8; 2] = match reason {
            Reason::Return => [kind::TSS_BUSY, kind::TSS16_BUSY],
            _ => [kind::TSS, kind::TSS16],
        };
        if d.is_segment() || !wanted.contains(&d.kind()) {
            return Err(self.fault(bad, code));
        }
        if !d.present() {
            return Err(self.fault(vector::NP, code));
        }
        let to = layout(d.kind());
        if (d.limit() as usize) < to.size - 1 {
            return Err(self.fault(vector::TS, code));
        }
        if self.intercepted(exitcode::TASK_SWITCH) {
            let mut info2 = error.map_or(0, |e| e as u64 | info::ERROR_CODE);
            info2 |= match reason {
                Reason::Return => info::IRET,
                Reason::Jump => info::JUMP,
                _ => 0,
            };
            if self.rflags & rf::RF != 0 || (reason == Reason::Gate && self.delivering_fault()) {
                info2 |= info::RF;
            }
            return Err(self.vmexit(exitcode::TASK_SWITCH, selector as u64, info2));
        }
        self.switch_to(selector, d, reason, error, next)
    }

    /// Whether the event in delivery is a fault (its RFLAGS image has RF set).
    fn delivering_fault(&self) -> bool {
        self.delivering >> 8 & 7 == 3
            && !matches!(self.delivering as u8, vector::DB | vector::BP | vector::OF)
    }

    fn switch_to(
        &mut self,
        selector: u16,
        d: Descriptor,
        reason: Reason,
        error: Option<u32>,
        next: u64,
    ) -> Res {
        let base = d.base();
        let to = layout(d.kind());
        let mut bytes = [0u8; 0x68];
        self.read_bytes(SYSTEM, sreg::DS as u8, base, &mut bytes[..to.size])?;
        let image = Self::read_image(&bytes, to);
        let from = layout(self.tr.kind());
        if self.tr.limit as usize + 1 < from.size {
            return Err(self.fault(vector::TS, Some(error_selector(self.tr.selector))));
        }
        let old_base = self.tr.base;
        let flags = self.rflags() & if reason == Reason::Return { !rf::NT } else { !0 };
        self.translate(SYSTEM, sreg::DS as u8, old_base as u32 as u64, 1, Access::Write)?;
        let last = (old_base as u32).wrapping_add(from.size as u32 - 1) as u64;
        self.translate(SYSTEM, sreg::DS as u8, last, 1, Access::Write)?;
        if matches!(reason, Reason::Call | Reason::Gate) {
            self.translate(SYSTEM, sreg::DS as u8, base, 2, Access::Write)?;
        }

        let cpl = if image.flags as u64 & rf::VM != 0 { 3 } else { image.selectors[sreg::CS] as u8 & 3 };
        let (ldtr, segments) = self.task_segments(&image, cpl)?;

        // Nothing below fails, but for accesses that were just translated.
        self.write_image(old_base, from, next as u32, flags as u32)?;
        if matches!(reason, Reason::Jump | Reason::Return) {
            self.set_busy(self.tr.selector, false)?;
        }
        let mut new_flags = image.flags as u64;
        if matches!(reason, Reason::Call | Reason::Gate) {
            self.store_system::<u16>(base, self.tr.selector)?;
            new_flags |= rf::NT;
        }
        if reason != Reason::Return {
            self.set_busy(selector, true)?;
        }
        self.tr = Segment { attrib: d.attrib() | 2, ..d.segment(selector) };
        self.cr0 |= cr0::TS;
        if to.width == 4 && self.cr0 & cr0::PG != 0 {
            let cr3 = image.cr3 as u64;
            self.load_cr3(cr3)?;
        }
        for (n, v) in image.gpr.iter().enumerate() {
            self.rb.gpr[n] = *v as u64;
        }
        self.ldtr = ldtr;
        self.seg = segments;
        self.cpl = cpl;
        self.dr7 &= !0x155;
        self.set_rflags(new_flags);
        self.update_mode();
        self.rip = image.ip as u64;
        if let Some(error) = error {
            let mut stack = self.current_stack(0);
            stack.error = 1;
            let sp = self.push_frame(&stack, &[error as u64], to.width as u64)?;
            self.rb.gpr[reg::RSP] = sp;
        }
        if image.trap {
            self.debug_hits |= super::debug::dr6::BT;
        }
        Ok(())
    }

    fn read_image(bytes: &[u8; 0x68], to: &Layout) -> Image {
        let w = to.width;
        let at = |n: usize| get(bytes, to.dynamic + n * w, w);
        let mut gpr = [0; 8];
        for (n, g) in gpr.iter_mut().enumerate() {
            *g = at(2 + n);
        }
        let mut selectors = [0; 6];
        for (n, s) in selectors.iter_mut().take(to.selectors).enumerate() {
            *s = at(10 + n) as u16;
        }
        Image {
            cr3: if w == 4 { get(bytes, 0x1C, 4) } else { 0 },
            ip: at(0),
            flags: at(1),
            gpr,
            selectors,
            ldt: get(bytes, to.ldt, 2) as u16,
            trap: w == 4 && bytes[0x64] & 1 != 0,
        }
    }

    fn write_image(&mut self, base: u64, from: &Layout, ip: u32, flags: u32) -> Res {
        let w = from.width;
        let mut bytes = [0u8; 16 * 4];
        let mut put = |n: usize, v: u32| bytes[n * w..n * w + w].copy_from_slice(&v.to_le_bytes()[..w]);
        put(0, ip);
        put(1, flags);
        for n in 0..8 {
            put(2 + n, self.rb.gpr[n] as u32);
        }
        for n in 0..from.selectors {
            put(10 + n, self.seg[n].selector as u32);
        }
        let size = (10 + from.selectors) * w;
        let at = self.system_linear(base.wrapping_add(from.dynamic as u64));
        self.write_bytes(SYSTEM, sreg::DS as u8, at, &bytes[..size])
    }

    fn set_busy(&mut self, selector: u16, busy: bool) -> Res {
        match self.descriptor_address(selector, 8) {
            Some(a) => self.change_system_byte(a.wrapping_add(5), |b| if busy { b | 2 } else { b & !2 }),
            None => Ok(()),
        }
    }

    /// Checks and loads the incoming task's LDTR and segments; this processor's are not changed.
    fn task_segments(&mut self, image: &Image, cpl: u8) -> Result<(Segment, [Segment; 6]), Stop> {
        let mut segments = [Segment::default(); 6];
        if image.flags as u64 & rf::VM != 0 {
            for (s, selector) in segments.iter_mut().zip(image.selectors) {
                let base = (selector as u64) << 4;
                *s = Segment { selector, attrib: attrib::V86, limit: 0xffff, base };
            }
            let ldtr = if is_null(image.ldt) {
                null_segment(image.ldt)
            } else {
                ldt_segment(self, image.ldt, vector::TS)?
            };
            return Ok((ldtr, segments));
        }
        let ldtr = if is_null(image.ldt) {
            null_segment(image.ldt)
        } else {
            ldt_segment(self, image.ldt, vector::TS)?
        };
        let saved = core::mem::replace(&mut self.ldtr, ldtr);
        let result = self.task_descriptors(image, cpl, &mut segments);
        self.ldtr = saved;
        result.map(|()| (ldtr, segments))
    }

    fn task_descriptors(&mut self, image: &Image, cpl: u8, segments: &mut [Segment; 6]) -> Res {
        let cs = image.selectors[sreg::CS];
        let error = error_selector(cs);
        if is_null(cs) {
            return Err(self.fault(vector::TS, Some(error)));
        }
        let d = self.descriptor(cs, vector::TS, 0)?;
        let level = if d.is_conforming() { d.dpl() <= cpl } else { d.dpl() == cpl };
        if !d.is_code() || !level {
            return Err(self.fault(vector::TS, Some(error)));
        }
        if !d.present() {
            return Err(self.fault(vector::NP, Some(error)));
        }
        self.mark_accessed(cs, d)?;
        segments[sreg::CS] = d.segment(cs);
        segments[sreg::SS] = self.stack_descriptor(image.selectors[sreg::SS], cpl, vector::TS, 0)?;
        for n in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            segments[n] = self.data_descriptor(image.selectors[n], cpl, vector::TS)?;
        }
        Ok(())
    }
}
