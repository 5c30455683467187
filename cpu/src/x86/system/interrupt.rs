// SPDX-License-Identifier: Apache-2.0
//! Events: exceptions, interrupts, and their delivery through the interrupt vector or descriptor table
//! (APM vol. 2, chapter 8, and 15.7.2 and 15.20 for intercepts and injection).

use crate::x86::op::Res;
use crate::x86::state::{Cpu, Exception};

impl Cpu {
    /// Raises an exception at `self.rip` (the faulting instruction, or for a trap the one after it): intercepted, or
    /// delivered to the guest.
    ///
    /// `Ok`: `self.rip` is the handler's first instruction. `Err(Stop::Exit)`: `self.exit` (and `self.delivering` for
    /// EXITINTINFO) describe the #VMEXIT, the guest's state is that before delivery. Nothing else is returned.
    pub fn raise(&mut self, exception: Exception) -> Res {
        let _ = exception;
        Err(self.vmexit(super::exitcode::SHUTDOWN, 0, 0))
    }

    /// Delivers the event of a VMCB's EVENTINJ field; `next_rip` is the VMCB's, used for software interrupts.
    /// Never intercepted itself (APM vol. 2, 15.20). Results as for [`Cpu::raise`].
    pub fn inject(&mut self, eventinj: u64, next_rip: u64) -> Res {
        let _ = (eventinj, next_rip);
        Err(self.vmexit(super::exitcode::SHUTDOWN, 0, 0))
    }

    /// Delivers a maskable interrupt (V_IRQ); the caller has checked RFLAGS.IF, the shadow and the priority.
    pub fn external_interrupt(&mut self, vector: u8) -> Res {
        let _ = vector;
        Err(self.vmexit(super::exitcode::SHUTDOWN, 0, 0))
    }

    /// Delivers a non-maskable interrupt that is not intercepted.
    pub fn non_maskable_interrupt(&mut self) -> Res {
        Err(self.vmexit(super::exitcode::SHUTDOWN, 0, 0))
    }
}
