// SPDX-License-Identifier: Apache-2.0
//! Every intercept: exit code, EXITINFO, next RIP, and its place among the exceptions (APM vol. 2, 15.8 to 15.14).

use iced_x86::code_asm::*;
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::vmcb::{control, save};

use crate::common::*;

type Code = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

/// Instructions that exit with information that is fixed: (intercept, code, EXITINFO1).
const SIMPLE: &[(u64, Code, u64)] = &[
    (exit::CR0_READ, |a| a.mov(rbx, cr0), 1 << 63 | 3),
    (exit::CR0_READ, |a| a.smsw(rbx), 0),
    (exit::CR0_READ + 2, |a| a.mov(rcx, cr2), 1 << 63 | 1),
    (exit::CR0_READ + 3, |a| a.mov(r9, cr3), 1 << 63 | 9),
    (exit::CR0_READ + 4, |a| a.mov(rax, cr4), 1 << 63),
    (exit::CR0_READ + 8, |a| a.mov(rax, cr8), 1 << 63),
    (exit::CR0_WRITE, |a| a.mov(cr0, rbx), 1 << 63 | 3),
    (exit::CR0_WRITE, |a| a.clts(), 0),
    (exit::CR0_WRITE, |a| a.lmsw(ebx), 0),
    (exit::CR0_WRITE + 2, |a| a.mov(cr2, rbx), 1 << 63 | 3),
    (exit::CR0_WRITE + 3, |a| a.mov(cr3, r15), 1 << 63 | 15),
    (exit::CR0_WRITE + 4, |a| a.mov(cr4, rbx), 1 << 63 | 3),
    (exit::CR0_WRITE + 8, |a| a.mov(cr8, rbx), 1 << 63 | 3),
    (exit::DR0_READ, |a| a.mov(rsi, dr0), 6),
    (exit::DR0_READ + 7, |a| a.mov(rsi, dr7), 6),
    (exit::DR0_WRITE + 3, |a| a.mov(dr3, rdi), 7),
    (exit::DR0_WRITE + 6, |a| a.mov(dr6, rdi), 7),
    (exit::CR0_SEL_WRITE, |a| a.lmsw(ebx), 0),
    (exit::IDTR_READ, |a| a.sidt(ptr(DATA)), 0),
    (exit::GDTR_READ, |a| a.sgdt(ptr(DATA)), 0),
    (exit::LDTR_READ, |a| a.sldt(ebx), 0),
    (exit::TR_READ, |a| a.str(ebx), 0),
    (exit::IDTR_WRITE, |a| a.lidt(ptr(DATA)), 0),
    (exit::GDTR_WRITE, |a| a.lgdt(ptr(DATA)), 0),
    (exit::LDTR_WRITE, |a| a.lldt(ebx), 0),
    (exit::TR_WRITE, |a| a.ltr(ebx), 0),
    (exit::RDTSC, |a| a.rdtsc(), 0),
    (exit::RDPMC, |a| a.rdpmc(), 0),
    (exit::PUSHF, |a| a.pushfq(), 0),
    (exit::POPF, |a| a.popfq(), 0),
    (exit::CPUID, |a| a.cpuid(), 0),
    (exit::RSM, |a| a.rsm(), 0),
    (exit::IRET, |a| a.iretq(), 0),
    (exit::SWINT, |a| a.int(0x55), 0x55),
    (exit::INVD, |a| a.invd(), 0),
    (exit::PAUSE, |a| a.pause(), 0),
    (exit::HLT, |a| a.hlt(), 0),
    (exit::INVLPG, |a| a.invlpg(byte_ptr(DATA + 5)), DATA + 5),
    (exit::INVLPGA, |a| a.invlpga(), 0),
    (exit::VMRUN, |a| a.vmrun(), 0),
    (exit::VMMCALL, |a| a.vmmcall(), 0),
    (exit::VMLOAD, |a| a.vmload(), 0),
    (exit::VMSAVE, |a| a.vmsave(), 0),
    (exit::STGI, |a| a.stgi(), 0),
    (exit::CLGI, |a| a.clgi(), 0),
    (exit::SKINIT, |a| a.skinit(), 0),
    (exit::RDTSCP, |a| a.rdtscp(), 0),
    (exit::ICEBP, |a| a.int1(), 0),
    (exit::WBINVD, |a| a.wbinvd(), 0),
    (exit::WBINVD, |a| a.wbnoinvd(), 0),
    (exit::MONITOR, |a| a.monitor(), 0),
    (exit::MWAIT, |a| a.mwait(), 0),
    (exit::RDPRU, |a| a.rdpru(), 0),
    (exit::INVPCID, |a| a.invpcid(rbx, xmmword_ptr(DATA)), 0),
    (exit::EXCP0 + 3, |a| a.int3(), 0),
];

#[test]
fn every_instruction_intercept_exits_at_the_instruction_with_the_next_rip() {
    for (code, instruction, info1) in SIMPLE {
        let mut g = Guest::long(|a| {
            instruction(a).unwrap();
            a.nop().unwrap();
        });
        g.intercept(*code);
        g.expect_exit(*code);
        let name = exit::name(*code);
        assert_eq!(g.rip(), CODE, "{name}");
        assert_eq!(g.info1(), *info1, "{name}: EXITINFO1");
        let length = g.get::<u64>(control::NRIP) - CODE;
        let bytes: [u8; 16] = g.memory.read(CODE);
        let i = iced_x86::Decoder::new(64, &bytes, iced_x86::DecoderOptions::AMD).decode();
        assert_eq!(length, i.len() as u64, "{name}: next RIP");
        assert_eq!(g.cpu.engine.instructions(), 0, "{name}: the instruction did not retire");
    }
}

#[test]
fn without_next_rip_saving_the_field_is_zero() {
    let mut g = Guest::long(|a| a.cpuid().unwrap());
    g.intercept(exit::CPUID);
    g.cpu.next_rip_enabled = false;
    g.expect_exit(exit::CPUID);
    assert_eq!(g.get::<u64>(control::NRIP), 0);
}

#[test]
fn privilege_is_checked_before_the_intercept() {
    let gp: &[(u64, Code)] = &[
        (exit::CR0_READ + 3, |a| a.mov(rax, cr3)),
        (exit::CR0_WRITE + 3, |a| a.mov(cr3, rax)),
        (exit::DR0_READ, |a| a.mov(rax, dr0)),
        (exit::HLT, |a| a.hlt()),
        (exit::INVD, |a| a.invd()),
        (exit::WBINVD, |a| a.wbinvd()),
        (exit::INVLPG, |a| a.invlpg(byte_ptr(DATA))),
        (exit::IDTR_WRITE, |a| a.lidt(ptr(DATA))),
        (exit::GDTR_WRITE, |a| a.lgdt(ptr(DATA))),
        (exit::LDTR_WRITE, |a| a.lldt(ebx)),
        (exit::TR_WRITE, |a| a.ltr(ebx)),
        (exit::MSR, |a| a.rdmsr()),
        (exit::MSR, |a| a.wrmsr()),
        (exit::VMRUN, |a| a.vmrun()),
        (exit::VMLOAD, |a| a.vmload()),
        (exit::STGI, |a| a.stgi()),
        (exit::INVPCID, |a| a.invpcid(rbx, xmmword_ptr(DATA))),
        (exit::RDPMC, |a| a.rdpmc()),
    ];
    for (code, instruction) in gp {
        let mut g = Guest::user(|a| instruction(a).unwrap());
        g.intercept(*code);
        g.expect(13, Some(0), CODE);
    }
    // At CPL 3 these two are undefined.
    for instruction in [(|a| a.monitor()) as Code, |a| a.mwait()] {
        let mut g = Guest::user(|a| instruction(a).unwrap());
        g.intercept(exit::MONITOR);
        g.intercept(exit::MWAIT);
        g.expect(6, None, CODE);
    }
    // CR4.TSD, CR4.UMIP.
    let mut g = Guest::user(|a| a.rdtsc().unwrap());
    g.intercept(exit::RDTSC);
    g.set(save::CR4, g.get::<u64>(save::CR4) | 1 << 2);
    g.expect(13, Some(0), CODE);
    for instruction in [
        (|a| a.sgdt(ptr(DATA))) as Code,
        |a| a.sidt(ptr(DATA)),
        |a| a.sldt(ebx),
        |a| a.str(ebx),
        |a| a.smsw(ebx),
    ] {
        let mut g = Guest::user(|a| {
            instruction(a).unwrap();
            a.vmmcall().unwrap();
        });
        g.expect_exit(exit::VMMCALL);
        assert!(g.rip() > CODE && g.rip() < CODE + 16, "allowed without UMIP");
        let mut g = Guest::user(|a| instruction(a).unwrap());
        g.set(save::CR4, g.get::<u64>(save::CR4) | 1 << 11);
        g.expect(13, Some(0), CODE);
    }
}

#[test]
fn the_intercepts_of_int_pushf_popf_iret_and_rsm_come_before_any_exception() {
    let cases: &[(u64, Code)] = &[
        (exit::SWINT, |a| a.int(0x80)),
        (exit::PUSHF, |a| a.pushfq()),
        (exit::POPF, |a| a.popfq()),
        (exit::IRET, |a| a.iretq()),
        (exit::RSM, |a| a.rsm()),
        (exit::VMMCALL, |a| a.vmmcall()),
    ];
    for (code, instruction) in cases {
        let mut g = Guest::user(|a| instruction(a).unwrap());
        g.set(save::RSP, 0x8000_0000_0000u64);
        g.intercept(*code);
        g.expect_exit(*code);
    }
}

#[test]
fn svm_instructions_that_nobody_intercepts_are_undefined() {
    let cases: &[Code] =
        &[|a| a.vmload(), |a| a.vmsave(), |a| a.stgi(), |a| a.clgi(), |a| a.skinit(), |a| a.invlpga()];
    for instruction in cases {
        let mut g = Guest::long(|a| instruction(a).unwrap());
        g.expect(6, None, CODE);
    }
    // VMMCALL too; the handler must be another one then.
    let mut g = Guest::long(|a| a.vmmcall().unwrap());
    g.unintercept(exit::VMMCALL);
    g.memory.write_bytes(HANDLERS + 16 * 6, &[0xf4]);
    g.expect_exit(exit::HLT);
    assert_eq!(g.rip(), HANDLERS + 16 * 6);
}

#[test]
fn selective_cr0_write_exits_when_other_bits_than_ts_and_mp_change() {
    let write = |xor: u64| {
        let mut g = Guest::long(|a| {
            a.mov(rax, cr0).unwrap();
            a.xor(rax, xor as i32).unwrap();
            a.mov(cr0, rax).unwrap();
            a.clts().unwrap();
            a.hlt().unwrap();
        });
        g.intercept(exit::CR0_SEL_WRITE);
        g.run()
    };
    assert_eq!(write(8 | 2), exit::HLT);
    assert_eq!(write(1 << 5), exit::CR0_SEL_WRITE);
    assert_eq!(write(1 << 18), exit::CR0_SEL_WRITE);
}

#[test]
fn cr_write_traps_come_after_the_write() {
    let mut g = Guest::long(|a| {
        a.mov(rax, cr4).unwrap();
        a.or(rax, 4).unwrap();
        a.mov(cr4, rax).unwrap();
        a.nop().unwrap();
    });
    g.intercept(exit::CR0_WRITE_TRAP + 4);
    g.expect_exit(exit::CR0_WRITE_TRAP + 4);
    assert_eq!(g.get::<u64>(save::CR4) & 4, 4);
    assert_eq!(g.info1(), g.get::<u64>(save::CR4));
    assert_eq!(
        g.rip(),
        g.memory.read::<[u8; 16]>(CODE).iter().position(|b| *b == 0x90).unwrap() as u64 + CODE
    );
}

#[test]
fn msr_accesses_follow_the_permission_map() {
    // Not intercepted at all: what the processor doesn't hold is #GP.
    let read = |msr: u32| {
        Guest::long(move |a| {
            a.mov(ecx, msr).unwrap();
            a.rdmsr().unwrap();
            a.hlt().unwrap();
        })
    };
    let write = |msr: u32| {
        Guest::long(move |a| {
            a.mov(ecx, msr).unwrap();
            a.wrmsr().unwrap();
            a.hlt().unwrap();
        })
    };
    let mut g = read(0x1234);
    g.expect(13, Some(0), CODE + 5);
    // In the map: two bits for each MSR, reads first.
    for (msr, at) in [(0x1Bu32, 0usize), (0xC000_0080, 0x800), (0xC001_0015, 0x1000)] {
        let bit = (msr & 0x1fff) as usize * 2;
        for (mut g, n) in [(read(msr), 0), (write(msr), 1)] {
            let byte = g.memory.msrpm + at + (bit + n) / 8;
            g.memory.put_host(byte & !7, 1 << ((byte & 7) * 8 + (bit + n) % 8));
            g.intercept(exit::MSR);
            g.expect_exit(exit::MSR);
            assert_eq!(g.info1(), n as u64);
            assert_eq!(g.rip(), CODE + 5);
            assert_eq!(g.get::<u64>(control::NRIP), CODE + 7);
        }
    }
    let mut g = read(0xC000_0080);
    g.intercept(exit::MSR);
    g.expect_exit(exit::HLT);
    assert_eq!(g.rax(), 0x1d01);
    // Outside the map: always.
    let mut g = read(0x4b56_4d00);
    g.intercept(exit::MSR);
    g.expect_exit(exit::MSR);
}

#[test]
fn port_accesses_follow_the_permission_map() {
    let cases: &[(Code, u64)] = &[
        (|a| a.in_(al, 0x70), 0x0070_0211),
        (|a| a.in_(ax, dx), 0x03f8_0221),
        (|a| a.in_(eax, dx), 0x03f8_0241),
        (|a| a.out(0x70, al), 0x0070_0210),
        (|a| a.out(dx, eax), 0x03f8_0240),
        (|a| a.insb(), 0x03f8_0215),
        (|a| a.rep().outsd(), 0x03f8_0e4c),
        (|a| a.rep().insw(), 0x03f8_022d),
    ];
    for (instruction, info1) in cases {
        let code = |a: &mut CodeAssembler| {
            a.mov(edx, 0x3f8).unwrap();
            a.mov(ecx, 2).unwrap();
            a.mov(esi, DATA as u32).unwrap();
            a.mov(edi, DATA as u32).unwrap();
            instruction(a).unwrap();
            a.hlt().unwrap();
        };
        let mut g = Guest::long(code);
        g.intercept(exit::IOIO);
        g.expect_exit(exit::HLT);
        let mut g = Guest::long(code);
        g.intercept(exit::IOIO);
        for n in 0..0x400 {
            g.memory.put_host(g.memory.iopm + n * 8, u64::MAX);
        }
        g.expect_exit(exit::IOIO);
        // ES is segment 0, DS 3.
        assert_eq!(g.info1(), *info1, "{:#x} for {info1:#x}", g.info1());
        assert_eq!(g.rip(), CODE + 20);
        let next = g.info2();
        assert_eq!(g.memory.read::<u8>(next), 0xf4, "EXITINFO2 is the next RIP");
        g.set(save::RIP, next);
        g.expect_exit(exit::HLT);
    }
}

#[test]
fn a_wide_access_is_intercepted_when_any_of_its_ports_is() {
    let mut g = Guest::long(|a| {
        a.mov(edx, 0x3f8).unwrap();
        a.in_(eax, dx).unwrap();
    });
    g.intercept(exit::IOIO);
    let byte = g.memory.iopm + 0x3fb / 8;
    g.memory.put_host(byte & !7, 1 << ((byte & 7) * 8 + 3));
    g.expect_exit(exit::IOIO);
}

#[test]
fn ports_without_intercept_float_high() {
    let mut g = Guest::long(|a| {
        a.xor(eax, eax).unwrap();
        a.in_(ax, 0x60).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!(g.rax(), 0xffff);
}

#[test]
fn the_task_state_segments_map_guards_ports_at_cpl_3() {
    let code = |a: &mut CodeAssembler| {
        a.in_(al, 0x70).unwrap();
        a.vmmcall().unwrap();
    };
    let mut g = Guest::user(code);
    g.intercept(exit::IOIO);
    g.expect(13, Some(0), CODE);
    let mut g = Guest::user(code);
    g.memory.write::<u8>(TSS + 0x68 + 0x70 / 8, 0xfe);
    g.expect_exit(exit::VMMCALL);
    assert_eq!(g.rip(), CODE + 2);
    // Beyond the segment's limit.
    let mut g = Guest::user(code);
    g.memory.write::<u8>(TSS + 0x68 + 0x70 / 8, 0xfe);
    g.system(save::TR, TSS_SEL, 0x8b, TSS, 0x68 + 0x70 / 8);
    g.expect(13, Some(0), CODE);
    // IOPL 3.
    let mut g = Guest::user(code);
    g.set(save::RFLAGS, 0x3002u64);
    g.expect_exit(exit::VMMCALL);
}

#[test]
fn the_pause_filter_counts() {
    let mut g = Guest::long(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(ebx).unwrap();
        a.pause().unwrap();
        a.jmp(again).unwrap();
    });
    g.intercept(exit::PAUSE);
    g.set(control::PAUSE_COUNT, 10u16);
    g.expect_exit(exit::PAUSE);
    assert_eq!(g.cpu.rb.gpr[3], 11);
}

/// 20 PAUSEs, 103 instructions from one to the next.
fn pauses_apart(a: &mut CodeAssembler) {
    let (mut again, mut wait) = (a.create_label(), a.create_label());
    a.mov(ecx, 20).unwrap();
    a.set_label(&mut again).unwrap();
    a.pause().unwrap();
    a.mov(eax, 49).unwrap();
    a.set_label(&mut wait).unwrap();
    a.dec(eax).unwrap();
    a.jnz(wait).unwrap();
    a.nop().unwrap();
    a.dec(ecx).unwrap();
    a.jnz(again).unwrap();
    a.hlt().unwrap();
}

#[test]
fn pauses_further_apart_than_the_threshold_do_not_add_up() {
    // APM vol. 2, 15.14.4: the counter starts anew if more than that has passed; without a threshold, never.
    for (threshold, left) in [(1, None), (102, None), (103, Some(17)), (0xffff, Some(17)), (0, Some(17))] {
        let mut g = Guest::long(pauses_apart);
        g.intercept(exit::PAUSE);
        g.set(control::PAUSE_COUNT, 3u16);
        g.set(control::PAUSE_THRESHOLD, threshold as u16);
        g.expect_exit(if left.is_some() { exit::PAUSE } else { exit::HLT });
        assert_eq!(g.cpu.rb.gpr[1], left.unwrap_or(0), "{threshold}");
    }
}

#[test]
fn pauses_of_one_block_are_told_apart() {
    for (threshold, code) in [(2u16, exit::HLT), (3, exit::PAUSE)] {
        let mut g = Guest::long(|a| {
            for _ in 0..5 {
                a.pause().unwrap();
                a.nop().unwrap();
                a.inc(ebx).unwrap();
            }
            a.hlt().unwrap();
        });
        g.intercept(exit::PAUSE);
        g.set(control::PAUSE_COUNT, 3u16);
        g.set(control::PAUSE_THRESHOLD, threshold);
        g.expect_exit(code);
        assert_eq!(g.cpu.rb.gpr[3], if code == exit::HLT { 5 } else { 3 });
    }
}

#[test]
fn xsetbv_is_checked_and_intercepted() {
    let code = |a: &mut CodeAssembler| {
        a.xor(ecx, ecx).unwrap();
        a.mov(eax, 3).unwrap();
        a.xor(edx, edx).unwrap();
        a.xsetbv().unwrap();
        a.hlt().unwrap();
    };
    let mut g = Guest::long(code);
    g.expect(6, None, CODE + 9);
    let mut g = Guest::long(code);
    g.set(save::CR4, 0x4_06a0u64);
    g.expect_exit(exit::HLT);
    assert_eq!(g.cpu.rb.xcr0, 3);
    let mut g = Guest::long(code);
    g.set(save::CR4, 0x4_06a0u64);
    g.intercept(exit::XSETBV);
    g.expect_exit(exit::XSETBV);
}

#[test]
fn a_task_switch_leaves_with_its_selector_and_reason() {
    let tss = |g: &Guest| {
        g.memory.write::<u64>(GDT + FREE as u64, system_descriptor(DATA, 0x67, 0x89));
    };
    let mut g = Guest::protected(|a| a.db(&[0x9a, 0, 0, 0, 0, FREE as u8, 0]).unwrap());
    tss(&g);
    g.intercept(exit::TASK_SWITCH);
    g.expect_exit(exit::TASK_SWITCH);
    assert_eq!((g.info1(), g.info2()), (FREE as u64, 0));
    assert_eq!((g.rip(), g.get::<u64>(control::NRIP)), (CODE, CODE + 7));

    let mut g = Guest::protected(|a| a.db(&[0xea, 0, 0, 0, 0, FREE as u8, 0]).unwrap());
    tss(&g);
    g.intercept(exit::TASK_SWITCH);
    g.expect_exit(exit::TASK_SWITCH);
    assert_eq!((g.info1(), g.info2()), (FREE as u64, 1 << 38));

    // IRET with NT: the link is in the running TSS.
    let mut g = Guest::protected(|a| a.iret().unwrap());
    g.memory.write::<u64>(GDT + FREE as u64, system_descriptor(DATA, 0x67, 0x8b));
    g.memory.write::<u16>(TSS, FREE);
    g.set(save::RFLAGS, 0x4002u64);
    g.intercept(exit::TASK_SWITCH);
    g.expect_exit(exit::TASK_SWITCH);
    assert_eq!((g.info1(), g.info2()), (FREE as u64, 1 << 36));

    // A fault through a task gate, with its error code.
    let mut g = Guest::protected(|a| {
        a.mov(eax, 0x1008).unwrap();
        a.mov(ds, eax).unwrap();
    });
    tss(&g);
    g.memory.write::<u64>(IDT + 8 * 13, gate(FREE, 0, 0, 0x85));
    g.intercept(exit::TASK_SWITCH);
    g.expect_exit(exit::TASK_SWITCH);
    assert_eq!((g.info1(), g.info2()), (FREE as u64, 1 << 44 | 1 << 48 | 0x1008));
    assert_eq!(g.intinfo(), 0x1008 << 32 | 1 << 31 | 1 << 11 | 3 << 8 | 13);
    assert_eq!(g.rip(), CODE + 5);
}

#[test]
fn an_invalid_vmcb_is_refused() {
    for (at, v) in
        [(save::EFER, 0xd01u64), (control::ASID, 0), (save::CR0, 1 << 32 | 0x8005_0033), (save::DR7, 1 << 40)]
    {
        let mut g = Guest::long(|a| a.hlt().unwrap());
        g.set(at, v);
        g.expect_exit(exit::INVALID);
    }
}

#[test]
fn what_the_guest_leaves_alone_comes_out_of_the_save_area_as_it_went_in() {
    let mut g = Guest::long(|a| a.hlt().unwrap());
    let registers = [
        save::STAR,
        save::LSTAR,
        save::CSTAR,
        save::SFMASK,
        save::KERNEL_GS_BASE,
        save::SYSENTER_CS,
        save::SYSENTER_ESP,
        save::SYSENTER_EIP,
        save::CR2,
        save::G_PAT,
        save::RAX,
    ];
    for (n, at) in registers.into_iter().enumerate() {
        g.set(at, 0x1234_5678_0000_1000u64 + n as u64);
    }
    g.segment(5, 0x2468, 0x0c93, 0x1357_9bdf, 0x000f_ffff);
    let before: Vec<u8> = (save::ES..save::DEBUGCTL + 8).map(|at| g.get(at)).collect();
    g.expect_exit(exit::HLT);
    let after: Vec<u8> = (save::ES..save::DEBUGCTL + 8).map(|at| g.get(at)).collect();
    assert_eq!(before, after);
}
