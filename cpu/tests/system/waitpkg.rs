// SPDX-License-Identifier: Apache-2.0
//! UMONITOR, UMWAIT and TPAUSE as the SDM (vol. 2) has them: waits, what ends them, flags, operands, faults.
//!
//! Nothing here depends on how fast anything is: waits either have no end but the one that the test brings about, or
//! their end has come before they begin.

use iced_x86::code_asm::*;
use softcpu::clock;
use softcpu::x86::state::vector;
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::system::waitpkg::CONTROL_C02_DISABLED;
use softcpu::x86::vmcb::{control, save};

use crate::common::*;
use crate::threads::pair;

/// CF PF AF ZF SF OF.
const ARITHMETIC: u64 = 0x8d5;
const CF: u64 = 1;
/// TPAUSE, UMWAIT and UMONITOR of EAX, ECX and so on are these and the register's number.
const TPAUSE: [u8; 3] = [0x66, 0x0f, 0xae];
const UMWAIT: [u8; 3] = [0xf2, 0x0f, 0xae];
const UMONITOR: [u8; 3] = [0xf3, 0x0f, 0xae];
/// EBX and ECX.
const RM: u8 = 0xf0;
const EBX: u8 = RM + 3;
const ECX: u8 = RM + 1;

fn put(a: &mut CodeAssembler, opcode: [u8; 3], register: u8) {
    a.db(&[opcode[0], opcode[1], opcode[2], register]).unwrap();
}

/// TPAUSE or UMWAIT of ECX until EDX:EAX.
fn wait_until(a: &mut CodeAssembler, opcode: [u8; 3], deadline: u64) {
    a.mov(eax, deadline as u32).unwrap();
    a.mov(edx, (deadline >> 32) as u32).unwrap();
    put(a, opcode, ECX);
}

fn with_waitpkg(mut g: Guest) -> Guest {
    g.cpu.waitpkg = true;
    g
}

#[test]
fn the_instructions_are_undefined_unless_the_hypervisor_turns_them_on() {
    for (opcode, register) in [(TPAUSE, ECX), (UMWAIT, ECX), (UMONITOR, EBX)] {
        Guest::long(|a| put(a, opcode, register)).expect(vector::UD, None, CODE);
        let mut g = with_waitpkg(Guest::long(|a| {
            put(a, opcode, register);
            a.hlt().unwrap();
        }));
        g.expect_exit(exit::HLT);
    }
}

#[test]
fn a_wait_until_a_time_that_has_come_ends_at_once_with_all_flags_clear() {
    for opcode in [TPAUSE, UMWAIT] {
        for state in [0, 1] {
            for deadline in [0, clock::tsc()] {
                let mut g = with_waitpkg(Guest::long(|a| {
                    a.lea(rbx, qword_ptr(DATA)).unwrap();
                    put(a, UMONITOR, EBX);
                    a.mov(ecx, state).unwrap();
                    wait_until(a, opcode, deadline);
                    a.hlt().unwrap();
                }));
                g.set(save::RFLAGS, 2 | ARITHMETIC);
                g.expect_exit(exit::HLT);
                assert_eq!(g.rflags() & ARITHMETIC, 0);
            }
        }
    }
}

#[test]
fn tpause_ends_when_the_counter_reaches_edx_eax_and_not_sooner() {
    for (state, ratio) in [(0, 1u64 << 32), (1, 1 << 32), (0, 1 << 31), (1, 5 << 31)] {
        let mut g = with_waitpkg(Guest::long(|a| {
            a.rdtsc().unwrap();
            a.shl(rdx, 32).unwrap();
            a.or(rax, rdx).unwrap();
            a.add(rax, 3_000_000).unwrap();
            a.mov(r8, rax).unwrap();
            a.mov(rdx, rax).unwrap();
            a.shr(rdx, 32).unwrap();
            put(a, TPAUSE, ECX);
            a.rdtsc().unwrap();
            a.hlt().unwrap();
        }));
        g.cpu.tsc_ratio = ratio;
        g.cpu.rb.gpr[1] = state;
        g.expect_exit(exit::HLT);
        let now = g.cpu.rb.gpr[2] << 32 | g.rax();
        assert!(now >= g.cpu.rb.gpr[8], "{now} before {}", g.cpu.rb.gpr[8]);
        assert_eq!(g.rflags() & ARITHMETIC, 0);
    }
}

#[test]
fn the_operating_systems_limit_ends_a_wait_with_carry() {
    // Bits 31:2 are the limit; C0.2 not being allowed makes no other difference.
    for control in [40, 400_000, 4 | CONTROL_C02_DISABLED] {
        for opcode in [TPAUSE, UMWAIT] {
            let mut g = with_waitpkg(Guest::long(|a| {
                a.lea(rbx, qword_ptr(DATA)).unwrap();
                put(a, UMONITOR, EBX);
                wait_until(a, opcode, u64::MAX);
                a.hlt().unwrap();
            }));
            g.cpu.rb.umwait_control = control;
            g.set(save::RFLAGS, 2u64 | ARITHMETIC & !CF);
            g.expect_exit(exit::HLT);
            assert_eq!(g.rflags() & ARITHMETIC, CF, "{control:#x}");
        }
    }
    // Its own deadline comes first: no carry.
    let mut g = with_waitpkg(Guest::long(|a| {
        wait_until(a, TPAUSE, 0);
        a.hlt().unwrap();
    }));
    g.cpu.rb.umwait_control = !3;
    g.set(save::RFLAGS, 2 | ARITHMETIC);
    g.expect_exit(exit::HLT);
    assert_eq!(g.rflags() & ARITHMETIC, 0);
}

#[test]
fn umwait_without_a_monitor_does_not_wait() {
    let mut g = with_waitpkg(Guest::long(|a| {
        wait_until(a, UMWAIT, u64::MAX);
        a.lea(rbx, qword_ptr(DATA)).unwrap();
        put(a, UMONITOR, EBX);
        // A store of the same processor counts, in the same line, of what is there already.
        a.mov(byte_ptr(DATA + 63), 0).unwrap();
        wait_until(a, UMWAIT, u64::MAX);
        // And each UMWAIT takes its monitor with it.
        wait_until(a, UMWAIT, u64::MAX);
        a.hlt().unwrap();
    }));
    g.expect_exit(exit::HLT);
    assert_eq!(g.rflags() & ARITHMETIC, 0);
}

#[test]
fn a_store_of_another_processor_ends_a_wait_whatever_it_stores() {
    // Into the first, a middle and the last byte of the line; what is there, and something else; plain, locked, by a
    // string instruction, by a vector, in two lines.
    let stores: [fn(&mut CodeAssembler); 6] = [
        |a| a.mov(byte_ptr(DATA), 0).unwrap(),
        |a| a.mov(dword_ptr(DATA + 32), 1).unwrap(),
        |a| a.lock().or(byte_ptr(DATA + 63), 0).unwrap(),
        |a| {
            a.mov(edi, DATA as u32 - 1).unwrap();
            a.mov(ecx, 2).unwrap();
            a.rep().stosb().unwrap();
        },
        |a| a.movups(xmmword_ptr(DATA - 15), xmm0).unwrap(),
        |a| a.lock().inc(word_ptr(DATA + 63)).unwrap(),
    ];
    for store in stores {
        let ready = DATA + 0x1000;
        let [waiter, mut other] = pair(
            |a| {
                a.mov(rbx, DATA).unwrap();
                put(a, UMONITOR, EBX);
                a.mov(byte_ptr(ready), 1).unwrap();
                wait_until(a, UMWAIT, u64::MAX);
                // What the wait was for, if something else has ended it: not a store alone.
                a.hlt().unwrap();
            },
            |a| {
                let mut spin = a.create_label();
                a.set_label(&mut spin).unwrap();
                a.cmp(byte_ptr(ready), 1).unwrap();
                a.jne(spin).unwrap();
                store(a);
                a.hlt().unwrap();
            },
        );
        let mut waiter = with_waitpkg(waiter);
        std::thread::scope(|s| {
            let waits = s.spawn(move || {
                waiter.expect_exit(exit::HLT);
                assert_eq!(waiter.rflags() & ARITHMETIC, 0);
            });
            other.expect_exit(exit::HLT);
            waits.join().unwrap();
        });
    }
}

#[test]
fn no_store_is_lost_between_the_look_and_the_wait() {
    // Two processors hand a number back and forth, each waits for the other's store and for nothing else.
    const ROUNDS: u32 = 300;
    let player = |mine: u32| {
        move |a: &mut CodeAssembler| {
            let (mut again, mut look, mut turn) = (a.create_label(), a.create_label(), a.create_label());
            a.mov(rbx, DATA).unwrap();
            a.xor(ecx, ecx).unwrap();
            a.set_label(&mut again).unwrap();
            a.mov(esi, dword_ptr(DATA)).unwrap();
            a.cmp(esi, ROUNDS as i32).unwrap();
            let mut done = a.create_label();
            a.jae(done).unwrap();
            a.set_label(&mut look).unwrap();
            put(a, UMONITOR, EBX);
            a.mov(esi, dword_ptr(DATA)).unwrap();
            a.mov(edi, esi).unwrap();
            a.and(edi, 1).unwrap();
            a.cmp(edi, mine as i32).unwrap();
            a.je(turn).unwrap();
            a.cmp(esi, ROUNDS as i32).unwrap();
            a.jae(done).unwrap();
            wait_until(a, UMWAIT, u64::MAX);
            a.jmp(look).unwrap();
            a.set_label(&mut turn).unwrap();
            a.inc(dword_ptr(DATA)).unwrap();
            a.jmp(again).unwrap();
            a.set_label(&mut done).unwrap();
            a.hlt().unwrap();
        }
    };
    let [a, b] = pair(player(0), player(1));
    let memory = a.memory.clone();
    let (mut a, mut b) = (with_waitpkg(a), with_waitpkg(b));
    std::thread::scope(|s| {
        s.spawn(move || a.expect_exit(exit::HLT));
        b.expect_exit(exit::HLT);
    });
    assert!(memory.read::<u32>(DATA) >= ROUNDS);
}

/// Waits for ever, with a store to `ready` before.
fn waiting(opcode: [u8; 3], ready: u64) -> Guest {
    with_waitpkg(Guest::long(|a| {
        a.mov(rbx, DATA).unwrap();
        put(a, UMONITOR, EBX);
        a.mov(byte_ptr(ready), 1).unwrap();
        wait_until(a, opcode, u64::MAX);
        a.mov(byte_ptr(ready), 2).unwrap();
        a.hlt().unwrap();
    }))
}

#[test]
fn the_hosts_stores_end_a_wait_told_or_untold() {
    let ready = DATA + 0x1000;
    for told in [true, false] {
        let mut g = waiting(UMWAIT, ready);
        let memory = g.memory.clone();
        std::thread::scope(|s| {
            let waits = s.spawn(move || g.expect_exit(exit::HLT));
            while memory.read::<u8>(ready) == 0 {
                std::thread::yield_now();
            }
            let at = memory.ram + DATA as usize + 8;
            if told {
                memory.machine.write(at, &[0]).unwrap();
            } else {
                memory.write::<u8>(DATA + 8, 1);
            }
            waits.join().unwrap();
        });
    }
}

#[test]
fn a_physical_interrupt_ends_a_wait_and_comes_behind_the_instruction() {
    for opcode in [TPAUSE, UMWAIT] {
        let ready = DATA + 0x1000;
        let mut g = waiting(opcode, ready);
        let (memory, kick) = (g.memory.clone(), g.cpu.engine.shared().clone());
        std::thread::scope(|s| {
            let waits = s.spawn(move || {
                g.expect_exit(exit::INTR);
                // The wait is over: the guest goes on behind it.
                g.expect_exit(exit::HLT);
            });
            while memory.read::<u8>(ready) == 0 {
                std::thread::yield_now();
            }
            kick.kick();
            waits.join().unwrap();
        });
        assert_eq!(memory.read::<u8>(ready), 2);
    }
}

#[test]
fn a_pending_virtual_interrupt_ends_a_wait_even_where_it_is_masked() {
    for flags in [2u64, 0x202] {
        let mut g = with_waitpkg(Guest::long(|a| {
            a.nop().unwrap();
            wait_until(a, TPAUSE, u64::MAX);
            a.hlt().unwrap();
        }));
        g.set(save::RFLAGS, flags);
        g.set(control::V_INTR, 1u64 << 8 | 0xf << 16 | 0x30 << 32);
        if flags & 0x200 != 0 {
            assert_eq!(g.run_to_handler(), 0x30);
        } else {
            g.expect_exit(exit::HLT);
        }
    }
}

#[test]
fn reserved_bits_of_the_operand_are_gp() {
    for opcode in [TPAUSE, UMWAIT] {
        for bit in 1..32 {
            let mut g = with_waitpkg(Guest::long(|a| put(a, opcode, ECX)));
            g.cpu.rb.gpr[1] = 1 << bit;
            g.expect(vector::GP, Some(0), CODE);
        }
        // The operand has 32 bits.
        let mut g = with_waitpkg(Guest::long(|a| {
            put(a, opcode, ECX);
            a.hlt().unwrap();
        }));
        g.cpu.rb.gpr[1] = 1 << 32;
        g.expect_exit(exit::HLT);
    }
}

#[test]
fn time_stamp_disable_keeps_user_code_from_waiting() {
    for opcode in [TPAUSE, UMWAIT] {
        for (tsd, faults) in [(0, false), (4, true)] {
            let mut g = with_waitpkg(Guest::user(|a| {
                put(a, opcode, ECX);
                a.syscall().unwrap();
            }));
            let cr4_now: u64 = g.get(save::CR4);
            g.set(save::CR4, cr4_now | tsd);
            let vector = g.run_to_handler();
            assert_eq!(vector == vector::GP, faults, "vector {vector}");
            // Not so the kernel.
            let mut g = with_waitpkg(Guest::long(|a| {
                put(a, opcode, ECX);
                a.hlt().unwrap();
            }));
            g.set(save::CR4, cr4_now | tsd);
            g.expect_exit(exit::HLT);
        }
    }
    // UMONITOR has nothing to do with the counter.
    let mut g = with_waitpkg(Guest::user(|a| {
        put(a, UMONITOR, EBX);
        a.int3().unwrap();
    }));
    let cr4_now: u64 = g.get(save::CR4);
    g.set(save::CR4, cr4_now | 4);
    g.cpu.rb.gpr[3] = DATA;
    assert_ne!(g.run_to_handler(), vector::UD);
}

#[test]
fn umonitor_faults_as_a_load_of_one_byte_does() {
    // Not present: #PF with the operand's address, a read.
    let mut g = with_waitpkg(Guest::long(|a| put(a, UMONITOR, EBX)));
    g.memory.change_leaf(DATA, 0, pte::P);
    g.cpu.rb.gpr[3] = DATA + 5;
    g.expect(vector::PF, Some(0), CODE);
    assert_eq!(g.get::<u64>(save::CR2), DATA + 5);
    // Not canonical.
    let mut g = with_waitpkg(Guest::long(|a| put(a, UMONITOR, EBX)));
    g.cpu.rb.gpr[3] = 1 << 47;
    g.expect(vector::GP, Some(0), CODE);
    // 67h: the lower half of the register.
    let mut g = with_waitpkg(Guest::long(|a| {
        a.db(&[0x67]).unwrap();
        put(a, UMONITOR, EBX);
        a.hlt().unwrap();
    }));
    g.cpu.rb.gpr[3] = 1 << 47 | DATA;
    g.expect_exit(exit::HLT);
    // FS: its base counts.
    let mut g = with_waitpkg(Guest::long(|a| {
        a.db(&[0x64]).unwrap();
        put(a, UMONITOR, EBX);
    }));
    g.segment(4, DATA0, 0xc93, DATA, u32::MAX);
    g.memory.change_leaf(DATA + 0x1000, 0, pte::P);
    g.cpu.rb.gpr[3] = 0x1008;
    g.expect(vector::PF, Some(0), CODE);
    assert_eq!(g.get::<u64>(save::CR2), DATA + 0x1008);
}

#[test]
fn umonitor_keeps_to_segments_in_legacy_modes() {
    // ES has 4 KiB.
    for (address, faults) in [(0xfff, false), (0x1000, true)] {
        let mut g = with_waitpkg(Guest::protected(|a| {
            a.db(&[0x26]).unwrap();
            put(a, UMONITOR, EBX);
            a.hlt().unwrap();
        }));
        g.segment(0, SMALL, 0x493, DATA, 0xfff);
        g.cpu.rb.gpr[3] = address;
        if faults {
            assert_eq!(g.run_to_handler(), vector::GP);
        } else {
            g.expect_exit(exit::HLT);
        }
    }
    // SS: #SS.
    let mut g = with_waitpkg(Guest::protected(|a| {
        a.db(&[0x36]).unwrap();
        put(a, UMONITOR, EBX);
    }));
    let small = 0xfff;
    g.segment(2, SMALL, 0x493, 0, small);
    g.cpu.rb.gpr[3] = 0x1000;
    g.set(save::RSP, 0xf00u64);
    assert_eq!(g.run_to_handler(), vector::SS);
    // 16-bit addresses: the lower half of EBX.
    let mut g = with_waitpkg(Guest::real(|a| {
        put(a, UMONITOR, EBX);
        put(a, TPAUSE, ECX);
        a.hlt().unwrap();
    }));
    g.cpu.rb.gpr[3] = 0x12_0010;
    g.expect_exit(exit::HLT);
}
