// SPDX-License-Identifier: Apache-2.0
//! Interrupts between the guest's processors (APM vol. 2, 15.29.2.4 and 15.29.6).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::PAGE;
use super::page::{BackingPage, register};
use crate::engine::processor::Exited;
use crate::x86::state::Cpu;
use crate::x86::system::exitcode;

/// Bits of an entry of the physical APIC ID table.
mod physical {
    pub const VALID: u64 = 1 << 63;
    pub const RUNNING: u64 = 1 << 62;
    pub const HOST_ID: u64 = 0xFFF;
}
/// An entry of the logical APIC ID table: valid, and the guest's physical APIC ID.
mod logical {
    pub const VALID: u32 = 1 << 31;
    pub const ID: u32 = 0xFF;
}

/// Bits of the ICR.
mod icr {
    pub const VECTOR: u32 = 0xFF;
    pub const MODE: u32 = 7 << 8;
    pub const LOGICAL: u32 = 1 << 11;
    pub const STATUS: u32 = 1 << 12;
    pub const LEVEL_TRIGGERED: u32 = 1 << 15;
    pub const SHORTHAND_SHIFT: u32 = 18;
    /// The destination in the high half, in xAPIC mode.
    pub const HIGH_XAPIC: u32 = 0xFF << 24;
    pub const TO_SELF: u32 = 1;
    pub const TO_ALL: u32 = 2;
    pub const TO_OTHERS: u32 = 3;
}

/// Why an interrupt is incomplete (APM vol. 2, table 15-27).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Not a fixed, edge-triggered one.
    InvalidType = 0,
    /// A target is not running; its IRR has been set.
    TargetNotRunning = 1,
    /// A target is in no table.
    InvalidTarget = 2,
    /// A target's backing page is not in memory.
    InvalidBackingPage = 3,
    /// The vector is below 16.
    InvalidVector = 4,
}

/// Physical APIC IDs that an interrupt is for: a bit each of those that a table can have.
#[derive(Default)]
struct Targets([u64; 8]);

impl Targets {
    fn add(&mut self, id: u32) {
        self.0[id as usize / 64] |= 1 << (id % 64);
    }

    fn iter(&self) -> impl Iterator<Item = u32> {
        let words = self.0;
        (0..512u32).filter(move |id| words[*id as usize / 64] >> (id % 64) & 1 != 0)
    }
}

/// What keeps an interrupt from its targets, and the table's index that it is about.
type Incomplete = (Failure, u32);

impl Cpu {
    /// The low half of the ICR has been written: sends, or leaves with AVIC_INCOMPLETE_IPI.
    pub(super) fn avic_icr(&mut self, page: BackingPage) -> Result<(), Exited> {
        let (low, mut high) = (page.get(register::ICR_LOW), page.get(register::ICR_HIGH));
        page.set(register::ICR_LOW, low & !icr::STATUS);
        if !self.avic.x2 {
            // The high half is memory to the guest; a register that is no memory has no reserved bits.
            high &= icr::HIGH_XAPIC;
            page.keep(register::ICR_HIGH, high);
        }
        match self.avic_send(page, low, high) {
            None => Ok(()),
            Some((failure, index)) => {
                let info1 = (high as u64) << 32 | low as u64;
                let info2 = (failure as u64) << 32 | index as u64;
                self.leave_with(exitcode::AVIC_INCOMPLETE_IPI, info1, info2)
            }
        }
    }

    /// SELF_IPI of x2APIC mode has been written.
    pub(super) fn avic_self_ipi(&mut self, vector: u32) {
        let page = self.backing_page();
        page.raise(register::IRR, vector as u8);
        self.avic_evaluate();
    }

    /// Sends to all targets or, if one of them is not to be had, to none.
    fn avic_send(&mut self, page: BackingPage, low: u32, high: u32) -> Option<Incomplete> {
        if low & (icr::MODE | icr::LEVEL_TRIGGERED) != 0 {
            return Some((Failure::InvalidType, 0));
        }
        let vector = (low & icr::VECTOR) as u8;
        if vector < 16 {
            return Some((Failure::InvalidVector, 0));
        }
        if low >> icr::SHORTHAND_SHIFT & 3 == icr::TO_SELF {
            page.raise(register::IRR, vector);
            self.avic_evaluate();
            return None;
        }
        match self.avic_targets(page, low, high) {
            Ok(targets) => self.avic_send_to(&targets, vector),
            Err(incomplete) => Some(incomplete),
        }
    }

    /// The targets, of which each is valid.
    fn avic_targets(&self, page: BackingPage, low: u32, high: u32) -> Result<Targets, Incomplete> {
        let x2 = self.avic.x2;
        let (dest, everybody) = if x2 { (high, u32::MAX) } else { (high >> 24, 0xFF) };
        let mut targets = Targets::default();
        let mut add = |id: u32| -> Result<(), Incomplete> {
            self.avic_check(id)?;
            targets.add(id);
            Ok(())
        };
        match low >> icr::SHORTHAND_SHIFT & 3 {
            icr::TO_ALL => (0..=self.avic.last).try_for_each(add)?,
            icr::TO_OTHERS => {
                let own = page.address() as u64;
                (0..=self.avic.last).filter(|id| self.physical_entry(*id) & PAGE != own).try_for_each(add)?;
            }
            _ if dest == everybody => (0..=self.avic.last).try_for_each(add)?,
            _ if low & icr::LOGICAL == 0 => add(dest)?,
            _ if x2 => {
                let cluster = dest >> 16 << 4;
                (0..16).filter(|bit| dest >> bit & 1 != 0).map(|bit| cluster | bit).try_for_each(add)?;
            }
            _ => {
                // Eight bits, or a cluster of four.
                let flat = page.get(register::DFR) >> 28 == 0xF;
                let (first, bits) = if flat { (0, dest) } else { ((dest >> 4) * 4, dest & 15) };
                for index in (0..8).filter(|bit| bits >> bit & 1 != 0).map(|bit| first + bit) {
                    let entry = self.logical_entry(index);
                    if entry & logical::VALID == 0 {
                        return Err((Failure::InvalidTarget, index));
                    }
                    add(entry & logical::ID)?;
                }
            }
        }
        Ok(targets)
    }

    /// Whether the table has a processor with this ID, and its page is in memory.
    fn avic_check(&self, id: u32) -> Result<(), Incomplete> {
        if id > self.avic.last || self.physical_entry(id) & physical::VALID == 0 {
            return Err((Failure::InvalidTarget, id));
        }
        let address = (self.physical_entry(id) & PAGE) as usize;
        if !self.engine.regions.contains(address, 4096) {
            return Err((Failure::InvalidBackingPage, id));
        }
        Ok(())
    }

    fn physical_entry(&self, id: u32) -> u64 {
        let at = self.avic.physical + 8 * id as usize;
        // SAFETY: `id` is at most 0x1FF, so that this is in the page that VMRUN has found registered.
        unsafe { AtomicU64::from_ptr(at as *mut u64) }.load(Ordering::SeqCst)
    }

    fn logical_entry(&self, index: u32) -> u32 {
        let at = self.avic.logical + 4 * index as usize;
        // SAFETY: there are 64 entries at most, in a page that VMRUN has found registered.
        unsafe { AtomicU32::from_ptr(at as *mut u32) }.load(Ordering::SeqCst)
    }

    /// Sets the bit of each target's IRR, and rings where the target runs.
    fn avic_send_to(&mut self, targets: &Targets, vector: u8) -> Option<Incomplete> {
        let mut not_running = None;
        for id in targets.iter() {
            let address = (self.physical_entry(id) & PAGE) as usize;
            if !self.engine.regions.contains(address, 4096) {
                return Some((Failure::InvalidBackingPage, id)); // the table has changed meanwhile
            }
            // SAFETY: registered, as far as this processor has caught up.
            unsafe { BackingPage::new(address) }.raise(register::IRR, vector);
            if address == self.avic.page {
                continue;
            }
            // Behind the store to the IRR: a target that begins to run says so before it looks there.
            let entry = self.physical_entry(id);
            if entry & physical::RUNNING == 0 {
                not_running = Some(id);
            } else {
                self.engine.machine.doorbell((entry & physical::HOST_ID) as u32);
            }
        }
        // The sender may be among the targets.
        self.avic_evaluate();
        not_running.map(|id| (Failure::TargetNotRunning, id))
    }
}
