// SPDX-License-Identifier: Apache-2.0
//! Events: exceptions, interrupts, and their delivery through the interrupt vector or descriptor table
//! (APM vol. 2, chapter 8; 15.7.2, 15.12 and 15.20 for intercepts and injection).
//!
//! `self.delivering` is the event under way in EVENTINJ format. It is 0 between events; when delivery ends in
//! #VMEXIT it stays, for EXITINTINFO.

use super::descriptor::{Descriptor, attrib, error_selector, is_null, kind, null_segment};
use super::exitcode;
use super::stack::{Stack, merge_sp, null_stack};
use super::task::Reason;
use crate::x86::flags::rf;
use crate::x86::op::{Op, Res, Stop};
use crate::x86::state::{Cpu, Exception, cr4, reg, sreg, vector};

/// Event types of EVENTINJ and EXITINTINFO (APM vol. 2, 15.20).
pub(super) mod class {
    pub const EXTERNAL: u64 = 0;
    pub const NMI: u64 = 2;
    pub const EXCEPTION: u64 = 3;
    pub const SOFTWARE: u64 = 4;
}

/// EVENTINJ: the error code is valid; the event is valid.
const ERROR_VALID: u64 = 1 << 11;
const VALID: u64 = 1 << 31;

/// One attempt at delivery.
pub(super) struct Event {
    pub(super) vector: u8,
    /// Pushed error code.
    pub(super) error: Option<u32>,
    /// INT n, INT3, INTO: the gate's DPL is checked against the CPL.
    pub(super) software: bool,
    /// INT n proper (opcode CD): subject to virtual-8086 mode's rules.
    pub(super) int_n: bool,
    /// EXT bit of error codes.
    pub(super) ext: u32,
    /// Return address.
    pub(super) ip: u64,
    /// RF in the pushed image.
    pub(super) resume: bool,
}

/// How exceptions combine (APM vol. 2, 8.2.9, table 8-3).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Severity {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn severity(vector: u8) -> Severity {
    match vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Severity::Contributory,
        vector::PF => Severity::PageFault,
        vector::DF => Severity::DoubleFault,
        _ => Severity::Benign,
    }
}

/// Whether a fault-class exception: its image of RFLAGS has RF set.
fn is_fault(e: &Exception) -> bool {
    match e.vector {
        vector::DB => e.address & super::debug::dr6::BD != 0,
        vector::BP | vector::OF | vector::NMI => false,
        _ => true,
    }
}

fn event_info(class: u64, vector: u8, error: Option<u32>) -> u64 {
    let code = error.map_or(0, |e| ERROR_VALID | (e as u64) << 32);
    VALID | class << 8 | vector as u64 | code
}

impl Cpu {
    /// Raises an exception at `self.rip` (the faulting instruction, or for a trap the one after it): intercepted, or
    /// delivered to the guest.
    ///
    /// `Ok`: `self.rip` is the handler's first instruction. `Err(Stop::Exit)`: `self.exit` (and `self.delivering` for
    /// EXITINTINFO) describe the #VMEXIT, the guest's state is that before delivery. Nothing else is returned.
    pub fn raise(&mut self, exception: Exception) -> Res {
        let mut e = exception;
        loop {
            if e.vector == vector::DB {
                self.set_dr6_hits(e.address);
            }
            // The second exception's own intercept comes before it is combined with the first.
            self.check_exception(&e)?;
            match e.vector {
                vector::PF => self.cr2 = e.address,
                vector::DB => self.dr7 &= !super::debug::dr7::GD,
                _ => {}
            }
            let prior = self.delivering;
            if prior & VALID != 0 && prior >> 8 & 7 == class::EXCEPTION {
                match (severity(prior as u8), severity(e.vector)) {
                    (Severity::DoubleFault, Severity::Benign) => {}
                    (Severity::DoubleFault, _) => {
                        return Err(self.vmexit(exitcode::SHUTDOWN, 0, 0));
                    }
                    (Severity::Contributory, Severity::Contributory)
                    | (Severity::PageFault, Severity::PageFault | Severity::Contributory) => {
                        e = Exception { vector: vector::DF, error: Some(0), address: 0 };
                        self.check_exception(&e)?;
                    }
                    _ => {}
                }
            }
            self.delivering = event_info(class::EXCEPTION, e.vector, e.error);
            let event = Event {
                vector: e.vector,
                error: e.error,
                software: false,
                int_n: false,
                ext: 1,
                ip: self.rip,
                resume: is_fault(&e),
            };
            match self.attempt(&event) {
                Err(Stop::Fault) => e = self.exception,
                done => return done,
            }
        }
    }

    /// An exception was about to be delivered when the guest was left for something else: EXITINTINFO tells of it
    /// (APM vol. 2, 15.7.2), DR6 of a #DB's reasons. One that would have been intercepted has no more effect yet.
    pub fn interrupted_by_exit(&mut self, e: Exception) {
        if e.vector == vector::DB {
            self.set_dr6_hits(e.address);
            if !self.intercepted(exitcode::EXCP0 + vector::DB as u64) {
                self.dr7 &= !super::debug::dr7::GD;
            }
        }
        self.delivering = event_info(class::EXCEPTION, e.vector, e.error);
    }

    fn set_dr6_hits(&mut self, hits: u64) {
        self.dr6 = (self.dr6 & !super::debug::dr6::HITS) | hits | super::debug::dr6::FIXED;
    }

    /// #VMEXIT when the exception is intercepted.
    fn check_exception(&mut self, e: &Exception) -> Res {
        if !self.intercepted(exitcode::EXCP0 + (e.vector & 31) as u64) {
            return Ok(());
        }
        let info2 = if e.vector == vector::PF { e.address } else { 0 };
        let code = exitcode::EXCP0 + (e.vector & 31) as u64;
        Err(self.vmexit(code, e.error.unwrap_or(0) as u64, info2))
    }

    /// Delivers the event of a VMCB's EVENTINJ field; `next_rip` is the VMCB's, used for software interrupts.
    /// Never intercepted itself (APM vol. 2, 15.20). Results as for [`Cpu::raise`].
    pub fn inject(&mut self, eventinj: u64, next_rip: u64) -> Res {
        let vector = eventinj as u8;
        let error = (eventinj & ERROR_VALID != 0).then_some((eventinj >> 32) as u32);
        let class = eventinj >> 8 & 7;
        let trap = matches!(vector, vector::BP | vector::OF);
        let software = class == class::SOFTWARE || (class == class::EXCEPTION && trap);
        let info = if class == class::EXCEPTION { error } else { None };
        let resume = class == class::EXCEPTION && !trap && vector != vector::DB;
        self.delivering = event_info(class, vector, info);
        let event = Event {
            vector,
            error: info,
            software,
            int_n: class == class::SOFTWARE,
            ext: !software as u32,
            ip: if software { next_rip } else { self.rip },
            resume,
        };
        if class == class::NMI {
            self.nmi_blocked = true;
        }
        self.finish_delivery(&event)
    }

    /// Delivers a maskable interrupt (V_IRQ); the caller has checked RFLAGS.IF, the shadow and the priority.
    pub fn external_interrupt(&mut self, vector: u8) -> Res {
        self.delivering = event_info(class::EXTERNAL, vector, None);
        let event =
            Event { vector, error: None, software: false, int_n: false, ext: 1, ip: self.rip, resume: false };
        self.finish_delivery(&event)
    }

    /// Whether an event that an instruction raised (INT n, INT3, INTO, INT1) is in delivery: exits save the next RIP.
    pub fn delivering_software(&self) -> bool {
        let trap = matches!(self.delivering as u8, vector::BP | vector::OF);
        match self.delivering >> 8 & 7 {
            class::SOFTWARE => true,
            class::EXCEPTION => trap,
            _ => false,
        }
    }

    /// Delivers; a fault on the way is raised in its turn.
    fn finish_delivery(&mut self, event: &Event) -> Res {
        match self.attempt(event) {
            Err(Stop::Fault) => {
                let e = self.exception;
                self.raise(e)
            }
            done => done,
        }
    }

    /// Delivers an event of the running instruction. A fault on the way is left to the executor, which raises it at
    /// the instruction.
    pub(super) fn deliver_software(&mut self, op: &Op, class: u64, event: &Event) -> Res {
        self.rip = self.mask_ip(self.this_ip(op));
        self.delivering = event_info(class, event.vector, None);
        match self.attempt(event) {
            Ok(()) => Err(Stop::EndBlock),
            Err(stop) => {
                if !matches!(stop, Stop::Fault | Stop::Exit) {
                    self.delivering = 0;
                }
                Err(stop)
            }
        }
    }

    /// One attempt: `Ok` when the handler is about to run; `Err(Stop::Fault)` with `self.exception`; `Err(Stop::Exit)`.
    fn attempt(&mut self, e: &Event) -> Res {
        // Whatever block ran, it is over: a frame pushed onto its code is noticed by the next look-up.
        let single = core::mem::replace(&mut self.engine.single, true);
        let done = self.transfer(e);
        self.engine.single = single;
        done
    }

    fn transfer(&mut self, e: &Event) -> Res {
        if !self.protected() {
            self.deliver_real(e)?;
        } else if self.long_mode() {
            self.deliver_long(e)?;
        } else if self.v86() && e.int_n {
            self.deliver_v86_software(e)?;
        } else {
            self.deliver_protected(e)?;
        }
        self.delivering = 0;
        self.sys.no_step = true;
        self.sys.deliveries = self.sys.deliveries.wrapping_add(1);
        self.shadow = false;
        self.update_attention();
        Ok(())
    }

    /// The image of RFLAGS that is pushed.
    fn flags_image(&self, e: &Event) -> u64 {
        (self.rflags() & !rf::RF) | if e.resume { rf::RF } else { self.rflags & rf::RF }
    }

    /// Through the interrupt vector table of real mode (APM vol. 2, 8.6).
    fn deliver_real(&mut self, e: &Event) -> Res {
        let at = e.vector as u64 * 4;
        if at + 3 > self.idtr.limit as u64 {
            return Err(self.gp(Self::idt_error(e)));
        }
        let entry = self.load_system::<u32>(self.system_linear(self.idtr.base.wrapping_add(at)))?;
        self.enter_vector(e, entry, self.rflags())
    }

    /// Pushes a 16-bit frame and enters a real-mode style handler.
    fn enter_vector(&mut self, e: &Event, entry: u32, image: u64) -> Res {
        let ip = entry as u64 & 0xffff;
        if ip > self.seg[sreg::CS].limit as u64 {
            return Err(self.gp(0));
        }
        let stack = self.current_stack(0);
        let cs = self.seg[sreg::CS].selector as u64;
        let sp = self.push_frame(&stack, &[image, cs, e.ip], 2)?;
        self.rb.gpr[reg::RSP] = sp;
        let mut clear = rf::TF | rf::NT | rf::RF;
        if self.v86() {
            clear |= if self.rflags & rf::IOPL == rf::IOPL { rf::IF } else { rf::VIF };
        } else {
            clear |= rf::IF | rf::AC;
        }
        let flags = self.rflags() & !clear;
        self.set_rflags(flags);
        self.enter_real_code((entry >> 16) as u16, ip);
        Ok(())
    }

    /// INT n in virtual-8086 mode (APM vol. 2, 8.11 and table 8-5).
    fn deliver_v86_software(&mut self, e: &Event) -> Res {
        let full = self.rflags & rf::IOPL == rf::IOPL;
        if self.cr4 & cr4::VME != 0 && !self.redirected(e.vector)? {
            let entry = self.load_bank::<u32>(2, sreg::DS as u8, e.vector as u64 * 4)?;
            let mut image = self.rflags();
            if !full {
                let vif = image & rf::VIF != 0;
                image = (image & !rf::IF) | rf::IOPL | if vif { rf::IF } else { 0 };
            }
            return self.enter_vector(e, entry, image);
        }
        if !full {
            return Err(self.gp(0));
        }
        self.deliver_protected(e)
    }

    /// The TSS's interrupt-redirection bitmap: true sends INT `vector` to the protected-mode handler.
    fn redirected(&mut self, vector: u8) -> Result<bool, Stop> {
        if self.tr.limit < 0x67 {
            return Err(self.gp(0));
        }
        let base = self.tr.base;
        let map = self.load_system::<u16>(self.system_linear(base.wrapping_add(0x66)))? as u64;
        let at = map.wrapping_sub(32).wrapping_add(vector as u64 / 8);
        if map < 32 || at > self.tr.limit as u64 {
            return Err(self.gp(0));
        }
        let byte = self.load_system::<u8>(self.system_linear(base.wrapping_add(at)))?;
        Ok(byte >> (vector & 7) & 1 != 0)
    }

    /// Error code of a fault that names an IDT entry.
    fn idt_error(e: &Event) -> u32 {
        (e.vector as u32) << 3 | 2 | e.ext
    }

    /// Fetches and checks the gate at `at` in the IDT, `size` bytes.
    fn gate(&mut self, e: &Event, size: u64, types: u16) -> Result<Descriptor, Stop> {
        let at = e.vector as u64 * size;
        if at + size - 1 > self.idtr.limit as u64 {
            return Err(self.gp(Self::idt_error(e)));
        }
        let linear = self.system_linear(self.idtr.base.wrapping_add(at));
        let gate = Descriptor(self.load_system::<u64>(linear)?);
        if gate.is_segment() || types >> gate.kind() & 1 == 0 || (e.software && gate.dpl() < self.cpl) {
            return Err(self.gp(Self::idt_error(e)));
        }
        if !gate.present() {
            return Err(self.fault(vector::NP, Some(Self::idt_error(e))));
        }
        Ok(gate)
    }

    /// Fetches and checks the handler's code segment.
    fn handler(&mut self, e: &Event, selector: u16) -> Result<Descriptor, Stop> {
        if is_null(selector) {
            return Err(self.gp(e.ext));
        }
        let error = error_selector(selector) | e.ext;
        let d = self.descriptor(selector, vector::GP, e.ext)?;
        if !d.is_code() || d.dpl() > self.cpl {
            return Err(self.gp(error));
        }
        if self.long_mode() && d.attrib() & (attrib::L | attrib::DB) != attrib::L {
            return Err(self.gp(error));
        }
        if !d.present() {
            return Err(self.fault(vector::NP, Some(error)));
        }
        Ok(d)
    }

    /// Through the IDT in legacy protected mode (APM vol. 2, 8.7).
    fn deliver_protected(&mut self, e: &Event) -> Res {
        const TYPES: u16 = 1 << kind::TASK_GATE
            | 1 << kind::INTERRUPT16
            | 1 << kind::TRAP16
            | 1 << kind::INTERRUPT
            | 1 << kind::TRAP;
        let gate = self.gate(e, 8, TYPES)?;
        if gate.kind() == kind::TASK_GATE {
            let resume = self.rflags;
            if e.resume {
                self.rflags |= rf::RF;
            }
            let done = self.task_switch(gate.gate_selector(), Reason::Gate, e.error, e.ip);
            if done.is_err() {
                self.rflags = resume;
            }
            return done;
        }
        let selector = gate.gate_selector();
        let d = self.handler(e, selector)?;
        let cpl = if d.is_conforming() { self.cpl } else { d.dpl() };
        let v86 = self.v86();
        if v86 && cpl != 0 {
            return Err(self.gp(error_selector(selector) | e.ext));
        }
        let ip = gate.gate_offset();
        let width = if gate.kind() & 8 != 0 { 4 } else { 2 };
        let mut items = [0u64; 10];
        let mut count = 0;
        let mut add = |v: u64| {
            items[count] = v;
            count += 1;
        };
        let inner = cpl != self.cpl;
        let stack = if inner { self.inner_stack(cpl, e.ext)? } else { self.current_stack(e.ext) };
        if v86 {
            for n in [sreg::GS, sreg::FS, sreg::DS, sreg::ES] {
                add(self.seg[n].selector as u64);
            }
        }
        if inner {
            add(self.seg[sreg::SS].selector as u64);
            add(self.rb.gpr[reg::RSP]);
        }
        add(self.flags_image(e));
        add(self.seg[sreg::CS].selector as u64);
        add(e.ip);
        if let Some(error) = e.error {
            add(error as u64);
        }
        self.check_target(d, ip, e.ext)?;
        self.mark_accessed(selector, d)?;
        let sp = self.push_frame(&stack, &items[..count], width)?;
        self.enter_handler(gate, stack, sp);
        if v86 {
            for n in [sreg::GS, sreg::FS, sreg::DS, sreg::ES] {
                self.seg[n] = null_segment(0);
            }
        }
        self.enter_code(selector, d, cpl, ip);
        Ok(())
    }

    /// Through the IDT in long mode (APM vol. 2, 8.9).
    fn deliver_long(&mut self, e: &Event) -> Res {
        let gate = self.gate(e, 16, 1 << kind::INTERRUPT | 1 << kind::TRAP)?;
        let at = self.idtr.base.wrapping_add(e.vector as u64 * 16 + 8);
        let high = self.load_system::<u64>(at)?;
        let ip = gate.gate_offset() | high << 32;
        let selector = gate.gate_selector();
        let d = self.handler(e, selector)?;
        let cpl = if d.is_conforming() { self.cpl } else { d.dpl() };
        let ist = (gate.0 >> 32 & 7) as u8;
        let mut stack = if cpl != self.cpl && ist == 0 {
            self.inner_stack(cpl, e.ext)?
        } else {
            Stack { ss: self.seg[sreg::SS], sp: self.rb.gpr[reg::RSP], size: 8, cpl, error: e.ext }
        };
        if cpl != self.cpl {
            stack.ss = null_stack(cpl);
        }
        if ist != 0 {
            stack.sp = self.ist_pointer(ist, e.ext)?;
        }
        stack.sp &= !15;
        if !self.canonical(ip) {
            return Err(self.gp(e.ext));
        }
        let items = [
            self.seg[sreg::SS].selector as u64,
            self.rb.gpr[reg::RSP],
            self.flags_image(e),
            self.seg[sreg::CS].selector as u64,
            e.ip,
            e.error.unwrap_or(0) as u64,
        ];
        let count = if e.error.is_some() { 6 } else { 5 };
        self.mark_accessed(selector, d)?;
        let sp = self.push_frame(&stack, &items[..count], 8)?;
        self.enter_handler(gate, stack, sp);
        self.enter_code(selector, d, cpl, ip);
        Ok(())
    }

    /// Puts the handler's stack in force and clears the flags that a gate clears.
    fn enter_handler(&mut self, gate: Descriptor, stack: Stack, sp: u64) {
        self.seg[sreg::SS] = stack.ss;
        self.rb.gpr[reg::RSP] = merge_sp(self.rb.gpr[reg::RSP], sp, stack.size);
        let mut clear = rf::TF | rf::NT | rf::RF | rf::VM;
        if gate.kind() & 1 == 0 {
            clear |= rf::IF;
        }
        let flags = self.rflags() & !clear;
        self.set_rflags(flags);
    }
}
