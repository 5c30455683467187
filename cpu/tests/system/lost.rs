// SPDX-License-Identifier: Apache-2.0
//! Guest memory that its owner takes away while a processor has it in its TLB: a machine check, intercepted by the
//! hypervisor, at the instruction that finds out. When the memory is back, the guest goes on as if nothing had been.

use iced_x86::code_asm::*;
use softcpu::mem::lost::Lost;
use softcpu::mem::remote::AccessError;
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::vmcb::{control, save};

use crate::common::*;

const MACHINE_CHECK: u64 = exit::EXCP0 + 18;
const PAGE: u64 = 4096;

fn protect(g: &Guest, gpa: u64, protection: i32) {
    let at = g.memory.ram + (gpa & !(PAGE - 1)) as usize;
    // SAFETY: the guest's memory, mapped by the test.
    assert_eq!(unsafe { libc::mprotect(at as *mut libc::c_void, PAGE as usize, protection) }, 0);
}

fn take_away(g: &Guest, gpa: u64) {
    protect(g, gpa, libc::PROT_NONE);
}

fn give_back(g: &Guest, gpa: u64) {
    protect(g, gpa, libc::PROT_READ | libc::PROT_WRITE);
}

/// Runs to the machine check of the page of `gpa`.
#[track_caller]
fn expect_loss(g: &mut Guest, gpa: u64) {
    g.intercept(MACHINE_CHECK);
    g.expect_exit(MACHINE_CHECK);
    let page = g.info2() & !(PAGE - 1);
    assert_eq!(page, g.memory.ram as u64 + (gpa & !(PAGE - 1)), "EXITINFO2");
    assert_eq!(g.info1(), 0);
}

/// What software sees of the processor.
#[derive(Debug, PartialEq)]
struct State {
    registers: [u64; 16],
    flags: u64,
    vectors: [[u64; 4]; 16],
    x87: ([[u64; 2]; 8], u16, u16),
    segments: [u16; 6],
    shadow: u64,
}

fn state(g: &Guest) -> State {
    let rb = &g.cpu.rb;
    let mut registers: [u64; 16] = rb.gpr[..16].try_into().unwrap();
    (registers[0], registers[4]) = (g.rax(), g.rsp());
    State {
        registers,
        flags: g.rflags(),
        vectors: rb.ymm,
        x87: (rb.st, rb.fsw, rb.ftw),
        segments: core::array::from_fn(|n| g.selector(n)),
        shadow: g.get::<u64>(control::INTERRUPT_SHADOW) & 1,
    }
}

/// A page of the operand, its last bytes, and one behind.
const AT: u64 = DATA;
const NEXT: u64 = DATA + PAGE;
const EDGE: u64 = NEXT - 4;
/// Another operand.
const OTHER: u64 = DATA + 0x4000;

/// An instruction, and the page that it finds missing.
struct Case {
    name: &'static str,
    /// Or only reads there.
    writes: bool,
    page: u64,
    code: fn(&mut CodeAssembler),
}

macro_rules! cases {
    ($($name:literal $kind:ident $page:ident |$a:ident| $code:expr;)*) => {
        [$(Case { name: $name, writes: stringify!($kind) == "writes", page: $page, code: |$a| { $code.unwrap(); } }),*]
    };
}

/// RBX and RSI lead to AT, R8 to EDGE, RDI and R9 to OTHER, RSP into AT; RCX is 3.
fn cases() -> Vec<Case> {
    cases![
        "load" reads AT |a| a.mov(rax, qword_ptr(rbx));
        "load of a byte" reads AT |a| a.mov(al, byte_ptr(rbx));
        "load by index" reads AT |a| a.mov(eax, dword_ptr(rbx + rcx * 4));
        "store" writes AT |a| a.mov(qword_ptr(rbx), rcx);
        "store of an immediate" writes AT |a| a.mov(word_ptr(rbx), 7);
        "addition to memory" writes AT |a| a.add(qword_ptr(rbx), rcx);
        "addition of memory" reads AT |a| a.add(rcx, qword_ptr(rbx));
        "addition with carry" writes AT |a| a.adc(dword_ptr(rbx), ecx);
        "shift" writes AT |a| a.rcl(dword_ptr(rbx), cl);
        "bit test" writes AT |a| a.bts(dword_ptr(rbx), ecx);
        "comparison and branch" reads AT |a| { let mut l = a.create_label(); a.cmp(dword_ptr(rbx), 5).unwrap(); a.je(l).unwrap(); a.set_label(&mut l).unwrap(); a.nop() };
        "exchange" writes AT |a| a.xchg(dword_ptr(rbx), ecx);
        "locked addition" writes AT |a| a.lock().add(dword_ptr(rbx), ecx);
        "locked exchange and addition" writes AT |a| a.lock().xadd(dword_ptr(rbx), ecx);
        "locked comparison" writes AT |a| a.lock().cmpxchg(dword_ptr(rbx), ecx);
        "locked comparison of 16 bytes" writes AT |a| a.lock().cmpxchg16b(xmmword_ptr(rbx));
        "push" writes AT |a| a.push(rcx);
        "push from memory" reads OTHER |a| a.push(qword_ptr(r9));
        "push from memory, to what is lost" writes AT |a| a.push(qword_ptr(r9));
        "pop" reads AT |a| a.pop(rcx);
        "pop to memory" writes OTHER |a| a.pop(qword_ptr(r9));
        "pushed flags" writes AT |a| a.pushfq();
        "call" writes AT |a| { let mut l = a.create_label(); a.call(l).unwrap(); a.set_label(&mut l).unwrap(); a.nop() };
        "leave" reads AT |a| a.leave();
        "enter" writes AT |a| a.enter(16, 3);
        "vector load" reads AT |a| a.movups(xmm1, xmmword_ptr(rbx));
        "vector store" writes AT |a| a.movaps(xmmword_ptr(rbx), xmm1);
        "vector addition" reads AT |a| a.paddd(xmm1, xmmword_ptr(rbx));
        "scalar load" reads AT |a| a.movsd_2(xmm1, qword_ptr(rbx));
        "scalar addition" reads AT |a| a.addsd(xmm1, qword_ptr(rbx));
        "x87 load" reads AT |a| a.fld(tbyte_ptr(rbx));
        "x87 addition" reads AT |a| a.fadd(qword_ptr(rbx));
        "x87 store" writes AT |a| a.fstp(tbyte_ptr(rbx));
        "x87 state" writes AT |a| a.fnsave(ptr(rbx));
        "all state" writes AT |a| a.fxsave(ptr(rbx));
        "string move from" reads AT |a| a.rep().movsq();
        "string move to" writes OTHER |a| a.rep().movsb();
        "string fill" writes OTHER |a| a.rep().stosd();
        "string comparison" reads OTHER |a| a.repe().cmpsb();
        "string comparison, the other" reads AT |a| a.repe().cmpsb();
        "string load" reads AT |a| a.lodsq();
        "load across pages" reads NEXT |a| a.mov(rax, qword_ptr(r8));
        "store across pages, the first" writes AT |a| a.mov(qword_ptr(r8), rcx);
        "store across pages, the second" writes NEXT |a| a.mov(qword_ptr(r8), rcx);
        "addition across pages" writes NEXT |a| a.add(qword_ptr(r8), rcx);
        "locked addition across pages" writes NEXT |a| a.lock().add(qword_ptr(r8), rcx);
        "locked comparison across pages" writes AT |a| a.lock().cmpxchg(qword_ptr(r8), rcx);
        "vector store across pages" writes NEXT |a| a.movups(xmmword_ptr(r8), xmm1);
        "descriptor table register" writes AT |a| a.sgdt(ptr(rbx));
        "segment register from memory" reads AT |a| a.mov(gs, word_ptr(rbx));
        "segment register's descriptor" reads GDT |a| a.mov(fs, edx);
        "interrupt's stack" writes AT |a| a.int(0x40);
        "interrupt's gate" reads IDT |a| a.int3();
        "return from an interrupt" reads AT |a| a.iretq();
    ]
    .into()
}

fn guest(case: &Case) -> Guest {
    let mut g = Guest::long(|a| {
        a.nop().unwrap();
        a.stc().unwrap();
        (case.code)(a);
        a.cpuid().unwrap();
    });
    g.intercept(exit::CPUID);
    g.intercept(MACHINE_CHECK);
    // The interrupts' handler is a CPUID, too.
    g.memory.write_bytes(HANDLER, &[0x0f, 0xa2]);
    for vector in [3, 0x40] {
        g.memory.write::<u64>(IDT + 16 * vector, gate(CODE64, HANDLER, 0, 0x8e));
    }
    start(&mut g);
    g
}

const HANDLER: u64 = CODE + 0x40;
/// Where the instruction is.
const THERE: u64 = CODE + 2;

/// Before the first instruction.
fn start(g: &mut Guest) {
    g.set(save::RIP, CODE);
    g.set(save::RAX, 0u64);
    g.set(save::RSP, AT + 0x800);
    g.set(save::RFLAGS, 0x202u64);
    let rb = &mut g.cpu.rb;
    (rb.gpr[1], rb.gpr[2], rb.gpr[3]) = (3, DATA0 as u64, AT);
    (rb.gpr[5], rb.gpr[6], rb.gpr[7]) = (AT + 0x700, AT, OTHER);
    (rb.gpr[8], rb.gpr[9]) = (EDGE, OTHER);
    rb.st[7] = [1 << 63, 0x3fff];
    (rb.fcw, rb.fsw, rb.ftw) = (0x37f, 7 << 11, 0x3fff);
    rb.ymm[1] = [5; 4];
    for n in 0..512 {
        for at in [AT, NEXT, OTHER] {
            g.memory.write::<u64>(at + 8 * n, 0);
        }
    }
    // What IRETQ, of two bytes, returns with.
    let frame = [THERE + 2, CODE64 as u64, 0x202, AT + 0x800, DATA0 as u64];
    for (n, v) in (0..).zip(frame) {
        g.memory.write::<u64>(AT + 0x800 + 8 * n, v);
    }
}

/// To the CPUID behind the instruction: where that is, what is to be seen then, and the memory.
fn finish(g: &mut Guest) -> (u64, State, Vec<[u64; 3]>) {
    g.expect_exit(exit::CPUID);
    let memory = (0..512).map(|n| [AT, NEXT, OTHER].map(|at| g.memory.read(at + 8 * n))).collect();
    (g.rip(), state(g), memory)
}

#[test]
fn every_kind_of_access_finds_the_loss_and_changes_nothing() {
    for case in cases() {
        // With the page in the TLB, and not yet; the page gone, or for reading only, which writes alone find out.
        for (warm, read_only) in [(true, false), (false, false), (true, true), (false, true)] {
            let what = format!("{}, warm {warm}, read-only {read_only}", case.name);
            let wanted = finish(&mut guest(&case));
            let mut g = guest(&case);
            if warm {
                finish(&mut g);
                start(&mut g);
            }
            let before = State { flags: 0x203, ..state(&g) };
            let retired = g.cpu.engine.instructions();
            protect(&g, case.page, if read_only { libc::PROT_READ } else { libc::PROT_NONE });
            for _ in 0..2 {
                let code = g.run();
                if read_only && code == exit::CPUID {
                    assert!(!case.writes, "{what}");
                    break;
                }
                assert_eq!(exit::name(code), exit::name(MACHINE_CHECK), "{what}");
                assert_eq!(g.info2() & !(PAGE - 1), g.memory.ram as u64 + case.page, "{what}");
                assert_eq!((g.rip(), g.cpu.engine.instructions() - retired), (THERE, 2), "{what}");
                assert_eq!(state(&g), before, "{what}");
            }
            give_back(&g, case.page);
            if g.rip() == THERE {
                assert_eq!(finish(&mut g), wanted, "{what}");
            }
        }
    }
}

#[test]
fn code_that_is_lost_is_not_executed_though_it_is_decoded() {
    let mut g = Guest::long(|a| {
        a.mov(rbx, DATA).unwrap();
        a.call(rbx).unwrap();
        a.cpuid().unwrap();
        a.call(rbx).unwrap();
        a.hlt().unwrap();
    });
    g.intercept(exit::CPUID);
    g.memory.write_bytes(DATA, &[0xff, 0xc0, 0xc3]); // INC EAX; RET
    g.expect_exit(exit::CPUID);
    let back = g.rip() + 2;
    g.set(save::RIP, back);
    take_away(&g, DATA);
    expect_loss(&mut g, DATA);
    assert_eq!((g.rip(), g.rax()), (DATA, 1));
    give_back(&g, DATA);
    g.expect_exit(exit::HLT);
    assert_eq!(g.rax(), 2);
}

#[test]
fn an_instruction_of_which_the_second_page_is_lost() {
    let mut g = Guest::long(|_| {});
    g.memory.write_bytes(NEXT - 2, &[0xb8, 1, 0, 0, 0, 0xf4]); // MOV EAX, 1; HLT
    g.set(save::RIP, NEXT - 2);
    take_away(&g, NEXT);
    expect_loss(&mut g, NEXT);
    assert_eq!(g.rip(), NEXT - 2);
    give_back(&g, NEXT);
    g.expect_exit(exit::HLT);
    assert_eq!(g.rax(), 1);
}

#[test]
fn page_tables_that_are_lost() {
    let mut g = Guest::long(|_| {});
    // A second GiB, with tables of its own.
    g.memory.write::<u64>(PDPT + 8, DATA | 7);
    g.memory.write::<u64>(DATA, NEXT | 7);
    g.memory.write::<u64>(NEXT, OTHER | 7);
    g.memory.write::<u64>(OTHER, 7);
    g.assemble(64, CODE, |a| {
        a.mov(ebx, 1 << 30).unwrap();
        a.mov(eax, dword_ptr(rbx)).unwrap();
        a.hlt().unwrap();
    });
    for table in [DATA, NEXT, OTHER] {
        take_away(&g, table);
        expect_loss(&mut g, table);
        assert_eq!(g.rip(), CODE + 5);
        give_back(&g, table);
    }
    g.expect_exit(exit::HLT);
    assert_eq!(g.rax(), 7);
}

#[test]
fn an_event_that_cannot_be_delivered_is_reported_as_one_that_has_not_arrived() {
    // Exceptions of the guest's, through an IDT or to a stack that is lost.
    for (lost, stack) in [(IDT, STACK), (DATA, DATA + 0x800)] {
        let mut g = Guest::long(|a| a.ud2().unwrap());
        g.set(save::RSP, stack);
        take_away(&g, lost);
        expect_loss(&mut g, lost);
        assert_eq!((g.intinfo(), g.rip(), g.rsp()), (1 << 31 | 3 << 8 | 6, CODE, stack));
        // Injected, as hypervisors do; it is there still.
        let event = g.intinfo();
        g.set(control::EVENTINJ, event);
        expect_loss(&mut g, lost);
        assert_eq!((g.intinfo(), g.rip(), g.rsp()), (event, CODE, stack));
        give_back(&g, lost);
        g.set(control::EVENTINJ, event);
        g.expect(6, None, CODE);
    }
}

#[test]
fn an_interrupt_shadow_and_a_resume_flag_hold_for_the_instruction_still() {
    let mut g = Guest::long(|a| {
        a.sti().unwrap();
        a.mov(eax, dword_ptr(DATA)).unwrap();
        a.hlt().unwrap();
    });
    take_away(&g, DATA);
    expect_loss(&mut g, DATA);
    assert_eq!((g.rip(), g.get::<u64>(control::INTERRUPT_SHADOW)), (CODE + 1, 3));
    give_back(&g, DATA);
    g.expect_exit(exit::HLT);
    assert_eq!(g.get::<u64>(control::INTERRUPT_SHADOW) & 1, 0);

    let mut g = Guest::long(|a| {
        a.mov(eax, dword_ptr(DATA)).unwrap();
        a.hlt().unwrap();
    });
    g.set(save::RFLAGS, 0x1_0002u64);
    take_away(&g, DATA);
    expect_loss(&mut g, DATA);
    assert_eq!((g.rip(), g.rflags()), (CODE, 0x1_0002));
    give_back(&g, DATA);
    g.expect_exit(exit::HLT);
    assert_eq!(g.rflags(), 2);
}

#[test]
fn a_machine_check_that_nobody_intercepts_shuts_down() {
    let mut g = Guest::long(|a| a.mov(eax, dword_ptr(DATA)).unwrap());
    take_away(&g, DATA);
    g.unintercept(MACHINE_CHECK);
    g.expect_exit(exit::SHUTDOWN);
}

#[test]
fn whoever_loses_memory_while_it_has_the_bus_gives_the_bus_back() {
    let mut g = Guest::long(|a| a.lock().inc(qword_ptr(EDGE)).unwrap());
    let mut other = Guest::bare(g.memory.clone(), 1);
    other.set(save::RIP, CODE + 0x1000);
    other.assemble(64, CODE + 0x1000, |a| {
        a.lock().inc(qword_ptr(DATA + 61)).unwrap();
        a.hlt().unwrap();
    });
    take_away(&g, NEXT);
    expect_loss(&mut g, NEXT);
    assert_eq!(g.rip(), CODE);
    other.expect_exit(exit::HLT);
    assert_eq!(g.memory.machine.write(g.memory.ram + 8, &[1]), Ok(()));
}

#[test]
fn hypervisors_find_out_too() {
    let g = Guest::long(|_| {});
    let (machine, at) = (g.memory.machine.clone(), g.memory.ram + DATA as usize);
    take_away(&g, DATA);
    let lost = |address| Err(AccessError::Lost(Lost { address, of: 0, awaited: false }));
    let mut bytes = [0u8; 8];
    assert_eq!(machine.read(at + 8, &mut bytes), lost(at + 8));
    assert_eq!(machine.read(at - 4, &mut bytes), lost(at));
    assert_eq!(machine.write(at + 16, &bytes), lost(at + 16));
    // SAFETY: nothing to drop.
    assert_eq!(unsafe { machine.words(at, 1, |_| ()) }, Ok(()));
    // SAFETY: as above.
    let word = unsafe { machine.words(at, 1, |w| w[0].load(std::sync::atomic::Ordering::SeqCst)) };
    assert_eq!(word, lost(at).map(|()| 0));
    give_back(&g, DATA);
    assert_eq!(machine.read(at, &mut bytes), Ok(()));
    assert_eq!(machine.read(1 << 40, &mut bytes), Err(AccessError::Unregistered));
}
