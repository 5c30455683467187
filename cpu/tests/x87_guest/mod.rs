// SPDX-License-Identifier: Apache-2.0
//! A bare guest for the tests of x87 instructions.

#![allow(dead_code, reason = "each test file uses its part")]

use softcpu::mem::Machine;
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

/// Fresh memory, never unmapped.
pub fn map(size: usize, align: usize, protection: i32) -> usize {
    // SAFETY: a fresh anonymous mapping, never unmapped.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size + align,
            libc::PROT_READ | libc::PROT_WRITE | protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert!(p != libc::MAP_FAILED);
    (p as usize).next_multiple_of(align)
}

/// A guest in 64-bit mode with 4 MiB of memory.
pub struct Guest {
    /// The processor.
    pub cpu: Box<Cpu>,
    vmcb: usize,
    ram: usize,
}

impl Guest {
    pub fn new() -> Guest {
        let machine = Machine::new();
        let ram = map(RAM, 2 << 20, 0);
        let host = map(64 << 10, 4096, 0);
        // SAFETY: both stay mapped.
        unsafe {
            machine.add_region(ram, RAM).unwrap();
            machine.add_region(host, 64 << 10).unwrap();
        }
        let put = |address: usize, value: u64| {
            // SAFETY: inside the two mappings.
            unsafe { (address as *mut u64).write(value) }
        };
        let (n4, n3, n2) = (host + 0x1000, host + 0x2000, host + 0x3000);
        put(n4, n3 as u64 | 7);
        put(n3, n2 as u64 | 7);
        put(ram + 0x1000, 0x2000 | 7);
        put(ram + 0x2000, 0x3000 | 7);
        for i in 0..RAM >> 21 {
            put(n2 + 8 * i, (ram + (i << 21)) as u64 | 0xe7);
            put(ram + 0x3000 + 8 * i, (i << 21) as u64 | 0xe7);
        }
        // SAFETY: a mapped page.
        let v = unsafe { Vmcb::new(host) };
        v.set(control::INTERCEPTS + 8, u32::MAX); // all exceptions
        v.set(control::INTERCEPTS + 12, 1u32 << 24 | 1 << 31 | 1); // HLT, shutdown, INTR
        v.set(control::INTERCEPTS + 16, 1u32);
        v.set(control::ASID, 1u32);
        v.set(control::NP_ENABLE, 1u64);
        v.set(control::N_CR3, n4 as u64);
        for n in 0..6 {
            v.set(save::ES + 16 * n, 0x10u16);
            v.set(save::ES + 16 * n + 2, 0xc93u16);
            v.set(save::ES + 16 * n + 4, u32::MAX);
        }
        v.set(save::ES + 16, 8u16);
        v.set(save::ES + 18, 0xa9bu16);
        v.set(save::EFER, 0x1d00u64);
        v.set(save::CR0, 0x8000_0033u64);
        v.set(save::CR3, 0x1000u64);
        v.set(save::CR4, 0x4_06a0u64);
        let mut cpu = Cpu::new(machine, 0);
        cpu.rb.xcr0 = 3;
        Guest { cpu, vmcb: host, ram }
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
