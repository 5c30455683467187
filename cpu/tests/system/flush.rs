// SPDX-License-Identifier: Apache-2.0
//! Flushes of TLBs by ranges, asked for from outside (as INVLPGB and TLBSYNC, APM vol. 3): what is named is gone when the
//! request is over, the rest stays, and no guest is left for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use softcpu::clock::clock_ns;
use softcpu::mem::Shared;
use softcpu::mem::flush::{Flushes, Pages, ask};

use iced_x86::code_asm::*;
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::vmcb::{control, save};

use crate::common::*;

/// Where the guests' pages of data are, and others that take their place.
const PAGES: [u64; 3] = [DATA, DATA + 0x5000, DATA + 0x9000];
const OTHER: u64 = 0x10_0000;
const PS: u64 = 1 << 7;

fn flush(shared: &Arc<Shared>, what: &Flushes) {
    ask(std::slice::from_ref(shared), what).wait();
}

fn page(address: u64) -> Pages {
    address >> 12..(address >> 12) + 1
}

fn physical(address: u64) -> Flushes {
    Flushes::physical(std::slice::from_ref(&page(address)))
}

fn linear(asid: u32, address: u64) -> Flushes {
    Flushes::linear(asid, Some(std::slice::from_ref(&page(address))))
}

fn statistic(g: &Guest, name: &str) -> u64 {
    g.cpu.engine.statistics().into_iter().find(|(n, _)| *n == name).unwrap().1
}

/// A guest that loads a word of each of the pages, and halts.
fn loader() -> Guest {
    let mut g = Guest::long(|a| {
        a.mov(rax, qword_ptr(PAGES[0])).unwrap();
        a.mov(rcx, qword_ptr(PAGES[1])).unwrap();
        a.mov(rdx, qword_ptr(PAGES[2])).unwrap();
        a.hlt().unwrap();
    });
    for n in PAGES {
        g.memory.write::<u64>(n, n);
        g.memory.write::<u64>(n + OTHER, n + 1);
    }
    g.intercept(exit::HLT);
    g
}

/// Runs it; what it has found in the pages, and how often it filled the TLB.
fn load(g: &mut Guest) -> ([u64; 3], u64) {
    let before = statistic(g, "tlb_fills");
    g.set(save::RIP, CODE);
    assert_eq!(g.run(), exit::HLT);
    let found = [g.rax(), g.cpu.rb.gpr[1], g.cpu.rb.gpr[2]];
    (found, statistic(g, "tlb_fills") - before)
}

/// Has a page's nested leaf lead to another page.
fn replace(g: &Guest, gpa: u64) {
    let m = &g.memory;
    m.put_host(m.nested_leaf(gpa), m.get_host(m.nested_leaf(gpa)) + OTHER);
}

#[test]
fn guest_physical_pages_are_forgotten_and_all_others_stay() {
    let mut g = loader();
    assert_eq!(load(&mut g), (PAGES, 4), "code, and three pages");
    for gpa in PAGES {
        replace(&g, gpa);
    }
    assert_eq!(load(&mut g), (PAGES, 0), "nobody has said so");
    let shared = g.cpu.engine.shared().clone();
    flush(&shared, &physical(PAGES[1]));
    assert_eq!(load(&mut g), ([PAGES[0], PAGES[1] + 1, PAGES[2]], 1));
    flush(&shared, &Flushes::physical(&[page(PAGES[0]), page(PAGES[2])]));
    assert_eq!(load(&mut g), (PAGES.map(|n| n + 1), 2));
    flush(&shared, &Flushes::physical(&[0..DATA >> 13, page(PAGES[2])]));
    assert_eq!(load(&mut g).1, 2, "the code's, and one page's");
    flush(&shared, &Flushes::everything());
    assert_eq!(load(&mut g).1, 4);
}

#[test]
fn a_guest_physical_page_is_forgotten_for_all_that_map_it() {
    // Every other page's guest-physical address is the first one's.
    let mut g = loader();
    for n in &PAGES[1..] {
        g.memory.write::<u64>(g.memory.leaf(*n), PAGES[0] | 7);
    }
    assert_eq!(load(&mut g), ([PAGES[0]; 3], 4));
    replace(&g, PAGES[0]);
    let shared = g.cpu.engine.shared().clone();
    flush(&shared, &physical(PAGES[1]));
    assert_eq!(load(&mut g), ([PAGES[0]; 3], 0), "nobody uses that page");
    flush(&shared, &physical(PAGES[0]));
    assert_eq!(load(&mut g), ([PAGES[0] + 1; 3], 3));
}

#[test]
fn a_table_of_the_guest_is_found_at_its_new_place_once_its_page_is_forgotten() {
    let mut g = loader();
    load(&mut g);
    // A copy of the last-level table, in which the first page is another.
    let copy = PT + 2 * OTHER;
    for n in 0..512 {
        g.memory.write::<u64>(copy + 8 * n, g.memory.read::<u64>(PT + 8 * n));
    }
    g.memory.write::<u64>(copy + (PAGES[0] >> 12) * 8, (PAGES[0] + OTHER) | 7);
    g.memory.put_host(g.memory.nested_leaf(PT), (g.memory.ram as u64 + copy) | 7);
    let shared = g.cpu.engine.shared().clone();
    flush(&shared, &physical(PT));
    assert_eq!(
        load(&mut g),
        (PAGES, 0),
        "what it has led to is still in the TLB, as with a guest that writes there"
    );
    flush(&shared, &linear(1, PAGES[0]));
    assert_eq!(load(&mut g), ([PAGES[0] + 1, PAGES[1], PAGES[2]], 1));
}

#[test]
fn linear_pages_are_forgotten_for_one_asid() {
    let mut g = loader();
    // Another guest's address space is known, too; the entries are the first one's by now.
    for asid in [2, 1] {
        g.set::<u32>(control::ASID, asid);
        assert_eq!(load(&mut g).1, 4);
    }
    for n in [PAGES[0], PAGES[2]] {
        g.memory.write::<u64>(g.memory.leaf(n), (n + OTHER) | 7);
    }
    let shared = g.cpu.engine.shared().clone();
    flush(&shared, &linear(2, PAGES[0]));
    flush(&shared, &Flushes::linear(2, Some(&[0..1 << 20, page(CODE)])));
    flush(&shared, &Flushes::linear(2, None));
    assert_eq!(load(&mut g), (PAGES, 0), "it is the other one's");
    flush(&shared, &linear(1, PAGES[0]));
    assert_eq!(load(&mut g), ([PAGES[0] + 1, PAGES[1], PAGES[2]], 1));
    flush(&shared, &Flushes::linear(1, None));
    assert_eq!(load(&mut g), ([PAGES[0] + 1, PAGES[1], PAGES[2] + 1], 4));
    // More pages than are looked for one by one.
    flush(&shared, &Flushes::linear(1, Some(&[page(PAGES[1]), 0x106..0x200])));
    assert_eq!(load(&mut g).1, 2);
}

#[test]
fn a_large_page_of_the_guest_goes_as_a_whole() {
    for far in [1, 100] {
        let mut g = loader();
        g.memory.write::<u64>(PD, 7 | PS);
        assert_eq!(load(&mut g), (PAGES, 4));
        // The directory's own mapping is not what was asked for: the guest takes the page apart.
        g.memory.write::<u64>(PD, PT | 7);
        g.memory.write::<u64>(g.memory.leaf(PAGES[1]), (PAGES[1] + OTHER) | 7);
        let shared = g.cpu.engine.shared().clone();
        flush(&shared, &linear(1, PAGES[0] + 0x20_0000));
        assert_eq!(load(&mut g), (PAGES, 0), "that is the next large page");
        let below = (PAGES[0] >> 12) - far..PAGES[0] >> 12;
        flush(&shared, &Flushes::linear(1, Some(std::slice::from_ref(&below))));
        assert_eq!(load(&mut g), ([PAGES[0], PAGES[1] + 1, PAGES[2]], 4));
    }
}

#[test]
fn a_running_processor_forgets_without_leaving_its_guest() {
    let mut g = Guest::long(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(qword_ptr(PAGES[1])).unwrap();
        a.cmp(qword_ptr(PAGES[0]), 1).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    });
    let m = g.memory.clone();
    m.write::<u64>(PAGES[0] + OTHER, 1);
    let shared = g.cpu.engine.shared().clone();
    std::thread::scope(|s| {
        let running = s.spawn(move || g.expect_exit(exit::HLT));
        while m.read::<u64>(PAGES[1]) < 1000 {
            std::thread::yield_now();
        }
        m.put_host(m.nested_leaf(PAGES[0]), (m.ram as u64 + PAGES[0] + OTHER) | 7);
        assert!(!running.is_finished());
        flush(&shared, &physical(PAGES[0]));
    });
}

#[test]
fn nothing_is_written_to_a_page_that_was_protected_and_forgotten() {
    for _ in 0..50 {
        let mut g = Guest::long(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again).unwrap();
            for n in PAGES {
                a.inc(qword_ptr(n)).unwrap();
            }
            a.lock().inc(qword_ptr(PAGES[1] + 8)).unwrap();
            a.jmp(again).unwrap();
        });
        let m = g.memory.clone();
        let shared = g.cpu.engine.shared().clone();
        std::thread::scope(|s| {
            s.spawn(move || {
                g.expect_exit(exit::NPF);
                assert_eq!((g.info2(), g.info1() & 2), (PAGES[1], 2));
            });
            while m.read::<u64>(PAGES[2]) < 100 {
                std::thread::yield_now();
            }
            m.put_host(m.nested_leaf(PAGES[1]), m.get_host(m.nested_leaf(PAGES[1])) & !pte::W);
            flush(&shared, &physical(PAGES[1]));
            let look = || [m.read::<u64>(PAGES[1]), m.read::<u64>(PAGES[1] + 8)];
            let found = look();
            let end = clock_ns() + 200_000;
            while clock_ns() < end {
                assert_eq!(look(), found);
            }
        });
    }
}

#[test]
fn a_processor_that_halts_within_its_guest_is_not_in_the_way() {
    let mut g = Guest::long(|a| {
        a.mov(byte_ptr(DATA), 1).unwrap();
        a.hlt().unwrap();
    });
    g.unintercept(exit::HLT);
    g.intercept(exit::INTR);
    let m = g.memory.clone();
    let shared = g.cpu.engine.shared().clone();
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            assert_eq!(g.run(), exit::INTR);
            assert!(over.load(Ordering::SeqCst), "it halts on");
        });
        while m.read::<u8>(DATA) == 0 {
            std::thread::yield_now();
        }
        // Looked at only: who waits for a busy host's processor has one that halts leave its guest in the end.
        for _ in 0..100 {
            let what = physical(DATA);
            let mut asked = ask(std::slice::from_ref(&shared), &what);
            while !asked.done() {
                std::thread::yield_now();
            }
        }
        over.store(true, Ordering::SeqCst);
        shared.kick();
    });
}
