// SPDX-License-Identifier: Apache-2.0
//! Accesses that begin at a canonical address and end at one that is not: #GP(0), or #SS(0) by way of the stack segment,
//! whatever the pages say, and nothing has happened (APM vol. 2, 5.3.1 and 8.2.13, 8.2.14).

use iced_x86::code_asm::*;
use softcpu::x86::vmcb::save;

use crate::common::*;

/// The first address that is not canonical.
const END: u64 = 1 << 47;
/// The frame of the last page before it, by the second table of the guest.
const LAST: u64 = 0x3f_f000;
const GP: u8 = 13;
const SS: u8 = 12;
const PF: u8 = 14;

type Code = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

/// What is accessed, in bytes and by way of RDI (and RSI, where that is another operand), and what it raises.
struct Case(&'static str, u64, u8, Code);

fn guest(mapped: bool, code: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let g = Guest::long(code);
    g.memory.write::<u64>(PML4 + 8 * 255, PDPT | 7);
    g.memory.write::<u64>(PDPT + 8 * 511, PD | 7);
    g.memory.write::<u64>(PD + 8 * 511, (PT + 0x1000) | 7);
    g.memory.write::<u64>(PT + 8 * 1023, LAST | mapped as u64 | 6);
    // What LDMXCSR takes, too.
    (0..0x400).for_each(|n| g.memory.write::<u32>(LAST + 4 * n, 0x1f80));
    for vector in [GP, SS, PF] {
        let stub = gate(CODE64, HANDLERS + 16 * vector as u64, 1, 0x8e);
        g.memory.write::<u64>(IDT + 16 * vector as u64, stub);
    }
    g
}

fn page(g: &Guest) -> Vec<u8> {
    (0..0x1000).map(|n| g.memory.read::<u8>(LAST + n)).collect()
}

/// Runs `code` with an access of `size` bytes of which `beyond` are not canonical.
fn check(case: &Case, beyond: u64, mapped: bool) {
    let Case(name, size, vector, code) = *case;
    let at = END - size + beyond;
    let mut g = guest(mapped, |a| {
        a.nop().unwrap();
        code(a).unwrap();
        a.hlt().unwrap();
    });
    let top = if vector == SS { at } else { STACK };
    // What the stack's instructions push ends where RSP is.
    let pushes = ["push", "pushf", "call", "push memory", "push 16"].contains(&name);
    let top = if pushes && vector == SS { at + size } else { top };
    g.set(save::RSP, top);
    for n in [1, 2, 3, 5, 8, 9] {
        g.cpu.rb.gpr[n] = 1;
    }
    (g.cpu.rb.gpr[6], g.cpu.rb.gpr[7]) = (DATA, at);
    if name.ends_with("from") {
        (g.cpu.rb.gpr[6], g.cpu.rb.gpr[7]) = (at, DATA);
    }
    g.set(save::RAX, 1u64);
    let before = page(&g);
    let general = g.cpu.rb.gpr;
    let what = format!("{name}, {beyond} of {size} bytes beyond, mapped: {mapped}");
    if beyond == 0 {
        // Nothing is wrong with an access that ends right there but, where it is not mapped, that.
        let code = g.run();
        let rip = g.rip();
        let handler = (rip.wrapping_sub(HANDLERS) < 0x1000).then_some(rip.wrapping_sub(HANDLERS) / 16);
        assert!(
            !mapped || handler.is_none_or(|v| ![12, 13].contains(&v)),
            "{what}: exit {code:#x} at {rip:#x}"
        );
        assert!(mapped || handler == Some(14), "{what}: exit {code:#x} at {rip:#x}");
        return;
    }
    assert_eq!(g.run_to_handler(), vector, "{what}");
    let (code, frame) = g.frame(true);
    assert_eq!((code, frame[0], frame[3]), (Some(0), CODE + 1, top), "{what}");
    assert!(page(&g) == before, "{what}: memory has changed");
    let same = |n: &usize| general[*n] == g.cpu.rb.gpr[*n];
    assert!([1, 2, 3, 5, 6, 7, 8, 9].iter().all(same) && g.rax() == 1, "{what}: registers have changed");
}

const GENERAL: &[Case] = &[
    // Loads.
    Case("mov load 2", 2, GP, |a| a.mov(cx, word_ptr(rdi))),
    Case("mov load 4", 4, GP, |a| a.mov(ecx, dword_ptr(rdi))),
    Case("mov load 8", 8, GP, |a| a.mov(rcx, qword_ptr(rdi))),
    Case("movzx", 2, GP, |a| a.movzx(ecx, word_ptr(rdi))),
    Case("movsxd", 4, GP, |a| a.movsxd(rcx, dword_ptr(rdi))),
    Case("add load", 8, GP, |a| a.add(rcx, qword_ptr(rdi))),
    Case("cmp", 4, GP, |a| a.cmp(dword_ptr(rdi), 1)),
    Case("test", 8, GP, |a| a.test(qword_ptr(rdi), rcx)),
    Case("imul", 8, GP, |a| a.imul_2(rcx, qword_ptr(rdi))),
    Case("bt", 8, GP, |a| a.bt(qword_ptr(rdi), 1)),
    Case("movbe", 8, GP, |a| a.movbe(rcx, qword_ptr(rdi))),
    Case("popcnt", 4, GP, |a| a.popcnt(ecx, dword_ptr(rdi))),
    Case("crc32", 8, GP, |a| a.crc32(rcx, qword_ptr(rdi))),
    Case("jmp memory", 8, GP, |a| a.jmp(qword_ptr(rdi))),
    Case("call memory", 8, GP, |a| a.call(qword_ptr(rdi))),
    Case("push from memory", 8, GP, |a| a.push(qword_ptr(rdi))),
    Case("lgdt", 10, GP, |a| a.lgdt(fword_ptr(rdi))),
    // Stores and both.
    Case("mov store 2", 2, GP, |a| a.mov(word_ptr(rdi), cx)),
    Case("mov store 4", 4, GP, |a| a.mov(dword_ptr(rdi), ecx)),
    Case("mov store 8", 8, GP, |a| a.mov(qword_ptr(rdi), rcx)),
    Case("mov store constant", 8, GP, |a| a.mov(qword_ptr(rdi), 7)),
    Case("movnti", 8, GP, |a| a.movnti(qword_ptr(rdi), rcx)),
    Case("add store", 4, GP, |a| a.add(dword_ptr(rdi), ecx)),
    Case("lock add", 8, GP, |a| a.lock().add(qword_ptr(rdi), rcx)),
    Case("xchg", 8, GP, |a| a.xchg(qword_ptr(rdi), rcx)),
    Case("xadd", 4, GP, |a| a.xadd(dword_ptr(rdi), ecx)),
    Case("cmpxchg", 8, GP, |a| a.cmpxchg(qword_ptr(rdi), rcx)),
    Case("cmpxchg8b", 8, GP, |a| a.cmpxchg8b(qword_ptr(rdi))),
    Case("bts", 4, GP, |a| a.bts(dword_ptr(rdi), ecx)),
    Case("shl", 8, GP, |a| a.shl(qword_ptr(rdi), 3)),
    Case("neg", 8, GP, |a| a.neg(qword_ptr(rdi))),
    Case("pop to memory", 8, GP, |a| a.pop(qword_ptr(rdi))),
    Case("sgdt", 10, GP, |a| a.sgdt(fword_ptr(rdi))),
    // Strings.
    Case("movsq", 8, GP, |a| a.movsq()),
    Case("movsd from", 4, GP, |a| a.movsd()),
    Case("movsw from", 2, GP, |a| a.movsw()),
    Case("stosq", 8, GP, |a| a.stosq()),
    Case("stosd", 4, GP, |a| a.stosd()),
    Case("lodsq from", 8, GP, |a| a.lodsq()),
    Case("scasq", 8, GP, |a| a.scasq()),
    Case("cmpsq", 8, GP, |a| a.cmpsq()),
    Case("cmpsd from", 4, GP, |a| a.cmpsd()),
    Case("rep movsq", 8, GP, |a| a.rep().movsq()),
    Case("rep movsq from", 8, GP, |a| a.rep().movsq()),
    Case("rep stosd", 4, GP, |a| a.rep().stosd()),
    Case("repne scasd", 4, GP, |a| a.repne().scasd()),
];

const STACKS: &[Case] = &[
    Case("push", 8, SS, |a| a.push(rcx)),
    Case("push 16", 2, SS, |a| a.push(cx)),
    Case("push memory", 8, SS, |a| a.push(qword_ptr(rsi))),
    Case("pushf", 8, SS, |a| a.pushfq()),
    Case("call", 8, SS, |a| a.call(CODE + 0x100)),
    Case("pop", 8, SS, |a| a.pop(rcx)),
    Case("pop 16", 2, SS, |a| a.pop(cx)),
    Case("popf", 8, SS, |a| a.popfq()),
    Case("ret", 8, SS, |a| a.ret()),
    Case("mov by rsp", 8, SS, |a| a.mov(rcx, qword_ptr(rsp))),
    Case("store by rsp", 4, SS, |a| a.mov(dword_ptr(rsp), ecx)),
    Case("add by rsp", 8, SS, |a| a.add(qword_ptr(rsp), rcx)),
    Case("movups by rsp", 16, SS, |a| a.movups(xmm1, xmmword_ptr(rsp))),
];

const WIDE: &[Case] = &[
    Case("movss load", 4, GP, |a| a.movss(xmm1, dword_ptr(rdi))),
    Case("movsd load", 8, GP, |a| a.movsd_2(xmm1, qword_ptr(rdi))),
    Case("movq load", 8, GP, |a| a.movq(xmm1, qword_ptr(rdi))),
    Case("movups load", 16, GP, |a| a.movups(xmm1, xmmword_ptr(rdi))),
    Case("movdqu load", 16, GP, |a| a.movdqu(xmm1, xmmword_ptr(rdi))),
    Case("lddqu", 16, GP, |a| a.lddqu(xmm1, xmmword_ptr(rdi))),
    Case("movhps load", 8, GP, |a| a.movhps(xmm1, qword_ptr(rdi))),
    Case("pmovzxbw", 8, GP, |a| a.pmovzxbw(xmm1, qword_ptr(rdi))),
    Case("cvtsi2sd", 8, GP, |a| a.cvtsi2sd(xmm1, qword_ptr(rdi))),
    Case("addsd", 8, GP, |a| a.addsd(xmm1, qword_ptr(rdi))),
    Case("movss store", 4, GP, |a| a.movss(dword_ptr(rdi), xmm1)),
    Case("movsd store", 8, GP, |a| a.movsd_2(qword_ptr(rdi), xmm1)),
    Case("movups store", 16, GP, |a| a.movups(xmmword_ptr(rdi), xmm1)),
    Case("movdqu store", 16, GP, |a| a.movdqu(xmmword_ptr(rdi), xmm1)),
    Case("movlps store", 8, GP, |a| a.movlps(qword_ptr(rdi), xmm1)),
    Case("movq mmx load", 8, GP, |a| a.movq(mm1, qword_ptr(rdi))),
    Case("movq mmx store", 8, GP, |a| a.movq(qword_ptr(rdi), mm1)),
    Case("fld 32", 4, GP, |a| a.fld(dword_ptr(rdi))),
    Case("fld 80", 10, GP, |a| a.fld(tword_ptr(rdi))),
    Case("fild 64", 8, GP, |a| a.fild(qword_ptr(rdi))),
    Case("fldenv", 28, GP, |a| a.fldenv(ptr(rdi))),
    Case("fnstenv", 28, GP, |a| a.fnstenv(ptr(rdi))),
    Case("fnsave", 108, GP, |a| a.fnsave(ptr(rdi))),
    Case("frstor", 108, GP, |a| a.frstor(ptr(rdi))),
    Case("fnstcw", 2, GP, |a| a.fnstcw(word_ptr(rdi))),
    Case("ldmxcsr", 4, GP, |a| a.ldmxcsr(dword_ptr(rdi))),
    Case("stmxcsr", 4, GP, |a| a.stmxcsr(dword_ptr(rdi))),
];

#[test]
fn an_access_whose_last_byte_is_not_canonical_faults_before_anything_happens() {
    for case in GENERAL.iter().chain(STACKS).chain(WIDE) {
        for beyond in [0, 1, case.1 - 1] {
            for mapped in [true, false] {
                check(case, beyond, mapped);
            }
        }
    }
}

#[test]
fn images_aligned_or_not_are_checked_to_their_last_byte() {
    // Aligned as they have to be, these are longer than what is left.
    let images: [(&str, u64, Code); 4] = [
        ("fxsave", 16, |a| a.fxsave(ptr(rdi))),
        ("fxrstor", 16, |a| a.fxrstor(ptr(rdi))),
        ("xsave", 64, |a| a.xsave(ptr(rdi))),
        ("xrstor", 64, |a| a.xrstor(ptr(rdi))),
    ];
    for (name, left, code) in images {
        for mapped in [true, false] {
            let mut g = guest(mapped, |a| {
                a.nop().unwrap();
                code(a).unwrap();
            });
            g.set(save::CR4, g.get::<u64>(save::CR4) | 1 << 18);
            g.cpu.rb.gpr[7] = END - left;
            g.set(save::RAX, 3u64);
            let before = page(&g);
            assert_eq!(g.run_to_handler(), GP, "{name}, mapped: {mapped}");
            assert_eq!((g.frame(true).0, g.frame(true).1[0]), (Some(0), CODE + 1), "{name}");
            assert!(page(&g) == before, "{name}: memory has changed");
        }
    }
}

#[test]
fn a_string_goes_on_to_the_last_whole_element() {
    let mut g = guest(true, |a| a.rep().stosd().unwrap());
    g.cpu.rb.gpr[7] = END - 10;
    g.cpu.rb.gpr[1] = 5;
    g.set(save::RAX, 0xABCD_EF01u64);
    g.expect(GP, Some(0), CODE);
    assert_eq!((g.cpu.rb.gpr[7], g.cpu.rb.gpr[1]), (END - 2, 3));
    assert_eq!(g.memory.read::<u64>(LAST + 0xff6), 0xABCD_EF01_ABCD_EF01);
}
