// SPDX-License-Identifier: Apache-2.0
//! Runs a flat 64-bit image at guest address 0x100000 until it executes HLT, and prints RAX and the speed:
//! `cargo run --release -p softcpu --example flat -- image.bin`. The guest has 256 MiB, mapped one to one with
//! 2 MiB pages (large nested leaves too), its stack below 0x100000, and runs at CPL 0.

use std::time::Instant;

use softcpu::mem::Machine;
use softcpu::x86::state::Cpu;
use softcpu::x86::vmcb::{Vmcb, control, save};

const RAM: usize = 256 << 20;
const LOAD: usize = 0x10_0000;

fn map(size: usize, align: usize) -> usize {
    // SAFETY: a fresh anonymous mapping, never unmapped.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size + align,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    assert!(p != libc::MAP_FAILED);
    (p as usize).next_multiple_of(align)
}

fn main() {
    let path = std::env::args().nth(1).expect("usage: flat IMAGE");
    let image = std::fs::read(path).expect("image");
    let machine = Machine::new();
    let ram = map(RAM, 2 << 20);
    let host = map(64 << 10, 4096);
    // SAFETY: both stay mapped.
    unsafe {
        machine.add_region(ram, RAM).unwrap();
        machine.add_region(host, 64 << 10).unwrap();
    }
    let put = |address: usize, value: u64| {
        // SAFETY: addresses are inside the two mappings.
        unsafe { (address as *mut u64).write(value) }
    };
    // Nested tables at host + 0x1000, the guest's at guest address 0x1000: one to one over 1 GiB.
    let (vmcb_page, n4, n3, n2) = (host, host + 0x1000, host + 0x2000, host + 0x3000);
    put(n4, n3 as u64 | 7);
    put(n3, n2 as u64 | 7);
    put(ram + 0x1000, 0x2000 | 7);
    put(ram + 0x2000, 0x3000 | 7);
    for i in 0..RAM >> 21 {
        put(n2 + 8 * i, (ram + (i << 21)) as u64 | 0xe7);
        put(ram + 0x3000 + 8 * i, (i << 21) as u64 | 0xe7);
    }
    // SAFETY: the image fits (checked by the slice length below 128 MiB).
    assert!(image.len() < 128 << 20);
    unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), (ram + LOAD) as *mut u8, image.len()) };
    // SAFETY: a mapped page.
    let v = unsafe { Vmcb::new(vmcb_page) };
    v.set(control::INTERCEPTS + 12, 1u32 << 24 | 1 << 31 | 1);
    v.set(control::INTERCEPTS + 16, 1u32);
    v.set(control::ASID, 1u32);
    v.set(control::NP_ENABLE, 1u64);
    v.set(control::N_CR3, n4 as u64);
    let seg = |at: usize, selector: u16, attrib: u16| {
        v.set(at, selector);
        v.set(at + 2, attrib);
        v.set(at + 4, u32::MAX);
    };
    for n in 0..6 {
        seg(save::ES + 16 * n, 0x10, 0xc93);
    }
    seg(save::ES + 16, 8, 0xa9b);
    v.set(save::EFER, 0x1500u64 | 0x800);
    v.set(save::CR0, 0x8005_0033u64);
    v.set(save::CR3, 0x1000u64);
    v.set(save::CR4, 0x6a0u64);
    v.set(save::RFLAGS, 2u64);
    v.set(save::RIP, LOAD as u64);
    v.set(save::RSP, LOAD as u64 - 8);
    let mut cpu = Cpu::new(machine, 0);
    let start = Instant::now();
    let code = cpu.vmrun(vmcb_page).expect("vmcb");
    let time = start.elapsed().as_secs_f64();
    println!(
        "exit {:#x} info {:#x} {:#x} rip {:#x} rax {:#x}: {} instructions, {:.3} s, {:.0} MIPS",
        code,
        v.get::<u64>(control::EXITINFO1),
        v.get::<u64>(control::EXITINFO2),
        v.get::<u64>(save::RIP),
        v.get::<u64>(save::RAX),
        cpu.instructions,
        time,
        cpu.instructions as f64 / time / 1e6
    );
}
