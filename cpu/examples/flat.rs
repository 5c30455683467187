// SPDX-License-Identifier: Apache-2.0
//! Runs a flat 64-bit image at guest address 0x100000 until it executes HLT, and prints RAX and the speed:
//! `cargo run --release -p softcpu --example flat -- image.bin`. The guest has 256 MiB, mapped one to one with
//! 2 MiB pages (large nested leaves too), its stack below 0x100000, and runs at CPL 0.

#[path = "../tests/common/flat.rs"]
mod common;

use std::time::Instant;

use softcpu::x86::vmcb::{control, save};

const RAM: usize = 256 << 20;
const LOAD: usize = 0x10_0000;

fn main() {
    let path = std::env::args().nth(1).expect("usage: flat IMAGE");
    let image = std::fs::read(path).expect("image");
    let mut guest = common::Flat::new(RAM);
    assert!(image.len() <= RAM - LOAD, "{} bytes are too many", image.len());
    // SAFETY: inside guest memory.
    unsafe {
        std::ptr::copy_nonoverlapping(image.as_ptr(), (guest.ram + LOAD) as *mut u8, image.len());
    }
    let v = guest.vmcb();
    v.set(save::RIP, LOAD as u64);
    v.set(save::RSP, LOAD as u64 - 8);
    let start = Instant::now();
    let code = guest.cpu.vmrun(guest.page).expect("vmcb");
    let time = start.elapsed().as_secs_f64();
    println!(
        "exit {:#x} info {:#x} {:#x} rip {:#x} rax {:#x}: {} instructions, {:.3} s, {:.0} MIPS",
        code,
        v.get::<u64>(control::EXITINFO1),
        v.get::<u64>(control::EXITINFO2),
        v.get::<u64>(save::RIP),
        v.get::<u64>(save::RAX),
        guest.cpu.engine.instructions(),
        time,
        guest.cpu.engine.instructions() as f64 / time / 1e6
    );
}
