// SPDX-License-Identifier: Apache-2.0
//! Every exception with its error code (APM vol. 2, 8.2), nesting, stacks.

use iced_x86::code_asm::*;
use softcpu::x86::system::exitcode;
use softcpu::x86::vmcb::{control, save};

use crate::common::*;

#[test]
fn divide_error_is_a_fault_without_error_code() {
    let mut g = Guest::long(|a| {
        a.xor(ecx, ecx).unwrap();
        a.div(ecx).unwrap();
    });
    g.expect(0, None, CODE + 2);
    let (_, frame) = g.frame(false);
    assert_eq!(frame[1], CODE64 as u64);
    assert_eq!(frame[2] & (1 << 16), 1 << 16, "RF is set in a fault's image");
    assert_eq!(frame[3], STACK);
    assert_eq!(frame[4], DATA0 as u64);
}

#[test]
fn breakpoint_and_overflow_are_traps() {
    let mut g = Guest::long(|a| a.int3().unwrap());
    g.expect(3, None, CODE + 1);
    assert_eq!(g.frame(false).1[2] & (1 << 16), 0);

    let mut g = Guest::protected(|a| {
        a.mov(al, 0x7f).unwrap();
        a.add(al, 1).unwrap();
        a.into().unwrap();
    });
    assert_eq!(g.run_to_handler(), 4);
    assert_eq!(g.memory.read::<u32>(g.rsp()) as u64, CODE + 5);
}

#[test]
fn bound_range_and_invalid_opcode() {
    let mut g = Guest::protected(|a| {
        a.mov(eax, 11).unwrap();
        a.bound(eax, dword_ptr(DATA as u32)).unwrap();
    });
    g.memory.write::<[i32; 2]>(DATA, [-3, 10]);
    assert_eq!(g.run_to_handler(), 5);
    assert_eq!(g.memory.read::<u32>(g.rsp()) as u64, CODE + 5);

    let mut g = Guest::long(|a| a.ud2().unwrap());
    g.expect(6, None, CODE);
}

#[test]
fn device_not_available_follows_cr0() {
    for (bit, fpu) in [(1u64 << 3, true), (1 << 2, true), (1 << 3, false)] {
        let mut g = Guest::long(|a| {
            if fpu {
                a.fld1().unwrap();
            } else {
                a.movaps(xmm0, xmm1).unwrap();
            }
        });
        let old: u64 = g.get(save::CR0);
        g.set(save::CR0, old | bit);
        g.expect(7, None, CODE);
    }
}

#[test]
fn segment_not_present_and_stack_fault_carry_the_selector() {
    let mut g = Guest::long(|a| {
        a.mov(eax, ABSENT as u32).unwrap();
        a.mov(ds, eax).unwrap();
    });
    g.expect(11, Some(ABSENT as u32), CODE + 5);

    let mut g = Guest::long(|a| {
        a.mov(eax, ABSENT as u32).unwrap();
        a.mov(ss, eax).unwrap();
    });
    g.expect(12, Some(ABSENT as u32), CODE + 5);

    let mut g = Guest::long(|a| {
        a.mov(rsp, 0x8000_0000_0000_0000u64).unwrap();
        a.pop(rax).unwrap();
    });
    // The handler needs a stack of its own.
    let gate12 = gate(CODE64, HANDLERS + 16 * 12, 1, 0x8e);
    g.memory.write::<u64>(IDT + 16 * 12, gate12);
    g.expect(12, Some(0), CODE + 10);
}

#[test]
fn general_protection_for_non_canonical_addresses_and_bad_selectors() {
    let mut g = Guest::long(|a| {
        a.mov(rax, 0x8000_0000_0000u64).unwrap();
        a.mov(rbx, qword_ptr(rax)).unwrap();
    });
    g.expect(13, Some(0), CODE + 10);

    // Beyond the GDT's limit.
    let mut g = Guest::long(|a| {
        a.mov(eax, 0x1008).unwrap();
        a.mov(ds, eax).unwrap();
    });
    g.expect(13, Some(0x1008), CODE + 5);

    // In the LDT: the table bit is part of the error code.
    let mut g = Guest::long(|a| {
        a.mov(eax, 0x0F).unwrap();
        a.mov(es, eax).unwrap();
    });
    g.expect(13, Some(0x0C), CODE + 5);

    // A jump to a non-canonical address faults at the jump.
    let mut g = Guest::long(|a| {
        a.mov(rax, 0x1234_5678_9abc_def0u64).unwrap();
        a.jmp(rax).unwrap();
    });
    g.expect(13, Some(0), CODE + 10);
}

#[test]
fn page_fault_error_codes() {
    const P: u32 = 1;
    const W: u32 = 2;
    const U: u32 = 4;
    const RSV: u32 = 8;
    const ID: u32 = 16;
    let read = |a: &mut CodeAssembler| a.mov(rax, qword_ptr(DATA)).unwrap();
    let write = |a: &mut CodeAssembler| a.mov(qword_ptr(DATA), rax).unwrap();
    type Code = fn(&mut CodeAssembler);
    let cases: [(bool, Code, u64, u64, u32); 6] = [
        (false, read, 0, pte::P, 0),
        (false, write, 0, pte::P, W),
        (true, read, 0, pte::P, U),
        (true, read, 0, pte::U, P | U),
        (true, write, 0, pte::W, P | W | U),
        (false, read, 1 << 51, 0, P | RSV),
    ];
    for (user, code, set, clear, error) in cases {
        let mut g = if user { Guest::user(code) } else { Guest::long(code) };
        g.memory.change_leaf(DATA, set, clear);
        g.expect(14, Some(error), CODE);
        assert_eq!(g.get::<u64>(save::CR2), DATA);
    }
    // Fetch from a page with NX.
    let mut g = Guest::long(|a| {
        a.mov(rax, DATA + 0x123).unwrap();
        a.jmp(rax).unwrap();
    });
    g.memory.change_leaf(DATA, pte::NX, 0);
    g.expect(14, Some(P | ID), DATA + 0x123);
    assert_eq!(g.get::<u64>(save::CR2), DATA + 0x123);
    // Supervisor writes ignore W without CR0.WP.
    let mut g = Guest::long(|a| {
        a.mov(qword_ptr(DATA), rax).unwrap();
        a.hlt().unwrap();
    });
    g.memory.change_leaf(DATA, 0, pte::W);
    let old: u64 = g.get(save::CR0);
    g.set(save::CR0, old & !(1 << 16));
    g.expect_exit(exitcode::HLT);
}

#[test]
fn alignment_check_at_cpl_3_only() {
    let code = |a: &mut CodeAssembler| a.mov(eax, dword_ptr(DATA + 1)).unwrap();
    let mut g = Guest::user(code);
    g.set(save::CR0, g.get::<u64>(save::CR0) | 1 << 18);
    g.set(save::RFLAGS, 0x4_0002u64);
    g.expect(17, Some(0), CODE);
    let mut g = Guest::long(|a| {
        a.mov(eax, dword_ptr(DATA + 1)).unwrap();
        a.hlt().unwrap();
    });
    g.set(save::CR0, g.get::<u64>(save::CR0) | 1 << 18);
    g.set(save::RFLAGS, 0x4_0002u64);
    g.expect_exit(exitcode::HLT);
}

#[test]
fn x87_images_have_alignments_of_their_own() {
    const AC: u8 = 17;
    const GP: u8 = 13;
    /// What faults at offsets 0, 1, 2, 4, 8 and 16, found on a real processor; 0: nothing.
    type Row = (&'static str, &'static [u8], [u8; 6]);
    let rows: [Row; 8] = [
        ("fld m80", &[0xdb, 0x2f], [0, AC, AC, AC, 0, 0]),
        ("fstp m80", &[0xdb, 0x3f], [0, AC, AC, AC, 0, 0]),
        ("fbld", &[0xdf, 0x27], [0, AC, AC, AC, 0, 0]),
        ("fbstp", &[0xdf, 0x37], [0, AC, AC, AC, 0, 0]),
        ("fnstenv", &[0xd9, 0x37], [0, AC, AC, 0, 0, 0]),
        ("fldenv", &[0xd9, 0x27], [0, AC, AC, 0, 0, 0]),
        ("fnsave", &[0xdd, 0x37], [0, AC, AC, 0, 0, 0]),
        ("fxsave", &[0x0f, 0xae, 0x07], [0, AC, AC, GP, GP, 0]),
    ];
    for (name, code, expected) in rows {
        for (offset, vector) in [0, 1, 2, 4, 8, 16].into_iter().zip(expected) {
            let mut g = Guest::user(|_| {});
            g.memory.write_bytes(CODE, &[0xdb, 0xe3, 0xd9, 0xee]); // fninit; fldz
            g.memory.write_bytes(CODE + 4, code);
            g.memory.write_bytes(CODE + 4 + code.len() as u64, &[0xcd, 0x03]); // int 3
            g.memory.write::<u64>(IDT + 16 * 3, gate(CODE64, HANDLERS + 16 * 3, 0, 0xee));
            g.set(save::CR0, g.get::<u64>(save::CR0) | 1 << 18);
            g.set(save::RFLAGS, 0x4_0002u64);
            g.cpu.rb.gpr[7] = DATA + offset;
            let found = g.run_to_handler();
            assert_eq!(found, if vector == 0 { 3 } else { vector }, "{name} at {offset}");
        }
    }
}

/// What happens at an operand of 16 bytes that is not on 16, found on a processor of AMD's family 19h: MXCSR.MM makes
/// of #GP what alignment checks make of it, but for moves that are aligned by their name.
#[test]
fn misaligned_exception_mask() {
    const AC: u8 = 17;
    const GP: u8 = 13;
    /// Without MM, without and with alignment checks; then the same with MM. 0: nothing.
    type Row = (&'static str, &'static [u8], [u8; 4]);
    const MASKED: [u8; 4] = [GP, GP, 0, AC];
    const ALWAYS: [u8; 4] = [GP; 4];
    const NEVER: [u8; 4] = [0, AC, 0, AC];
    let rows: [Row; 25] = [
        ("addps", &[0x0f, 0x58, 0x07], MASKED),
        ("mulpd", &[0x66, 0x0f, 0x59, 0x07], MASKED),
        ("paddb", &[0x66, 0x0f, 0xfc, 0x07], MASKED),
        ("pshufb", &[0x66, 0x0f, 0x38, 0x00, 0x07], MASKED),
        ("pshufd", &[0x66, 0x0f, 0x70, 0x07, 0x00], MASKED),
        ("aesenc", &[0x66, 0x0f, 0x38, 0xdc, 0x07], MASKED),
        ("pclmulqdq", &[0x66, 0x0f, 0x3a, 0x44, 0x07, 0x00], MASKED),
        ("cvtdq2ps", &[0x0f, 0x5b, 0x07], MASKED),
        ("cvtpd2pi", &[0x66, 0x0f, 0x2d, 0x07], MASKED),
        ("movshdup", &[0xf3, 0x0f, 0x16, 0x07], MASKED),
        ("ptest", &[0x66, 0x0f, 0x38, 0x17, 0x07], MASKED),
        ("dpps", &[0x66, 0x0f, 0x3a, 0x40, 0x07, 0xff], MASKED),
        ("movaps from memory", &[0x0f, 0x28, 0x07], ALWAYS),
        ("movaps to memory", &[0x0f, 0x29, 0x07], ALWAYS),
        ("movdqa from memory", &[0x66, 0x0f, 0x6f, 0x07], ALWAYS),
        ("movdqa to memory", &[0x66, 0x0f, 0x7f, 0x07], ALWAYS),
        ("movntps", &[0x0f, 0x2b, 0x07], ALWAYS),
        ("movntdq", &[0x66, 0x0f, 0xe7, 0x07], ALWAYS),
        ("movntdqa", &[0x66, 0x0f, 0x38, 0x2a, 0x07], ALWAYS),
        ("movups from memory", &[0x0f, 0x10, 0x07], NEVER),
        ("movups to memory", &[0x0f, 0x11, 0x07], NEVER),
        ("movdqu", &[0xf3, 0x0f, 0x6f, 0x07], NEVER),
        ("lddqu", &[0xf2, 0x0f, 0xf0, 0x07], NEVER),
        ("pcmpistri", &[0x66, 0x0f, 0x3a, 0x63, 0x07, 0x00], NEVER),
        ("sha1msg1", &[0x0f, 0x38, 0xc9, 0x07], NEVER),
    ];
    for (name, code, expected) in rows {
        for (n, misaligned) in expected.into_iter().enumerate() {
            // The last one crosses a page.
            for offset in [0, 1, 2, 4, 8, 16, 0xff8] {
                let mut g = Guest::user(|_| {});
                g.memory.write::<u32>(DATA - 16, 0x1f80 | (n as u32 >> 1) << 17);
                g.memory.write_bytes(CODE, &[0x0f, 0xae, 0x57, 0xf0]); // ldmxcsr [rdi - 16]
                g.memory.write_bytes(CODE + 4, &[0x48, 0x89, 0xc7]); // mov rdi, rax
                g.memory.write_bytes(CODE + 7, code);
                g.memory.write_bytes(CODE + 7 + code.len() as u64, &[0xcd, 0x03]); // int 3
                g.memory.write::<u64>(IDT + 16 * 3, gate(CODE64, HANDLERS + 16 * 3, 0, 0xee));
                g.set(save::CR0, g.get::<u64>(save::CR0) | 1 << 18);
                g.set(save::RFLAGS, if n & 1 != 0 { 0x4_0002u64 } else { 2 });
                g.set(save::RAX, DATA + offset);
                g.cpu.rb.gpr[7] = DATA;
                let vector = if offset & 15 == 0 { 0 } else { misaligned };
                assert_eq!(
                    g.run_to_handler(),
                    if vector == 0 { 3 } else { vector },
                    "{name} at {offset}, {n}"
                );
            }
        }
    }
}

#[test]
fn misaligned_operands_are_read_whole() {
    for offset in [1, 8, 0xff1] {
        let mut g = Guest::long(|a| {
            a.ldmxcsr(dword_ptr(DATA - 16)).unwrap();
            a.pxor(xmm0, xmm0).unwrap();
            a.paddb(xmm0, xmmword_ptr(DATA + offset)).unwrap();
            a.hlt().unwrap();
        });
        g.memory.write::<u32>(DATA - 16, 0x2_1f80);
        let value = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100u128;
        g.memory.write_bytes(DATA + offset, &value.to_le_bytes());
        g.expect_exit(exitcode::HLT);
        assert_eq!(g.cpu.rb.mxcsr, 0x2_1f80);
        assert_eq!((g.cpu.xmm(0)[0], g.cpu.xmm(0)[1]), (value as u64, (value >> 64) as u64), "at {offset}");
    }
}

#[test]
fn floating_point_exceptions() {
    let mut g = Guest::long(|a| {
        a.fldcw(word_ptr(DATA)).unwrap();
        a.fld1().unwrap();
        a.fldz().unwrap();
        a.fdivp(st1, st0).unwrap();
        a.wait().unwrap();
    });
    g.memory.write::<u16>(DATA, 0x37b);
    assert_eq!(g.run_to_handler(), 16);

    let mut g = Guest::long(|a| {
        a.ldmxcsr(dword_ptr(DATA)).unwrap();
        a.pxor(xmm0, xmm0).unwrap();
        a.divss(xmm0, xmm0).unwrap();
    });
    g.memory.write::<u32>(DATA, 0x1f00);
    assert_eq!(g.run_to_handler(), 19);
}

#[test]
fn interrupt_from_user_switches_to_rsp0_with_null_ss() {
    let mut g = Guest::user(|a| a.ud2().unwrap());
    g.expect(6, None, CODE);
    assert_eq!(g.rsp(), STACK0 - 40);
    assert_eq!(g.cpl(), 0);
    assert_eq!(g.selector(2), 0, "SS is null at the new privilege level");
    let (_, frame) = g.frame(false);
    assert_eq!(frame[1], USER_CODE64 as u64);
    assert_eq!(frame[4], USER_DATA as u64);
}

#[test]
fn ist_stack_is_used_and_aligned() {
    let mut g = Guest::long(|a| a.ud2().unwrap());
    g.memory.write::<u64>(IDT + 16 * 6, gate(CODE64, HANDLERS + 16 * 6, 1, 0x8e));
    g.memory.write::<u64>(TSS + 36, IST1 - 3);
    g.expect(6, None, CODE);
    assert_eq!(g.rsp(), ((IST1 - 3) & !15) - 40);
    assert_eq!(g.selector(2), DATA0, "SS stays when the privilege level does");
}

#[test]
fn stack_is_aligned_without_ist_too() {
    let mut g = Guest::long(|a| a.ud2().unwrap());
    g.set(save::RSP, STACK - 5);
    g.expect(6, None, CODE);
    assert_eq!(g.rsp(), ((STACK - 5) & !15) - 40);
    assert_eq!(g.frame(false).1[3], STACK - 5);
}

#[test]
fn software_interrupts_check_the_gates_privilege() {
    let mut g = Guest::user(|a| a.int(0x80).unwrap());
    g.expect(13, Some(0x80 * 8 + 2), CODE);
    let mut g = Guest::user(|a| a.int(0x80).unwrap());
    g.memory.write::<u64>(IDT + 16 * 0x80, gate(CODE64, HANDLERS + 16 * 0x80, 0, 0xee));
    g.expect(0x80, None, CODE + 2);
    // INT3 checks it too, INT1 does not.
    let mut g = Guest::user(|a| a.int3().unwrap());
    g.expect(13, Some(3 * 8 + 2), CODE);
    let mut g = Guest::user(|a| a.int1().unwrap());
    g.expect(1, None, CODE + 1);
}

#[test]
fn absent_gates_and_wrong_types() {
    let mut g = Guest::long(|a| a.ud2().unwrap());
    g.memory.write::<u64>(IDT + 16 * 6, gate(CODE64, HANDLERS, 0, 0x0e));
    g.expect(11, Some(6 * 8 + 2 + 1), CODE);
    let mut g = Guest::long(|a| a.int(6).unwrap());
    g.memory.write::<u64>(IDT + 16 * 6, gate(CODE64, HANDLERS, 0, 0x8c));
    g.expect(13, Some(6 * 8 + 2), CODE);
    // 32-bit code is no handler in long mode.
    let mut g = Guest::long(|a| a.int(6).unwrap());
    g.memory.write::<u64>(IDT + 16 * 6, gate(CODE32, HANDLERS, 0, 0x8e));
    g.expect(13, Some(CODE32 as u32), CODE);
}

#[test]
fn interrupt_gates_clear_if_and_trap_gates_do_not() {
    for (access, expected) in [(0x8eu64, 0u64), (0x8f, 1 << 9)] {
        let mut g = Guest::long(|a| a.ud2().unwrap());
        g.memory.write::<u64>(IDT + 16 * 6, gate(CODE64, HANDLERS + 16 * 6, 0, access));
        g.set(save::RFLAGS, 0x4202u64);
        g.expect(6, None, CODE);
        assert_eq!(g.rflags() & (1 << 9 | 1 << 14), expected, "IF as the gate says, NT cleared");
        assert_eq!(g.frame(false).1[2] & 0x4200, 0x4200);
    }
}

#[test]
fn contributory_faults_make_a_double_fault() {
    // #GP whose handler's gate is absent: #NP during #GP.
    let mut g = Guest::long(|a| {
        a.mov(eax, 0x1008).unwrap();
        a.mov(ds, eax).unwrap();
    });
    g.memory.write::<u64>(IDT + 16 * 13, 0);
    g.expect(8, Some(0), CODE + 5);
}

#[test]
fn a_page_fault_in_a_page_faults_delivery_makes_a_double_fault() {
    let mut g = Guest::long(|a| a.mov(rax, qword_ptr(DATA)).unwrap());
    g.memory.change_leaf(DATA, 0, pte::P);
    g.memory.change_leaf(STACK - 1, 0, pte::P);
    g.memory.write::<u64>(IDT + 16 * 8, gate(CODE64, HANDLERS + 16 * 8, 1, 0x8e));
    g.expect(8, Some(0), CODE);
    assert_eq!(g.get::<u64>(save::CR2), STACK - 48, "the second fault's address");
}

#[test]
fn a_page_fault_after_a_benign_exception_is_delivered_by_itself() {
    let mut g = Guest::long(|a| a.ud2().unwrap());
    g.memory.change_leaf(STACK - 1, 0, pte::P);
    g.memory.write::<u64>(IDT + 16 * 14, gate(CODE64, HANDLERS + 16 * 14, 1, 0x8e));
    g.expect(14, Some(2), CODE);
    assert_eq!(g.get::<u64>(save::CR2), STACK - 40);
}

#[test]
fn a_fault_in_a_double_faults_delivery_is_shutdown() {
    let mut g = Guest::long(|a| a.ud2().unwrap());
    g.table(save::IDTR, IDT, 0);
    g.expect_exit(exitcode::SHUTDOWN);
    assert_eq!(g.rip(), CODE);
    assert_eq!(g.rsp(), STACK, "no half-pushed frame");
}

#[test]
fn intercepted_exceptions_leave_before_delivery() {
    let mut g = Guest::long(|a| a.mov(rax, qword_ptr(DATA + 8)).unwrap());
    g.memory.change_leaf(DATA, 0, pte::P);
    g.intercept(exitcode::EXCP0 + 14);
    g.set(save::CR2, 0x1234u64);
    g.expect_exit(exitcode::EXCP0 + 14);
    assert_eq!((g.info1(), g.info2()), (0, DATA + 8));
    assert_eq!(g.get::<u64>(save::CR2), 0x1234, "CR2 is not written");
    assert_eq!(g.rip(), CODE);
    assert_eq!(g.intinfo(), 0);
    let count: u8 = g.get(control::BYTES_FETCHED);
    assert!(count >= 8, "decode assist");
    assert_eq!(g.get::<u8>(control::INSTRUCTION_BYTES), 0x48);
}

#[test]
fn an_intercepted_exception_during_delivery_reports_the_first_event() {
    let mut g = Guest::long(|a| a.ud2().unwrap());
    g.memory.change_leaf(STACK - 1, 0, pte::P);
    g.intercept(exitcode::EXCP0 + 14);
    g.expect_exit(exitcode::EXCP0 + 14);
    assert_eq!(g.intinfo(), 1 << 31 | 3 << 8 | 6);
    assert_eq!(g.info1(), 2);
    assert_eq!(g.info2(), STACK - 40);
}

#[test]
fn intercepted_breakpoints_report_the_instruction_and_the_next_one() {
    let mut g = Guest::long(|a| a.int3().unwrap());
    g.intercept(exitcode::EXCP0 + 3);
    g.expect_exit(exitcode::EXCP0 + 3);
    assert_eq!(g.rip(), CODE);
    assert_eq!(g.get::<u64>(control::NRIP), CODE + 1);
}

#[test]
fn real_mode_vectors() {
    let mut g = Guest::real(|a| {
        a.sti().unwrap();
        a.xor(cx, cx).unwrap();
        a.div(cx).unwrap();
    });
    assert_eq!(g.run_to_handler(), 0);
    assert_eq!(g.rsp(), 0x4000 - 6, "no error code, 16-bit frame");
    assert_eq!(g.memory.read::<u16>(0x1_0000 + g.rsp()), 3);
    assert_eq!(g.memory.read::<u16>(0x1_0000 + g.rsp() + 2), 0x1000);
    assert_eq!(g.memory.read::<u16>(0x1_0000 + g.rsp() + 4) & 0x200, 0x200);
    assert_eq!(g.rflags() & 0x200, 0);
}

#[test]
fn injected_events() {
    // External interrupt, exception with error code, software interrupt with the VMCB's next RIP.
    let cases = [
        (0x8000_0030u64, 0x30u8, None, CODE),
        (0x8000_0b0d | 0x1234 << 32, 13, Some(0x1234), CODE),
        (0x8000_0480, 0x80, None, CODE + 7),
        (0x8000_0202, 2, None, CODE),
    ];
    for (event, vector, error, ip) in cases {
        let mut g = Guest::long(|a| a.hlt().unwrap());
        g.set(control::EVENTINJ, event);
        g.set(control::NRIP, CODE + 7);
        g.expect(vector, error, ip);
        assert_eq!(g.get::<u64>(control::EVENTINJ), 0, "EVENTINJ is cleared");
        assert_eq!(g.cpu.nmi_blocked, vector == 2);
    }
}

#[test]
fn nested_fault_while_an_event_is_injected_reports_it() {
    let mut g = Guest::long(|a| a.hlt().unwrap());
    let leaf = g.memory.nested_leaf(IDT);
    let old = g.memory.get_host(leaf);
    g.memory.put_host(leaf, 0);
    g.set(control::EVENTINJ, 0x8000_0030u64);
    g.expect_exit(exitcode::NPF);
    assert_eq!(g.intinfo(), 0x8000_0030);
    assert_eq!(g.info2(), IDT + 0x30 * 16);
    // KVM maps the page and injects again.
    g.memory.put_host(leaf, old);
    g.set(control::EVENTINJ, g.intinfo());
    g.expect(0x30, None, CODE);
}

#[test]
fn virtual_interrupts_wait_for_if_priority_and_shadow() {
    let code = |a: &mut CodeAssembler| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    };
    // V_IRQ, priority 3, vector 0x31.
    let pending = 1u64 << 8 | 3 << 16 | 0x31 << 32;
    let mut g = Guest::long(code);
    g.set(control::V_INTR, pending);
    g.expect(0x31, None, CODE + 3);
    assert_eq!(g.get::<u64>(control::V_INTR) & 1 << 8, 0);
    // The task priority masks it.
    let mut g = Guest::long(code);
    g.set(control::V_INTR, pending | 3);
    g.expect_exit(exitcode::HLT);
    // The window's intercept.
    let mut g = Guest::long(code);
    g.set(control::V_INTR, pending);
    g.intercept(exitcode::VINTR);
    g.expect_exit(exitcode::VINTR);
    assert_eq!(g.rip(), CODE + 3);
}
