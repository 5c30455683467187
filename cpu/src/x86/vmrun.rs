// SPDX-License-Identifier: Apache-2.0
//! VMRUN: guest state from the VMCB, event injection, the run, #VMEXIT, guest state back (APM vol. 2, 15.5, 15.6).
//!
//! `vmrun` includes VMLOAD before and VMSAVE after, as every hypervisor does around it.

use std::sync::Arc;

use super::state::*;
use super::system::exitcode;
use super::vmcb::{Vmcb, control, save};
use crate::engine::count::{Counting, run_counted};
use crate::engine::run;

/// VMRUN was refused: the VMCB is not in registered memory or not aligned.
#[derive(Debug, PartialEq, Eq)]
pub struct BadVmcb;

/// What [`Cpu::registered`] is asked for.
const CHECKED_VMCB: usize = 0;
const CHECKED_IOPM: usize = 1;
const CHECKED_MSRPM: usize = 2;

impl Cpu {
    /// Runs the guest described by the VMCB at `pa` until #VMEXIT; returns EXITCODE. Everything else is in the VMCB.
    pub fn vmrun(&mut self, pa: usize) -> Result<u64, BadVmcb> {
        self.world_switch(pa, None)
    }

    /// VMRUN with what a hypervisor's entry code puts around it: RAX and RSP, too, are in the register block, before
    /// and after.
    pub fn vmrun_gprs(&mut self, pa: usize) -> Result<u64, BadVmcb> {
        let gpr = &self.rb.gpr;
        self.world_switch(pa, Some((gpr[reg::RAX], gpr[reg::RSP])))
    }

    fn world_switch(&mut self, pa: usize, rax_rsp: Option<(u64, u64)>) -> Result<u64, BadVmcb> {
        run::in_guest(self, |cpu| cpu.enter_guest(pa, rax_rsp))
    }

    fn enter_guest(&mut self, pa: usize, rax_rsp: Option<(u64, u64)>) -> Result<u64, BadVmcb> {
        if pa % 4096 != 0 || !self.registered(CHECKED_VMCB, pa, 4096) {
            return Err(BadVmcb);
        }
        // SAFETY: the page is registered, so it is mapped until a removal, which waits for this run to end.
        let vmcb = unsafe { Vmcb::new(pa) };
        if let Some((rax, rsp)) = rax_rsp {
            vmcb.set(save::RAX, rax);
            vmcb.set(save::RSP, rsp);
        }
        let event = self.load_guest(&vmcb);
        if !self.consistent() || !self.avic_consistent() {
            vmcb.set(control::EXITCODE, exitcode::INVALID);
            vmcb.set(control::EXITINFO1, 0u64);
            vmcb.set(control::EXITINFO2, 0u64);
            vmcb.set(control::EXITINTINFO, 0u64);
            return Ok(exitcode::INVALID);
        }
        run::begin(self);
        self.delivering = 0;
        vmcb.set(control::EVENTINJ, 0u64);
        let next_rip = vmcb.get(control::NRIP);
        let counting = self.rb.pmc_enable != 0;
        if counting {
            self.start_counting();
        }
        let ran = run::guarded(self, |cpu| {
            if cpu.avic.enabled {
                cpu.avic_evaluate();
            }
            if event >> 31 & 1 == 0 || cpu.inject(event, next_rip).is_ok() {
                cpu.delivering = 0;
                if counting {
                    run_counted(cpu);
                } else {
                    run::run(cpu);
                }
            }
        });
        if let Err(lost) = ran {
            if counting {
                self.account();
            }
            self.hold_on();
            self.avic.written = 0; // the instruction has not retired
            self.machine_check(lost);
        }
        self.save_guest(&vmcb);
        Ok(self.exit.code)
    }

    /// The fields of the state save area that are the same on both sides: VMRUN copies them in, #VMEXIT back.
    #[inline(always)]
    fn state_registers(&mut self, mut copy: impl FnMut(usize, &mut u64)) {
        copy(save::EFER, &mut self.efer);
        copy(save::CR4, &mut self.cr4);
        copy(save::CR3, &mut self.cr3);
        copy(save::CR0, &mut self.cr0);
        copy(save::DR7, &mut self.dr7);
        copy(save::DR6, &mut self.dr6);
        copy(save::RIP, &mut self.rip);
        copy(save::RSP, &mut self.rb.gpr[reg::RSP]);
        copy(save::RAX, &mut self.rb.gpr[reg::RAX]);
        copy(save::STAR, &mut self.msr.star);
        copy(save::LSTAR, &mut self.msr.lstar);
        copy(save::CSTAR, &mut self.msr.cstar);
        copy(save::SFMASK, &mut self.msr.sfmask);
        copy(save::KERNEL_GS_BASE, &mut self.msr.kernel_gs_base);
        copy(save::SYSENTER_CS, &mut self.msr.sysenter_cs);
        copy(save::SYSENTER_ESP, &mut self.msr.sysenter_esp);
        copy(save::SYSENTER_EIP, &mut self.msr.sysenter_eip);
        copy(save::CR2, &mut self.cr2);
        copy(save::G_PAT, &mut self.msr.pat);
        copy(save::DEBUGCTL, &mut self.msr.debugctl);
    }

    /// The same for segment registers.
    #[inline(always)]
    fn state_segments(&mut self, mut copy: impl FnMut(usize, &mut Segment)) {
        for (i, s) in self.seg.iter_mut().enumerate() {
            copy(save::ES + 16 * i, s);
        }
        copy(save::LDTR, &mut self.ldtr);
        copy(save::TR, &mut self.tr);
    }

    /// The same for the descriptor tables' registers.
    #[inline(always)]
    fn state_tables(&mut self, mut copy: impl FnMut(usize, &mut TableRegister)) {
        copy(save::GDTR, &mut self.gdtr);
        copy(save::IDTR, &mut self.idtr);
    }

    /// The bits of CR0, CR4 and EFER that translations depend on, and CR3.
    #[inline(always)]
    fn paging_mode(&self) -> (u64, u64, u64, u64) {
        let irrelevant = cr4::TSD | cr4::DE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        (
            self.cr0 & (cr0::PG | cr0::WP | cr0::PE),
            self.cr4 & !irrelevant,
            self.efer & (efer::LMA | efer::NXE),
            self.cr3,
        )
    }

    /// Loads guest state and control fields; returns EVENTINJ.
    fn load_guest(&mut self, v: &Vmcb) -> u64 {
        for (i, word) in self.ctl.intercepts.iter_mut().enumerate() {
            *word = v.get(control::INTERCEPTS + 4 * i);
        }
        let v_intr: u64 = v.get(control::V_INTR);
        let asid: u32 = v.get(control::ASID);
        let nested_cr3: u64 = v.get(control::N_CR3);
        let nested: u64 = v.get(control::NP_ENABLE);
        let moved = self.ctl.nested_cr3 != nested_cr3 || self.ctl.asid != asid;
        self.ctl = Control {
            intercepts: self.ctl.intercepts,
            iopm: v.get(control::IOPM_BASE),
            msrpm: v.get(control::MSRPM_BASE),
            tsc_offset: v.get(control::TSC_OFFSET),
            asid,
            v_intr_masking: v_intr >> 24 & 1 != 0,
            v_tpr: v_intr as u8 & 0xf,
            v_irq: v_intr >> 8 & 1 != 0,
            v_intr_prio: (v_intr >> 16) as u8 & 0xf,
            v_ign_tpr: v_intr >> 20 & 1 != 0,
            v_intr_vector: (v_intr >> 32) as u8,
            nested_paging: nested & 1 != 0,
            nested_cr3,
            pause_count: v.get(control::PAUSE_COUNT),
            pause_threshold: v.get(control::PAUSE_THRESHOLD),
            bus_locks: 0,
        };
        let avic_moved = self.load_avic(v, v_intr);
        self.sys.pause_left = self.ctl.pause_count;
        if self.intercepted(exitcode::BUSLOCK) {
            self.ctl.bus_locks = v.get(control::BUS_LOCK_COUNTER);
        }
        self.shadow = v.get::<u64>(control::INTERRUPT_SHADOW) & 1 != 0;
        let (mode, breakpoints) = (self.paging_mode(), self.dr7 & 0xff);
        self.state_registers(|at, field| *field = v.get(at));
        self.state_segments(|at, s| *s = v.segment(at));
        self.state_tables(|at, t| *t = TableRegister { base: v.get(at + 8), limit: v.get(at + 4) });
        let changed = mode != self.paging_mode();
        let watch = breakpoints != self.dr7 & 0xff;
        self.rb.gpr[16] = 0;
        let flags: u64 = v.get(save::RFLAGS);
        self.cpl = v.get::<u8>(save::CPL) & 3;
        if self.cr0 & cr0::PE == 0 {
            self.cpl = 0;
        } else if flags & super::flags::rf::VM != 0 {
            self.cpl = 3;
        }
        self.switch_tlb();
        match v.get::<u8>(control::TLB_CONTROL) {
            0 => {
                if moved {
                    self.engine.tlb.flush_frames();
                }
                if watch || avic_moved {
                    self.engine.tlb.flush_all();
                } else if changed {
                    self.engine.tlb.flush_current();
                }
            }
            1 => self.engine.tlb.flush_all(),
            _ => {
                self.flush_asid();
                self.engine.tlb.flush_frames();
            }
        }
        self.set_rflags(flags);
        self.update_mode();
        v.get(control::EVENTINJ)
    }

    /// The checks of VMRUN (APM vol. 2, 15.5.1, "Canonicalization and consistency checks").
    fn consistent(&mut self) -> bool {
        let c = &self.ctl;
        let long = self.efer & efer::LME != 0 && self.cr0 & cr0::PG != 0;
        let cs = &self.seg[sreg::CS];
        self.efer & efer::SVME != 0
            && !(self.cr0 & cr0::CD == 0 && self.cr0 & cr0::NW != 0)
            && self.cr0 >> 32 == 0
            && self.dr6 >> 32 == 0
            && self.dr7 >> 32 == 0
            && !(long && self.cr4 & cr4::PAE == 0)
            && !(long && self.cr0 & cr0::PE == 0)
            && !(long && self.cr4 & cr4::PAE != 0 && cs.long() && cs.db())
            && c.intercepts[4] & 1 != 0
            && c.asid != 0
            && (!c.nested_paging || c.nested_cr3 & 0xfff == 0)
            && (self.intercepts_maps_registered())
    }

    /// The permission maps lie in registered memory (their intercepts read them).
    fn intercepts_maps_registered(&mut self) -> bool {
        let io = !self.intercepted(exitcode::IOIO)
            || self.registered(CHECKED_IOPM, (self.ctl.iopm & !0xfff) as usize, 0x3000);
        let msr = !self.intercepted(exitcode::MSR)
            || self.registered(CHECKED_MSRPM, (self.ctl.msrpm & !0xfff) as usize, 0x2000);
        io && msr
    }

    /// Whether memory is registered; what was there for the same purpose before still is, as long as no region has
    /// gone or come.
    #[inline]
    fn registered(&mut self, purpose: usize, address: usize, size: usize) -> bool {
        if !Arc::ptr_eq(&self.checked_in, &self.engine.regions) {
            self.checked_in = self.engine.regions.clone();
            self.checked = [None; CHECKED];
        }
        if self.checked[purpose] == Some(address) {
            return true;
        }
        let found = self.engine.regions.contains(address, size);
        if found {
            self.checked[purpose] = Some(address);
        }
        found
    }

    /// Writes guest state and exit information back.
    fn save_guest(&mut self, v: &Vmcb) {
        self.state_registers(|at, field| v.set(at, *field));
        self.state_segments(|at, s| v.set_segment(at, s));
        self.state_tables(|at, t| {
            v.set(at + 4, t.limit);
            v.set(at + 8, t.base);
        });
        v.set(save::CPL, self.cpl);
        v.set(save::RFLAGS, self.rflags());
        let v_intr: u64 = v.get(control::V_INTR);
        // With AVIC interrupts come from the backing page, and V_IRQ means nothing (APM vol. 2, 15.29.4).
        let v_irq = if self.avic.enabled { v_intr & 0x100 } else { (self.ctl.v_irq as u64) << 8 };
        v.set(control::V_INTR, (v_intr & !0x10f) | self.ctl.v_tpr as u64 | v_irq);
        v.set(
            control::INTERRUPT_SHADOW,
            self.shadow as u64 | ((self.rflags & super::flags::rf::IF != 0) as u64) << 1,
        );
        let e = self.exit;
        v.set(control::EXITCODE, e.code);
        v.set(control::EXITINFO1, e.info1);
        v.set(control::EXITINFO2, e.info2);
        v.set(control::EXITINTINFO, self.delivering);
        v.set(control::TLB_CONTROL, 0u8);
        if self.intercepted(exitcode::BUSLOCK) {
            v.set(control::BUS_LOCK_COUNTER, self.ctl.bus_locks);
        }
        let next = if self.next_rip_enabled
            && ((self.delivering == 0 && saves_next_rip(e.code)) || self.delivering_software())
        {
            self.engine.stopped_op().map(|op| self.mask_ip(self.next_ip(op)))
        } else {
            None
        };
        v.set(control::NRIP, next.unwrap_or(0));
        let assists = e.code == exitcode::NPF || e.code == exitcode::EXCP0 + vector::PF as u64;
        let bytes = if assists { self.engine.stopped_bytes() } else { None };
        let bytes = bytes.unwrap_or(&[]);
        v.set(control::BYTES_FETCHED, bytes.len() as u8);
        for (i, b) in bytes.iter().enumerate() {
            v.set(control::INSTRUCTION_BYTES + i, *b);
        }
        self.delivering = 0;
    }
}

/// Exits caused by an instruction (INT3 and INTO among them) report where the next one starts (APM vol. 2, 15.7.1).
fn saves_next_rip(code: u64) -> bool {
    let soft = [exitcode::EXCP0 + vector::BP as u64, exitcode::EXCP0 + vector::OF as u64];
    exitcode::is_instruction(code) || soft.contains(&code)
}
