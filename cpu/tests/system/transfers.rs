// SPDX-License-Identifier: Apache-2.0
//! Segment loads and limits, far transfers, IRET, system calls, mode switches (APM vol. 2, 4, 6, 8 and 14).

use iced_x86::code_asm::*;
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::vmcb::save;

use crate::common::*;

#[test]
fn loading_a_segment_sets_its_accessed_bit_and_its_cache() {
    let mut g = Guest::protected(|a| {
        a.mov(eax, SMALL as u32).unwrap();
        a.mov(es, eax).unwrap();
        a.mov(ebx, dword_ptr(0xffc).es()).unwrap();
        a.hlt().unwrap();
    });
    let at = GDT + SMALL as u64;
    g.memory.write::<u64>(at, g.memory.read::<u64>(at) & !(1 << 40));
    g.memory.write::<u32>(DATA + 0xffc, 0x5566_7788);
    g.expect_exit(exit::HLT);
    assert_eq!(g.memory.read::<u64>(at) >> 40 & 1, 1);
    assert_eq!(g.cpu.rb.gpr[3], 0x5566_7788);
    assert_eq!(g.get::<u64>(save::ES + 8), DATA);
    assert_eq!(g.get::<u32>(save::ES + 4), 0xfff);
}

#[test]
fn limits_types_and_null_selectors_fault() {
    // Beyond the limit: #GP(0); through SS: #SS(0).
    let mut g = Guest::protected(|a| {
        a.mov(eax, SMALL as u32).unwrap();
        a.mov(es, eax).unwrap();
        a.mov(ebx, dword_ptr(0xffd).es()).unwrap();
    });
    assert_eq!(g.run_to_handler(), 13);
    assert_eq!(g.memory.read::<u32>(g.rsp()), 0);
    let mut g = Guest::protected(|a| {
        a.mov(ebp, -2i32 as u32).unwrap();
        a.mov(ebx, dword_ptr(ebp)).unwrap();
    });
    assert_eq!(g.run_to_handler(), 12);
    // Null.
    let mut g = Guest::protected(|a| {
        a.xor(eax, eax).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(ebx, dword_ptr(DATA as u32)).unwrap();
    });
    assert_eq!(g.run_to_handler(), 13);
    // A write through a read-only (code) segment.
    let mut g = Guest::protected(|a| a.mov(dword_ptr(DATA as u32).cs(), eax).unwrap());
    assert_eq!(g.run_to_handler(), 13);
    // Loading: code that isn't readable, a system descriptor, SS with the wrong privilege.
    let faulty = [(0x00cf_9900_0000_ffffu64, 0), (0x00cf_8200_0000_ffff, 0), (0x00cf_f300_0000_ffff, 2)];
    for (descriptor, n) in faulty {
        let mut g = Guest::protected(|a| {
            a.mov(eax, FREE as u32).unwrap();
            if n == 2 {
                a.mov(ss, eax).unwrap();
            } else {
                a.mov(ds, eax).unwrap();
            }
        });
        g.memory.write::<u64>(GDT + FREE as u64, descriptor);
        assert_eq!(g.run_to_handler(), 13);
        assert_eq!(g.memory.read::<u32>(g.rsp()), FREE as u32);
    }
    // Data at DPL 0 from CPL 3.
    let mut g = Guest::protected_user(|a| {
        a.mov(eax, DATA0 as u32).unwrap();
        a.mov(ds, eax).unwrap();
    });
    assert_eq!(g.run_to_handler(), 13);
}

#[test]
fn expand_down_segments_count_from_the_limit_up() {
    let run = |offset: u32| {
        let mut g = Guest::protected(move |a| {
            a.mov(eax, FREE as u32).unwrap();
            a.mov(es, eax).unwrap();
            a.mov(ebx, dword_ptr(offset).es()).unwrap();
            a.hlt().unwrap();
        });
        // Expand-down, 16-bit, limit 0xfff: valid from 0x1000 to 0xffff.
        g.memory.write::<u64>(GDT + FREE as u64, 0x0000_9710_0000_0fff);
        g.run()
    };
    assert_eq!(run(0x1000), exit::HLT);
    assert_eq!(run(0xfff), exit::VMMCALL);
    assert_eq!(run(0xfffc), exit::HLT);
    assert_eq!(run(0xfffd), exit::VMMCALL);
}

#[test]
fn far_call_and_return_at_the_same_privilege() {
    let mut g = Guest::long(|a| {
        let mut target = a.create_label();
        a.lea(rax, ptr(target)).unwrap();
        a.mov(qword_ptr(DATA), rax).unwrap();
        a.mov(word_ptr(DATA + 4), CODE64 as u32).unwrap();
        a.db(&[0xff, 0x1c, 0x25]).unwrap(); // CALL m16:32
        a.dd(&[DATA as u32]).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut target).unwrap();
        a.mov(ebx, 77).unwrap();
        a.db(&[0xcb]).unwrap(); // RET with 32-bit operands, as the CALL
    });
    g.expect_exit(exit::HLT);
    assert_eq!(g.cpu.rb.gpr[3], 77);
    assert_eq!(g.rsp(), STACK);
}

#[test]
fn call_gate_to_an_inner_level_copies_parameters() {
    let mut g = Guest::protected_user(|a| {
        a.push(0x1111).unwrap();
        a.push(0x2222).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0, FREE as u8 | 3, 0]).unwrap();
    });
    // A 32-bit gate at DPL 3 with two parameters.
    let entry = HANDLERS + 16 * 200;
    g.memory.write::<u64>(GDT + FREE as u64, gate(CODE32, entry, 2, 0xec));
    assert_eq!(g.run_to_handler(), 200);
    assert_eq!(g.cpl(), 0);
    let top = g.rsp();
    assert_eq!(top, STACK0 - 24);
    let words: [u32; 6] = core::array::from_fn(|n| g.memory.read::<u32>(top + 4 * n as u64));
    let top = (STACK - 8) as u32;
    assert_eq!(words[1..], [USER_CODE32 as u32, 0x2222, 0x1111, top, USER_DATA as u32]);
    // RETF 8 from there pops both stacks.
    let mut g2 = g;
    g2.memory.write_bytes(entry + 3, &[0xca, 8, 0]);
    g2.set(save::RIP, entry + 3);
    let back = words[0] as u64;
    g2.memory.write_bytes(back, &[0x0f, 0x01, 0xd9]);
    g2.expect_exit(exit::VMMCALL);
    assert_eq!((g2.rip(), g2.cpl(), g2.rsp()), (back, 3, STACK));
    assert_eq!(g2.selector(2), USER_DATA);
}

#[test]
fn call_gate_in_long_mode_pushes_eight_bytes_each() {
    let mut g = Guest::user(|a| {
        a.mov(dword_ptr(DATA + 4), (FREE | 3) as u32).unwrap();
        a.db(&[0xff, 0x1c, 0x25]).unwrap();
        a.dd(&[DATA as u32]).unwrap();
    });
    let entry = HANDLERS + 16 * 201;
    g.memory.write::<u64>(GDT + FREE as u64, gate(CODE64, entry, 0, 0xec));
    g.memory.write::<u64>(GDT + FREE as u64 + 8, 0);
    assert_eq!(g.run_to_handler(), 201);
    let top = g.rsp();
    assert_eq!(top, STACK0 - 32);
    assert_eq!(g.memory.read::<u64>(top + 8), USER_CODE64 as u64);
    assert_eq!(g.memory.read::<u64>(top + 16), STACK);
    assert_eq!(g.memory.read::<u64>(top + 24), USER_DATA as u64);
    assert_eq!(g.selector(2), 0);
}

#[test]
fn far_jumps_check_privilege_presence_and_limit() {
    let run = |selector: u16, descriptor: u64| {
        let mut g = Guest::protected(move |a| {
            a.db(&[0xea, 0, 0x10, 0, 0, selector as u8, (selector >> 8) as u8]).unwrap();
        });
        g.memory.write::<u64>(GDT + FREE as u64, descriptor);
        let vector = g.run_to_handler();
        (vector, g.memory.read::<u32>(g.rsp()))
    };
    let free = FREE as u32;
    assert_eq!(run(FREE, 0x00cf_9300_0000_ffff), (13, free), "data");
    assert_eq!(run(FREE, 0x00cf_fb00_0000_ffff), (13, free), "DPL 3 from CPL 0");
    assert_eq!(run(FREE, 0x00cf_1b00_0000_ffff), (11, free), "not present");
    assert_eq!(run(FREE, 0x0040_9b00_0000_0fff), (13, 0), "beyond the limit");
    assert_eq!(run(0, 0), (13, 0), "null");
}

#[test]
fn iretq_to_user_nulls_what_it_must_not_keep() {
    let mut g = Guest::long(|a| {
        a.push(USER_DATA as i32).unwrap();
        a.push(STACK as i32 - 64).unwrap();
        a.push(0x202).unwrap();
        a.push(USER_CODE64 as i32).unwrap();
        a.push(DATA as i32).unwrap();
        a.iretq().unwrap();
    });
    g.memory.write_bytes(DATA, &[0x0f, 0x01, 0xd9]);
    g.segment(4, 0, 0, 0x1234_5000, 0); // FS null, with a base by MSR
    g.expect_exit(exit::VMMCALL);
    assert_eq!((g.rip(), g.cpl(), g.rsp()), (DATA, 3, STACK - 64));
    assert_eq!(g.rflags() & 0x200, 0x200);
    assert_eq!((g.selector(3), g.selector(0)), (0, 0), "DS and ES of DPL 0 are nulled");
    assert_eq!(g.get::<u64>(save::ES + 16 * 4 + 8), 0x1234_5000, "a null FS keeps its base");
}

#[test]
fn iret_faults() {
    // NT in long mode.
    let mut g = Guest::long(|a| a.iretq().unwrap());
    g.set(save::RFLAGS, 0x4002u64);
    g.expect(13, Some(0), CODE);
    // To a data segment.
    let mut g = Guest::long(|a| {
        for v in [DATA0 as i32, STACK as i32, 2, DATA0 as i32, DATA as i32] {
            a.push(v).unwrap();
        }
        a.iretq().unwrap();
    });
    assert_eq!(g.run_to_handler(), 13);
    assert_eq!(g.frame(true).0, Some(DATA0 as u64));
    // To a non-canonical address: at the IRET.
    let mut g = Guest::long(|a| {
        a.mov(rax, 0x8000_0000_0000u64).unwrap();
        for v in [DATA0 as i32, STACK as i32, 2, CODE64 as i32] {
            a.push(v).unwrap();
        }
        a.push(rax).unwrap();
        a.iretq().unwrap();
    });
    assert_eq!(g.run_to_handler(), 13);
    assert_eq!(g.frame(true).0, Some(0));
    assert_eq!(g.frame(true).1[1], CODE64 as u64);
}

#[test]
fn iret_unblocks_nmis() {
    let mut g = Guest::long(|a| {
        for v in [DATA0 as i32, STACK as i32, 2, CODE64 as i32, DATA as i32] {
            a.push(v).unwrap();
        }
        a.iretq().unwrap();
    });
    g.memory.write_bytes(DATA, &[0xf4]);
    g.cpu.nmi_blocked = true;
    g.expect_exit(exit::HLT);
    assert!(!g.cpu.nmi_blocked);
}

fn set_syscall(g: &mut Guest, target: u64) {
    g.set(save::STAR, ((USER_CODE32 as u64 & !3) << 48) | (CODE64 as u64) << 32);
    g.set(save::LSTAR, target);
    g.set(save::CSTAR, target + 16);
    g.set(save::SFMASK, 0x4_7700u64);
}

#[test]
fn syscall_and_sysret() {
    let mut g = Guest::user(|a| {
        a.stc().unwrap();
        a.syscall().unwrap();
        a.vmmcall().unwrap();
    });
    set_syscall(&mut g, HANDLERS + 16 * 220);
    g.set(save::RFLAGS, 0x202u64);
    assert_eq!(g.run_to_handler(), 220);
    assert_eq!((g.cpl(), g.selector(1), g.selector(2)), (0, CODE64, DATA0));
    assert_eq!(g.cpu.rb.gpr[1], CODE + 3, "RCX");
    assert_eq!(g.cpu.rb.gpr[11], 0x203, "R11");
    assert_eq!(g.rflags() & 0x200, 0, "SFMASK");
    assert_eq!(g.rsp(), STACK);
    // Back again.
    let at = g.rip();
    g.memory.write_bytes(at, &[0x48, 0x0f, 0x07]);
    g.expect_exit(exit::VMMCALL);
    assert_eq!((g.rip(), g.cpl()), (CODE + 3, 3));
    assert_eq!((g.selector(1), g.selector(2)), (USER_CODE64, USER_DATA));
    assert_eq!(g.rflags(), 0x203);
    // Without EFER.SCE.
    let mut g = Guest::user(|a| a.syscall().unwrap());
    g.set(save::EFER, 0x1d00u64);
    g.expect(6, None, CODE);
}

#[test]
fn syscall_from_compatibility_mode_uses_cstar() {
    let mut g = Guest::user(|_| {});
    g.memory.write_bytes(CODE, &[0x0f, 0x05]);
    g.segment(1, USER_CODE32, 0xcfb, 0, u32::MAX);
    set_syscall(&mut g, HANDLERS + 16 * 220);
    assert_eq!(g.run_to_handler(), 221);
    assert_eq!(g.cpu.rb.gpr[1], CODE + 2);
}

#[test]
fn sysenter_is_undefined_in_long_mode_and_works_in_legacy_mode() {
    let mut g = Guest::user(|a| a.sysenter().unwrap());
    g.expect(6, None, CODE);
    let mut g = Guest::protected_user(|a| a.sysenter().unwrap());
    g.set(save::SYSENTER_CS, CODE32 as u64);
    g.set(save::SYSENTER_EIP, HANDLERS + 16 * 222);
    g.set(save::SYSENTER_ESP, STACK0);
    assert_eq!(g.run_to_handler(), 222);
    assert_eq!((g.cpl(), g.selector(1), g.selector(2), g.rsp()), (0, CODE32, CODE32 + 8, STACK0));
    let mut g = Guest::protected_user(|a| a.sysenter().unwrap());
    assert_eq!(g.run_to_handler(), 13);
}

#[test]
fn swapgs_and_the_base_instructions() {
    let mut g = Guest::long(|a| {
        a.swapgs().unwrap();
        a.rdgsbase(rax).unwrap();
        a.mov(rbx, 0x1_0000_0000u64).unwrap();
        a.wrfsbase(rbx).unwrap();
        a.rdfsbase(rcx).unwrap();
        a.mov(rbx, 0x8000_0000_0000u64).unwrap();
        a.wrgsbase(rbx).unwrap();
    });
    g.set(save::CR4, 0x1_06a0u64);
    g.set(save::KERNEL_GS_BASE, 0x7777_0000u64);
    g.segment(5, 0, 0, 0x1111_0000, 0);
    assert_eq!(g.run_to_handler(), 13);
    assert_eq!((g.rax(), g.cpu.rb.gpr[1]), (0x7777_0000, 0x1_0000_0000));
    assert_eq!(g.get::<u64>(save::KERNEL_GS_BASE), 0x1111_0000);
    let mut g = Guest::long(|a| a.rdfsbase(rax).unwrap());
    g.expect(6, None, CODE);
    let mut g = Guest::user(|a| a.swapgs().unwrap());
    g.expect(13, Some(0), CODE);
}

#[test]
fn ltr_marks_the_segment_busy_and_lldt_takes_null() {
    let mut g = Guest::long(|a| {
        a.mov(eax, TSS_SEL as u32).unwrap();
        a.ltr(eax).unwrap();
        a.xor(eax, eax).unwrap();
        a.lldt(eax).unwrap();
        a.mov(eax, TSS_SEL as u32).unwrap();
        a.ltr(eax).unwrap();
    });
    assert_eq!(g.run_to_handler(), 13, "a busy TSS is refused");
    assert_eq!(g.frame(true).0, Some(TSS_SEL as u64));
    assert_eq!(g.memory.read::<u8>(GDT + TSS_SEL as u64 + 5), 0x8b);
    assert_eq!(g.get::<u16>(save::LDTR + 2) & 0x80, 0);
}

#[test]
fn lar_lsl_verr_verw_report_in_zf() {
    let zf = |g: &Guest| g.rflags() >> 6 & 1;
    for (selector, expected) in [(DATA0, 1), (0, 0), (0x1ff0, 0), (TSS_SEL, 1), (CODE64, 1)] {
        let mut g = Guest::long(move |a| {
            a.mov(ecx, selector as u32).unwrap();
            a.lsl(eax, ecx).unwrap();
            a.hlt().unwrap();
        });
        g.expect_exit(exit::HLT);
        assert_eq!(zf(&g), expected, "LSL {selector:#x}");
    }
    let mut g = Guest::long(|a| {
        a.mov(ecx, USER_DATA as u32).unwrap();
        a.lar(eax, ecx).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!(g.rax(), 0x00cf_f300);
    for (selector, read, write) in [(DATA0, 1, 1), (CODE64, 1, 0), (0, 0, 0), (LDT_SEL, 0, 0)] {
        for verw in [false, true] {
            let mut g = Guest::long(move |a| {
                a.mov(ecx, selector as u32).unwrap();
                if verw {
                    a.verw(ecx).unwrap();
                } else {
                    a.verr(ecx).unwrap();
                }
                a.hlt().unwrap();
            });
            g.expect_exit(exit::HLT);
            assert_eq!(zf(&g), if verw { write } else { read }, "{selector:#x}");
        }
    }
    let mut g = Guest::protected(|a| {
        a.mov(eax, 0x20).unwrap();
        a.mov(ebx, 0x33).unwrap();
        a.arpl(ax, bx).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!((g.rax(), zf(&g)), (0x23, 1));
}

#[test]
fn from_real_mode_to_long_mode() {
    // The usual path: PE, a 32-bit segment, PAE and LME, paging, a 64-bit segment.
    let mut g = Guest::real(|a| {
        a.mov(eax, cr0).unwrap();
        a.or(al, 1).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0x66, 0xea]).unwrap();
        a.dd(&[CODE as u32]).unwrap();
        a.dw(&[CODE32]).unwrap();
    });
    g.table(save::GDTR, GDT, 0xfff);
    g.assemble(32, CODE, |a| {
        a.mov(eax, DATA0 as u32).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(ss, eax).unwrap();
        a.mov(eax, 0x20).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, PML4 as u32).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(ecx, 0xC000_0080u32).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, 0x100).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, cr0).unwrap();
        a.bts(eax, 31).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0xea]).unwrap();
        a.dd(&[DATA as u32]).unwrap();
        a.dw(&[CODE64]).unwrap();
    });
    g.assemble(64, DATA, |a| {
        a.mov(rbx, 0x1234_5678_9abcu64).unwrap();
        a.hlt().unwrap();
    });
    // The first pages hold the real-mode vectors; the tables are untouched.
    g.expect_exit(exit::HLT);
    assert_eq!(g.cpu.rb.gpr[3], 0x1234_5678_9abc);
    assert_eq!(g.get::<u64>(save::EFER), 0x1500, "LMA is set by paging");
}

#[test]
fn control_register_checks() {
    type Code = fn(&mut CodeAssembler);
    let bad: &[(&str, Code)] = &[
        ("PG without PE", |a| a.mov(eax, 0x8000_0010u32).unwrap()),
        ("NW without CD", |a| a.mov(eax, 0xa005_0033u32).unwrap()),
        ("upper half", |a| a.mov(rax, 0x1_8005_0033u64).unwrap()),
        ("leaving paging in 64-bit mode", |a| a.mov(eax, 0x0005_0033).unwrap()),
    ];
    for (name, value) in bad {
        let mut g = Guest::long(|a| {
            value(a);
            a.mov(cr0, rax).unwrap();
        });
        assert_eq!(g.run_to_handler(), 13, "CR0: {name}");
        assert_eq!(g.get::<u64>(save::CR0), 0x8005_0033);
    }
    for (name, value) in
        [("reserved", 0x8000_06a0u64), ("PAE in long mode", 0x680), ("upper half", 1 << 32 | 0x6a0)]
    {
        let mut g = Guest::long(|a| {
            a.mov(rax, value).unwrap();
            a.mov(cr4, rax).unwrap();
        });
        assert_eq!(g.run_to_handler(), 13, "CR4: {name}");
    }
    // PCIDE with PCID bits in CR3.
    let mut g = Guest::long(|a| {
        a.mov(rax, 0x2_06a0u64).unwrap();
        a.mov(cr4, rax).unwrap();
    });
    g.set(save::CR3, PML4 | 8);
    assert_eq!(g.run_to_handler(), 13);
    // CR3 beyond the physical address width, bit 63 without PCIDE.
    for value in [1u64 << 50, 1 << 63 | PML4] {
        let mut g = Guest::long(|a| {
            a.mov(rax, value).unwrap();
            a.mov(cr3, rax).unwrap();
        });
        assert_eq!(g.run_to_handler(), 13);
    }
    // CR8 above 15; CR1 is undefined.
    let mut g = Guest::long(|a| {
        a.mov(eax, 16).unwrap();
        a.mov(cr8, rax).unwrap();
    });
    assert_eq!(g.run_to_handler(), 13);
    let mut g = Guest::long(|a| a.db(&[0x0f, 0x20, 0xc8]).unwrap());
    g.expect(6, None, CODE);
    // EFER: reserved bits, LME under paging.
    for value in [0x1_1d01u64, 0x1c01] {
        let mut g = Guest::long(|a| {
            a.mov(ecx, 0xC000_0080u32).unwrap();
            a.mov(eax, value as u32).unwrap();
            a.xor(edx, edx).unwrap();
            a.wrmsr().unwrap();
        });
        assert_eq!(g.run_to_handler(), 13);
    }
    // Non-canonical bases, an impossible PAT.
    for (msr, low, high) in [(0xC000_0101u32, 0, 0x8000u32), (0xC000_0082, 0, 0x8000), (0x277, 2, 0)] {
        let mut g = Guest::long(move |a| {
            a.mov(ecx, msr).unwrap();
            a.mov(eax, low).unwrap();
            a.mov(edx, high).unwrap();
            a.wrmsr().unwrap();
        });
        assert_eq!(g.run_to_handler(), 13);
    }
}

#[test]
fn virtual_8086_mode() {
    // INT n with IOPL < 3 and no VME: #GP(0) at CPL 0 with the big frame.
    let mut g = Guest::v86(0, |a| a.int(0x21).unwrap());
    assert_eq!(g.run_to_handler(), 13);
    assert_eq!(g.cpl(), 0);
    let top = g.rsp();
    assert_eq!(top, STACK0 - 40);
    let words: [u32; 10] = core::array::from_fn(|n| g.memory.read::<u32>(top + 4 * n as u64));
    assert_eq!(words[0], 0);
    assert_eq!(words[1..3], [0, 0x1000]);
    assert_eq!(words[3] & 0x2_0000, 0x2_0000, "VM in the image");
    assert_eq!(words[4..], [0x4000, 0x1000, 0x1000, 0x1000, 0x1000, 0x1000]);
    assert_eq!(g.selector(3), 0, "data segments are nulled");
    // IRET from there goes back.
    let at = g.rip();
    g.memory.write_bytes(at, &[0x83, 0xc4, 4, 0xcf]);
    g.memory.write_bytes(0x1_0000, &[0x0f, 0x01, 0xd9]);
    g.expect_exit(exit::VMMCALL);
    assert_eq!((g.rip(), g.cpl(), g.rsp(), g.selector(0)), (0, 3, 0x4000, 0x1000));
    assert_eq!(g.rflags() & 0x2_0000, 0x2_0000);

    // CLI, POPF: #GP(0) with IOPL < 3, allowed with IOPL 3.
    let mut g = Guest::v86(0, |a| a.cli().unwrap());
    assert_eq!(g.run_to_handler(), 13);
    let mut g = Guest::v86(3, |a| {
        a.cli().unwrap();
        a.vmmcall().unwrap();
    });
    g.expect_exit(exit::VMMCALL);
    assert_eq!(g.rip(), 1);

    // VME: CLI works on VIF, INT n goes through the vector table when its redirection bit is clear.
    let mut g = Guest::v86(0, |a| {
        a.sti().unwrap();
        a.int(0x21).unwrap();
    });
    g.set(save::CR4, 1u64);
    g.memory.write::<u16>(TSS + 0x66, 0x88);
    g.memory.write_bytes(TSS + 0x68, &[0; 32]);
    g.memory.write::<u16>(4 * 0x21, 0x21 * 16);
    g.memory.write::<u16>(4 * 0x21 + 2, (HANDLERS >> 4) as u16);
    assert_eq!(g.run_to_handler(), 0x21);
    assert_eq!((g.cpl(), g.rsp()), (3, 0x4000 - 6));
    let image: u16 = g.memory.read(0x1_0000 + 0x4000 - 2);
    assert_eq!(image & 0x3200, 0x3200, "IOPL 3 and IF = VIF in the image");
    assert_eq!(g.rflags() & 0x8_0000, 0, "VIF cleared");
}

#[test]
fn a_hardware_task_switch() {
    let mut g = Guest::protected(|a| {
        a.mov(ebx, 0x1234).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0, FREE as u8, 0]).unwrap();
        a.hlt().unwrap();
    });
    g.memory.write::<u64>(GDT + FREE as u64, system_descriptor(DATA, 0x67, 0x89));
    let put = |at: u64, v: u32| g.memory.write::<u32>(DATA + at, v);
    put(0x20, (HANDLERS + 16 * 230) as u32);
    put(0x24, 2);
    put(0x28, 99);
    put(0x38, IST1 as u32);
    for (at, selector) in [(0x48, DATA0), (0x4c, CODE32), (0x50, DATA0), (0x54, DATA0), (0x58, 0), (0x5c, 0)]
    {
        put(at, selector as u32);
    }
    g.memory.write::<u16>(TSS + 0x60, 0);
    assert_eq!(g.run_to_handler(), 230);
    assert_eq!((g.rax(), g.rsp()), (99, IST1));
    assert_eq!(g.rflags() & 0x4000, 0x4000, "NT");
    assert_eq!(g.memory.read::<u16>(DATA), TSS_SEL, "back link");
    assert_eq!(g.memory.read::<u32>(TSS + 0x20) as u64, CODE + 12, "the old task's EIP");
    assert_eq!(g.memory.read::<u32>(TSS + 0x34), 0x1234);
    assert_eq!(g.memory.read::<u8>(GDT + FREE as u64 + 5), 0x8b);
    assert_eq!(g.get::<u64>(save::CR0) & 8, 8, "TS");
    // IRET with NT returns.
    let at = g.rip();
    g.memory.write_bytes(at, &[0xcf]);
    g.memory.write::<u8>(GDT + TSS_SEL as u64 + 5, 0x8b);
    g.expect_exit(exit::HLT);
    assert_eq!(g.cpu.rb.gpr[3], 0x1234);
    assert_eq!(g.memory.read::<u8>(GDT + FREE as u64 + 5), 0x89);
}
