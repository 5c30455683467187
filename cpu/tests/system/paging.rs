// SPDX-License-Identifier: Apache-2.0
//! Protection, accessed and dirty bits on both levels, page crossings, nested page faults (APM vol. 2, 5 and 15.25).

use iced_x86::code_asm::*;
use softcpu::x86::system::exitcode;
use softcpu::x86::vmcb::{control, save};

use crate::common::*;

const NPF_P: u64 = 1;
const NPF_W: u64 = 2;
const NPF_U: u64 = 4;
const NPF_RSV: u64 = 8;
const NPF_ID: u64 = 16;
const NPF_FINAL: u64 = 1 << 32;
const NPF_TABLE: u64 = 1 << 33;

fn load_then_halt(a: &mut CodeAssembler) {
    a.mov(rax, qword_ptr(DATA)).unwrap();
    a.hlt().unwrap();
}

fn store_then_halt(a: &mut CodeAssembler) {
    a.mov(qword_ptr(DATA), rax).unwrap();
    a.hlt().unwrap();
}

#[test]
fn smep_keeps_the_supervisor_from_user_code() {
    let smep = 1u64 << 20;
    let mut g = Guest::long(|a| a.nop().unwrap());
    g.set(save::CR4, 0x6a0u64 | smep);
    // The very first fetch faults: the pages of the code, and of the handlers, are user pages.
    g.memory.change_leaf(HANDLERS + 16 * 14, 0, pte::U);
    g.expect(14, Some(1 | 16), CODE);
}

#[test]
fn smap_keeps_the_supervisor_from_user_data_unless_ac() {
    let smap = 0x6a0u64 | 1 << 21;
    let supervisor_tables = |g: &mut Guest| {
        for page in [GDT, IDT, TSS, STACK - 1] {
            g.memory.change_leaf(page, 0, pte::U);
        }
    };
    let mut g = Guest::long(load_then_halt);
    g.set(save::CR4, smap);
    supervisor_tables(&mut g);
    g.expect(14, Some(1), CODE);
    let mut g = Guest::long(|a| {
        a.stac().unwrap();
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.clac().unwrap();
        a.mov(rax, qword_ptr(DATA)).unwrap();
    });
    g.set(save::CR4, smap);
    supervisor_tables(&mut g);
    g.expect(14, Some(1), CODE + 16);
}

#[test]
fn implicit_supervisor_accesses_are_always_subject_to_smap() {
    // AC is set, but the IDT lies in a user page: #PF in delivery, then #DF, then shutdown.
    let mut g = Guest::long(|a| a.ud2().unwrap());
    g.set(save::CR4, 0x6a0u64 | 1 << 21);
    g.set(save::RFLAGS, 0x4_0002u64);
    g.expect_exit(exitcode::SHUTDOWN);
}

#[test]
fn accessed_and_dirty_bits_are_set_in_both_tables() {
    let mut g = Guest::long(load_then_halt);
    g.expect_exit(exitcode::HLT);
    let m = &g.memory;
    assert_eq!(m.read::<u64>(m.leaf(DATA)) & (pte::A | pte::D), pte::A);
    assert_eq!(m.read::<u64>(PML4) & pte::A, pte::A);
    assert_eq!(m.read::<u64>(PDPT) & pte::A, pte::A);
    assert_eq!(m.read::<u64>(PD) & (pte::A | pte::D), pte::A, "no dirty bit above the leaf");
    assert_eq!(m.get_host(m.nested_leaf(DATA)) & (pte::A | pte::D), pte::A);
    // Page tables are written to in the nested tables' eyes.
    assert_eq!(m.get_host(m.nested_leaf(PT)) & (pte::A | pte::D), pte::A | pte::D);
    assert_eq!(m.get_host(m.nested) & pte::A, pte::A);

    let mut g = Guest::long(store_then_halt);
    g.expect_exit(exitcode::HLT);
    let m = &g.memory;
    assert_eq!(m.read::<u64>(m.leaf(DATA)) & (pte::A | pte::D), pte::A | pte::D);
    assert_eq!(m.get_host(m.nested_leaf(DATA)) & (pte::A | pte::D), pte::A | pte::D);
    // A page not touched stays clean.
    assert_eq!(m.read::<u64>(m.leaf(DATA + 4096)) & (pte::A | pte::D), 0);
}

#[test]
fn a_store_after_a_load_sets_the_dirty_bit() {
    let mut g = Guest::long(|a| {
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.mov(qword_ptr(DATA), rax).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exitcode::HLT);
    assert_eq!(g.memory.read::<u64>(g.memory.leaf(DATA)) & pte::D, pte::D);
    assert_eq!(g.memory.get_host(g.memory.nested_leaf(DATA)) & pte::D, pte::D);
}

#[test]
fn a_store_across_pages_with_the_second_missing_changes_nothing() {
    let mut g = Guest::long(|a| {
        a.mov(rax, -1i64).unwrap();
        a.mov(qword_ptr(DATA + 0xffc), rax).unwrap();
        a.hlt().unwrap();
    });
    g.memory.change_leaf(DATA + 0x1000, 0, pte::P);
    g.expect(14, Some(2), CODE + 10);
    assert_eq!(g.get::<u64>(save::CR2), DATA + 0x1000);
    assert_eq!(g.memory.read::<u64>(DATA + 0xffc), 0);

    // The same through the nested tables.
    let mut g = Guest::long(|a| {
        a.mov(rax, -1i64).unwrap();
        a.mov(qword_ptr(DATA + 0xffc), rax).unwrap();
        a.hlt().unwrap();
    });
    let leaf = g.memory.nested_leaf(DATA + 0x1000);
    let old = g.memory.get_host(leaf);
    g.memory.put_host(leaf, 0);
    g.expect_exit(exitcode::NPF);
    assert_eq!(g.info2(), DATA + 0x1000);
    assert_eq!(g.memory.read::<u64>(DATA + 0xffc), 0);
    g.memory.put_host(leaf, old);
    g.expect_exit(exitcode::HLT);
    assert_eq!(g.memory.read::<u64>(DATA + 0xffc), u64::MAX);
}

#[test]
fn nested_page_faults_say_what_happened() {
    // Not present, read.
    let mut g = Guest::long(load_then_halt);
    g.memory.put_host(g.memory.nested_leaf(DATA), 0);
    g.expect_exit(exitcode::NPF);
    assert_eq!((g.info1(), g.info2()), (NPF_U | NPF_FINAL, DATA));
    assert_eq!(g.rip(), CODE);
    assert_eq!(g.get::<u8>(control::INSTRUCTION_BYTES), 0x48);
    // Write to a read-only leaf.
    let mut g = Guest::long(store_then_halt);
    let leaf = g.memory.nested_leaf(DATA);
    g.memory.put_host(leaf, g.memory.get_host(leaf) & !2);
    g.expect_exit(exitcode::NPF);
    assert_eq!(g.info1(), NPF_P | NPF_W | NPF_U | NPF_FINAL);
    // Supervisor leaf: every nested access is a user access.
    let mut g = Guest::long(load_then_halt);
    let leaf = g.memory.nested_leaf(DATA);
    g.memory.put_host(leaf, g.memory.get_host(leaf) & !4);
    g.expect_exit(exitcode::NPF);
    assert_eq!(g.info1(), NPF_P | NPF_U | NPF_FINAL);
    // Reserved bit.
    let mut g = Guest::long(load_then_halt);
    let leaf = g.memory.nested_leaf(DATA);
    g.memory.put_host(leaf, g.memory.get_host(leaf) | 1 << 51);
    g.expect_exit(exitcode::NPF);
    assert_eq!(g.info1(), NPF_P | NPF_U | NPF_RSV | NPF_FINAL);
    // Fetch from a leaf with NX.
    let mut g = Guest::long(load_then_halt);
    let leaf = g.memory.nested_leaf(CODE);
    g.memory.put_host(leaf, g.memory.get_host(leaf) | pte::NX);
    g.expect_exit(exitcode::NPF);
    assert_eq!((g.info1(), g.info2()), (NPF_P | NPF_U | NPF_ID | NPF_FINAL, CODE));
    // The guest's page table itself.
    let mut g = Guest::long(load_then_halt);
    g.memory.put_host(g.memory.nested_leaf(PD), 0);
    g.expect_exit(exitcode::NPF);
    assert_eq!((g.info1(), g.info2()), (NPF_W | NPF_U | NPF_TABLE, PD));
    // A frame that is no registered memory is refused.
    let mut g = Guest::long(load_then_halt);
    g.memory.put_host(g.memory.nested_leaf(DATA), 0x1000 | 7);
    g.expect_exit(exitcode::NPF);
    // A guest-physical address beyond the nested tables.
    let mut g = Guest::long(load_then_halt);
    g.memory.write::<u64>(g.memory.leaf(DATA), 1 << 40 | 7);
    g.expect_exit(exitcode::NPF);
    assert_eq!(g.info2(), 1 << 40);
}

#[test]
fn a_changed_translation_takes_effect_after_invlpg() {
    let mut g = Guest::long(|a| {
        a.mov(rbx, qword_ptr(DATA)).unwrap();
        a.mov(rax, (DATA + 0x1000) | 7).unwrap();
        a.mov(qword_ptr(PT + (DATA >> 12) * 8), rax).unwrap();
        a.invlpg(byte_ptr(DATA)).unwrap();
        a.mov(rcx, qword_ptr(DATA)).unwrap();
        a.hlt().unwrap();
    });
    g.memory.write::<u64>(DATA, 111);
    g.memory.write::<u64>(DATA + 0x1000, 222);
    g.expect_exit(exitcode::HLT);
    assert_eq!((g.cpu.rb.gpr[3], g.cpu.rb.gpr[1]), (111, 222));
}

#[test]
fn invlpg_drops_a_large_page_whichever_of_its_addresses_it_names() {
    // 2 MiB by the third directory entry, 1 GiB by the second of the level above.
    for (linear, entry) in [(2 << 21, PD + 2 * 8), (1 << 30, PDPT + 8)] {
        let mut g = Guest::long(|a| {
            a.mov(rsi, linear + DATA).unwrap();
            a.mov(rbx, qword_ptr(rsi)).unwrap();
            a.mov(rcx, qword_ptr(rsi + 0x3000)).unwrap();
            a.mov(qword_ptr(entry), 0).unwrap();
            a.invlpg(byte_ptr(rsi + 0x1000)).unwrap();
            a.mov(rdx, qword_ptr(rsi)).unwrap();
        });
        g.memory.write::<u64>(entry, 0x87);
        g.memory.write::<u64>(DATA, 111);
        g.memory.write::<u64>(DATA + 0x3000, 222);
        assert_eq!(g.run_to_handler(), 14);
        assert_eq!((g.cpu.rb.gpr[3], g.cpu.rb.gpr[1]), (111, 222));
        assert_eq!(g.get::<u64>(save::CR2), linear + DATA);
    }
}

#[test]
fn writing_cr3_cr0_and_cr4_drops_translations() {
    // CR3.
    let mut g = Guest::long(|a| {
        a.mov(rbx, qword_ptr(DATA)).unwrap();
        a.mov(rax, (DATA + 0x1000) | 7).unwrap();
        a.mov(qword_ptr(PT + (DATA >> 12) * 8), rax).unwrap();
        a.mov(rax, cr3).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(rcx, qword_ptr(DATA)).unwrap();
        a.hlt().unwrap();
    });
    g.memory.write::<u64>(DATA + 0x1000, 222);
    g.expect_exit(exitcode::HLT);
    assert_eq!(g.cpu.rb.gpr[1], 222);
    // CR0.WP.
    let mut g = Guest::long(|a| {
        a.mov(rax, cr0).unwrap();
        a.btr(rax, 16).unwrap();
        a.mov(cr0, rax).unwrap();
        a.mov(dword_ptr(DATA), 1).unwrap();
        a.bts(rax, 16).unwrap();
        a.mov(cr0, rax).unwrap();
        a.mov(dword_ptr(DATA), 2).unwrap();
    });
    g.memory.change_leaf(DATA, 0, pte::W);
    assert_eq!(g.run_to_handler(), 14);
    assert_eq!(g.frame(true).0, Some(3));
    assert_eq!(g.memory.read::<u32>(DATA), 1);
}

/// Other nested tables for the same memory, in which DATA's frame is the one behind it.
fn other_root(g: &Guest) -> u64 {
    let pages = g.memory.machine.alloc_pages(5).unwrap();
    for n in 0..5 * 512 {
        let entry = g.memory.get_host(g.memory.nested + 8 * n);
        let table = entry.wrapping_sub(g.memory.nested as u64) < 5 << 12;
        let moved = entry.wrapping_sub(g.memory.nested as u64).wrapping_add(pages as u64);
        g.memory.put_host(pages + 8 * n, if table { moved } else { entry });
    }
    let leaf = g.memory.nested_leaf(DATA) - g.memory.nested + pages;
    g.memory.put_host(leaf, g.memory.get_host(g.memory.nested_leaf(DATA + 0x1000)));
    pages as u64
}

#[test]
fn nothing_of_the_old_nested_tables_is_used_under_new_ones() {
    // TLB_CONTROL, and whether the guest gets another ASID (APM vol. 2, 15.16): one of them there has to be.
    for (control, new_asid) in [(0u8, true), (1, false), (3, false), (7, false), (1, true), (3, true)] {
        let mut g = Guest::long(|a| {
            a.mov(rbx, qword_ptr(DATA)).unwrap();
            a.mov(rcx, qword_ptr(DATA + 0x2000)).unwrap(); // the same frame by another page
            a.vmmcall().unwrap();
        });
        g.memory.write::<u64>(g.memory.leaf(DATA + 0x2000), DATA | 7);
        g.memory.write::<u64>(DATA, 111);
        g.memory.write::<u64>(DATA + 0x1000, 222);
        let roots = [g.get::<u64>(control::N_CR3), other_root(&g)];
        let asid = g.get::<u32>(control::ASID);
        // There and back again: what is known of the first root is not believed, either.
        for (turn, expected) in [111u64, 222, 111, 222].into_iter().enumerate() {
            g.set(save::RIP, CODE);
            g.set(control::N_CR3, roots[turn % 2]);
            if turn > 0 {
                g.set(control::TLB_CONTROL, control);
            }
            if new_asid {
                g.set(control::ASID, asid + turn as u32);
            }
            g.expect_exit(exitcode::VMMCALL);
            let got = (g.cpu.rb.gpr[3], g.cpu.rb.gpr[1]);
            assert_eq!(got, (expected, expected), "TLB_CONTROL {control}, new ASID {new_asid}, turn {turn}");
        }
    }
}

#[test]
fn a_page_not_looked_at_before_is_translated_by_the_nested_tables_of_now() {
    // The guest's translations stay in force without a flush, but no more of the old tables comes to them.
    let mut g = Guest::long(|a| {
        a.mov(rbx, qword_ptr(rsi)).unwrap();
        a.vmmcall().unwrap();
    });
    g.memory.write::<u64>(g.memory.leaf(DATA + 0x2000), DATA | 7);
    g.memory.write::<u64>(DATA, 111);
    g.memory.write::<u64>(DATA + 0x1000, 222);
    let root = other_root(&g);
    for (root, at, expected) in [(g.get(control::N_CR3), DATA, 111), (root, DATA + 0x2000, 222)] {
        g.set(save::RIP, CODE);
        g.set(control::N_CR3, root);
        g.cpu.rb.gpr[6] = at;
        g.expect_exit(exitcode::VMMCALL);
        assert_eq!(g.cpu.rb.gpr[3], expected);
    }
}

#[test]
fn pcids_keep_their_translations_apart() {
    let mut g = Guest::long(|a| {
        a.mov(rax, cr4).unwrap();
        a.bts(rax, 17).unwrap();
        a.mov(cr4, rax).unwrap();
        a.mov(rbx, qword_ptr(DATA)).unwrap(); // PCID 0: caches 111
        a.mov(rax, (DATA + 0x1000) | 7).unwrap();
        a.mov(qword_ptr(PT + (DATA >> 12) * 8), rax).unwrap();
        a.mov(rax, PML4 | 5).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(rcx, qword_ptr(DATA)).unwrap(); // PCID 5: walks
        a.mov(rax, 1u64 << 63 | PML4).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(rdx, qword_ptr(DATA)).unwrap(); // PCID 0 again, not flushed
        a.mov(rax, cr3).unwrap();
        a.hlt().unwrap();
    });
    g.memory.write::<u64>(DATA, 111);
    g.memory.write::<u64>(DATA + 0x1000, 222);
    g.expect_exit(exitcode::HLT);
    let r = g.cpu.rb.gpr;
    assert_eq!((r[3], r[1]), (111, 222));
    assert!(r[2] == 111 || r[2] == 222, "kept or walked again, both are right");
    assert_eq!(g.rax(), PML4, "the no-flush bit is not part of CR3");
}

#[test]
fn rep_movs_restarts_after_a_fault_with_its_progress() {
    let mut g = Guest::long(|a| {
        a.mov(rsi, DATA).unwrap();
        a.mov(rdi, DATA + 0x4000 - 0x20).unwrap();
        a.mov(ecx, 0x40).unwrap();
        a.rep().movsb().unwrap();
        a.hlt().unwrap();
    });
    for n in 0..0x40u64 {
        g.memory.write::<u8>(DATA + n, n as u8 + 1);
    }
    g.memory.change_leaf(DATA + 0x4000, 0, pte::P);
    assert_eq!(g.run_to_handler(), 14);
    assert_eq!(g.get::<u64>(save::CR2), DATA + 0x4000);
    assert_eq!(g.cpu.rb.gpr[1], 0x20, "RCX counts what is left");
    assert_eq!(g.cpu.rb.gpr[6], DATA + 0x20);
    assert_eq!(g.cpu.rb.gpr[7], DATA + 0x4000);
    let ip = g.frame(true).1[0];
    g.memory.change_leaf(DATA + 0x4000, pte::P, 0);
    g.set(save::RIP, ip);
    g.set(save::RSP, STACK);
    g.expect_exit(exitcode::HLT);
    for n in 0..0x40u64 {
        assert_eq!(g.memory.read::<u8>(DATA + 0x4000 - 0x20 + n), n as u8 + 1);
    }
}

/// In 32-bit mode with PAE paging; only the first PDPTE is present.
fn pae(code: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut g = Guest::protected(code);
    for n in 0..4u64 {
        g.memory.write::<u64>(PDPT + 8 * n, if n == 0 { PD | 1 } else { 0 });
    }
    g.set(save::CR0, 0x8001_0011u64);
    g.set(save::CR3, PDPT);
    g.set(save::CR4, 0x20u64);
    g
}

#[test]
fn pdptes_are_read_by_the_table_walk_and_not_by_mov_to_cr3() {
    // APM vol. 2, 15.25.10: what is wrong with an entry shows when a walk comes to it.
    let mut g = pae(|a| {
        a.mov(eax, cr3).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(eax, cr4).unwrap();
        a.bts(eax, 7).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(dword_ptr(DATA as u32), 7).unwrap();
        a.mov(dword_ptr(0xc000_0000u32 + DATA as u32), 8).unwrap();
    });
    g.memory.write::<u64>(PDPT + 24, PD | 1 | 1 << 1);
    assert_eq!(g.run_to_handler(), 14);
    assert_eq!(g.memory.read::<u32>(g.rsp()), 1 | 2 | 8, "a reserved bit");
    assert_eq!((g.get::<u64>(save::CR2), g.memory.read::<u32>(DATA)), (0xc000_0000 + DATA, 7));
    // An entry made present counts without another load of CR3.
    let mut g = pae(|a| {
        a.mov(dword_ptr(PDPT as u32 + 24), PD as u32 | 1).unwrap();
        a.mov(dword_ptr(0xc000_0000u32 + DATA as u32), 8).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exitcode::HLT);
    assert_eq!(g.memory.read::<u32>(DATA), 8);
}

#[test]
fn pae_and_two_level_paging() {
    // PAE: PDPTEs without rights, NX by EFER.NXE.
    let mut g = pae(|a| {
        a.mov(dword_ptr(DATA as u32), 7).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exitcode::HLT);
    assert_eq!(g.memory.read::<u64>(g.memory.leaf(DATA)) & pte::D, pte::D);
    // 32-bit entries, one 4 MiB page.
    let mut g = Guest::protected(|a| {
        a.mov(dword_ptr(DATA as u32), 9).unwrap();
        a.hlt().unwrap();
    });
    g.memory.write::<u32>(PML4, 0x83);
    g.set(save::CR0, 0x8001_0011u64);
    g.set(save::CR4, 0x10u64);
    g.expect_exit(exitcode::HLT);
    assert_eq!(g.memory.read::<u32>(DATA), 9);
    assert_eq!(g.memory.read::<u32>(PML4) as u64 & (pte::A | pte::D), pte::A | pte::D);
}

const PKE: u64 = 1 << 22;
const OSXSAVE: u64 = 1 << 18;
const KEY: u64 = 3;
const ACCESS_DISABLE: u32 = 1 << (2 * KEY);
const WRITE_DISABLE: u32 = 2 << (2 * KEY);
/// #PF by a protection key, for a read.
const KEY_FAULT: u32 = 1 | 1 << 5;

/// A guest with CR4.PKE whose page at DATA has protection key 3.
fn keyed(code: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut g = Guest::long(code);
    g.set(save::CR4, 0x6a0u64 | PKE | OSXSAVE);
    g.memory.change_leaf(DATA, KEY << 59, 0);
    g.cpu.rb.xcr0 = 0x203;
    g
}

fn wrpkru(a: &mut CodeAssembler, rights: u32) {
    a.xor(ecx, ecx).unwrap();
    a.xor(edx, edx).unwrap();
    a.mov(eax, rights).unwrap();
    a.wrpkru().unwrap();
}

#[test]
fn wrpkru_counts_at_once() {
    let mut g = keyed(|a| {
        a.mov(dword_ptr(DATA), 1).unwrap();
        wrpkru(a, WRITE_DISABLE);
        a.mov(rbx, qword_ptr(DATA)).unwrap();
        wrpkru(a, ACCESS_DISABLE);
        a.mov(rbx, qword_ptr(DATA + 8)).unwrap();
    });
    assert_eq!(g.run_to_handler(), 14);
    assert_eq!(g.frame(true).0, Some(KEY_FAULT as u64));
    assert_eq!((g.get::<u64>(save::CR2), g.cpu.rb.gpr[3]), (DATA + 8, 1));
    // The page's own rights forbid it as well.
    let mut g = keyed(|a| {
        wrpkru(a, ACCESS_DISABLE);
        a.mov(dword_ptr(DATA), 2).unwrap();
    });
    g.memory.change_leaf(DATA, 0, pte::W);
    assert_eq!(g.run_to_handler(), 14);
    assert_eq!(g.frame(true).0, Some(KEY_FAULT as u64 | 2));
    // Rights of keys that no page has change nothing.
    let mut g = keyed(|a| {
        a.mov(dword_ptr(DATA), 1).unwrap();
        wrpkru(a, !(3 << (2 * KEY) | 3));
        a.mov(dword_ptr(DATA), 2).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exitcode::HLT);
}

#[test]
fn xrstor_of_pkru_counts_at_once() {
    let area = DATA + 0x1000;
    let mut g = keyed(|a| {
        a.mov(dword_ptr(DATA), 1).unwrap();
        a.mov(eax, 0x200).unwrap();
        a.xor(edx, edx).unwrap();
        a.xrstor(ptr(area)).unwrap();
        a.mov(rbx, qword_ptr(DATA)).unwrap();
    });
    g.memory.write::<u64>(area + 512, 0x200);
    g.memory.write::<u32>(area + 0x980, ACCESS_DISABLE);
    assert_eq!(g.run_to_handler(), 14);
    assert_eq!(g.frame(true).0, Some(KEY_FAULT as u64));
    assert_eq!(g.cpu.rb.pkru, ACCESS_DISABLE);
}

#[test]
fn pke_can_be_set_and_shows_in_cpuid() {
    let mut g = Guest::long(|a| {
        a.mov(rax, 0x6a0 | PKE).unwrap();
        a.mov(cr4, rax).unwrap();
        a.mov(eax, 7).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.cpuid().unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exitcode::HLT);
    assert_eq!(g.cpu.rb.gpr[1] >> 3 & 3, 3, "PKU and OSPKE");
}

#[test]
fn the_save_areas_sizes_follow_xcr0() {
    for (xcr0, standard, compacted) in [(1, 0x240, 0x240), (0x201, 0x988, 0x248), (0x203, 0x988, 0x248)] {
        let mut g = keyed(|a| {
            a.mov(eax, xcr0).unwrap();
            a.xor(edx, edx).unwrap();
            a.xor(ecx, ecx).unwrap();
            a.xsetbv().unwrap();
            a.mov(eax, 0xd).unwrap();
            a.cpuid().unwrap();
            a.mov(r8, rbx).unwrap();
            a.mov(eax, 0xd).unwrap();
            a.mov(ecx, 1).unwrap();
            a.cpuid().unwrap();
            a.hlt().unwrap();
        });
        g.expect_exit(exitcode::HLT);
        assert_eq!((g.cpu.rb.gpr[8], g.cpu.rb.gpr[3]), (standard, compacted), "XCR0 {xcr0:#x}");
    }
}
