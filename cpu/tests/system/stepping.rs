// SPDX-License-Identifier: Apache-2.0
//! Interrupt shadows, single step, breakpoints (APM vol. 2, 13.1; vol. 3, STI and MOV).

use iced_x86::code_asm::*;
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::vmcb::{control, save};

use crate::common::*;

const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;
const TF: u64 = 0x102;
/// V_IRQ with priority 15 and vector 0x31.
const PENDING: u64 = 1 << 8 | 15 << 16 | 0x31 << 32;

fn dr6(g: &Guest) -> u64 {
    g.get::<u64>(save::DR6) & 0xffff & !0xff0
}

#[test]
fn sti_and_mov_ss_hold_interrupts_for_one_instruction() {
    let mut g = Guest::long(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    g.set(control::V_INTR, PENDING);
    g.expect(0x31, None, CODE + 2);
    // STI with IF already set has no shadow.
    let mut g = Guest::long(|a| {
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    g.set(save::RFLAGS, 0x202u64);
    g.set(control::V_INTR, PENDING);
    g.expect(0x31, None, CODE);
    // MOV SS and POP SS; LSS too is free of it.
    let mut g = Guest::long(|a| {
        a.mov(ss, eax).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    g.set(save::RAX, DATA0 as u64);
    g.set(save::RFLAGS, 0x202u64);
    g.set(control::V_INTR, PENDING);
    g.set(control::INTERRUPT_SHADOW, 1u64);
    g.expect(0x31, None, CODE + 3);
}

#[test]
fn the_shadow_is_saved_when_the_shadowed_instruction_exits() {
    let mut g = Guest::long(|a| {
        a.sti().unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!(g.get::<u64>(control::INTERRUPT_SHADOW) & 1, 1);
    assert_eq!(g.rip(), CODE + 1);
    let mut g = Guest::long(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!(g.get::<u64>(control::INTERRUPT_SHADOW) & 1, 0);
}

#[test]
fn single_step_traps_after_each_instruction() {
    let mut g = Guest::long(|a| {
        a.nop().unwrap();
        a.nop().unwrap();
    });
    g.set(save::RFLAGS, TF);
    g.expect(1, None, CODE + 1);
    assert_eq!(dr6(&g), BS);
    assert_eq!(g.rflags() & 0x100, 0);
    assert_eq!(g.frame(false).1[2] & 0x1_0100, 0x100, "TF in the image, RF not");
}

#[test]
fn popf_that_sets_tf_traps_after_the_next_instruction() {
    let mut g = Guest::long(|a| {
        a.push(0x102).unwrap();
        a.popfq().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(g.run_to_handler(), 1);
    let ip = g.frame(false).1[0];
    assert_eq!(g.memory.read::<[u8; 2]>(ip - 1), [0x90, 0x90]);
}

#[test]
fn a_faulting_instruction_under_tf_faults_only() {
    let mut g = Guest::long(|a| a.ud2().unwrap());
    g.set(save::RFLAGS, TF);
    g.expect(6, None, CODE);
    assert_eq!(dr6(&g), 0);
}

#[test]
fn a_software_interrupt_under_tf_enters_its_handler_without_a_step() {
    let mut g = Guest::long(|a| a.int(0x40).unwrap());
    g.set(save::RFLAGS, TF);
    g.expect(0x40, None, CODE + 2);
    assert_eq!(dr6(&g), 0);
}

#[test]
fn every_iteration_of_a_repeated_instruction_is_stepped() {
    let mut g = Guest::long(|a| {
        a.mov(edi, DATA as u32).unwrap();
        a.mov(ecx, 3).unwrap();
        a.rep().stosb().unwrap();
    });
    let mut left = Vec::new();
    g.set(save::RFLAGS, TF);
    for _ in 0..5 {
        assert_eq!(g.run_to_handler(), 1);
        left.push((g.frame(false).1[0] - CODE, g.cpu.rb.gpr[1]));
        let ip = g.frame(false).1[0];
        g.set(save::RIP, ip);
        g.set(save::RSP, STACK);
        g.set(save::RFLAGS, TF);
    }
    assert_eq!(left, [(5, 0), (10, 3), (10, 2), (10, 1), (12, 0)]);
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    // DR1: writes of 4 bytes.
    let watch =
        |n: u64, kind: u64, len: u64| 0x400 | 1 << (2 * n) | kind << (16 + 4 * n) | len << (18 + 4 * n);
    let code = |a: &mut CodeAssembler| {
        a.mov(eax, dword_ptr(DATA)).unwrap();
        a.mov(byte_ptr(DATA + 3), al).unwrap();
        a.hlt().unwrap();
    };
    let length = |g: &Guest| {
        let bytes: [u8; 32] = g.memory.read(CODE);
        let mut d = iced_x86::Decoder::new(64, &bytes, 0);
        let first = d.decode().len() as u64;
        (first, first + d.decode().len() as u64)
    };
    let mut g = Guest::long(code);
    g.cpu.rb.dr[1] = DATA;
    g.set(save::DR7, watch(1, 1, 3));
    let (first, second) = length(&g);
    g.expect(1, None, CODE + second);
    assert_eq!(dr6(&g), 2);
    assert_eq!(g.memory.read::<u8>(DATA + 3), 0);
    // Reads and writes.
    let mut g = Guest::long(code);
    g.cpu.rb.dr[2] = DATA;
    g.set(save::DR7, watch(2, 3, 0));
    g.expect(1, None, CODE + first);
    assert_eq!(dr6(&g), 4);
    // Beside the access.
    let mut g = Guest::long(code);
    g.cpu.rb.dr[0] = DATA + 4;
    g.set(save::DR7, watch(0, 3, 3));
    g.expect_exit(exit::HLT);
}

#[test]
fn instruction_breakpoints_fault_before_and_rf_lets_them_pass() {
    let mut g = Guest::long(|a| {
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    g.cpu.rb.dr[3] = CODE + 1;
    g.set(save::DR7, 0x400u64 | 1 << 6);
    g.expect(1, None, CODE + 1);
    assert_eq!(dr6(&g), 8);
    g.set(save::RIP, CODE + 1);
    g.set(save::RFLAGS, 0x1_0002u64);
    g.set(save::RSP, STACK);
    g.expect_exit(exit::HLT);
    assert_eq!(g.rflags() & 0x1_0000, 0, "RF is cleared by the instruction");
}

#[test]
fn breakpoints_armed_by_the_guest_itself() {
    let mut g = Guest::long(|a| {
        a.mov(rbx, qword_ptr(DATA)).unwrap(); // fills the TLB first
        a.mov(rax, DATA).unwrap();
        a.mov(dr0, rax).unwrap();
        a.mov(eax, 0xd0401).unwrap();
        a.mov(dr7, rax).unwrap();
        a.mov(qword_ptr(DATA), rbx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(g.run_to_handler(), 1);
    assert_eq!(dr6(&g), 1);
}

#[test]
fn port_breakpoints_need_debugging_extensions() {
    let code = |a: &mut CodeAssembler| {
        a.in_(al, 0x70).unwrap();
        a.hlt().unwrap();
    };
    // DR0: I/O, two ports from 70h.
    let watch = 0x400u64 | 1 | 2 << 16 | 1 << 18;
    let mut g = Guest::long(code);
    g.cpu.rb.dr[0] = 0x70;
    g.set(save::DR7, watch);
    g.set(save::CR4, 0x6a8u64);
    g.expect(1, None, CODE + 2);
    assert_eq!(dr6(&g), 1);
    let mut g = Guest::long(code);
    g.cpu.rb.dr[0] = 0x70;
    g.set(save::DR7, watch);
    g.expect_exit(exit::HLT);
}

#[test]
fn general_detect_and_the_aliases_of_debug_registers() {
    let mut g = Guest::long(|a| a.mov(rax, dr0).unwrap());
    g.set(save::DR7, 0x400u64 | 1 << 13);
    g.expect(1, None, CODE);
    assert_eq!(dr6(&g), BD);
    assert_eq!(g.get::<u64>(save::DR7) & 1 << 13, 0, "GD is cleared on entry");
    // DR4 is DR6 without CR4.DE, undefined with it.
    let mut g = Guest::long(|a| {
        a.mov(rax, dr4).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!(g.rax(), 0xffff_0ff0);
    let mut g = Guest::long(|a| a.mov(rax, dr4).unwrap());
    g.set(save::CR4, 0x6a8u64);
    g.expect(6, None, CODE);
    let mut g = Guest::long(|a| {
        a.mov(rax, 1u64 << 32).unwrap();
        a.mov(dr7, rax).unwrap();
    });
    assert_eq!(g.run_to_handler(), 13);
}

#[test]
fn an_intercepted_debug_exception_has_its_cause_in_dr6() {
    let mut g = Guest::long(|a| {
        a.nop().unwrap();
        a.nop().unwrap();
    });
    g.set(save::RFLAGS, TF);
    g.intercept(exit::EXCP0 + 1);
    g.expect_exit(exit::EXCP0 + 1);
    assert_eq!((g.rip(), dr6(&g)), (CODE + 1, BS));
}

#[test]
fn the_instruction_count_is_exact() {
    let mut g = Guest::long(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.mov(ecx, 10).unwrap();
        a.mov(edi, DATA as u32).unwrap();
        a.rep().stosb().unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!(g.cpu.engine.instructions(), 1 + 2000 + 3, "a repeated instruction is one");
}

/// Two writes to the block that follows, a third to where no code is.
#[test]
fn writes_to_code_are_counted() {
    let mut g = Guest::long(|a| {
        let mut target = a.create_label();
        let mut done = a.create_label();
        a.lea(rdi, qword_ptr(target)).unwrap();
        a.mov(ecx, 0).unwrap();
        a.jmp(target).unwrap();
        // In a chunk of its own.
        a.nops_with_size(64).unwrap();
        a.set_label(&mut target).unwrap();
        a.mov(al, 1).unwrap();
        a.inc(ecx).unwrap();
        a.cmp(ecx, 3).unwrap();
        a.je(done).unwrap();
        a.mov(byte_ptr(rdi + 1), cl).unwrap();
        a.jmp(target).unwrap();
        a.nops_with_size(64).unwrap();
        a.set_label(&mut done).unwrap();
        a.mov(byte_ptr(DATA), cl).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    let counted: std::collections::BTreeMap<_, _> = g.cpu.engine.statistics().into();
    assert_eq!(g.rax() & 0xFF, 2, "the second write is what ran last");
    assert_eq!(counted["code_writes"], 2);
}
