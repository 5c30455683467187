// SPDX-License-Identifier: Apache-2.0
//! The state of one logical processor.

use std::sync::Arc;

use super::flags::{Int, LazyFlags, rf};
use super::pmu::counters::Pmu;
use super::system::exitcode;
use crate::engine::op::Stop;
use crate::engine::state::Engine;
use crate::mem::lost::Lost;
use crate::mem::{Machine, RegionTable};

mod avic;
mod control;
mod numbers;
mod registers;

pub use avic::Avic;
pub use control::{Control, Exception, Exit, Held, LINE, Monitor, SystemState};
pub use numbers::{cr0, cr4, efer, mxcsr, reg, sreg, vector};
pub use registers::{Msrs, RegisterBlock, Segment, TableRegister};

/// Reasons, local to the processor, to look closer before the next block; bits of [`Engine::attention`].
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
    /// Registers of the virtual APIC have been written.
    pub const APIC: u32 = 16;
}

/// How many places VMRUN looks for in registered memory: those of the VMCB and of two permission maps.
pub const CHECKED: usize = 3;

/// The TSC ratio of a guest whose counter ticks with the processor's.
pub const TSC_RATIO_ONE: u64 = 1 << 32;

/// One logical processor.
#[repr(C)]
pub struct Cpu {
    /// Registers shared with KVM.
    pub rb: RegisterBlock,
    /// Arithmetic flags.
    pub(crate) lf: LazyFlags,
    /// RFLAGS without the arithmetic flags (bit 1 always set).
    pub(crate) rflags: u64,
    /// RIP of the next instruction, valid between blocks.
    pub(crate) rip: u64,
    /// The engine's part.
    pub engine: Engine<Cpu>,
    /// Bases used by fast (64-bit) effective addresses: ES, CS, SS, DS read 0 in 64-bit mode; FS, GS their base.
    pub(crate) ea_base: [u64; 8],
    /// MMU index of data accesses now: 0 supervisor with SMAP enforced, 1 supervisor without, 2 user, 3 user with
    /// alignment checks (never cached, so every access takes the slow path that checks).
    pub(crate) mmu: usize,
    /// Current privilege level.
    pub(crate) cpl: u8,
    /// Bytes of the code segment's default operand size: 2, 4, or 8 for 64-bit code.
    pub(crate) code_size: u8,
    /// Exception of [`Stop::Fault`] and [`Stop::Trap`].
    pub exception: Exception,
    /// Exit of [`Stop::Exit`] and [`Stop::ExitAfter`].
    pub(crate) exit: Exit,
    /// ES, CS, SS, DS, FS, GS.
    pub(crate) seg: [Segment; 6],
    /// LDTR.
    pub(crate) ldtr: Segment,
    /// TR.
    pub(crate) tr: Segment,
    /// GDTR.
    pub(crate) gdtr: TableRegister,
    /// IDTR.
    pub(crate) idtr: TableRegister,
    /// CR0.
    pub(crate) cr0: u64,
    /// CR2.
    pub(crate) cr2: u64,
    /// CR3.
    pub(crate) cr3: u64,
    /// CR4.
    pub(crate) cr4: u64,
    /// EFER.
    pub(crate) efer: u64,
    /// DR6.
    pub(crate) dr6: u64,
    /// DR7.
    pub(crate) dr7: u64,
    /// Other MSRs.
    pub(crate) msr: Msrs,
    /// VMCB control fields.
    pub(crate) ctl: Control,
    /// The virtual interrupt controller.
    pub(crate) avic: Avic,
    /// Where the VMCB and the permission maps were, the last time that they were looked for, and in which regions.
    pub(super) checked: [Option<usize>; CHECKED],
    pub(super) checked_in: Arc<RegionTable>,
    /// Interrupt shadow is in force for the next instruction.
    pub(crate) shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// The event being delivered through the IDT, in EVENTINJ format, for EXITINTINFO; 0 when none.
    pub(crate) delivering: u64,
    /// Data breakpoints that the running instruction hit (DR6 bits).
    pub(crate) debug_hits: u64,
    /// Bookkeeping of system instructions.
    pub(crate) sys: SystemState,
    /// Host state: NEXT_RIP is saved on instruction intercepts.
    pub next_rip_enabled: bool,
    /// Host state: guests have UMONITOR, UMWAIT and TPAUSE.
    pub waitpkg: bool,
    /// Host state: the TSC ratio MSR, what a guest's TSC ticks for one of the processor's, in units of 2^-32 (APM vol. 2,
    /// 15.30.5).
    pub tsc_ratio: u64,
    /// Protection keys of the pages that the TLB has ever been filled with (a bit each).
    pub(crate) keys: u16,
    /// Number of this processor in its machine.
    pub(crate) index: u32,
    /// What its performance counters count, when there are any that do.
    pub(crate) pmu: Box<Pmu>,
}

impl Cpu {
    /// A processor after reset, number `index` of its machine.
    pub fn new(machine: Arc<Machine>, index: u32) -> Box<Cpu> {
        // SAFETY: RegisterBlock is integers only, for which zero is a value.
        let mut rb: RegisterBlock = unsafe { core::mem::zeroed() };
        rb.xcr0 = 1;
        rb.mxcsr = 0x1f80;
        rb.fcw = 0x37f;
        rb.ftw = 0xffff;
        let engine = Engine::new(machine);
        engine.shared().set_index(index);
        let checked_in = engine.regions.clone();
        Box::new(Cpu {
            rb,
            lf: LazyFlags::default(),
            rflags: 2,
            rip: 0xfff0,
            ea_base: [0; 8],
            mmu: 0,
            engine,
            cpl: 0,
            code_size: 2,
            exception: Exception::default(),
            exit: Exit::default(),
            seg: Default::default(),
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr6: 0,
            dr7: 0,
            msr: Msrs::default(),
            ctl: Control::default(),
            avic: Avic::default(),
            checked: [None; CHECKED],
            checked_in,
            shadow: false,
            nmi_blocked: false,
            delivering: 0,
            debug_hits: 0,
            sys: Default::default(),
            next_rip_enabled: true,
            waitpkg: false,
            tsc_ratio: TSC_RATIO_ONE,
            keys: 0,
            index,
            pmu: Box::default(),
        })
    }

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
        self.engine.set_bank(self.mmu);
    }

    /// Recomputes [`Engine::attention`]: call after changing IF, TF, RF, the shadow, DR7, V_TPR or V_IRQ.
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
        if self.avic.written != 0 {
            a |= attention::APIC;
        }
        self.engine.attention = a;
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
    /// Memory that is lost is an address without anything behind it, of which real processors get a machine check. It
    /// is not the guest's to handle: #VMEXIT if machine checks are intercepted, with the physical address, which MCi_ADDR
    /// has on real processors, in EXITINFO2; else shutdown. The instruction has not retired. What is long in coming is an
    /// interrupt of the host's, behind which the instruction is executed once more.
    #[cold]
    pub fn machine_check(&mut self, lost: Lost) -> Stop {
        if lost.awaited {
            return self.vmexit(exitcode::INTR, 0, 0);
        }
        let code = exitcode::EXCP0 + vector::MC as u64;
        if self.intercepted(code) {
            self.vmexit(code, 0, lost.address as u64)
        } else {
            self.vmexit(exitcode::SHUTDOWN, 0, 0)
        }
    }
    /// Whether the intercept that leaves with exit code `code` is set.
    #[inline(always)]
    pub fn intercepted(&self, code: u64) -> bool {
        match exitcode::position(code) {
            Some((word, bit)) => self.ctl.intercepts[word] >> bit & 1 != 0,
            None => false,
        }
    }
}
