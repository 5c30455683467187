// SPDX-License-Identifier: Apache-2.0
//! Code that changes under the processor, and several processors at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use iced_x86::code_asm::*;
use softcpu::clock::clock_ns;
use softcpu::mem::{Shared, Wake};
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::vmcb::save;

use crate::common::*;

/// MOV EAX, imm32; RET at DATA; called in a loop by the guests below.
fn function(value: u32) -> Vec<u8> {
    let mut bytes = vec![0xb8];
    bytes.extend(value.to_le_bytes());
    bytes.push(0xc3);
    bytes
}

#[test]
fn code_written_through_an_alias_takes_effect_at_once() {
    let alias = DATA + 0x5000;
    let mut g = Guest::long(|a| {
        a.mov(rbx, DATA).unwrap();
        a.call(rbx).unwrap();
        a.mov(esi, eax).unwrap();
        a.mov(dword_ptr(alias + 1), 222).unwrap();
        a.call(rbx).unwrap();
        a.hlt().unwrap();
    });
    g.memory.write_bytes(DATA, &function(111));
    g.memory.write::<u64>(g.memory.leaf(alias), DATA | 7);
    g.expect_exit(exit::HLT);
    assert_eq!((g.cpu.rb.gpr[6], g.rax()), (111, 222));
}

#[test]
fn an_instruction_that_overwrites_the_next_one() {
    let mut g = Guest::long(|a| {
        // Turns the MOV's immediate behind it from 1 into 2, in the same block.
        a.db(&[0xc6, 0x04, 0x25]).unwrap();
        a.dd(&[CODE as u32 + 9]).unwrap();
        a.db(&[2]).unwrap();
        a.db(&[0xb0, 1]).unwrap();
        a.hlt().unwrap();
    });
    g.expect_exit(exit::HLT);
    assert_eq!(g.rax() & 0xff, 2);
}

#[test]
fn a_store_that_begins_before_the_block_it_is_in_changes_what_follows() {
    const AT: u64 = CODE + 0x100;
    let mut g = Guest::long(|a| {
        a.movups(xmm0, xmmword_ptr(DATA)).unwrap();
        a.jmp(AT).unwrap();
    });
    // MOVUPS [AT-4], XMM0; MOV AL, 1; HLT. The store puts the same there, but for MOV AL, 2.
    let mut code = vec![0x0f, 0x11, 0x04, 0x25];
    code.extend((AT as u32 - 4).to_le_bytes());
    code.extend([0xb0, 1, 0xf4, 0x90]);
    g.memory.write_bytes(AT, &code);
    g.memory.write_bytes(DATA + 4, &code);
    g.memory.write::<u8>(DATA + 4 + 9, 2);
    g.expect_exit(exit::HLT);
    assert_eq!(g.rax() & 0xff, 2);
}

#[test]
fn code_written_by_the_host_takes_effect_at_the_next_vmrun_or_notification() {
    let mut g = Guest::long(|a| {
        let mut again = a.create_label();
        a.mov(rbx, DATA).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rbx).unwrap();
        a.cpuid().unwrap();
        a.jmp(again).unwrap();
    });
    g.intercept(exit::CPUID);
    g.memory.write_bytes(DATA, &function(1));
    g.expect_exit(exit::CPUID);
    assert_eq!(g.rax(), 1);
    g.memory.write_bytes(DATA, &function(2));
    let back = g.rip() + 2;
    g.set(save::RIP, back);
    g.expect_exit(exit::CPUID);
    assert_eq!(g.rax(), 2);
}

/// A jump of which the last three bytes lie in the page behind DATA's, and nothing else does. It goes to a function that
/// returns 1; with [`OTHER`] in that page to one that returns 2, with 10h in its second byte to one that returns 3.
const CROSSING: u64 = DATA + 0xffe;
const SECOND: u64 = DATA + 0x1000;
const OTHER: u8 = 0xf2;

fn put_crossing(memory: &Memory) {
    memory.write_bytes(CROSSING, &[0xe9, 0x00, 0xf1, 0xff, 0xff]);
    for (at, value) in [(0x103, 1), (0x203, 2), (0x113, 3)] {
        memory.write_bytes(DATA + at, &function(value));
    }
}

#[test]
fn a_block_across_pages_is_compared_in_both() {
    // The host writes one page or the other between two VMRUNs.
    for (at, byte, expected) in [(SECOND, OTHER, 2), (CROSSING + 1, 0x10, 3)] {
        let mut g = Guest::long(|a| {
            let mut again = a.create_label();
            a.mov(rbx, CROSSING).unwrap();
            a.set_label(&mut again).unwrap();
            a.call(rbx).unwrap();
            a.cpuid().unwrap();
            a.jmp(again).unwrap();
        });
        g.intercept(exit::CPUID);
        put_crossing(&g.memory);
        for (turn, value) in [1, 1, expected].into_iter().enumerate() {
            if turn == 2 {
                g.memory.write::<u8>(at, byte);
            }
            g.expect_exit(exit::CPUID);
            assert_eq!(g.rax(), value);
            let back = g.rip() + 2;
            g.set(save::RIP, back);
        }
    }
}

#[test]
fn a_store_into_either_page_of_a_block_is_noticed() {
    for (at, byte, expected) in [(SECOND, OTHER, 2), (CROSSING + 1, 0x10, 3)] {
        // By the page's own address and by another one, which has been written before the code was there.
        let page = at & !0xfff;
        for alias in [page, DATA + 0x5000] {
            let mut g = Guest::long(|a| {
                a.mov(word_ptr(alias + 0x800), 1).unwrap();
                a.mov(rbx, CROSSING).unwrap();
                a.call(rbx).unwrap();
                a.call(rbx).unwrap();
                a.mov(esi, eax).unwrap();
                a.mov(byte_ptr(alias + at % 4096), byte as u32).unwrap();
                a.call(rbx).unwrap();
                a.hlt().unwrap();
            });
            put_crossing(&g.memory);
            g.memory.write::<u64>(g.memory.leaf(DATA + 0x5000), page | 7);
            g.expect_exit(exit::HLT);
            assert_eq!((g.cpu.rb.gpr[6], g.rax()), (1, expected), "{at:#x} by {alias:#x}");
        }
    }
}

#[test]
fn the_second_page_of_a_block_is_the_one_that_is_mapped_now() {
    let other = DATA + 0x5000;
    let mut g = Guest::long(|a| {
        a.mov(rbx, CROSSING).unwrap();
        a.call(rbx).unwrap();
        a.call(rbx).unwrap();
        a.mov(esi, eax).unwrap();
        a.mov(rcx, other | 7).unwrap();
        a.mov(qword_ptr(PT + (SECOND >> 12) * 8), rcx).unwrap();
        a.invlpg(byte_ptr(SECOND)).unwrap();
        a.call(rbx).unwrap();
        a.mov(edi, eax).unwrap();
        // And it may be none at all.
        a.mov(qword_ptr(PT + (SECOND >> 12) * 8), 0).unwrap();
        a.invlpg(byte_ptr(SECOND)).unwrap();
        a.call(rbx).unwrap();
    });
    put_crossing(&g.memory);
    g.memory.write_bytes(other, &[OTHER, 0xff, 0xff]);
    g.expect(14, Some(0x10), CROSSING);
    assert_eq!(g.get::<u64>(save::CR2), SECOND);
    assert_eq!((g.cpu.rb.gpr[6], g.cpu.rb.gpr[7]), (1, 2));
}

#[test]
fn code_written_by_another_processor_is_noticed() {
    let memory = Memory::new();
    memory.write_bytes(DATA, &function(1));
    let flag = DATA + 0x2000;
    // One processor calls until the function returns 2; the other patches it once the first has called it.
    let mut caller = Guest::bare(memory.clone(), 0);
    caller.assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(rbx, DATA).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rbx).unwrap();
        a.inc(qword_ptr(flag)).unwrap();
        a.cmp(eax, 2).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    });
    let mut writer = Guest::bare(memory.clone(), 1);
    writer.set(save::RIP, CODE + 0x1000);
    writer.set(save::RSP, STACK0);
    writer.assemble(64, CODE + 0x1000, |a| {
        let mut wait = a.create_label();
        a.set_label(&mut wait).unwrap();
        a.cmp(qword_ptr(flag), 1000).unwrap();
        a.jb(wait).unwrap();
        a.mov(dword_ptr(DATA + 1), 2).unwrap();
        a.hlt().unwrap();
    });
    std::thread::scope(|s| {
        s.spawn(move || caller.expect_exit(exit::HLT));
        s.spawn(move || writer.expect_exit(exit::HLT));
    });
    assert!(memory.read::<u64>(flag) > 1000);
}

fn count_together(cpus: u32, step: fn(&mut CodeAssembler)) -> Memory {
    let memory = Memory::new();
    let guests: Vec<Guest> = (0..cpus)
        .map(|n| {
            let mut g = Guest::bare(memory.clone(), n);
            g.set(save::RSP, STACK - 0x400 * n as u64);
            if n == 0 {
                g.assemble(64, CODE, |a| {
                    let mut again = a.create_label();
                    a.mov(ecx, 20_000).unwrap();
                    a.set_label(&mut again).unwrap();
                    step(a);
                    a.dec(ecx).unwrap();
                    a.jnz(again).unwrap();
                    a.hlt().unwrap();
                });
            }
            g
        })
        .collect();
    std::thread::scope(|s| {
        for mut g in guests {
            s.spawn(move || g.expect_exit(exit::HLT));
        }
    });
    memory
}

#[test]
fn locked_increments_are_never_lost() {
    let steps: [fn(&mut CodeAssembler); 3] = [
        |a| a.lock().inc(qword_ptr(DATA)).unwrap(),
        |a| {
            a.mov(eax, 1).unwrap();
            a.lock().xadd(qword_ptr(DATA), rax).unwrap();
        },
        |a| {
            let mut again = a.create_label();
            a.mov(rax, qword_ptr(DATA)).unwrap();
            a.set_label(&mut again).unwrap();
            a.lea(rdx, ptr(rax + 1)).unwrap();
            a.lock().cmpxchg(qword_ptr(DATA), rdx).unwrap();
            a.jne(again).unwrap();
        },
    ];
    for step in steps {
        for cpus in [2u32, 4] {
            assert_eq!(count_together(cpus, step).read::<u64>(DATA), 20_000 * cpus as u64);
        }
    }
}

/// Addresses of operands that cross a cache line and a page.
const SPLIT: [u64; 2] = [DATA + 61, DATA + 0xffd];

#[test]
fn locked_increments_across_a_cache_line_or_page_are_never_lost() {
    for n in 0..2 {
        let step: [fn(&mut CodeAssembler); 2] =
            [|a| a.lock().inc(qword_ptr(SPLIT[0])).unwrap(), |a| a.lock().inc(qword_ptr(SPLIT[1])).unwrap()];
        for cpus in [1, 2, 4] {
            let memory = count_together(cpus, step[n]);
            assert_eq!(memory.read::<u64>(SPLIT[n]), 20_000 * cpus as u64);
        }
    }
}

/// Two processors of one memory, each with its code.
pub fn pair(first: impl FnOnce(&mut CodeAssembler), second: impl FnOnce(&mut CodeAssembler)) -> [Guest; 2] {
    let memory = Memory::new();
    let mut a = Guest::bare(memory.clone(), 0);
    a.assemble(64, CODE, first);
    let mut b = Guest::bare(memory, 1);
    b.set(save::RIP, CODE + 0x1000);
    b.set(save::RSP, STACK0);
    b.assemble(64, CODE + 0x1000, second);
    [a, b]
}

#[test]
fn a_split_locked_exchange_that_fails_writes_nothing_over_a_plain_store() {
    for at in SPLIT {
        // CMPXCHG writes what it has read when it fails (APM vol. 3): the other's store must come before or after.
        let [mut locker, mut storer] = pair(
            |a| {
                let mut again = a.create_label();
                a.set_label(&mut again).unwrap();
                a.mov(eax, -1).unwrap();
                a.lock().cmpxchg(dword_ptr(at), edx).unwrap();
                a.jmp(again).unwrap();
            },
            |a| {
                let (mut again, mut lost) = (a.create_label(), a.create_label());
                a.mov(ecx, 200_000).unwrap();
                a.set_label(&mut again).unwrap();
                a.inc(bl).unwrap();
                a.mov(byte_ptr(at + 3), bl).unwrap();
                for _ in 0..4 {
                    a.cmp(byte_ptr(at + 3), bl).unwrap();
                    a.jne(lost).unwrap();
                }
                a.dec(ecx).unwrap();
                a.jnz(again).unwrap();
                a.set_label(&mut lost).unwrap();
                a.hlt().unwrap();
            },
        );
        let kick = locker.cpu.engine.shared().clone();
        std::thread::scope(|s| {
            s.spawn(move || locker.expect_exit(exit::INTR));
            storer.expect_exit(exit::HLT);
            kick.kick();
        });
        assert_eq!(storer.cpu.rb.gpr[1], 0, "a store was lost");
    }
}

#[test]
fn split_and_other_locked_additions_to_the_same_bytes_add_up() {
    for at in SPLIT {
        // One adds to the whole, the other to the aligned double word that is its upper part.
        let upper = at + 3;
        let [mut whole, mut part] = pair(
            |a| {
                let mut again = a.create_label();
                a.mov(ecx, 300_000).unwrap();
                a.set_label(&mut again).unwrap();
                a.lock().add(qword_ptr(at), 1).unwrap();
                a.dec(ecx).unwrap();
                a.jnz(again).unwrap();
                a.hlt().unwrap();
            },
            |a| {
                let mut again = a.create_label();
                a.mov(ecx, 300_000).unwrap();
                a.set_label(&mut again).unwrap();
                a.lock().add(dword_ptr(upper), 0x1_0000).unwrap();
                a.dec(ecx).unwrap();
                a.jnz(again).unwrap();
                a.hlt().unwrap();
            },
        );
        let memory = whole.memory.clone();
        std::thread::scope(|s| {
            s.spawn(move || whole.expect_exit(exit::HLT));
            part.expect_exit(exit::HLT);
        });
        assert_eq!(memory.read::<u64>(at), 300_000 + ((300_000 % 0x1_0000) << 40));
    }
}

#[test]
fn a_spinlock_across_a_page_is_nobodys_when_it_has_been_released() {
    let lock = SPLIT[1];
    let critical = |a: &mut CodeAssembler| {
        let (mut again, mut spin) = (a.create_label(), a.create_label());
        a.mov(ebx, 20_000).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(ecx, 1).unwrap();
        a.set_label(&mut spin).unwrap();
        a.xor(eax, eax).unwrap();
        a.lock().cmpxchg(dword_ptr(lock), ecx).unwrap();
        a.jne(spin).unwrap();
        a.inc(dword_ptr(DATA + 0x2000)).unwrap();
        a.mov(dword_ptr(lock), 0).unwrap();
        a.dec(ebx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    };
    let [mut a, mut b] = pair(critical, critical);
    let memory = a.memory.clone();
    std::thread::scope(|s| {
        s.spawn(move || a.expect_exit(exit::HLT));
        b.expect_exit(exit::HLT);
    });
    assert_eq!(memory.read::<u32>(DATA + 0x2000), 40_000);
}

#[test]
fn a_split_locked_operation_waits_until_every_other_processor_stands() {
    let steps: [fn(&mut CodeAssembler, u64); 4] = [
        |a, at| a.lock().inc(dword_ptr(at)).unwrap(),
        |a, at| a.xchg(dword_ptr(at), ebx).unwrap(),
        |a, at| a.lock().bts(dword_ptr(at), edx).unwrap(),
        |a, at| a.lock().cmpxchg8b(qword_ptr(at)).unwrap(),
    ];
    for step in steps {
        for at in SPLIT {
            let mut g = Guest::long(|a| {
                step(a, at);
                a.hlt().unwrap();
            });
            g.cpu.rb.gpr[3] = 1;
            let memory = g.memory.clone();
            // A processor in the guest that doesn't come to the end of its instruction.
            let other = Arc::new(Shared::new());
            memory.machine.attach(other.clone());
            other.start();
            std::thread::scope(|s| {
                let ran = s.spawn(move || g.expect_exit(exit::HLT));
                std::thread::sleep(Duration::from_millis(5));
                assert!(!ran.is_finished() && memory.read::<u32>(at) == 0);
                other.stop();
            });
            assert_ne!(memory.read::<u32>(at), 0);
        }
    }
}

#[test]
fn a_processor_that_halts_does_not_keep_others_from_the_bus() {
    let [mut sleeper, mut locker] = pair(
        |a| {
            a.inc(dword_ptr(DATA)).unwrap();
            a.hlt().unwrap();
            a.inc(dword_ptr(DATA)).unwrap();
            a.hlt().unwrap();
        },
        |a| {
            let (mut wait, mut again) = (a.create_label(), a.create_label());
            a.set_label(&mut wait).unwrap();
            a.cmp(dword_ptr(DATA), 0).unwrap();
            a.je(wait).unwrap();
            a.mov(ecx, 1000).unwrap();
            a.set_label(&mut again).unwrap();
            a.lock().inc(qword_ptr(SPLIT[1])).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
            a.hlt().unwrap();
        },
    );
    sleeper.unintercept(exit::HLT);
    let (kick, memory) = (sleeper.cpu.engine.shared().clone(), locker.memory.clone());
    std::thread::scope(|s| {
        s.spawn(move || {
            sleeper.expect_exit(exit::INTR);
            // What the others wanted of it was no interrupt: it has waited on.
            assert_eq!(sleeper.memory.read::<u32>(DATA), 1);
        });
        locker.expect_exit(exit::HLT);
        kick.kick();
    });
    assert_eq!(memory.read::<u64>(SPLIT[1]), 1000);
}

#[test]
fn a_kick_ends_an_endless_loop() {
    let mut g = Guest::long(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(dword_ptr(DATA)).unwrap();
        a.jmp(again).unwrap();
    });
    let memory = g.memory.clone();
    let shared = g.cpu.engine.shared().clone();
    std::thread::scope(|s| {
        s.spawn(move || {
            while memory.read::<u32>(DATA) < 1000 {
                std::thread::yield_now();
            }
            shared.kick();
        });
        g.expect_exit(exit::INTR);
    });
    assert!(g.cpu.engine.instructions() > 1000);
}

#[test]
fn no_kick_is_lost_however_close_to_falling_asleep_it_comes() {
    const ROUNDS: usize = 20_000;
    let (a, b) = (Shared::default(), Shared::default());
    let turn = |mine: &Shared, other: &Shared| {
        for _ in 0..ROUNDS {
            assert_eq!(mine.wait(Some(clock_ns() + 60_000_000_000)), Wake::Event);
            assert!(mine.clear_kick());
            other.kick();
        }
    };
    std::thread::scope(|s| {
        s.spawn(|| turn(&a, &b));
        a.kick();
        turn(&b, &a);
    });
}

#[test]
fn a_wait_ends_at_its_time_and_leaves_no_kick_behind() {
    let shared = Shared::default();
    let end = clock_ns() + 2_000_000;
    assert_eq!(shared.wait(Some(end)), Wake::Timeout);
    assert!(clock_ns() >= end && !shared.kicked());
}

static SIGNALLED: Shared = Shared::new();

extern "C" fn kick_from_a_handler(_: libc::c_int) {
    SIGNALLED.kick();
}

extern "C" fn handler_that_does_nothing(_: libc::c_int) {}

/// The handler of a signal runs in the middle of anything; a lock that its thread holds it would wait for forever.
#[test]
fn a_signal_handler_may_kick_and_any_handler_interrupts_a_wait() {
    let handlers: [(libc::c_int, extern "C" fn(libc::c_int), Wake); 2] = [
        (libc::SIGUSR1, kick_from_a_handler, Wake::Event),
        (libc::SIGUSR2, handler_that_does_nothing, Wake::Interrupted),
    ];
    for (signal, handler, wake) in handlers {
        // SAFETY: both handlers are async-signal-safe.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
        let ended = &AtomicBool::new(false);
        std::thread::scope(|s| {
            let (send, thread) = std::sync::mpsc::channel();
            let waiter = s.spawn(move || {
                // SAFETY: the calling thread's own handle.
                send.send(unsafe { libc::pthread_self() }).unwrap();
                let woken = SIGNALLED.wait(None);
                ended.store(true, Ordering::SeqCst);
                woken
            });
            let thread = thread.recv().unwrap();
            while !ended.load(Ordering::SeqCst) {
                // SAFETY: the scope joins the thread later.
                unsafe { libc::pthread_kill(thread, signal) };
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(waiter.join().unwrap(), wake);
        });
        assert_eq!(SIGNALLED.clear_kick(), wake == Wake::Event);
    }
}

/// A stack that a few nested calls of the decoder would fill.
const SMALL_STACK: usize = if cfg!(debug_assertions) { 1 << 20 } else { 64 << 10 };

#[test]
fn code_that_another_processor_keeps_rewriting_runs_on_and_ends_at_a_kick() {
    const MOVES: u64 = 12;
    let memory = Memory::new();
    let mut reader = Guest::bare(memory.clone(), 0);
    reader.assemble(64, DATA, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        for _ in 0..MOVES {
            a.mov(eax, 0).unwrap();
        }
        a.inc(qword_ptr(DATA + 0x2000)).unwrap();
        a.jmp(again).unwrap();
    });
    reader.set(save::RIP, DATA);
    let mut writer = Guest::bare(memory.clone(), 1);
    writer.set(save::RIP, CODE);
    writer.set(save::RSP, STACK0);
    writer.assemble(64, CODE, |a| {
        let (mut again, mut round) = (a.create_label(), a.create_label());
        a.mov(ecx, 300_000).unwrap();
        a.set_label(&mut again).unwrap();
        for n in 0..MOVES {
            a.inc(dword_ptr(DATA + 5 * n + 1)).unwrap();
        }
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        // The reader comes round in spite of all that.
        a.set_label(&mut round).unwrap();
        a.cmp(qword_ptr(DATA + 0x2000), 1000).unwrap();
        a.jb(round).unwrap();
        a.hlt().unwrap();
    });
    let kick = reader.cpu.engine.shared().clone();
    std::thread::scope(|s| {
        let small = || std::thread::Builder::new().stack_size(SMALL_STACK);
        small().spawn_scoped(s, move || reader.expect_exit(exit::INTR)).unwrap();
        let writer = small().spawn_scoped(s, move || writer.expect_exit(exit::HLT)).unwrap();
        writer.join().unwrap();
        kick.kick();
    });
}
