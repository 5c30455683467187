// SPDX-License-Identifier: Apache-2.0
//! What comes between two instructions: interrupts, exceptions, the interrupt shadow, single steps, breakpoints.

use super::flags::rf;
use super::op::Stop;
use super::state::{Cpu, Exception, Exit, Held, attention, vector};
use super::system::exitcode;
use crate::engine::processor::Exited;
use crate::engine::run::run_one;
use crate::mem::pending;

/// DR6 bit: single step.
const DR6_BS: u64 = 1 << 14;

impl Cpu {
    /// Acts on a stop other than the end of a block.
    #[cold]
    pub(super) fn take_stop(&mut self, stop: Stop) -> Result<(), Exited> {
        match stop {
            Stop::Exit | Stop::ExitAfter => Err(Exited),
            Stop::Fault => self.deliver_exception(self.exception),
            Stop::Trap => self.deliver_trap(self.exception),
            _ => Ok(()),
        }
    }

    fn deliver_exception(&mut self, exception: Exception) -> Result<(), Exited> {
        match self.raise(exception) {
            Ok(()) => {
                self.shadow = false;
                self.update_attention();
                Ok(())
            }
            Err(_) => Err(Exited),
        }
    }

    /// Delivers an exception that comes behind an instruction. What this has written to the virtual APIC is acted on
    /// first, as the guest may be left for the exception. If it is that which leaves the guest, EXITINTINFO has the
    /// exception.
    fn deliver_trap(&mut self, exception: Exception) -> Result<(), Exited> {
        if self.avic.written != 0 {
            self.avic_take_writes().inspect_err(|_| self.interrupted_by_exit(exception))?;
        }
        self.deliver_exception(exception)
    }

    /// Takes what may come between two instructions. Whatever is pending beside kicks is the engine's.
    pub(super) fn take_events(&mut self, p: u32) -> Result<(), Exited> {
        // The write's instruction has retired: without its effect the guest isn't left.
        if self.engine.attention & attention::APIC != 0 {
            self.avic_take_writes()?;
        }
        if p & pending::KICK != 0 {
            self.engine.shared.clear_kick();
            return self.leave(exitcode::INTR);
        }
        if p & pending::DOORBELL != 0 {
            self.engine.shared.clear_doorbell();
            if self.avic.enabled {
                self.avic_evaluate();
            }
        }
        if self.engine.attention & attention::VIRQ != 0 && !self.shadow && self.rflags & rf::IF != 0 {
            let c = self.ctl;
            if self.avic.enabled {
                self.avic_deliver().map_err(|_| Exited)?;
            } else if c.v_ign_tpr || c.v_intr_prio > c.v_tpr {
                if self.intercepted(exitcode::VINTR) {
                    return self.leave(exitcode::VINTR);
                }
                self.ctl.v_irq = false;
                if self.external_interrupt(c.v_intr_vector).is_err() {
                    return Err(Exited);
                }
                self.update_attention();
            }
        }
        if self.engine.attention & (attention::SHADOW | attention::STEP | attention::DEBUG) != 0 {
            self.engine.single = true;
        }
        Ok(())
    }

    /// #VMEXIT between two instructions, without information.
    pub(super) fn leave(&mut self, code: u64) -> Result<(), Exited> {
        self.leave_with(code, 0, 0)
    }

    /// #VMEXIT between two instructions.
    pub(super) fn leave_with(&mut self, code: u64, info1: u64, info2: u64) -> Result<(), Exited> {
        self.exit = Exit { code, info1, info2 };
        self.engine.stop_op = core::ptr::null();
        Err(Exited)
    }

    /// Runs one instruction by itself: interrupt shadow, single step, breakpoints, a write into its own block.
    pub(super) fn step_one(&mut self) -> Result<(), Exited> {
        let done = self.step_inner();
        self.update_attention();
        done
    }

    fn step_inner(&mut self) -> Result<(), Exited> {
        let shadow = core::mem::take(&mut self.shadow);
        let stepping = self.rflags & rf::TF != 0;
        let resume = self.rflags & rf::RF;
        // AMD's processors take an instruction breakpoint behind MOV SS, too.
        if self.engine.attention & attention::DEBUG != 0 && resume == 0 {
            let hits = self.instruction_breakpoints();
            if hits != 0 {
                return self.deliver_exception(Exception { vector: vector::DB, error: None, address: hits });
            }
        }
        self.sys.held = Held { shadow, resume };
        self.rflags &= !rf::RF;
        self.debug_hits = 0;
        self.sys.no_step = false;
        let deferred = self.sys.deferred_hits;
        let written = self.avic.written;
        let stop = run_one(self);
        if matches!(stop, Stop::Exit | Stop::Fault | Stop::SelfModify) {
            self.avic.written = written; // the write has not happened
        }
        match stop {
            // The delivery of a fault ends it.
            Stop::Exit | Stop::Restart | Stop::SelfModify | Stop::Fault => self.hold_on(),
            _ => self.sys.held = Held::default(),
        }
        // Traps come after every iteration of a repeated instruction too.
        if !matches!(stop, Stop::EndBlock | Stop::Restart) {
            if matches!(stop, Stop::Trap | Stop::Fault) {
                self.sys.deferred_hits = 0;
                if self.exception.vector == vector::DB {
                    self.exception.address |= deferred;
                }
            }
            return self.take_stop(stop);
        }
        let mut hits = self.debug_hits;
        if self.shadow && self.sys.no_step {
            // MOV SS: its own data breakpoints wait for the end of the next instruction, too.
            self.sys.deferred_hits |= hits;
            return Ok(());
        }
        if stop == Stop::EndBlock {
            hits |= core::mem::take(&mut self.sys.deferred_hits);
        }
        if stepping && !self.sys.no_step {
            hits |= DR6_BS;
        }
        if hits != 0 {
            return self.deliver_trap(Exception { vector: vector::DB, error: None, address: hits });
        }
        Ok(())
    }

    /// What held for an instruction that has not retired holds for it still.
    pub(super) fn hold_on(&mut self) {
        let held = core::mem::take(&mut self.sys.held);
        self.rflags |= held.resume;
        self.shadow |= held.shadow;
    }

    /// Called for each data access while breakpoints are armed.
    #[cold]
    pub(super) fn note_data_access(&mut self, linear: u64, size: usize, write: bool) {
        self.debug_hits |= self.data_breakpoints(linear, size, write);
    }
}
