// SPDX-License-Identifier: Apache-2.0
//! A processor with a flat guest in 64-bit mode: guest memory one to one, in 2 MiB pages on both levels.
#![allow(dead_code, reason = "each user takes its part")]

use std::sync::Arc;

use softcpu::mem::Machine;
use softcpu::x86::state::Cpu;
use softcpu::x86::vmcb::{Vmcb, control, save};

/// The guest's tables: PML4, PDPT, page directory.
pub const PML4: usize = 0x1000;

/// Fresh memory at a multiple of `align` (a power of two of at least 4096), never unmapped; `protection` is in addition
/// to read and write.
pub fn map(size: usize, align: usize, protection: i32) -> usize {
    // SAFETY: a fresh anonymous mapping.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size + align - 4096,
            libc::PROT_READ | libc::PROT_WRITE | protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    assert!(p != libc::MAP_FAILED);
    (p as usize).next_multiple_of(align)
}

/// Sets segment register `n`, in the order of the VMCB.
pub fn put_segment(v: Vmcb, n: usize, selector: u16, attrib: u16, base: u64, limit: u32) {
    let at = save::ES + 16 * n;
    v.set(at, selector);
    v.set(at + 2, attrib);
    v.set(at + 4, limit);
    v.set(at + 8, base);
}

/// Makes a VMCB that is zero one of a guest in 64-bit mode at CPL 0 with flat segments, on the nested tables at
/// `nested` and its own at `cr3`. HLT, shutdown and physical interrupts exit.
pub fn long_mode(v: Vmcb, nested: usize, cr3: u64) {
    v.set(control::INTERCEPTS + 12, 1u32 << 24 | 1 << 31 | 1);
    v.set(control::INTERCEPTS + 16, 1u32); // VMRUN, without which no VMCB is consistent
    v.set(control::ASID, 1u32);
    v.set(control::NP_ENABLE, 1u64);
    v.set(control::N_CR3, nested as u64);
    for n in [0, 2, 3, 4, 5] {
        put_segment(v, n, 0x10, 0xc93, 0, u32::MAX);
    }
    put_segment(v, 1, 8, 0xa9b, 0, u32::MAX);
    v.set(save::EFER, 0x1d01u64);
    v.set(save::CR0, 0x8005_0033u64);
    v.set(save::CR3, cr3);
    v.set(save::CR4, 0x6a0u64);
    v.set(save::RFLAGS, 2u64);
}

/// A processor, its VMCB and its guest's memory.
pub struct Flat {
    pub cpu: Box<Cpu>,
    pub machine: Arc<Machine>,
    /// Host address of guest-physical 0.
    pub ram: usize,
    /// Host address of the VMCB.
    pub page: usize,
}

impl Flat {
    /// With `size` bytes of memory, at most 1 GiB. The first 16 KiB are the guest's tables'.
    pub fn new(size: usize) -> Flat {
        let machine = Machine::new();
        let (ram, page) = (map(size, 2 << 20, 0), map(0x4000, 4096, 0));
        // SAFETY: both stay mapped.
        unsafe {
            machine.add_region(ram, size).unwrap();
            machine.add_region(page, 0x4000).unwrap();
        }
        let put = |address: usize, value: usize| {
            // SAFETY: inside the two mappings.
            unsafe { (address as *mut u64).write(value as u64) }
        };
        let nested = page + 0x1000;
        put(nested, (nested + 0x1000) | 7);
        put(nested + 0x1000, (nested + 0x2000) | 7);
        put(ram + PML4, (PML4 + 0x1000) | 7);
        put(ram + PML4 + 0x1000, (PML4 + 0x2000) | 7);
        for i in 0..size >> 21 {
            put(nested + 0x2000 + 8 * i, (ram + (i << 21)) | 0xe7);
            put(ram + PML4 + 0x2000 + 8 * i, i << 21 | 0xe7);
        }
        let flat = Flat { cpu: Cpu::new(machine.clone(), 0), machine, ram, page };
        long_mode(flat.vmcb(), nested, PML4 as u64);
        flat
    }

    /// Its VMCB.
    pub fn vmcb(&self) -> Vmcb {
        // SAFETY: a mapped page, which the tests touch only while the guest isn't running.
        unsafe { Vmcb::new(self.page) }
    }
}
