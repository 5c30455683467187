// SPDX-License-Identifier: Apache-2.0
//! A bare guest for the tests of x87 instructions.

#![allow(dead_code, reason = "each test file uses its part")]

#[path = "../common/flat.rs"]
pub mod flat;

use flat::Flat;
use softcpu::x86::state::Cpu;
use softcpu::x86::vmcb::{Vmcb, control, save};

const RAM: usize = 4 << 20;
/// Guest address of the code.
pub const CODE: usize = 0x8_5670;
/// Guest address of the data page, in RDI at the start.
pub const DATA: usize = 0x20_0000;
const STACK: usize = 0x30_0000;
/// Size of the data page.
pub const DATA_SIZE: usize = 4096;

/// A guest in 64-bit mode with 4 MiB of memory.
pub struct Guest {
    /// The processor.
    pub cpu: Box<Cpu>,
    vmcb: usize,
    ram: usize,
}

impl Guest {
    pub fn new() -> Guest {
        let flat = Flat::new(RAM);
        let v = flat.vmcb();
        v.set(control::INTERCEPTS + 8, u32::MAX); // all exceptions
        v.set(save::CR0, 0x8000_0033u64);
        v.set(save::CR4, 0x4_06a0u64);
        let Flat { mut cpu, ram, page, .. } = flat;
        cpu.rb.xcr0 = 3;
        Guest { cpu, vmcb: page, ram }
    }

    /// Its VMCB.
    pub fn vmcb(&self) -> Vmcb {
        // SAFETY: a mapped page, touched only while the guest isn't running.
        unsafe { Vmcb::new(self.vmcb) }
    }

    /// EXITCODE of the last run.
    pub fn exit(&self) -> u64 {
        self.vmcb().get(control::EXITCODE)
    }

    /// Runs `code` up to HLT with RDI at the data page, whose contents come back; the offset it came to.
    pub fn run(&mut self, code: &[u8], data: &mut [u8; DATA_SIZE]) -> usize {
        self.run_at(CODE as u64, code, data)
    }

    /// The same with `rip` for the start of the code, which is at [`CODE`].
    pub fn run_at(&mut self, rip: u64, code: &[u8], data: &mut [u8; DATA_SIZE]) -> usize {
        assert!(code.len() < 0x1_0000);
        // SAFETY: inside guest memory; the guest isn't running.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), (self.ram + CODE) as *mut u8, code.len());
            std::ptr::copy_nonoverlapping(data.as_ptr(), (self.ram + DATA) as *mut u8, DATA_SIZE);
        }
        let v = self.vmcb();
        v.set(control::TLB_CONTROL, 1u8);
        v.set(save::RFLAGS, 2u64);
        v.set(save::RIP, rip);
        v.set(save::RSP, STACK as u64);
        self.cpu.rb.gpr[7] = DATA as u64;
        let exit = self.cpu.vmrun(self.vmcb).expect("a good VMCB");
        // SAFETY: as above.
        unsafe {
            std::ptr::copy_nonoverlapping((self.ram + DATA) as *const u8, data.as_mut_ptr(), DATA_SIZE)
        };
        assert_ne!(exit, u64::MAX, "a consistent VMCB");
        (v.get::<u64>(save::RIP) - rip) as usize
    }
}
