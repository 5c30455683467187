// SPDX-License-Identifier: Apache-2.0
//! AVIC (APM vol. 2, 15.29): registers in the backing page, interrupts from the IRR, interrupts between processors.

use iced_x86::code_asm::*;
use softcpu::x86::avic::page::{Handling, reads, register, writes};
use softcpu::x86::system::exitcode;
use softcpu::x86::vmcb::{control, save};

use crate::common::{CODE, DATA, Guest, Memory, STACK};

/// Guest-physical page of the registers, and where the pages and tables of these tests lie in guest memory.
const BAR: u64 = DATA + 0x1_0000;
const PAGES: u64 = DATA + 0x2_0000;
const PHYSICAL: u64 = DATA + 0x4_0000;
const LOGICAL: u64 = DATA + 0x4_1000;
const WRITE: u64 = 1 << 32;
const IF: u64 = 0x202;

fn host(m: &Memory, gpa: u64) -> u64 {
    m.ram as u64 + gpa
}

fn page(index: u32) -> u64 {
    PAGES + 0x1000 * index as u64
}

/// Enables AVIC for a processor of a machine of `count`.
fn enable(g: &mut Guest, index: u32, count: u32, x2: bool) {
    let m = g.memory.clone();
    let entry = host(&m, page(index)) | 1 << 63 | index as u64;
    m.write::<u64>(PHYSICAL + 8 * index as u64, entry);
    g.set(control::AVIC_BAR, BAR);
    g.set(control::AVIC_BACKING_PAGE, host(&m, page(index)));
    g.set(control::AVIC_LOGICAL_TABLE, host(&m, LOGICAL));
    g.set(control::AVIC_PHYSICAL_TABLE, host(&m, PHYSICAL) | (count as u64 - 1));
    g.set(control::V_INTR, 1u64 << 31 | (x2 as u64) << 30 | 1 << 24);
    m.write::<u32>(page(index) + register::DFR as u64, u32::MAX);
    g.set(save::RFLAGS, IF);
}

/// One processor whose code ends with VMMCALL.
fn guest(code: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut g = Guest::long(|a| {
        code(a);
        a.vmmcall().unwrap();
    });
    enable(&mut g, 0, 1, false);
    g
}

fn at(offset: u16) -> i32 {
    BAR as i32 + offset as i32
}

fn get(g: &Guest, index: u32, offset: u16) -> u32 {
    g.memory.read(page(index) + offset as u64)
}

fn set(g: &Guest, index: u32, offset: u16, v: u32) {
    g.memory.write(page(index) + offset as u64, v);
}

fn bit(g: &Guest, index: u32, bitmap: u16, vector: u8) -> bool {
    get(g, index, bitmap + 16 * (vector as u16 / 32)) >> (vector % 32) & 1 != 0
}

fn raise(g: &Guest, index: u32, bitmap: u16, vector: u8) {
    let at = bitmap + 16 * (vector as u16 / 32);
    set(g, index, at, get(g, index, at) | 1 << (vector % 32));
}

#[test]
fn every_register_is_read_and_written_as_the_manuals_table_says() {
    for offset in (0..0x1000u16).step_by(16) {
        let mut g = guest(|a| {
            a.mov(eax, dword_ptr(at(offset))).unwrap();
        });
        set(&g, 0, offset, 0x1234_5600);
        // The silicon keeps some registers up to date itself.
        let kept = matches!(offset, register::APR | register::PPR | register::IRR..=register::IRR_END | register::ISR..0x180);
        if kept {
            set(&g, 0, offset, 0);
        }
        if reads(offset) == Handling::Allowed {
            g.expect_exit(exitcode::VMMCALL);
            assert_eq!(g.rax() as u32, if kept { 0 } else { 0x1234_5600 }, "register {offset:#x}");
        } else {
            g.expect_exit(exitcode::AVIC_NOACCEL);
            assert_eq!((g.info1(), g.rip()), (offset as u64, CODE), "read of {offset:#x}");
        }
        let mut g = guest(|a| {
            a.mov(dword_ptr(at(offset)), 0x20).unwrap();
        });
        match writes(offset) {
            Handling::Fault => {
                g.expect_exit(exitcode::AVIC_NOACCEL);
                assert_eq!((g.info1(), g.rip()), (offset as u64 | WRITE, CODE), "write of {offset:#x}");
                assert_eq!(get(&g, 0, offset), 0, "register {offset:#x}");
            }
            Handling::Trap => {
                g.expect_exit(exitcode::AVIC_NOACCEL);
                assert_eq!(g.info1(), offset as u64 | WRITE, "write of {offset:#x}");
                assert!(g.rip() > CODE, "write of {offset:#x} has retired");
                assert_eq!(get(&g, 0, offset), 0x20, "register {offset:#x}");
            }
            _ => {
                // (An ICR of 20h asks for a vector to a processor 0.)
                g.set(save::RFLAGS, 2u64);
                g.expect_exit(exitcode::VMMCALL);
            }
        }
    }
}

#[test]
fn accesses_of_other_sizes_or_places_are_left_to_the_hypervisor() {
    let mut g = guest(|a| {
        a.mov(rax, qword_ptr(at(register::TPR))).unwrap();
    });
    g.expect_exit(exitcode::AVIC_NOACCEL);
    assert_eq!(g.info1(), register::TPR as u64 | 1);
    let mut g = guest(|a| {
        a.mov(byte_ptr(at(register::TPR) + 1), 1).unwrap();
    });
    g.expect_exit(exitcode::AVIC_NOACCEL);
    assert_eq!((g.info1(), g.rip()), (register::TPR as u64 | WRITE | 1, CODE));
}

#[test]
fn the_nested_tables_have_to_let_the_access_pass() {
    let mut g = guest(|a| {
        a.mov(eax, dword_ptr(at(register::ID))).unwrap();
    });
    let leaf = g.memory.nested_leaf(BAR);
    g.memory.put_host(leaf, 0);
    g.expect_exit(exitcode::NPF);
    assert_eq!(g.info2(), BAR + register::ID as u64);
}

#[test]
fn tables_outside_of_memory_make_vmrun_fail() {
    for field in [control::AVIC_BACKING_PAGE, control::AVIC_LOGICAL_TABLE, control::AVIC_PHYSICAL_TABLE] {
        let mut g = guest(|_| {});
        g.set(field, 0u64);
        g.expect_exit(exitcode::INVALID);
    }
}

#[test]
fn an_interrupt_in_the_irr_is_delivered_by_priority() {
    for (tpr, in_service, vector, taken) in [
        (0, 0, 0x31, true),
        (0x30, 0, 0x31, false),
        (0x2f, 0, 0x31, true),
        (0, 0x35, 0x31, false),
        (0, 0x35, 0x41, true),
    ] {
        let mut g = guest(|_| {});
        set(&g, 0, register::TPR, tpr);
        g.set(control::V_INTR, g.get::<u64>(control::V_INTR) | tpr as u64 >> 4);
        if in_service != 0 {
            raise(&g, 0, register::ISR, in_service);
        }
        raise(&g, 0, register::IRR, vector);
        if taken {
            g.expect(vector, None, CODE);
            assert!(bit(&g, 0, register::ISR, vector) && !bit(&g, 0, register::IRR, vector));
            assert_eq!(get(&g, 0, register::PPR), vector as u32 & 0xF0);
        } else {
            g.expect_exit(exitcode::VMMCALL);
            assert_eq!(g.rip(), CODE);
            assert!(bit(&g, 0, register::IRR, vector));
        }
    }
}

#[test]
fn interrupts_wait_for_the_flag_and_for_the_shadow() {
    let mut g = guest(|a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    g.set(save::RFLAGS, 2u64);
    raise(&g, 0, register::IRR, 0x31);
    g.expect(0x31, None, CODE + 3);
}

#[test]
fn a_self_ipi_and_its_eoi_need_no_exit() {
    for halted in [false, true] {
        let mut g = guest(|a| {
            a.cli().unwrap();
            a.mov(dword_ptr(at(register::ICR_LOW)), 1 << 18 | 0x51).unwrap();
            a.sti().unwrap();
            if halted {
                a.hlt().unwrap();
            }
            a.nop().unwrap();
            a.nop().unwrap();
        });
        g.unintercept(exitcode::HLT);
        g.intercept(exitcode::IDLE_HLT);
        // The handler: EOI, then VMMCALL.
        g.assemble(64, crate::common::HANDLERS + 16 * 0x51, |a| {
            a.mov(dword_ptr(at(register::EOI)), 0).unwrap();
            a.vmmcall().unwrap();
        });
        g.expect_exit(exitcode::VMMCALL);
        let frame: [u64; 5] = g.frame(false).1;
        assert_eq!(frame[0], CODE + 1 + 11 + 1 + 1, "behind the instruction after STI");
        assert!(!bit(&g, 0, register::ISR, 0x51));
        assert_eq!(get(&g, 0, register::PPR), 0);
    }
}

#[test]
fn an_idle_halt_exits_and_its_next_rip_is_saved() {
    let mut g = guest(|a| {
        a.hlt().unwrap();
    });
    g.intercept(exitcode::IDLE_HLT);
    g.expect_exit(exitcode::IDLE_HLT);
    assert_eq!((g.rip(), g.get::<u64>(control::NRIP)), (CODE, CODE + 1));
}

#[test]
fn the_eoi_of_a_level_triggered_interrupt_is_the_hypervisors() {
    let mut g = guest(|a| {
        a.mov(dword_ptr(at(register::EOI)), 0).unwrap();
    });
    raise(&g, 0, register::ISR, 0x45);
    raise(&g, 0, register::TMR, 0x45);
    g.expect_exit(exitcode::AVIC_NOACCEL);
    assert_eq!((g.info1(), g.info2()), (register::EOI as u64 | WRITE, 0x45));
    assert!(bit(&g, 0, register::ISR, 0x45));
}

#[test]
fn an_eoi_and_a_lower_priority_let_the_next_interrupt_in() {
    let mut g = guest(|a| {
        a.mov(dword_ptr(at(register::EOI)), 0).unwrap();
        a.nop().unwrap();
    });
    raise(&g, 0, register::ISR, 0x45);
    raise(&g, 0, register::IRR, 0x41);
    g.expect(0x41, None, CODE + 11);
    let mut g = guest(|a| {
        a.mov(eax, 2).unwrap();
        a.mov(cr8, rax).unwrap();
        a.nop().unwrap();
    });
    set(&g, 0, register::TPR, 0x40);
    g.set(control::V_INTR, g.get::<u64>(control::V_INTR) | 4);
    raise(&g, 0, register::IRR, 0x41);
    assert_eq!(g.run_to_handler(), 0x41);
    assert_eq!(get(&g, 0, register::TPR), 0x20);
    assert_eq!(g.get::<u64>(control::V_INTR) & 15, 2);
}

#[test]
fn a_trap_comes_behind_any_instruction_that_writes() {
    let mut g = guest(|a| {
        a.mov(edi, at(register::SVR)).unwrap();
        a.mov(eax, 0x1ff).unwrap();
        a.stosd().unwrap();
    });
    g.expect_exit(exitcode::AVIC_NOACCEL);
    assert_eq!((g.rip(), g.info1()), (CODE + 11, register::SVR as u64 | WRITE));
    assert_eq!(get(&g, 0, register::SVR), 0x1ff);
}

#[test]
fn reserved_bits_of_the_icr_are_gone_when_it_sends() {
    let mut g = guest(|a| {
        a.mov(dword_ptr(at(register::ICR_HIGH)), 0x12A5_A5A5).unwrap();
        a.mov(dword_ptr(at(register::ICR_LOW)), 0x0004_5051).unwrap(); // busy: the processor's to say
    });
    g.expect_exit(exitcode::VMMCALL);
    assert_eq!((get(&g, 0, register::ICR_HIGH), get(&g, 0, register::ICR_LOW)), (0x1200_0000, 0x4_4051));
}

#[test]
fn what_an_iteration_has_written_is_acted_on_before_the_next_one_faults() {
    // The ICR: an interrupt to itself; then what lies behind, which no register is.
    let mut g = guest(|a| {
        a.mov(edi, at(register::ICR_LOW)).unwrap();
        a.mov(eax, 0x4_4051).unwrap();
        a.mov(ecx, 2).unwrap();
        a.rep().stosd().unwrap();
    });
    g.set(save::RFLAGS, 2u64);
    g.expect_exit(exitcode::AVIC_NOACCEL);
    assert_eq!((g.info1(), g.cpu.rb.gpr[1]), (register::ICR_LOW as u64 | WRITE | 1, 1));
    assert!(bit(&g, 0, register::IRR, 0x51));
}

/// DR6 as #DB of a single step leaves it, and EXITINTINFO with #DB.
const STEPPED: u64 = 0xFFFF_0FF0 | 1 << 14;
const INTERRUPTED_DB: u64 = 1 << 31 | 3 << 8 | 1;

/// `dr7` has GD where #DB is intercepted, and not, where its delivery has begun.
#[test]
fn a_write_is_acted_on_before_the_exception_behind_its_instruction_leaves_the_guest() {
    for intercepted in [true, false] {
        let step = |offset: u16, value: i32| {
            let mut g = guest(|a| {
                a.mov(dword_ptr(at(offset)), value).unwrap();
            });
            g.set(save::RFLAGS, 0x102u64); // TF
            g.set(save::DR7, 0x2400u64);
            if intercepted {
                g.set(control::INTERCEPTS + 8, 1u32 << 1);
            }
            g
        };
        // An interrupt to itself needs no exit: it is requested before #DB is one.
        if intercepted {
            let mut g = step(register::ICR_LOW, 0x4_4051);
            g.expect_exit(exitcode::EXCP0 + 1);
            assert!(bit(&g, 0, register::IRR, 0x51));
            assert_eq!((g.get::<u64>(control::EXITINTINFO), g.get::<u64>(save::DR6)), (0, STEPPED));
        }
        // What KVM has to act on is the exit.
        let mut g = step(register::SVR, 0x1ff);
        g.expect_exit(exitcode::AVIC_NOACCEL);
        assert_eq!(g.info1(), register::SVR as u64 | WRITE);
        assert_eq!((g.get::<u64>(control::EXITINTINFO), g.get::<u64>(save::DR6)), (INTERRUPTED_DB, STEPPED));
        assert_eq!(g.get::<u64>(save::DR7) >> 13 & 1 != 0, intercepted);
    }
}

/// A second processor with AVIC, in the same machine.
fn second(g: &Guest, x2: bool) -> Guest {
    let mut other = Guest::bare(g.memory.clone(), 1);
    enable(&mut other, 1, 2, x2);
    other.set(save::RSP, STACK - 0x1000);
    other.memory.write_bytes(CODE + 0x1000, &[0xeb, 0xfe]);
    other.set(save::RIP, CODE + 0x1000);
    other
}

fn sender(icr: u32, high: u32) -> Guest {
    let mut g = guest(|a| {
        a.mov(dword_ptr(at(register::ICR_HIGH)), high as i32).unwrap();
        a.mov(dword_ptr(at(register::ICR_LOW)), icr as i32).unwrap();
    });
    enable(&mut g, 0, 2, false);
    g
}

const RUNNING: u64 = 1 << 62;

fn run_bit(m: &Memory, index: u32, on: bool) {
    let at = PHYSICAL + 8 * index as u64;
    let entry: u64 = m.read(at);
    m.write(at, if on { entry | RUNNING } else { entry & !RUNNING });
}

#[test]
fn an_ipi_reaches_a_running_processor_without_an_exit_of_either() {
    for (icr, high) in [
        (0x61, 1 << 24),
        (0x61 | 1 << 11, 2 << 24),
        (0x61 | 2 << 18, 0),
        (0x61 | 3 << 18, 0),
        (0x61, 0xFF << 24),
    ] {
        let mut g = sender(icr, high);
        let mut other = second(&g, false);
        for n in 0..2u32 {
            g.memory.write::<u32>(LOGICAL + 4 * n as u64, 1 << 31 | n);
        }
        run_bit(&g.memory, 1, true);
        g.set(save::RFLAGS, 2u64);
        let target = std::thread::spawn(move || {
            let vector = other.run_to_handler();
            (vector, other)
        });
        g.expect_exit(exitcode::VMMCALL);
        let (vector, other) = target.join().unwrap();
        assert_eq!(vector, 0x61, "ICR {icr:#x}");
        assert!(bit(&other, 1, register::ISR, 0x61));
        let to_itself = matches!(icr >> 18 & 3, 2) || high == 0xFF << 24;
        assert_eq!(bit(&g, 0, register::IRR, 0x61), to_itself, "ICR {icr:#x}");
    }
}

#[test]
fn an_incomplete_ipi_says_why_and_which_target() {
    let missing = 5 << 24;
    for (icr, high, failure, index, requested) in [
        (0x61u32, 1u32 << 24, 1u64, 1u64, true), // not running
        (0x61 | 1 << 15, 1 << 24, 0, 0, false),  // level-triggered
        (0x61 | 1 << 8, 1 << 24, 0, 0, false),   // lowest priority
        (0x400, 1 << 24, 0, 0, false),           // NMI
        (0x61, missing, 2, 5, false),
        (0x61 | 1 << 11, 4 << 24, 2, 2, false),
        (0x61 | 1 << 11, 6 << 24, 2, 2, false), // one of two is missing: nobody gets it
        (0x0F, 1 << 24, 4, 0, false),
    ] {
        let mut g = sender(icr, high);
        let other = second(&g, false);
        g.memory.write::<u32>(LOGICAL + 4, 1 << 31 | 1);
        g.expect_exit(exitcode::AVIC_INCOMPLETE_IPI);
        assert_eq!(g.info1(), (high as u64) << 32 | icr as u64);
        assert_eq!(g.info2(), failure << 32 | index, "ICR {icr:#x}");
        assert!(g.rip() > CODE + 11, "the write has retired");
        assert_eq!(bit(&other, 1, register::IRR, 0x61), requested, "ICR {icr:#x}");
    }
    let mut g = sender(0x61, 1 << 24);
    let _other = second(&g, false);
    g.memory.write::<u64>(PHYSICAL + 8, 1 << 63 | 0xdead_f000);
    g.expect_exit(exitcode::AVIC_INCOMPLETE_IPI);
    assert_eq!(g.info2(), 3 << 32 | 1);
}

/// x2APIC mode: WRMSR or RDMSR of a register.
fn x2(code: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut g = guest(code);
    enable(&mut g, 0, 1, true);
    g
}

fn wrmsr(a: &mut CodeAssembler, offset: u16, v: u64) {
    a.mov(ecx, 0x800 + (offset as i32 >> 4)).unwrap();
    a.mov(eax, v as u32).unwrap();
    a.mov(edx, (v >> 32) as u32).unwrap();
    a.wrmsr().unwrap();
}

#[test]
fn x2apic_registers_are_msrs() {
    let mut g = x2(|a| wrmsr(a, register::SELF_IPI, 0x71));
    assert_eq!(g.run_to_handler(), 0x71);
    let mut g = x2(|a| wrmsr(a, register::ICR_LOW, 0x72));
    assert_eq!(g.run_to_handler(), 0x72, "to itself by its ID");
    let mut g = x2(|a| wrmsr(a, register::ICR_LOW, 1 << 32 | 0x72));
    g.expect_exit(exitcode::AVIC_INCOMPLETE_IPI);
    assert_eq!((g.info1(), g.info2()), (1 << 32 | 0x72, 2 << 32 | 1));
    for (offset, v) in [
        (register::ICR_LOW, 1 << 13),
        (register::EOI, 1),
        (register::TPR, 0x100),
        (register::SELF_IPI, 1 << 32),
    ] {
        let mut g = x2(|a| wrmsr(a, offset, v));
        assert_eq!(g.run_to_handler(), 13, "register {offset:#x}");
    }
    let mut g = x2(|a| wrmsr(a, register::SVR, 0x1ff));
    g.expect_exit(exitcode::AVIC_NOACCEL);
    assert_eq!(g.info1(), register::SVR as u64 | WRITE);
    let mut g = x2(|a| {
        a.mov(ecx, 0x830).unwrap();
        a.rdmsr().unwrap();
    });
    set(&g, 0, register::ICR_LOW, 0x1234);
    set(&g, 0, register::ICR_HIGH, 7);
    g.expect_exit(exitcode::VMMCALL);
    assert_eq!((g.rax(), g.cpu.rb.gpr[2]), (0x1234, 7));
}

#[test]
fn random_pages_and_tables_leave_the_machine_whole() {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..300 {
        let (icr, high) = (next() as u32, next() as u32);
        let mut g = sender(icr, high);
        for n in (0..0x1000).step_by(8) {
            g.memory.write::<u64>(PHYSICAL + n, next());
            g.memory.write::<u64>(LOGICAL + n, next());
            g.memory.write::<u64>(page(0) + n, next());
        }
        g.set(control::AVIC_PHYSICAL_TABLE, host(&g.memory, PHYSICAL) | next() & 0xFFF);
        g.set(save::RFLAGS, if next() & 1 != 0 { IF } else { 2 });
        let code = g.run();
        let documented = [exitcode::AVIC_INCOMPLETE_IPI, exitcode::AVIC_NOACCEL, exitcode::VMMCALL];
        assert!(documented.contains(&code), "{}", exitcode::name(code));
        g.memory.release();
    }
}
