// SPDX-License-Identifier: Apache-2.0
//! The guest's time-stamp counter: offset and ratio (APM vol. 2, 15.30.5). And the bus-lock threshold (15.14.5).

use iced_x86::code_asm::*;
use softcpu::clock;
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::vmcb::{control, save};

use crate::common::*;

/// EDX:EAX of RDTSC in a guest, with the processor's counter before and after.
fn read(ratio: u64, offset: u64) -> [u64; 3] {
    let mut g = Guest::long(|a| {
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    g.cpu.tsc_ratio = ratio;
    g.set(control::TSC_OFFSET, offset);
    let before = clock::tsc();
    g.expect_exit(exit::HLT);
    let after = clock::tsc();
    [before, g.cpu.rb.gpr[2] << 32 | g.rax() & 0xffff_ffff, after]
}

#[test]
fn a_guests_counter_is_the_processors_times_the_ratio_and_the_offset() {
    // Integer part 8 bits, fraction 32 (8.32): half, one, 2.5, almost 256.
    for ratio in [1u64 << 31, 1 << 32, 5 << 31, (1 << 40) - 1] {
        for offset in [0, 12345, 0u64.wrapping_sub(1 << 40)] {
            let [before, guest, after] = read(ratio, offset);
            let scale = |tsc: u64| (((tsc as u128 * ratio as u128) >> 32) as u64).wrapping_add(offset);
            let (from, to) = (scale(before), scale(after));
            assert!(guest.wrapping_sub(from) <= to.wrapping_sub(from), "{ratio:#x} {offset:#x}");
        }
    }
}

#[test]
fn processors_report_the_ratio_and_the_bus_lock_threshold() {
    let features = softcpu::x86::system::cpuid::cpuid(0x8000_000A, 0)[3];
    assert_eq!(features >> 4 & 1, 1);
    assert_eq!(features >> 29 & 1, 1);
}

/// Three bus locks: in two lines, in two pages, in two lines by XCHG.
fn three_bus_locks() -> Guest {
    Guest::long(|a| {
        a.lock().inc(dword_ptr(DATA + 62)).unwrap();
        a.lock().inc(dword_ptr(DATA + 0x80)).unwrap(); // none
        a.lock().add(qword_ptr(DATA + 0xffc), 1).unwrap();
        a.xchg(dword_ptr(DATA + 0x1000 + 125), eax).unwrap();
        a.hlt().unwrap();
    })
}

#[test]
fn a_guest_is_left_before_the_bus_lock_that_it_has_none_left_for() {
    for allowed in 0..4u16 {
        let mut g = three_bus_locks();
        g.intercept(exit::BUSLOCK);
        g.set(control::BUS_LOCK_COUNTER, allowed);
        if allowed == 3 {
            g.expect_exit(exit::HLT);
        } else {
            g.expect_exit(exit::BUSLOCK);
            // As often as the counter is 0: the instruction has not happened.
            let at = g.rip();
            g.expect_exit(exit::BUSLOCK);
            assert_eq!(g.rip(), at);
        }
        assert_eq!(g.get::<u16>(control::BUS_LOCK_COUNTER), 0);
        assert_eq!(g.memory.read::<u32>(DATA + 62), (allowed > 0) as u32);
        assert_eq!(g.memory.read::<u64>(DATA + 0xffc), (allowed > 1) as u64);
        // One more, and the guest goes on.
        if allowed < 3 {
            g.set(control::BUS_LOCK_COUNTER, 3 - allowed);
            g.expect_exit(exit::HLT);
            assert_eq!(g.memory.read::<u64>(DATA + 0xffc), 1);
        }
    }
}

#[test]
fn bus_locks_that_nobody_intercepts_are_not_counted() {
    let mut g = three_bus_locks();
    g.set(control::BUS_LOCK_COUNTER, 7u16);
    g.expect_exit(exit::HLT);
    assert_eq!(g.get::<u16>(control::BUS_LOCK_COUNTER), 7);
    assert_eq!(g.get::<u64>(save::RAX), 0);
}
