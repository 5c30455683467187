// SPDX-License-Identifier: Apache-2.0
//! Near returns that do and do not go where the last call came from: what the processor remembers of calls must never
//! show. Each guest first runs a call and its return often enough for them to be remembered.

use iced_x86::code_asm::*;
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::vmcb::save;

use crate::common::*;

/// Rounds after which calls and returns are remembered.
const WARM: u32 = 8;

/// EDI rounds of a call to `function`.
fn warm_up(a: &mut CodeAssembler, function: CodeLabel) {
    let mut again = a.create_label();
    a.mov(edi, WARM).unwrap();
    a.set_label(&mut again).unwrap();
    a.call(function).unwrap();
    a.dec(edi).unwrap();
    a.jne(again).unwrap();
}

#[test]
fn a_return_goes_to_the_address_on_the_stack_not_to_the_call() {
    let mut g = Guest::long(|a| {
        let (mut function, mut elsewhere, mut divert) =
            (a.create_label(), a.create_label(), a.create_label());
        a.xor(ebx, ebx).unwrap();
        let mut again = a.create_label();
        a.mov(edi, WARM).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(function).unwrap();
        a.inc(ebx).unwrap();
        a.dec(edi).unwrap();
        a.jne(again).unwrap();
        a.mov(esi, 1).unwrap();
        a.inc(edi).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut function).unwrap();
        a.test(esi, esi).unwrap();
        a.jne(divert).unwrap();
        a.ret().unwrap();
        a.set_label(&mut divert).unwrap();
        a.lea(rax, qword_ptr(elsewhere)).unwrap();
        a.mov(qword_ptr(rsp), rax).unwrap();
        a.ret().unwrap();
        a.set_label(&mut elsewhere).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!(g.cpu.rb.gpr[3], WARM as u64);
    assert_eq!(g.rsp(), STACK);
}

#[test]
fn returns_on_switched_stacks_go_back_to_their_own_calls() {
    // Two stacks take turns: `swap` is called on one and returns on the other.
    let other = STACK0;
    let mut g = Guest::long(|a| {
        let (mut swap, mut second, mut first, mut done) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.lea(rax, qword_ptr(second)).unwrap();
        a.mov(qword_ptr(other - 8), rax).unwrap();
        a.mov(rsi, other - 8).unwrap();
        a.set_label(&mut first).unwrap();
        a.call(swap).unwrap();
        a.add(ebx, 1).unwrap();
        a.cmp(ebx, WARM).unwrap();
        a.jb(first).unwrap();
        a.jmp(done).unwrap();
        a.set_label(&mut second).unwrap();
        a.shl(rbp, 1).unwrap();
        a.inc(rbp).unwrap();
        a.call(swap).unwrap();
        a.jmp(second).unwrap();
        a.set_label(&mut swap).unwrap();
        a.xchg(rsp, rsi).unwrap();
        a.ret().unwrap();
        a.set_label(&mut done).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!((g.cpu.rb.gpr[3], g.cpu.rb.gpr[5]), (WARM as u64, (1 << WARM) - 1));
}

#[test]
fn returns_from_deep_recursion_all_find_their_way() {
    let depth = 100u64;
    let mut g = Guest::long(|a| {
        let (mut function, mut bottom) = (a.create_label(), a.create_label());
        for _ in 0..3 {
            a.mov(rcx, depth).unwrap();
            a.call(function).unwrap();
        }
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.dec(rcx).unwrap();
        a.je(bottom).unwrap();
        a.call(function).unwrap();
        a.inc(rbx).unwrap();
        a.set_label(&mut bottom).unwrap();
        a.ret().unwrap();
    });
    let before = g.cpu.engine.instructions();
    g.expect_exit(exit::HLT);
    assert_eq!(g.cpu.rb.gpr[3], 3 * (depth - 1));
    // MOV and CALL, then DEC, JE, CALL, INC and RET for each level but the last, which has DEC, JE and RET.
    assert_eq!(g.cpu.engine.instructions() - before, 3 * (2 + 5 * (depth - 1) + 3));
}

#[test]
fn code_changed_under_a_remembered_return_takes_effect() {
    let mut g = Guest::long(|a| {
        let (mut function, mut patch, mut site) = (a.create_label(), a.create_label(), a.create_label());
        let mut again = a.create_label();
        a.lea(rdx, qword_ptr(site)).unwrap();
        a.mov(edi, WARM).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(function).unwrap();
        a.set_label(&mut site).unwrap();
        // MOV AL, 1: the last round's becomes MOV AL, 2 while the call is under way.
        a.db(&[0xb0, 1]).unwrap();
        a.dec(edi).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.cmp(edi, 1).unwrap();
        a.je(patch).unwrap();
        a.ret().unwrap();
        a.set_label(&mut patch).unwrap();
        a.mov(byte_ptr(rdx + 1), 2).unwrap();
        a.ret().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!(g.rax() & 0xff, 2);
}

#[test]
fn a_page_remapped_between_call_and_return_is_fetched_anew() {
    // The caller lies at DATA + 0x1000. In the last round the function maps another page there, whose code loads 2
    // where the first's loads 1.
    let (caller, copy) = (DATA + 0x1000, DATA + 0x3000);
    let code = |value: u8| {
        move |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.set_label(&mut again).unwrap();
            a.call(CODE + 0x100).unwrap();
            a.db(&[0xb0, value]).unwrap();
            a.dec(edi).unwrap();
            a.jne(again).unwrap();
            a.hlt().unwrap();
        }
    };
    for flush in [true, false] {
        let mut g = Guest::long(|a| {
            a.mov(edi, WARM).unwrap();
            a.mov(rbx, caller).unwrap();
            a.jmp(rbx).unwrap();
        });
        let leaf = g.memory.leaf(caller);
        g.assemble(64, CODE + 0x100, |a| {
            let mut out = a.create_label();
            a.cmp(edi, 1).unwrap();
            a.jne(out).unwrap();
            a.mov(rcx, copy | 7).unwrap();
            a.mov(qword_ptr(leaf), rcx).unwrap();
            if flush {
                a.invlpg(byte_ptr(caller)).unwrap();
            } else {
                a.mov(rcx, cr3).unwrap();
                a.mov(cr3, rcx).unwrap();
            }
            a.set_label(&mut out).unwrap();
            a.ret().unwrap();
        });
        g.assemble(64, caller, code(1));
        // Assembled for the address where it runs, put where the other page is.
        let mut other = CodeAssembler::new(64).unwrap();
        code(2)(&mut other);
        let bytes = other.assemble(caller).unwrap();
        g.memory.write_bytes(copy, &bytes);
        g.expect_exit(exit::HLT);
        assert_eq!(g.rax() & 0xff, 2);
    }
}

#[test]
fn a_return_at_another_privilege_level_is_checked_as_a_fetch_of_that_level() {
    // The supervisor's call leaves a note; the user's RET to the same address must not use it: the page is not the
    // user's.
    let stub = DATA + 0x2000;
    let mut g = Guest::long(|a| {
        let (mut function, mut drop) = (a.create_label(), a.create_label());
        warm_up(a, function);
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.cmp(edi, 1).unwrap();
        a.je(drop).unwrap();
        a.ret().unwrap();
        // In the last round to user mode, at a RET, on the same stack.
        a.set_label(&mut drop).unwrap();
        a.mov(rax, rsp).unwrap();
        a.push(USER_DATA as i32).unwrap();
        a.push(rax).unwrap();
        a.push(2).unwrap();
        a.push(USER_CODE64 as i32).unwrap();
        a.push(stub as i32).unwrap();
        a.iretq().unwrap();
    });
    g.memory.write_bytes(stub, &[0xc3]);
    g.memory.change_leaf(CODE, 0, pte::U);
    assert_eq!(g.run_to_handler(), 14);
    let error = g.memory.read::<u64>(g.rsp());
    // Present, user, instruction fetch.
    assert_eq!(error & 0x15, 0x15);
    // Nothing behind the call has run.
    assert_eq!(g.cpu.rb.gpr[7], 1);
}

#[test]
fn every_step_over_remembered_calls_and_returns_traps() {
    let mut g = Guest::long(|a| {
        let mut function = a.create_label();
        warm_up(a, function);
        a.pushfq().unwrap();
        a.or(qword_ptr(rsp), 0x100).unwrap();
        a.popfq().unwrap();
        a.mov(edi, 2).unwrap();
        a.call(function).unwrap();
        a.call(function).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.ret().unwrap();
    });
    // The #DB handler counts and returns.
    g.assemble(64, HANDLERS + 16, |a| {
        a.inc(rbx).unwrap();
        a.iretq().unwrap();
    });
    g.expect_exit(exit::HLT);
    // MOV, CALL, RET, CALL, RET.
    assert_eq!(g.cpu.rb.gpr[3], 5);
    assert_eq!(g.get::<u64>(save::RFLAGS) & 0x100, 0x100);
}

#[test]
fn a_kick_ends_an_endless_loop_of_calls_and_returns() {
    let mut g = Guest::long(|a| {
        let (mut function, mut again) = (a.create_label(), a.create_label());
        a.set_label(&mut again).unwrap();
        a.call(function).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut function).unwrap();
        a.ret().unwrap();
    });
    let shared = g.cpu.engine.shared().clone();
    std::thread::scope(|s| {
        s.spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            shared.kick();
        });
        g.expect_exit(exit::INTR);
    });
}
