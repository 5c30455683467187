// SPDX-License-Identifier: Apache-2.0
//! Random processors: no guest state, table or code may make the processor panic or leave guest memory.
//!
//! `SOFTCPU_FUZZ=<cases>` runs longer, `SOFTCPU_FUZZ_SEED=<n>` repeats a failing case.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use softcpu::x86::vmcb::{control, save};

use crate::common::*;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// Small, near an edge, an address of the guest's layout, or anything.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(0x200),
            1 => self.next() & 0xffff,
            2 => self.below(RAM as u64),
            3 => (0x7fff_ffff_fff0u64).wrapping_add(self.below(0x20)),
            4 => 0u64.wrapping_sub(self.below(0x40)),
            _ => self.next(),
        }
    }
}

/// Opcodes that random bytes seldom hit: far transfers, returns, system instructions, string operations.
const OPCODES: &[&[u8]] = &[
    &[0xcf],
    &[0x48, 0xcf],
    &[0x66, 0xcf],
    &[0xcb],
    &[0xca, 8, 0],
    &[0xcd, 0x80],
    &[0xcc],
    &[0xce],
    &[0xf1],
    &[0x9c],
    &[0x9d],
    &[0xfa],
    &[0xfb],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x22, 0xc0],
    &[0x0f, 0x22, 0xd8],
    &[0x0f, 0x22, 0xe0],
    &[0x0f, 0x23, 0xf8],
    &[0x0f, 0x00, 0xd8],
    &[0x0f, 0x00, 0xd0],
    &[0x0f, 0x01, 0xf8],
    &[0x0f, 0x02, 0xc1],
    &[0x0f, 0x03, 0xc1],
    &[0x8e, 0xd8],
    &[0x8e, 0xd0],
    &[0x17],
    &[0x07],
    &[0x0f, 0xa1],
    &[0xff, 0x28],
    &[0xff, 0x18],
    &[0xea],
    &[0x9a],
    &[0xf3, 0xa4],
    &[0xf3, 0x6c],
    &[0xf3, 0x6f],
    &[0x0f, 0xc7, 0x08],
    &[0x0f, 0xae, 0x00],
    &[0x0f, 0xae, 0x08],
    &[0x0f, 0xae, 0x20],
    &[0x0f, 0xae, 0x28],
    &[0xdd, 0x30],
    &[0xdd, 0x20],
];

fn scramble(g: &mut Guest, r: &mut Random) {
    for n in 0..16 {
        g.cpu.rb.gpr[n] = r.value();
    }
    for n in 0..4 {
        g.cpu.rb.dr[n] = r.value();
    }
    let rax = r.value();
    g.set(save::RAX, rax);
    // Code: a mixture of random bytes and of the list.
    let at = match g.get::<u64>(save::RIP) {
        0 => 0x1_0000,
        at if at < RAM as u64 - 0x1000 => at,
        _ => CODE,
    };
    let mut n = 0;
    while n < 200 {
        if r.one_in(2) {
            let code = OPCODES[r.below(OPCODES.len() as u64) as usize];
            g.memory.write_bytes(at + n, code);
            n += code.len() as u64;
        } else {
            for _ in 0..r.below(8) {
                g.memory.write::<u8>(at + n, r.next() as u8);
                n += 1;
            }
        }
    }
    // Descriptor tables, page tables, the TSS, nested tables.
    for _ in 0..r.below(12) {
        let base = [GDT, IDT, TSS, PML4, PD, PT, LDT, STACK - 0x100][r.below(8) as usize];
        let at = base + r.below(0x100);
        g.memory.write::<u8>(at, r.next() as u8);
    }
    if r.one_in(4) {
        let leaf = g.memory.nested + r.below(0x2000) as usize / 8 * 8;
        g.memory.put_host(leaf, r.next() & 0xfff | g.memory.ram as u64);
    }
    // State.
    for _ in 0..r.below(5) {
        match r.below(12) {
            0 => {
                let v = g.get::<u64>(save::CR0) ^ 1 << r.below(32);
                g.set(save::CR0, v);
            }
            1 => {
                let v = g.get::<u64>(save::CR4) ^ 1 << r.below(23);
                g.set(save::CR4, v);
            }
            2 => {
                let v = g.get::<u64>(save::EFER) ^ 1 << r.below(15);
                g.set(save::EFER, v);
            }
            3 => g.set(save::CR3, r.value()),
            4 => g.set(save::RFLAGS, r.next() & 0x3f_ffff | 2),
            5 => g.set(save::DR7, r.next() & 0xffff_ffff),
            6 => {
                let at = save::ES + 16 * r.below(10) as usize;
                g.set(at, r.next() as u16);
                g.set(at + 2, r.next() as u16);
                g.set(at + 4, r.value() as u32);
                g.set(at + 8, r.value());
            }
            7 => g.set(save::CPL, r.next() as u8 & 3),
            8 => g.set(save::RSP, r.value()),
            9 => g.set(control::EVENTINJ, 1u64 << 31 | r.next() & 0xffff_ffff_0000_0fff),
            10 => g.set(control::V_INTR, r.next() & 0xff_011f_011f),
            _ => g.set(save::STAR + 8 * r.below(8) as usize, r.value()),
        }
    }
    for word in [0, 1, 2, 3, 4, 5] {
        if r.one_in(3) {
            let at = control::INTERCEPTS + 4 * word;
            let v = g.get::<u32>(at) | r.next() as u32 & r.next() as u32;
            g.set(at, v);
        }
    }
}

/// Programs the performance counters, the first for instructions from 0, the others at random; or none.
fn count_anything(g: &mut Guest, r: &mut Random) -> bool {
    let block = &mut g.cpu.rb;
    block.pmc_status = 0;
    block.pmc_enable = if r.one_in(2) { r.next() | 1 } else { 0 };
    for n in 1..block.pmc_select.len() {
        block.pmc_select[n] = if r.one_in(3) { r.next() } else { 0x70_0000 | (0xC0 + r.below(0x20)) };
        block.pmc_count[n] = r.value();
    }
    block.pmc_select[0] = 0x43_00C0;
    block.pmc_count[0] = 0;
    block.pmc_enable != 0
}

/// Ends the kicks even when the run panics.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn case(seed: u64) {
    let mut r = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut g = match r.below(6) {
        0 => Guest::real(|_| {}),
        1 => Guest::v86(r.below(4), |_| {}),
        2 => Guest::protected(|_| {}),
        3 => Guest::protected_user(|_| {}),
        4 => Guest::user(|_| {}),
        _ => Guest::long(|_| {}),
    };
    scramble(&mut g, &mut r);
    let shared = g.cpu.engine.shared().clone();
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                std::thread::park_timeout(Duration::from_micros(500));
                shared.kick();
            }
        });
        let _ends = SetOnDrop(&over);
        for _ in 0..4 {
            let counted = count_anything(&mut g, &mut r);
            let before = g.cpu.engine.instructions();
            g.run();
            if counted && g.cpu.rb.pmc_status & 1 == 0 {
                assert_eq!(
                    g.cpu.rb.pmc_count[0],
                    g.cpu.engine.instructions() - before,
                    "instructions counted"
                );
            }
            if r.one_in(2) {
                scramble(&mut g, &mut r);
            } else {
                let next: u64 = g.get(control::NRIP);
                if next != 0 {
                    g.set(save::RIP, next);
                }
            }
        }
    });
    g.memory.release();
}

#[test]
fn random_processors_never_panic() {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    if let Some(seed) = number("SOFTCPU_FUZZ_SEED") {
        return case(seed);
    }
    for seed in 0..number("SOFTCPU_FUZZ").unwrap_or(1500) {
        let result = std::panic::catch_unwind(|| case(seed));
        assert!(result.is_ok(), "SOFTCPU_FUZZ_SEED={seed}");
    }
}
