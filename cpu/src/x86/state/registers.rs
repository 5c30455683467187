// SPDX-License-Identifier: Apache-2.0
//! Registers as memory lays them out.

use crate::x86::pmu::counters::COUNTERS;

/// The registers that KVM and the processor share, one page, at the head of [`Cpu`](super::Cpu).
///
/// The layout is part of the interface (see the crate's documentation).
#[repr(C, align(4096))]
pub struct RegisterBlock {
    /// General registers 0..15, then slot 16 = always zero, slot 17 = RIP of the running block's start, rest scratch.
    pub gpr: [u64; 24],
    /// 0xC0: DR0..DR3.
    pub dr: [u64; 4],
    /// 0xE0: XCR0.
    pub xcr0: u64,
    /// 0xE8: XSS.
    pub xss: u64,
    /// 0xF0: PKRU.
    pub pkru: u32,
    /// 0xF4: MXCSR.
    pub mxcsr: u32,
    /// 0xF8: TSC_AUX.
    pub tsc_aux: u64,
    /// 0x100: x87 control word.
    pub fcw: u16,
    /// x87 status word (TOP in bits 11-13).
    pub fsw: u16,
    /// x87 tag word, two bits per physical register.
    pub ftw: u16,
    /// Last x87 opcode.
    pub fop: u16,
    /// 0x108: last x87 instruction pointer.
    pub fip: u64,
    /// 0x110: last x87 data pointer.
    pub fdp: u64,
    /// 0x118: their selectors.
    pub fcs: u16,
    /// Data selector.
    pub fds: u16,
    /// 0x11C: IA32_UMWAIT_CONTROL, of guests that have UMWAIT.
    pub umwait_control: u32,
    pad0: [u8; 0x180 - 0x120],
    /// 0x180: physical x87 registers R0..R7: significand, then sign and exponent in the low 16 bits.
    pub st: [[u64; 2]; 8],
    /// 0x200: vector registers; the low two words are XMM.
    pub ymm: [[u64; 4]; 16],
    /// 0x400: performance counters that run while a guest does: a bit each ([`crate::x86::pmu`]).
    pub pmc_enable: u64,
    /// 0x408: counters that have overflowed, a bit each; software clears it.
    pub pmc_status: u64,
    /// 0x410: what they count, as PERF_CTL.
    pub pmc_select: [u64; COUNTERS],
    /// Their counts, as PERF_CTR.
    pub pmc_count: [u64; COUNTERS],
    pad1: [u8; 4096 - 0x410 - 16 * COUNTERS],
}

/// A segment register with its descriptor cache, laid out as in the VMCB (APM vol. 2, appendix B).
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// VMCB attribute format: bits 0-3 type, 4 S, 5-6 DPL, 7 P, 8 AVL, 9 L, 10 D/B, 11 G; 0 in `P` = unusable.
    pub attrib: u16,
    /// Limit in bytes (already scaled).
    pub limit: u32,
    /// Linear base.
    pub base: u64,
}

impl Segment {
    /// The bits of `attrib` that there are.
    pub const ATTRIBUTES: u16 = 0xfff;

    /// Present/usable.
    #[inline(always)]
    pub fn present(&self) -> bool {
        self.attrib & 0x80 != 0
    }
    /// Descriptor privilege level.
    #[inline(always)]
    pub fn dpl(&self) -> u8 {
        ((self.attrib >> 5) & 3) as u8
    }
    /// Four type bits.
    #[inline(always)]
    pub fn kind(&self) -> u8 {
        (self.attrib & 15) as u8
    }
    /// D/B bit.
    #[inline(always)]
    pub fn db(&self) -> bool {
        self.attrib & 0x400 != 0
    }
    /// L bit.
    #[inline(always)]
    pub fn long(&self) -> bool {
        self.attrib & 0x200 != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Default, Debug)]
pub struct TableRegister {
    /// Linear base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
}

/// MSRs that live in the VMCB's save area.
#[derive(Clone, Copy, Default, Debug)]
pub struct Msrs {
    /// STAR.
    pub star: u64,
    /// LSTAR.
    pub lstar: u64,
    /// CSTAR.
    pub cstar: u64,
    /// SFMASK.
    pub sfmask: u64,
    /// KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// SYSENTER_CS.
    pub sysenter_cs: u64,
    /// SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// PAT (guest).
    pub pat: u64,
    /// DEBUGCTL.
    pub debugctl: u64,
}
