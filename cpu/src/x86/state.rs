// SPDX-License-Identifier: Apache-2.0
//! The state of one logical processor.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::block::BlockCache;
use super::flags::{Int, LazyFlags, rf};
use super::op::{Op, Stop};
use super::tlb::Tlb;
use crate::mem::Machine;

/// General register numbers.
pub mod reg {
    #![allow(missing_docs)]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Segment register numbers.
pub mod sreg {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Exception vectors (APM vol. 2, 8.2).
pub mod vector {
    #![allow(missing_docs)]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XF: u8 = 19;
}

/// CR0 bits.
pub mod cr0 {
    #![allow(missing_docs)]
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
pub mod cr4 {
    #![allow(missing_docs)]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

/// EFER bits.
pub mod efer {
    #![allow(missing_docs)]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const SVME: u64 = 1 << 12;
    pub const LMSLE: u64 = 1 << 13;
    pub const FFXSR: u64 = 1 << 14;
}

/// The registers that KVM and the processor share, one page, at the head of [`Cpu`].
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
    pad0: [u8; 0x180 - 0x11C],
    /// 0x180: physical x87 registers R0..R7: significand, then sign and exponent in the low 16 bits.
    pub st: [[u64; 2]; 8],
    /// 0x200: vector registers; the low two words are XMM.
    pub ymm: [[u64; 4]; 16],
    pad1: [u8; 4096 - 0x400],
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
    // VMCB attributes, 12 bits: 0-3 type, 4 S, 5-6 DPL, 7 P, 8 AVL, 9 L, 10 D/B, 11 G.

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

/// An exception waiting to be delivered (or intercepted).
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector 0..31.
    pub vector: u8,
    /// Error code, if the exception pushes one.
    pub error: Option<u32>,
    /// #PF: the linear address for CR2. #DB: the bits for DR6.
    pub address: u64,
}

/// What #VMEXIT will report.
#[derive(Clone, Copy, Default, Debug)]
pub struct Exit {
    /// EXITCODE (APM vol. 2, appendix C).
    pub code: u64,
    /// EXITINFO1.
    pub info1: u64,
    /// EXITINFO2.
    pub info2: u64,
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

/// The VMCB's control area as the running processor needs it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Control {
    /// Intercept vectors 0..5 (VMCB offsets 0x000..0x014).
    pub intercepts: [u32; 6],
    /// Physical address of the I/O permission map, 0 when not used.
    pub iopm: u64,
    /// Physical address of the MSR permission map.
    pub msrpm: u64,
    /// Added to the TSC.
    pub tsc_offset: u64,
    /// ASID.
    pub asid: u32,
    /// V_INTR_MASKING.
    pub v_intr_masking: bool,
    /// V_TPR (CR8).
    pub v_tpr: u8,
    /// V_IRQ: a virtual interrupt is pending.
    pub v_irq: bool,
    /// V_INTR_PRIO.
    pub v_intr_prio: u8,
    /// V_IGN_TPR.
    pub v_ign_tpr: bool,
    /// V_INTR_VECTOR.
    pub v_intr_vector: u8,
    /// Nested paging enabled.
    pub nested_paging: bool,
    /// Nested CR3 (host physical).
    pub nested_cr3: u64,
    /// Pause filter count and threshold.
    pub pause_count: u16,
    /// Pause filter threshold (cycles).
    pub pause_threshold: u16,
}

/// Bits of [`Shared::pending`].
pub mod pending {
    #![allow(missing_docs)]
    pub const INTR: u32 = 1;
    pub const NMI: u32 = 2;
    /// Other processors want this one to drop writable translations of pages that became code, or of removed regions.
    pub const TLB_SYNC: u32 = 4;
    /// Decoded code may have changed in memory: check it before running it again.
    pub const CODE_CHANGED: u32 = 8;
}

/// The part of a processor that other threads touch.
#[derive(Default)]
pub struct Shared {
    /// Physical events; see [`pending`].
    pub pending: AtomicU32,
    /// True inside VMRUN.
    pub running: std::sync::atomic::AtomicBool,
    /// The machine's TLB-sync generation this processor has caught up with.
    pub synced: std::sync::atomic::AtomicU64,
    /// True inside [`Shared::wait`].
    pub waiting: std::sync::atomic::AtomicBool,
    /// Woken by kicks.
    pub wake: (std::sync::Mutex<()>, std::sync::Condvar),
}

/// Reasons, local to the processor, to look closer before the next block; bits of [`Cpu::attention`].
pub mod attention {
    #![allow(missing_docs)]
    /// Interrupt shadow (STI, MOV SS): one instruction, then look again.
    pub const SHADOW: u32 = 1;
    /// RFLAGS.TF, or breakpoints that need single instructions.
    pub const STEP: u32 = 2;
    /// A virtual interrupt may be deliverable.
    pub const VIRQ: u32 = 4;
    /// An instruction breakpoint is armed in DR7, or RF is set.
    pub const DEBUG: u32 = 8;
}

/// In [`Cpu::link`]: the block does not always go on there.
pub const LINK_NONE: u8 = 2;
/// In [`Cpu::link`]: the same, but it is where the call that is noted ([`super::returns`]) comes back.
pub const LINK_RETURN: u8 = 3;

/// One logical processor.
#[repr(C)]
pub struct Cpu {
    /// Registers shared with KVM.
    pub rb: RegisterBlock,
    /// Arithmetic flags.
    pub lf: LazyFlags,
    /// RFLAGS without the arithmetic flags (bit 1 always set).
    pub rflags: u64,
    /// RIP of the next instruction, valid between blocks.
    pub rip: u64,
    /// Bases used by fast (64-bit) effective addresses: ES, CS, SS, DS read 0 in 64-bit mode; FS, GS their base.
    pub ea_base: [u64; 8],
    /// MMU index of data accesses now: 0 supervisor with SMAP enforced, 1 supervisor without, 2 user, 3 user with
    /// alignment checks (never cached, so every access takes the slow path that checks).
    pub mmu: usize,
    /// The TLB's entries for `mmu`.
    pub bank: *const super::tlb::Entry,
    /// Current privilege level.
    pub cpl: u8,
    /// Bytes of the code segment's default operand size: 2, 4, or 8 for 64-bit code.
    pub code_size: u8,
    /// Which exit of its last block a run took that stopped with [`Stop::EndBlock`] (0, 1, [`LINK_NONE`] or [`LINK_RETURN`]).
    pub link: u8,
    /// The processor runs one instruction at a time (shadow, step, self-modification).
    pub single: bool,
    /// See [`attention`].
    pub attention: u32,
    /// The op at which the last run stopped.
    pub stop_op: *const Op,
    /// Exception of [`Stop::Fault`] and [`Stop::Trap`].
    pub exception: Exception,
    /// Exit of [`Stop::Exit`] and [`Stop::ExitAfter`].
    pub exit: Exit,
    /// ES, CS, SS, DS, FS, GS.
    pub seg: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// Other MSRs.
    pub msr: Msrs,
    /// VMCB control fields.
    pub ctl: Control,
    /// Interrupt shadow is in force for the next instruction.
    pub shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// The event being delivered through the IDT, in EVENTINJ format, for EXITINTINFO; 0 when none.
    pub delivering: u64,
    /// Data breakpoints that the running instruction hit (DR6 bits).
    pub debug_hits: u64,
    /// Bookkeeping of system instructions.
    pub sys: super::system::SystemState,
    /// Retired instructions.
    pub instructions: u64,
    /// Host state: NEXT_RIP is saved on instruction intercepts.
    pub next_rip_enabled: bool,
    /// The running block, to notice writes into itself and to chain from it.
    pub block: *mut super::block::Block,
    /// The last calls.
    pub returns: super::returns::Returns,
    /// The run loop gets a look before the next block when so many instructions have retired.
    pub chain_limit: u64,
    /// Blocks whose stamp is another one are checked against memory before they run.
    pub stamp: u64,
    /// Software TLB.
    pub tlb: Tlb,
    /// Protection keys of the pages that the TLB has ever been filled with (a bit each).
    pub keys: u16,
    /// Decoded code.
    pub blocks: BlockCache,
    /// Machine this processor is in.
    pub machine: Arc<Machine>,
    /// Snapshot of the machine's regions.
    pub regions: Arc<crate::mem::RegionTable>,
    /// Index of the region that the last look-up found.
    pub region_guess: usize,
    /// Shared with other threads.
    pub shared: Arc<Shared>,
    /// Number of this processor in its machine.
    pub index: u32,
}

// SAFETY: `stop_op` is only meaningful inside one `vmrun`, which has exclusive access.
unsafe impl Send for Cpu {}

impl Cpu {
    // ---- registers ---------------------------------------------------------------------------------------------

    /// Reads a general register operand by its byte offset.
    #[inline(always)]
    pub fn reg<T: Int>(&self, offset: u8) -> T {
        debug_assert!((offset as usize) + T::BYTES <= 192);
        // SAFETY: offsets come from the translator: below 18 * 8; the file has 24 * 8 bytes; any bits are valid.
        unsafe { (self.rb.gpr.as_ptr() as *const u8).add(offset as usize).cast::<T>().read_unaligned() }
    }

    /// Writes a general register operand; 32-bit writes clear the upper half.
    #[inline(always)]
    pub fn set_reg<T: Int>(&mut self, offset: u8, v: T) {
        debug_assert!((offset as usize) + T::BYTES <= 128);
        // SAFETY: as in `reg`.
        unsafe {
            let p = (self.rb.gpr.as_mut_ptr() as *mut u8).add(offset as usize);
            if T::BITS == 32 {
                p.cast::<u64>().write_unaligned(v.to_u64());
            } else {
                p.cast::<T>().write_unaligned(v);
            }
        }
    }

    /// RIP of the instruction after `op`.
    #[inline(always)]
    pub fn next_ip(&self, op: &Op) -> u64 {
        self.rb.gpr[17].wrapping_add(op.next as u64)
    }

    /// RIP of `op` itself.
    #[inline(always)]
    pub fn this_ip(&self, op: &Op) -> u64 {
        self.rb.gpr[17].wrapping_add(op.next as u64 - op.len as u64)
    }

    /// Truncates an instruction pointer to the code size in force (16/32-bit code keeps 32 bits of EIP).
    #[inline(always)]
    pub fn mask_ip(&self, ip: u64) -> u64 {
        if self.code_size == 8 { ip } else { ip as u32 as u64 }
    }

    /// The whole RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.rflags | self.lf.bits()
    }

    /// Writes the whole RFLAGS (undefined bits are dropped) and updates what depends on it.
    pub fn set_rflags(&mut self, v: u64) {
        self.lf.set_all(v);
        self.rflags = (v & rf::DEFINED & !rf::ARITH) | rf::FIXED1;
        self.update_attention();
        self.update_mmu();
    }

    // ---- modes -------------------------------------------------------------------------------------------------

    /// EFER.LMA.
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }
    /// CR0.PE.
    #[inline(always)]
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }
    /// RFLAGS.VM.
    #[inline(always)]
    pub fn v86(&self) -> bool {
        self.rflags & rf::VM != 0
    }
    /// Real or virtual-8086 mode.
    #[inline(always)]
    pub fn real_or_v86(&self) -> bool {
        !self.protected() || self.v86()
    }

    /// Recomputes everything that follows from CS, SS, CR0, EFER, RFLAGS.VM and CPL: call after changing any.
    pub fn update_mode(&mut self) {
        let cs = self.seg[sreg::CS];
        self.code_size = if self.long_mode() && cs.long() {
            8
        } else if cs.db() {
            4
        } else {
            2
        };
        for i in 0..6 {
            self.ea_base[i] = if self.code_size == 8 && i < sreg::FS { 0 } else { self.seg[i].base };
        }
        self.update_mmu();
        self.update_attention();
    }

    /// Recomputes the MMU index: call after changing CPL, CR0.AM, CR4.SMAP or RFLAGS.AC.
    pub fn update_mmu(&mut self) {
        self.mmu = if self.cpl == 3 {
            if self.cr0 & cr0::AM != 0 && self.rflags & rf::AC != 0 { 3 } else { 2 }
        } else if self.cr4 & cr4::SMAP != 0 && self.rflags & rf::AC == 0 {
            0
        } else {
            1
        };
        self.bank = self.tlb.bank(self.mmu);
    }

    /// Recomputes [`Cpu::attention`]: call after changing IF, TF, RF, the shadow, DR7, V_TPR or V_IRQ.
    pub fn update_attention(&mut self) {
        let mut a = 0;
        if self.shadow {
            a |= attention::SHADOW;
        }
        if self.rflags & rf::TF != 0 {
            a |= attention::STEP;
        }
        if self.ctl.v_irq && self.rflags & rf::IF != 0 {
            a |= attention::VIRQ;
        }
        if self.dr7 & 0xff != 0 || self.rflags & rf::RF != 0 {
            a |= attention::DEBUG;
        }
        self.attention = a;
    }

    // ---- faults and exits --------------------------------------------------------------------------------------

    /// Raises a fault.
    #[cold]
    pub fn fault(&mut self, vector: u8, error: Option<u32>) -> Stop {
        self.exception = Exception { vector, error, address: 0 };
        Stop::Fault
    }
    /// #GP(error).
    #[cold]
    pub fn gp(&mut self, error: u32) -> Stop {
        self.fault(vector::GP, Some(error))
    }
    /// #UD.
    #[cold]
    pub fn ud(&mut self) -> Stop {
        self.fault(vector::UD, None)
    }
    /// #NM.
    #[cold]
    pub fn nm(&mut self) -> Stop {
        self.fault(vector::NM, None)
    }
    /// #PF with its linear address.
    #[cold]
    pub fn pf(&mut self, address: u64, error: u32) -> Stop {
        self.exception = Exception { vector: vector::PF, error: Some(error), address };
        Stop::Fault
    }
    /// #VMEXIT before the instruction retires.
    #[cold]
    pub fn vmexit(&mut self, code: u64, info1: u64, info2: u64) -> Stop {
        self.exit = Exit { code, info1, info2 };
        Stop::Exit
    }
    /// Whether intercept `bit` (0..31) of vector `word` (VMCB offset `word * 4`) is set.
    #[inline(always)]
    pub fn intercepted(&self, word: usize, bit: u32) -> bool {
        self.ctl.intercepts[word] >> bit & 1 != 0
    }

    /// Whether any physical event or local reason calls for attention before the next block.
    #[inline(always)]
    pub fn needs_attention(&self) -> bool {
        (self.shared.pending.load(Ordering::Relaxed) | self.attention) != 0
    }

    // ---- control flow ------------------------------------------------------------------------------------------

    /// Ends the block with a jump to `target` through exit `link` of the block (0 or 1: same target every time;
    /// [`LINK_RETURN`] or [`LINK_NONE`]).
    #[inline(always)]
    pub fn jump(&mut self, target: u64, link: u8) -> Stop {
        self.rip = target;
        match link {
            0 => Stop::Exit0,
            1 => Stop::Exit1,
            LINK_RETURN => Stop::Return,
            _ => Stop::EndBlock,
        }
    }

    /// Ends the block after `op`, going on with the next instruction, by look-up (used after mode or TLB changes).
    #[inline(always)]
    pub fn end_block(&mut self, op: &Op) -> Stop {
        let next = self.next_ip(op);
        self.rip = self.mask_ip(next);
        Stop::EndBlock
    }
}
