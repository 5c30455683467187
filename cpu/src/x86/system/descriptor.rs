// SPDX-License-Identifier: Apache-2.0
//! Segment and gate descriptors, and how they are fetched from the GDT and LDT (APM vol. 2, 4.7 and 4.8).

use crate::mem::{host_load, host_store};
use crate::x86::access::{Access, SYSTEM};
use crate::x86::op::{Res, Stop};
use crate::x86::state::{Cpu, Segment, sreg, vector};

/// System-segment and gate types (APM vol. 2, tables 4-5 and 4-6).
pub mod kind {
    #![allow(missing_docs)]
    pub const TSS16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT16: u8 = 6;
    pub const TRAP16: u8 = 7;
    pub const TSS: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL: u8 = 12;
    pub const INTERRUPT: u8 = 14;
    pub const TRAP: u8 = 15;
}

/// Bits of [`Segment::attrib`].
pub mod attrib {
    #![allow(missing_docs)]
    /// Data: written to; code: read from.
    pub const RW: u16 = 1 << 1;
    /// Data: expand-down; code: conforming.
    pub const DC: u16 = 1 << 2;
    /// Code rather than data.
    pub const CODE: u16 = 1 << 3;
    /// Code or data rather than a system segment or gate.
    pub const S: u16 = 1 << 4;
    pub const P: u16 = 1 << 7;
    pub const L: u16 = 1 << 9;
    pub const DB: u16 = 1 << 10;
    /// Data, writable, accessed, present: what real mode makes of a segment register.
    pub const REAL: u16 = 0x93;
    /// The same at DPL 3: what virtual-8086 mode makes of it.
    pub const V86: u16 = 0xf3;
}

/// The first eight bytes of a descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// The VMCB's attribute word.
    pub fn attrib(self) -> u16 {
        (self.0 >> 40 & 0xff) as u16 | (self.0 >> 44 & 0xf00) as u16
    }
    /// The four type bits.
    pub fn kind(self) -> u8 {
        (self.0 >> 40 & 15) as u8
    }
    /// Privilege level.
    pub fn dpl(self) -> u8 {
        (self.0 >> 45 & 3) as u8
    }
    /// Present.
    pub fn present(self) -> bool {
        self.0 >> 47 & 1 != 0
    }
    /// Code or data.
    pub fn is_segment(self) -> bool {
        self.attrib() & attrib::S != 0
    }
    /// A code segment.
    pub fn is_code(self) -> bool {
        self.attrib() & (attrib::S | attrib::CODE) == attrib::S | attrib::CODE
    }
    /// A conforming code segment.
    pub fn is_conforming(self) -> bool {
        self.is_code() && self.attrib() & attrib::DC != 0
    }
    /// A data segment that may be written.
    pub fn is_writable_data(self) -> bool {
        self.attrib() & (attrib::S | attrib::CODE | attrib::RW) == attrib::S | attrib::RW
    }
    /// A segment that may be read: data, or readable code.
    pub fn is_readable(self) -> bool {
        self.is_segment() && (self.attrib() & attrib::CODE == 0 || self.attrib() & attrib::RW != 0)
    }
    /// The low 32 bits of the base.
    pub fn base(self) -> u64 {
        (self.0 >> 16 & 0xff_ffff) | (self.0 >> 56) << 24
    }
    /// The limit in bytes.
    pub fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff) as u32 | (self.0 >> 32 & 0xf_0000) as u32;
        if self.0 >> 55 & 1 != 0 { raw << 12 | 0xfff } else { raw }
    }
    /// A gate's selector.
    pub fn gate_selector(self) -> u16 {
        (self.0 >> 16) as u16
    }
    /// The low 32 bits of a gate's offset (16 bits in a 16-bit gate).
    pub fn gate_offset(self) -> u64 {
        let low = self.0 & 0xffff;
        if self.kind() & 8 != 0 { low | (self.0 >> 48) << 16 } else { low }
    }
    /// The descriptor as a segment register holds it, marked accessed.
    pub fn segment(self, selector: u16) -> Segment {
        let accessed = if self.is_segment() { 1 } else { 0 };
        Segment { selector, attrib: self.attrib() | accessed, limit: self.limit(), base: self.base() }
    }
}

/// A selector without its RPL: what error codes carry (the table bit stays).
pub fn error_selector(selector: u16) -> u32 {
    (selector & !3) as u32
}

/// Whether the selector is null (index 0 of the GDT, any RPL).
pub fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// A segment register after a null selector was loaded: base and limit are cleared too (CPUID
/// Fn8000_0021_EAX[NullSelectClearsBase]).
pub fn null_segment(selector: u16) -> Segment {
    Segment { selector, attrib: 0, limit: 0, base: 0 }
}

impl Cpu {
    /// Linear addresses are 32 bits wide outside long mode.
    pub(super) fn system_linear(&self, linear: u64) -> u64 {
        if self.long_mode() { linear } else { linear as u32 as u64 }
    }

    /// Linear address of a selector's descriptor of `size` bytes, if it lies within its table's limit.
    pub(super) fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let offset = (selector & !7) as u64;
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, self.gdtr.limit)
        } else if self.ldtr.present() {
            (self.ldtr.base, self.ldtr.limit)
        } else {
            return None;
        };
        (offset + size - 1 <= limit as u64).then(|| self.system_linear(base.wrapping_add(offset)))
    }

    /// Fetches a descriptor; None when it lies outside its table.
    pub(super) fn try_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        match self.descriptor_address(selector, 8) {
            Some(address) => Ok(Some(Descriptor(self.load_system::<u64>(address)?))),
            None => Ok(None),
        }
    }

    /// Fetches a descriptor; outside its table: the fault `vector` with the selector (and `ext`) as error code.
    pub(super) fn descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> Result<Descriptor, Stop> {
        match self.try_descriptor(selector)? {
            Some(d) => Ok(d),
            None => Err(self.fault(vector, Some(error_selector(selector) | ext))),
        }
    }

    /// The second half of a 16-byte system descriptor or gate; #GP(selector) when it is outside the table or its
    /// type field is not zero.
    pub(super) fn descriptor_high(&mut self, selector: u16, ext: u32) -> Result<u64, Stop> {
        let error = error_selector(selector) | ext;
        let Some(address) = self.descriptor_address(selector, 16) else {
            return Err(self.gp(error));
        };
        let high = self.load_system::<u64>(self.system_linear(address.wrapping_add(8)))?;
        if high >> 40 & 0x1f != 0 {
            return Err(self.gp(error));
        }
        Ok(high)
    }

    /// Sets bits of a byte in a system structure atomically (accessed and busy bits). Nothing is written when they
    /// are set.
    pub(super) fn set_system_bits(&mut self, linear: u64, bits: u8) -> Res {
        self.change_system_byte(linear, |b| b | bits)
    }

    /// Changes a byte in a system structure atomically.
    pub(super) fn change_system_byte(&mut self, linear: u64, f: impl Fn(u8) -> u8) -> Res {
        let linear = self.system_linear(linear);
        let host = self.translate(SYSTEM, sreg::DS as u8, linear, 1, Access::Write)?;
        self.engine.before_code_write(host, 1)?;
        let p = host as *mut u8;
        // SAFETY: `translate` gives the host address of registered memory.
        if !unsafe { self.exchange(p, &mut |_, b| f(b)) } {
            // SAFETY: as above.
            unsafe { self.with_bus(|_| host_store(p, f(host_load(p)))) }?;
        }
        self.engine.after_code_write(host, 1);
        Ok(())
    }

    /// Sets the accessed bit of a code or data segment's descriptor in memory.
    pub(super) fn mark_accessed(&mut self, selector: u16, d: Descriptor) -> Res {
        if d.0 >> 40 & 1 != 0 {
            return Ok(());
        }
        match self.descriptor_address(selector, 8) {
            Some(address) => self.set_system_bits(address.wrapping_add(5), 1),
            None => Ok(()),
        }
    }

    /// Fetches and checks a stack segment for privilege level `cpl`; the faults are `vector` (#GP, or #TS when the
    /// selector came from a TSS) and #SS when it is not present.
    pub(super) fn stack_descriptor(
        &mut self,
        selector: u16,
        cpl: u8,
        vector: u8,
        ext: u32,
    ) -> Result<Segment, Stop> {
        if is_null(selector) {
            return Err(self.fault(vector, Some(ext)));
        }
        let d = self.descriptor(selector, vector, ext)?;
        let error = Some(error_selector(selector) | ext);
        if selector as u8 & 3 != cpl || d.dpl() != cpl || !d.is_writable_data() {
            return Err(self.fault(vector, error));
        }
        if !d.present() {
            return Err(self.fault(vector::SS, error));
        }
        self.mark_accessed(selector, d)?;
        Ok(d.segment(selector))
    }

    /// Loads ES, SS, DS, FS or GS as MOV and POP do.
    ///
    /// Raises #GP, #NP or #SS with the selector; nothing is changed then (APM vol. 2, 4.8.3).
    pub fn load_segment(&mut self, n: usize, selector: u16) -> Res {
        let segment = if self.real_or_v86() {
            self.real_segment(n, selector)
        } else if n == sreg::SS {
            if is_null(selector) && self.code_size == 8 && self.cpl < 3 && selector as u8 & 3 == self.cpl {
                Segment { attrib: (self.cpl as u16) << 5, ..null_segment(selector) }
            } else {
                self.stack_descriptor(selector, self.cpl, vector::GP, 0)?
            }
        } else {
            self.data_descriptor(selector, self.cpl, vector::GP)?
        };
        self.set_segment(n, segment);
        Ok(())
    }

    /// Fetches and checks a segment for DS, ES, FS or GS.
    pub(super) fn data_descriptor(&mut self, selector: u16, cpl: u8, vector: u8) -> Result<Segment, Stop> {
        if is_null(selector) {
            return Ok(null_segment(selector));
        }
        let error = Some(error_selector(selector));
        let d = self.descriptor(selector, vector, 0)?;
        let least = cpl.max(selector as u8 & 3);
        if !d.is_readable() || (!d.is_conforming() && d.dpl() < least) {
            return Err(self.fault(vector, error));
        }
        if !d.present() {
            return Err(self.fault(vector::NP, error));
        }
        self.mark_accessed(selector, d)?;
        Ok(d.segment(selector))
    }

    /// What register `n` holds after a load in real mode (the limit stays) or virtual-8086 mode.
    pub(super) fn real_segment(&self, n: usize, selector: u16) -> Segment {
        let base = (selector as u64) << 4;
        if self.v86() {
            Segment { selector, attrib: attrib::V86, limit: 0xffff, base }
        } else {
            let old = self.seg[n % 6];
            Segment { selector, attrib: (old.attrib & 0xf00) | attrib::REAL, limit: old.limit, base }
        }
    }

    /// Puts a checked segment into register `n` (not CS).
    pub(super) fn set_segment(&mut self, n: usize, segment: Segment) {
        self.seg[n % 6] = segment;
        self.ea_base[n % 6] = if self.code_size == 8 && n < sreg::FS { 0 } else { segment.base };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_taken_apart_as_the_manual_draws_them() {
        // Base 0x12345678, limit 0xABCDE pages, 32-bit code, DPL 3.
        let d = Descriptor(0x12CA_FA34_5678_BCDE);
        assert_eq!(d.base(), 0x1234_5678);
        assert_eq!(d.limit(), 0xABCD_EFFF & 0xABCDEFFF);
        assert_eq!(d.dpl(), 3);
        assert!(d.is_code() && !d.is_conforming() && d.present() && d.is_readable() && !d.is_writable_data());
        assert_eq!(d.attrib(), 0xCFA);
        let gate = Descriptor(0x1234_8E00_0010_5678);
        assert_eq!(
            (gate.gate_selector(), gate.gate_offset(), gate.kind()),
            (0x10, 0x1234_5678, kind::INTERRUPT)
        );
    }
}
