// SPDX-License-Identifier: Apache-2.0
//! What a processor holds of the advanced virtual interrupt controller ([`crate::x86::avic`]).

/// The VMCB's fields of AVIC, and what the running guest has done to its page.
#[derive(Clone, Copy, Debug)]
pub struct Avic {
    /// Virtual interrupts come from the backing page.
    pub enabled: bool,
    /// x2APIC mode: registers are MSRs.
    pub x2: bool,
    /// Guest-physical page of the registers; no address while there are none.
    pub bar: u64,
    /// Host address of the backing page.
    pub page: usize,
    /// Host address of the logical APIC ID table.
    pub(in crate::x86) logical: usize,
    /// Host address of the physical APIC ID table, and its last index.
    pub(in crate::x86) physical: usize,
    pub(in crate::x86) last: u32,
    /// Registers that were written and have to be acted on: bit n for the one at 16 * n.
    pub written: u64,
    /// What the rest was made of, and whether VMRUN has found it consistent: mostly they are the same.
    pub(in crate::x86) fields: [u64; 6],
    pub(in crate::x86) checked: bool,
}

impl Default for Avic {
    fn default() -> Self {
        Avic {
            enabled: false,
            x2: false,
            bar: u64::MAX,
            page: 0,
            logical: 0,
            physical: 0,
            last: 0,
            written: 0,
            fields: [0; 6],
            checked: false,
        }
    }
}
