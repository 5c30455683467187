// SPDX-License-Identifier: Apache-2.0
//! What translations are tagged with: the guest's ASID (APM vol. 2, 15.16) and its PCID (5.5.1).

use crate::engine::architecture;
use crate::x86::state::{Cpu, cr4};

/// An address space of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Space {
    asid: u32,
    pcid: u16,
}

impl architecture::Space for Space {
    fn guest(&self) -> u32 {
        self.asid
    }
}

impl Cpu {
    /// The PCID in force: CR3 bits 11:0 with CR4.PCIDE.
    pub fn pcid(&self) -> u16 {
        if self.cr4 & cr4::PCIDE != 0 { (self.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// Makes accesses belong to the ASID and PCID in force.
    pub fn switch_tlb(&mut self) {
        let space = Space { asid: self.ctl.asid, pcid: self.pcid() };
        self.engine.tlb.switch(space);
    }

    /// Forgets the translations of one PCID of the ASID in force.
    pub fn flush_pcid(&mut self, pcid: u16) {
        self.engine.tlb.flush_space(Space { asid: self.ctl.asid, pcid });
    }

    /// Forgets those of every PCID of the ASID in force.
    pub fn flush_asid(&mut self) {
        self.engine.tlb.flush_guest(self.ctl.asid);
    }
}
