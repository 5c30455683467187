// SPDX-License-Identifier: Apache-2.0
//! The advanced virtual interrupt controller (APM vol. 2, 15.29): the guest's accesses to its local APIC, its interrupts
//! and those between its processors, without #VMEXIT.
//!
//! An accelerated or trapped write happens like any other, by itself between two instructions
//! ([`Avic::written`]), and is acted on before the next one.

use std::sync::atomic::Ordering;

use super::access::Access;
use super::op::{Op, Res, Stop};
use super::paging::PHYS_BITS;
use super::state::{Avic, Cpu};
use super::system::exitcode;
use super::vmcb::{Vmcb, control};
use crate::engine::processor::Exited;

mod ipi;
pub mod page;

use page::{BackingPage, Handling, register};

const PAGE: u64 = ((1 << PHYS_BITS) - 1) & !0xFFF;
/// V_INTR: x2AVIC and AVIC are enabled.
const X2AVIC_ENABLE: u64 = 1 << 30;
const AVIC_ENABLE: u64 = 1 << 31;
/// EXITINFO1 of AVIC_NOACCEL: the access is a write.
const NOACCEL_WRITE: u64 = 1 << 32;
/// EXITINFO1 of AVIC_NOACCEL, in bits that are reserved: the access is not of a register's 32 bits. What trap-like exits
/// are about has been written; this has not.
const NOACCEL_ODD: u64 = 1;
/// The registers of x2APIC mode.
const X2APIC_MSRS: u32 = 0x800;
/// Bits of an x2APIC ICR that must be 0: 31:20, 17:16 and 13.
const X2APIC_ICR_RESERVED: u64 = 0xFFF3_2000;

impl Cpu {
    /// Loads the fields of AVIC; whether translations from before are of no use.
    #[inline(always)]
    pub(super) fn load_avic(&mut self, v: &Vmcb, v_intr: u64) -> bool {
        if v_intr & AVIC_ENABLE == 0 && !self.avic.enabled {
            return false;
        }
        self.load_avic_fields(v, v_intr)
    }

    #[inline]
    fn load_avic_fields(&mut self, v: &Vmcb, v_intr: u64) -> bool {
        let fields = [
            v_intr & (AVIC_ENABLE | X2AVIC_ENABLE),
            v.get(control::AVIC_BAR),
            v.get(control::AVIC_BACKING_PAGE),
            v.get(control::AVIC_LOGICAL_TABLE),
            v.get(control::AVIC_PHYSICAL_TABLE),
            // Memory may have gone since.
            self.engine.shared.synced.load(Ordering::Relaxed),
        ];
        if fields == self.avic.fields {
            return false;
        }
        let moved = self.load_new_avic_fields(v, v_intr);
        self.avic.fields = fields;
        moved
    }

    #[inline(never)]
    fn load_new_avic_fields(&mut self, v: &Vmcb, v_intr: u64) -> bool {
        debug_assert_eq!(self.avic.written, 0, "the guest is left behind what it has written");
        let bar = self.avic.bar;
        self.avic = Avic::default();
        if v_intr & AVIC_ENABLE != 0 {
            let x2 = v_intr & X2AVIC_ENABLE != 0;
            let physical: u64 = v.get(control::AVIC_PHYSICAL_TABLE);
            self.avic = Avic {
                enabled: true,
                x2,
                bar: if x2 { u64::MAX } else { v.get::<u64>(control::AVIC_BAR) & PAGE },
                page: (v.get::<u64>(control::AVIC_BACKING_PAGE) & PAGE) as usize,
                logical: (v.get::<u64>(control::AVIC_LOGICAL_TABLE) & PAGE) as usize,
                physical: (physical & PAGE) as usize,
                last: physical as u32 & if x2 { 0x1FF } else { 0xFF },
                ..Avic::default()
            };
        }
        bar != self.avic.bar
    }

    /// VMRUN's checks: the page and both tables are in memory.
    #[inline(always)]
    pub(super) fn avic_consistent(&mut self) -> bool {
        let a = &self.avic;
        if a.enabled && !a.checked {
            let regions = &self.engine.regions;
            self.avic.checked =
                [a.page, a.logical, a.physical].iter().all(|page| regions.contains(*page, 4096));
            return self.avic.checked;
        }
        true
    }

    /// The backing page in force; AVIC is enabled.
    fn backing_page(&self) -> BackingPage {
        debug_assert!(self.avic.enabled);
        // SAFETY: VMRUN has checked that it is registered; a removal waits for the guest's end.
        unsafe { BackingPage::new(self.avic.page) }
    }

    /// Finds the processor priority, and whether a virtual interrupt is above it.
    pub(super) fn avic_evaluate(&mut self) {
        let page = self.backing_page();
        let tpr = page.get(register::TPR) & 0xFF;
        // V_TPR is the priority in force; the page adds the subclass.
        let class = (self.ctl.v_tpr as u32) << 4;
        let tpr = if tpr & 0xF0 == class { tpr } else { class };
        let in_service = page.highest(register::ISR).map_or(0, |v| v as u32 & 0xF0);
        let ppr = if tpr & 0xF0 >= in_service { tpr } else { in_service };
        page.keep(register::PPR, ppr);
        let requested = page.highest(register::IRR).map_or(0, |v| v as u32 & 0xF0);
        page.keep(register::APR, if tpr & 0xF0 >= requested { ppr } else { requested.max(in_service) });
        self.ctl.v_irq = requested > ppr & 0xF0;
        self.ctl.v_ign_tpr = true;
        self.update_attention();
    }

    /// Delivers the highest requested interrupt, which has the priority.
    pub(super) fn avic_deliver(&mut self) -> Res {
        let page = self.backing_page();
        let Some(vector) = page.highest(register::IRR) else {
            // The hypervisor has taken it back.
            self.avic_evaluate();
            return Ok(());
        };
        page.clear(register::IRR, vector);
        page.raise(register::ISR, vector);
        self.avic_evaluate();
        self.external_interrupt(vector)
    }

    /// CR8 has been written.
    pub(super) fn avic_set_v_tpr(&mut self) {
        self.backing_page().set(register::TPR, (self.ctl.v_tpr as u32) << 4);
        self.avic_evaluate();
    }

    // ---- the page ----------------------------------------------------------------------------------------------

    /// An access to the guest-physical page of the registers: the host address of the register, or the exit. The nested
    /// tables have let it pass.
    #[inline(never)]
    pub(super) fn avic_access(&mut self, linear: u64, size: usize, access: Access) -> Result<usize, Stop> {
        let offset = linear as u16 & 0xFFF;
        let write = access == Access::Write;
        let aligned = size == 4 && offset & 15 == 0;
        let handling = match (aligned, write) {
            (false, _) => Handling::Fault,
            (_, false) => page::reads(offset),
            (_, true) => page::writes(offset),
        };
        match handling {
            Handling::Fault => {
                let info = (offset & 0xFF0) as u64
                    | if write { NOACCEL_WRITE } else { 0 }
                    | if aligned { 0 } else { NOACCEL_ODD };
                return Err(self.vmexit(exitcode::AVIC_NOACCEL, info, 0));
            }
            Handling::Allowed => {}
            Handling::Accelerated | Handling::Trap => {
                if !self.engine.single {
                    // The instruction runs by itself, so that nothing comes between it and its effect.
                    return Err(Stop::SelfModify);
                }
                self.avic.written |= 1 << (offset >> 4);
            }
        }
        Ok(self.avic.page + offset as usize)
    }

    /// Acts on the registers that were written.
    pub(super) fn avic_take_writes(&mut self) -> Result<(), Exited> {
        while self.avic.written != 0 {
            let offset = (self.avic.written.trailing_zeros() as u16) << 4;
            self.avic.written &= self.avic.written - 1;
            if !self.avic.enabled {
                continue;
            }
            let page = self.backing_page();
            match offset {
                register::TPR => {
                    let tpr = page.get(offset) & 0xFF;
                    page.set(offset, tpr);
                    self.ctl.v_tpr = tpr as u8 >> 4;
                    self.avic_evaluate();
                }
                register::EOI => self.avic_eoi(page)?,
                register::ICR_LOW => self.avic_icr(page)?,
                // Vectors below 16 are errors, which are the hypervisor's.
                register::SELF_IPI if page.get(offset) < 16 => return self.avic_noaccel(offset, 0),
                register::SELF_IPI => self.avic_self_ipi(page.get(offset)),
                _ => return self.avic_noaccel(offset, 0),
            }
        }
        self.update_attention();
        Ok(())
    }

    fn avic_noaccel(&mut self, offset: u16, vector: u8) -> Result<(), Exited> {
        self.leave_with(exitcode::AVIC_NOACCEL, offset as u64 | NOACCEL_WRITE, vector as u64)
    }

    /// EOI: of an edge-triggered interrupt here, of a level-triggered one in the hypervisor.
    fn avic_eoi(&mut self, page: BackingPage) -> Result<(), Exited> {
        page.set(register::EOI, 0);
        let Some(vector) = page.highest(register::ISR) else { return Ok(()) };
        if page.test(register::TMR, vector) {
            return self.avic_noaccel(register::EOI, vector);
        }
        page.clear(register::ISR, vector);
        self.avic_evaluate();
        Ok(())
    }

    // ---- x2AVIC ------------------------------------------------------------------------------------------------

    /// Whether an MSR is a register of the APIC, which is in x2APIC mode.
    #[inline(always)]
    pub(super) fn x2avic_msr(&self, msr: u32) -> bool {
        self.avic.x2 && msr & !0xFF == X2APIC_MSRS
    }

    /// RDMSR of one.
    #[cold]
    pub(super) fn x2avic_read(&mut self, msr: u32) -> Result<u64, Stop> {
        let offset = (msr as u16 & 0xFF) << 4;
        let page = self.backing_page();
        match offset {
            register::EOI | register::DFR | register::ICR_HIGH => Err(self.gp(0)),
            register::ICR_LOW => {
                Ok((page.get(register::ICR_HIGH) as u64) << 32 | page.get(register::ICR_LOW) as u64)
            }
            _ if page::reads(offset) == Handling::Allowed && offset != register::APR => {
                Ok(page.get(offset) as u64)
            }
            _ => Err(self.vmexit(exitcode::AVIC_NOACCEL, offset as u64, 0)),
        }
    }

    /// WRMSR of one; what it does is done behind the instruction.
    #[cold]
    pub(super) fn x2avic_write(&mut self, op: &Op, msr: u32, v: u64) -> Stop {
        let offset = (msr as u16 & 0xFF) << 4;
        let page = self.backing_page();
        let reserved = match offset {
            register::ICR_LOW => X2APIC_ICR_RESERVED,
            register::EOI | register::ESR => u64::MAX,
            register::TPR | register::SELF_IPI => !0xFF,
            _ => !0xFFFF_FFFF,
        };
        if v & reserved != 0 {
            return self.gp(0);
        }
        match offset {
            register::ICR_LOW => page.set(register::ICR_HIGH, (v >> 32) as u32),
            register::SELF_IPI | register::TPR | register::EOI => {}
            register::ID | register::RRR..=register::DFR | register::ICR_HIGH => {
                return self.vmexit(exitcode::AVIC_NOACCEL, offset as u64 | NOACCEL_WRITE, 0);
            }
            _ if page::writes(offset) == Handling::Trap => {}
            _ => return self.vmexit(exitcode::AVIC_NOACCEL, offset as u64 | NOACCEL_WRITE, 0),
        }
        page.set(offset, v as u32);
        self.avic.written |= 1 << (offset >> 4);
        self.update_attention();
        self.end_block(op)
    }
}
