// SPDX-License-Identifier: Apache-2.0
//! The virtual machine control block in memory (APM vol. 2, appendix B).

use super::state::Segment;
use crate::int::Int;
use crate::mem::{PAGE_SIZE, host_load, host_store};

/// Offsets in the control area.
pub mod control {
    #![allow(missing_docs)]
    pub const INTERCEPTS: usize = 0x000;
    pub const PAUSE_THRESHOLD: usize = 0x03C;
    pub const PAUSE_COUNT: usize = 0x03E;
    pub const IOPM_BASE: usize = 0x040;
    pub const MSRPM_BASE: usize = 0x048;
    pub const TSC_OFFSET: usize = 0x050;
    pub const ASID: usize = 0x058;
    pub const TLB_CONTROL: usize = 0x05C;
    pub const V_INTR: usize = 0x060;
    pub const INTERRUPT_SHADOW: usize = 0x068;
    pub const EXITCODE: usize = 0x070;
    pub const EXITINFO1: usize = 0x078;
    pub const EXITINFO2: usize = 0x080;
    pub const EXITINTINFO: usize = 0x088;
    pub const NP_ENABLE: usize = 0x090;
    pub const AVIC_BAR: usize = 0x098;
    pub const EVENTINJ: usize = 0x0A8;
    pub const N_CR3: usize = 0x0B0;
    pub const NRIP: usize = 0x0C8;
    pub const BYTES_FETCHED: usize = 0x0D0;
    pub const INSTRUCTION_BYTES: usize = 0x0D1;
    pub const BUS_LOCK_COUNTER: usize = 0x120;
    pub const AVIC_BACKING_PAGE: usize = 0x0E0;
    pub const AVIC_LOGICAL_TABLE: usize = 0x0F0;
    pub const AVIC_PHYSICAL_TABLE: usize = 0x0F8;
}

/// Offsets in the state save area, from the start of the VMCB.
pub mod save {
    #![allow(missing_docs)]
    pub const ES: usize = 0x400;
    pub const GDTR: usize = 0x460;
    pub const LDTR: usize = 0x470;
    pub const IDTR: usize = 0x480;
    pub const TR: usize = 0x490;
    pub const CPL: usize = 0x4CB;
    pub const EFER: usize = 0x4D0;
    pub const CR4: usize = 0x548;
    pub const CR3: usize = 0x550;
    pub const CR0: usize = 0x558;
    pub const DR7: usize = 0x560;
    pub const DR6: usize = 0x568;
    pub const RFLAGS: usize = 0x570;
    pub const RIP: usize = 0x578;
    pub const RSP: usize = 0x5D8;
    pub const RAX: usize = 0x5F8;
    pub const STAR: usize = 0x600;
    pub const LSTAR: usize = 0x608;
    pub const CSTAR: usize = 0x610;
    pub const SFMASK: usize = 0x618;
    pub const KERNEL_GS_BASE: usize = 0x620;
    pub const SYSENTER_CS: usize = 0x628;
    pub const SYSENTER_ESP: usize = 0x630;
    pub const SYSENTER_EIP: usize = 0x638;
    pub const CR2: usize = 0x640;
    pub const G_PAT: usize = 0x668;
    pub const DEBUGCTL: usize = 0x670;
}

/// A VMCB page, which KVM may only touch while no processor runs it.
#[derive(Clone, Copy)]
pub struct Vmcb(*mut u8);

impl Vmcb {
    /// # Safety
    /// `page` must be a 4 KiB aligned, mapped page for as long as the value is used.
    pub unsafe fn new(page: usize) -> Vmcb {
        Vmcb(page as *mut u8)
    }

    /// The address of a field of `size` bytes.
    #[inline(always)]
    fn field(self, offset: usize, size: usize) -> *mut u8 {
        assert!(offset + size <= PAGE_SIZE);
        self.0.wrapping_add(offset)
    }

    /// Reads the value at a byte offset.
    #[inline(always)]
    pub fn get<T: Int>(self, offset: usize) -> T {
        // SAFETY: inside the page.
        unsafe { host_load(self.field(offset, T::BYTES).cast()) }
    }

    /// Writes the value at a byte offset.
    #[inline(always)]
    pub fn set<T: Int>(self, offset: usize, v: T) {
        // SAFETY: inside the page.
        unsafe { host_store(self.field(offset, T::BYTES).cast(), v) }
    }

    /// Reads the segment register at a byte offset.
    #[inline(always)]
    pub fn segment(self, offset: usize) -> Segment {
        let low: u64 = self.get(offset);
        Segment {
            selector: low as u16,
            attrib: (low >> 16) as u16 & Segment::ATTRIBUTES,
            limit: (low >> 32) as u32,
            base: self.get(offset + 8),
        }
    }

    /// Writes the segment register at a byte offset.
    #[inline(always)]
    pub fn set_segment(self, offset: usize, s: &Segment) {
        self.set(offset, s.selector as u64 | (s.attrib as u64) << 16 | (s.limit as u64) << 32);
        self.set(offset + 8, s.base);
    }
}
