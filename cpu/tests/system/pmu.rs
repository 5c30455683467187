// SPDX-License-Identifier: Apache-2.0
//! Performance counters: exact counts, by privilege, and overflows behind the very instruction (APM vol. 2, 13.2).

use iced_x86::code_asm::*;
use softcpu::x86::pmu::select::*;
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::vmcb::{control, save};

use crate::common::*;

const ALL: u64 = EN | USR | OS;
const TOP: u64 = 1 << 48;

// Events (PPR for AMD Family 17h).
const LOADS: u64 = 0x0129;
const STORES: u64 = 0x0229;
const MODIFIES: u64 = 0x0429;
const DC_ACCESSES: u64 = 0x40;
const CYCLES: u64 = 0x76;
const INSTRUCTIONS: u64 = 0xC0;
const BRANCHES: u64 = 0xC2;
const MISPREDICTED: u64 = 0xC3;
const TAKEN: u64 = 0xC4;
const FAR: u64 = 0xC6;
const NEAR_RETURNS: u64 = 0xC8;
const INDIRECT: u64 = 0xCC;
const BRANCH_INSTRUCTIONS: u64 = 0xF_0000_00C2;
const CONDITIONAL: u64 = 0xD1;

/// Has counter n count the n-th of these from 0.
fn count(g: &mut Guest, selects: &[u64]) {
    g.cpu.rb.pmc_enable = (1 << selects.len()) - 1;
    for (n, select) in selects.iter().enumerate() {
        g.cpu.rb.pmc_select[n] = *select;
        g.cpu.rb.pmc_count[n] = 0;
    }
    g.intercept(exit::NMI);
}

#[track_caller]
fn expect_counts(g: &Guest, expected: &[u64]) {
    assert_eq!(&g.cpu.rb.pmc_count[..expected.len()], expected);
}

/// Ten rounds of a loop with a call, a store, a load and a branch that is never taken; 2 + 10 * 9 instructions and HLT,
/// which exits.
fn rounds(a: &mut CodeAssembler) {
    let (mut again, mut function, mut end) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(edi, 10).unwrap();
    a.mov(rbx, DATA).unwrap();
    a.set_label(&mut again).unwrap();
    a.call(function).unwrap(); // a store
    a.mov(qword_ptr(rbx), rdi).unwrap();
    a.test(edi, edi).unwrap();
    a.je(end).unwrap();
    a.add(dword_ptr(rbx + 8), edi).unwrap();
    a.dec(edi).unwrap();
    a.jne(again).unwrap();
    a.set_label(&mut end).unwrap();
    a.hlt().unwrap();
    a.set_label(&mut function).unwrap();
    a.mov(rax, qword_ptr(rbx)).unwrap();
    a.ret().unwrap(); // a load
}

const SELECTS: [u64; 14] = [
    INSTRUCTIONS | ALL,
    CYCLES | ALL,
    BRANCHES | ALL,
    TAKEN | ALL,
    CONDITIONAL | ALL,
    NEAR_RETURNS | ALL,
    MISPREDICTED | ALL,
    LOADS | ALL,
    STORES | ALL,
    MODIFIES | ALL,
    LOADS | STORES | MODIFIES | ALL,
    DC_ACCESSES | ALL,
    FAR | ALL,
    INDIRECT | ALL,
];
const COUNTS: [u64; 14] = [92, 92, 40, 29, 20, 10, 0, 20, 20, 10, 50, 60, 0, 0];

#[test]
fn each_event_is_counted_exactly() {
    let mut g = Guest::long(rounds);
    count(&mut g, &SELECTS);
    g.expect_exit(exit::HLT);
    expect_counts(&g, &COUNTS);
    // One at a time, so that each is counted in the way that it alone needs.
    for (select, expected) in SELECTS.into_iter().zip(COUNTS) {
        let mut g = Guest::long(rounds);
        count(&mut g, &[select]);
        g.expect_exit(exit::HLT);
        assert_eq!(g.cpu.rb.pmc_count[0], expected, "{select:#x}");
        assert_eq!(g.cpu.engine.instructions(), 92);
    }
}

#[test]
fn what_is_not_enabled_does_not_count() {
    let host = HOST_ONLY;
    for (select, enable, expected) in [
        (INSTRUCTIONS | ALL, 0, 0),
        (INSTRUCTIONS | ALL, 2, 0),
        (INSTRUCTIONS | USR | OS, 1, 0),
        (INSTRUCTIONS | EN, 1, 0),
        (INSTRUCTIONS | EN | OS, 1, 92),
        (INSTRUCTIONS | EN | USR, 1, 0),
        (INSTRUCTIONS | ALL | host, 1, 0),
        (INSTRUCTIONS | ALL | GUEST_ONLY, 1, 92),
        (INSTRUCTIONS | ALL | GUEST_ONLY | host, 1, 92),
        (0xFFF | ALL, 1, 0),
    ] {
        let mut g = Guest::long(rounds);
        count(&mut g, &[select]);
        g.cpu.rb.pmc_enable = enable;
        g.expect_exit(exit::HLT);
        assert_eq!(g.cpu.rb.pmc_count[0], expected, "{select:#x} {enable}");
    }
}

/// Four system calls from ring 3 and back: by the kernel 2 before the first SYSRET, and then 3 each; by the user 3 each.
fn system_calls() -> Guest {
    const KERNEL: u64 = CODE + 0x100;
    const USER: u64 = CODE + 0x200;
    let mut g = Guest::long(|a| {
        a.mov(ecx, USER as u32).unwrap();
        a.mov(r11d, 2).unwrap();
        a.sysretq().unwrap();
    });
    g.assemble(64, KERNEL, |a| {
        let mut leave = a.create_label();
        a.dec(edi).unwrap();
        a.je(leave).unwrap();
        a.sysretq().unwrap();
        a.set_label(&mut leave).unwrap();
        a.hlt().unwrap();
    });
    g.assemble(64, USER, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.nop().unwrap();
        a.syscall().unwrap();
        a.jmp(again).unwrap();
    });
    g.set(save::STAR, (0x0008_u64) << 32 | 0x0023_u64 << 48);
    g.set(save::LSTAR, KERNEL);
    g.set(save::SFMASK, 0u64);
    g.cpu.rb.gpr[7] = 4;
    for page in [USER, PML4, PDPT] {
        g.memory.change_leaf(page, pte::U, 0);
    }
    g
}

#[test]
fn instructions_count_for_the_privilege_level_at_which_they_begin() {
    // mov, mov, sysret; three times dec, je, sysret; dec, je.
    let kernel = 3 + 3 * 3 + 2;
    // Four times nop and syscall, three times jmp.
    let user = 4 * 2 + 3;
    for simple in [true, false] {
        let mut g = system_calls();
        let more = if simple { INSTRUCTIONS } else { BRANCHES };
        count(
            &mut g,
            &[
                INSTRUCTIONS | EN | OS,
                INSTRUCTIONS | EN | USR,
                INSTRUCTIONS | ALL,
                more | EN | USR,
                more | EN | OS,
            ],
        );
        g.expect_exit(exit::HLT);
        let (by_user, by_kernel) = if simple { (user, kernel) } else { (4 + 3, 1 + 3 * 2 + 1) };
        expect_counts(&g, &[kernel, user, kernel + user, by_user, by_kernel]);
    }
}

#[test]
fn an_overflow_is_told_of_behind_the_very_instruction() {
    // Where the guest is behind each instruction, and what has been counted then.
    let mut places = vec![(CODE, vec![0; SELECTS.len()])];
    loop {
        let mut g = Guest::long(rounds);
        count(&mut g, &SELECTS);
        g.cpu.rb.pmc_select[0] |= INT;
        g.cpu.rb.pmc_count[0] = TOP - places.len() as u64;
        if g.run() != exit::NMI {
            break;
        }
        assert_eq!(g.cpu.rb.pmc_status, 1);
        assert_eq!(g.cpu.rb.pmc_count[0], 0);
        assert_eq!(g.cpu.engine.instructions(), places.len() as u64);
        places.push((g.rip(), g.cpu.rb.pmc_count[..SELECTS.len()].to_vec()));
    }
    assert_eq!(places.len(), 93);
    for (n, select) in SELECTS.into_iter().enumerate() {
        for period in 1..=COUNTS[n] {
            let mut g = Guest::long(rounds);
            count(&mut g, &[INSTRUCTIONS | ALL, select | INT]);
            g.cpu.rb.pmc_count[1] = TOP - period;
            g.expect_exit(exit::NMI);
            assert_eq!(g.cpu.rb.pmc_status, 2);
            // The first counter of `SELECTS` had been given another start.
            let reached = |i: usize| if n == 0 { i as u64 } else { places[i].1[n] };
            let first = (0..places.len()).find(|i| reached(*i) >= period).unwrap();
            assert_eq!(g.cpu.rb.pmc_count[0], first as u64, "{select:#x} after {period}");
            assert_eq!(g.rip(), places[first].0);
            // It goes on from there, to the same end.
            g.cpu.rb.pmc_status = 0;
            g.expect_exit(exit::HLT);
            assert_eq!(g.cpu.rb.pmc_count[..2], [COUNTS[0], COUNTS[n] - period]);
        }
    }
}

#[test]
fn an_overflow_far_away_is_exact_too() {
    for period in [1000, 2047, 2048, 2049, 4096, 5000, 99_999] {
        for select in [INSTRUCTIONS | ALL, INSTRUCTIONS | EN | OS] {
            let mut g = Guest::long(|a| {
                let mut again = a.create_label();
                a.set_label(&mut again).unwrap();
                a.inc(rax).unwrap();
                a.jmp(again).unwrap();
            });
            count(&mut g, &[select | INT]);
            g.cpu.rb.pmc_count[0] = TOP - period;
            g.expect_exit(exit::NMI);
            assert_eq!(g.cpu.engine.instructions(), period);
            assert_eq!(g.rax(), period.div_ceil(2));
        }
    }
}

#[test]
fn an_overflow_waits_until_it_is_taken_note_of() {
    let mut g = Guest::long(rounds);
    count(&mut g, &[INSTRUCTIONS | ALL | INT]);
    g.cpu.rb.pmc_count[0] = TOP - 5;
    g.expect_exit(exit::NMI);
    for _ in 0..2 {
        // Nothing runs while it is pending, but what is injected is delivered.
        g.expect_exit(exit::NMI);
        assert_eq!(g.cpu.engine.instructions(), 5);
    }
    g.set(control::EVENTINJ, 1u64 << 31 | 0x44);
    g.expect_exit(exit::NMI);
    assert_eq!((g.rip(), g.get::<u64>(control::EVENTINJ)), (HANDLERS + 16 * 0x44, 0));
    g.cpu.rb.pmc_status = 0;
    g.expect_exit(exit::VMMCALL);
    assert_eq!(g.cpu.rb.pmc_count[0], 0);
}

#[test]
fn without_int_or_the_intercept_an_overflow_only_sets_its_bit() {
    for (select, intercepted) in [(INSTRUCTIONS | ALL, true), (INSTRUCTIONS | ALL | INT, false)] {
        let mut g = Guest::long(rounds);
        count(&mut g, &[select]);
        if !intercepted {
            g.unintercept(exit::NMI);
        }
        g.cpu.rb.pmc_count[0] = TOP - 5;
        g.expect_exit(exit::HLT);
        assert_eq!((g.cpu.rb.pmc_count[0], g.cpu.rb.pmc_status), (92 - 5, 1));
    }
}

#[test]
fn repeated_string_instructions_count_once_and_their_accesses_each_time() {
    for warm in [false, true] {
        let mut g = Guest::long(|a| {
            a.mov(ecx, 1000).unwrap();
            a.mov(esi, DATA as u32).unwrap();
            a.mov(edi, DATA as u32 + 0x4000).unwrap();
            a.rep().movsq().unwrap();
            a.mov(ecx, 3).unwrap();
            a.xor(eax, eax).unwrap();
            a.rep().stosb().unwrap();
            a.rep().stosb().unwrap();
            a.mov(ecx, 100).unwrap();
            a.mov(edi, DATA as u32 + 0x4000 + 8000 - 10).unwrap();
            a.inc(eax).unwrap();
            a.repne().scasb().unwrap(); // finds none of the 1s
            a.hlt().unwrap();
        });
        count(&mut g, &[INSTRUCTIONS | ALL, LOADS | ALL, STORES | ALL]);
        if warm {
            // The blocks are there already, for other counters.
            g.cpu.rb.pmc_select[1] = INSTRUCTIONS | ALL;
            g.cpu.rb.pmc_select[2] = INSTRUCTIONS | ALL;
            g.expect_exit(exit::HLT);
            g.set(save::RIP, CODE);
            count(&mut g, &[INSTRUCTIONS | ALL, LOADS | ALL, STORES | ALL]);
        }
        g.expect_exit(exit::HLT);
        expect_counts(&g, &[12, 1000 + 100, 1000 + 3]);
    }
}

#[test]
fn delivered_events_are_branches() {
    // Two INT n, whose handlers return, and #UD.
    let mut g = Guest::long(|a| {
        a.int(0x41).unwrap();
        a.int(0x41).unwrap();
        a.ud2().unwrap();
    });
    g.assemble(64, HANDLERS + 16 * 0x41, |a| a.iretq().unwrap());
    let selects = [INSTRUCTIONS, BRANCHES, TAKEN, FAR, CONDITIONAL, BRANCH_INSTRUCTIONS].map(|s| s | ALL);
    count(&mut g, &[&selects[..], &[FAR | EN | USR]].concat());
    assert_eq!(g.run_to_handler(), 6);
    expect_counts(&g, &[4, 5, 5, 5, 0, 2, 0]);
    // An overflow by a delivery: the handler has not begun.
    let mut g = Guest::user(|a| {
        a.nop().unwrap();
        a.ud2().unwrap();
    });
    for page in [CODE, PML4, PDPT] {
        g.memory.change_leaf(page, pte::U, 0);
    }
    count(&mut g, &[INSTRUCTIONS | ALL, FAR | EN | USR | INT, FAR | EN | OS | INT]);
    g.cpu.rb.pmc_count[1] = TOP - 1;
    g.cpu.rb.pmc_count[2] = TOP - 1;
    g.expect_exit(exit::NMI);
    assert_eq!((g.rip(), g.cpu.rb.pmc_status), (HANDLERS + 16 * 6, 4));
    // An injected one.
    let mut g = Guest::long(rounds);
    g.set(control::EVENTINJ, 1u64 << 31 | 0x44);
    count(&mut g, &[INSTRUCTIONS | ALL, BRANCHES | ALL]);
    assert_eq!(g.run_to_handler(), 0x44);
    expect_counts(&g, &[0, 1]);
}

#[test]
fn masks_count_cycles_and_edges_their_beginnings() {
    // Of each cycle: a load; two loads and a store; none; none; a load.
    let code = |a: &mut CodeAssembler| {
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.cmpsq().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.hlt().unwrap();
    };
    let mask = |n: u64| n << CNT_MASK_SHIFT;
    for (more, expected) in [
        (0, 4),
        (mask(1), 3),
        (mask(2), 1),
        (mask(3), 0),
        (INV, 4),
        (mask(1) | INV, 2),
        (mask(2) | INV, 4),
        (mask(1) | EDGE, 2),
        (EDGE, 2),
        (mask(1) | INV | EDGE, 1),
        (mask(2) | INV | EDGE, 2),
    ] {
        let mut g = Guest::long(code);
        for register in [3, 6, 7] {
            g.cpu.rb.gpr[register] = DATA;
        }
        count(&mut g, &[LOADS | ALL | more]);
        g.expect_exit(exit::HLT);
        assert_eq!(g.cpu.rb.pmc_count[0], expected, "{more:#x}");
    }
}

#[test]
fn an_instruction_that_exits_or_faults_is_not_counted() {
    let mut g = Guest::long(|a| {
        a.nop().unwrap();
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.hlt().unwrap();
    });
    g.memory.change_leaf(DATA, 0, pte::P);
    count(&mut g, &[INSTRUCTIONS | ALL, LOADS | ALL]);
    g.expect(14, Some(0), CODE + 1);
    expect_counts(&g, &[1, 0]);
}

#[test]
fn counting_changes_with_each_entry() {
    let mut g = Guest::long(|a| {
        for _ in 0..3 {
            a.nop().unwrap();
            a.push(rax).unwrap();
            a.vmmcall().unwrap();
        }
    });
    let next = |g: &mut Guest| {
        g.expect_exit(exit::VMMCALL);
        let next: u64 = g.get(control::NRIP);
        g.set(save::RIP, next);
    };
    count(&mut g, &[INSTRUCTIONS | ALL, STORES | ALL]);
    next(&mut g);
    g.cpu.rb.pmc_enable = 1;
    next(&mut g);
    g.cpu.rb.pmc_enable = 2;
    g.cpu.rb.pmc_count[1] |= 0xabcd << 48;
    next(&mut g);
    expect_counts(&g, &[4, 2]);
}

#[test]
fn code_that_changes_itself_is_counted() {
    // The store makes a nop of the instruction behind it, in its own block.
    let mut g = Guest::long(|a| {
        let mut patched = a.create_label();
        a.lea(rbx, qword_ptr(patched)).unwrap();
        a.mov(word_ptr(rbx), 0x9090).unwrap();
        a.set_label(&mut patched).unwrap();
        a.push(rax).unwrap();
        a.push(rax).unwrap();
        a.hlt().unwrap();
    });
    count(&mut g, &[INSTRUCTIONS | ALL, STORES | ALL]);
    g.expect_exit(exit::HLT);
    expect_counts(&g, &[4, 1]);
}

#[test]
fn single_steps_and_interrupt_shadows_are_counted() {
    let mut g = Guest::long(|a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    count(&mut g, &[INSTRUCTIONS | ALL, BRANCHES | ALL]);
    g.set(control::V_INTR, 1u64 << 8 | 15 << 16 | 0x31 << 32);
    g.expect(0x31, None, CODE + 3);
    expect_counts(&g, &[3, 1]);
    let mut g = Guest::long(|a| {
        a.nop().unwrap();
        a.nop().unwrap();
    });
    count(&mut g, &[INSTRUCTIONS | ALL, BRANCHES | ALL]);
    g.set(save::RFLAGS, 0x102u64);
    g.expect(1, None, CODE + 1);
    expect_counts(&g, &[1, 1]);
}
