// SPDX-License-Identifier: Apache-2.0
//! Tests of guards, and of what their handler leaves to others.

use std::ffi::c_int;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::ptr::null_mut;

use super::guards::all;
use super::*;
use crate::int::Int;

const PAGE: usize = 4096;

fn map(pages: usize, fd: Option<&File>) -> usize {
    let (kind, fd) =
        fd.map_or((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1), |f| (libc::MAP_SHARED, f.as_raw_fd()));
    // SAFETY: a new mapping.
    let p = unsafe { libc::mmap(null_mut(), pages * PAGE, libc::PROT_READ | libc::PROT_WRITE, kind, fd, 0) };
    assert_ne!(p, libc::MAP_FAILED);
    p as usize
}

/// Takes a page away, and leaves nothing for other mappings to take.
fn lose(page: usize) {
    // SAFETY: the test's mapping.
    assert_eq!(unsafe { libc::mprotect(page as *mut c_void, PAGE, libc::PROT_NONE) }, 0);
}

fn within(base: usize, size: usize) -> impl Fn(usize) -> bool {
    move |address| address.wrapping_sub(base) < size
}

fn load(at: usize) -> u64 {
    // SAFETY: guarded, or the end.
    unsafe { (at as *const u64).read_volatile() }
}

fn store(at: usize) {
    // SAFETY: as above.
    unsafe { (at as *mut u64).write_volatile(1) }
}

#[test]
fn accesses_to_memory_that_is_not_there_are_a_result() {
    // SAFETY: a file without a name.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"lost".as_ptr(), 0)) };
    file.set_len(4 * PAGE as u64).unwrap();
    let at = map(4, Some(&file));
    let covers = within(at, 4 * PAGE);
    // SAFETY: nothing to drop.
    let guarded = |f: &dyn Fn()| unsafe { guarded(&covers, f) };
    assert_eq!(guarded(&|| store(at + PAGE + 8)), Ok(()));
    file.set_len(PAGE as u64).unwrap();
    assert_eq!(guarded(&|| store(at + 8)), Ok(()));
    assert_eq!(
        guarded(&|| assert_eq!(load(at + PAGE + 8), 0)),
        Err(Lost { address: at + PAGE + 8, of: 0, awaited: false })
    );
    assert_eq!(
        guarded(&|| store(at + 3 * PAGE)),
        Err(Lost { address: at + 3 * PAGE, of: 0, awaited: false })
    );
    file.set_len(4 * PAGE as u64).unwrap();
    assert_eq!(guarded(&|| assert_eq!(load(at + PAGE + 8), 0)), Ok(()));
    // SAFETY: this test's mapping.
    unsafe { libc::mprotect(at as *mut c_void, PAGE, libc::PROT_READ) };
    assert_eq!(guarded(&|| assert_eq!(load(at + 8), 1)), Ok(()));
    assert_eq!(guarded(&|| store(at)), Err(Lost { address: at, of: 0, awaited: false }));
    lose(at);
    assert_eq!(
        guarded(&|| assert_eq!(load(at + 8), 1)),
        Err(Lost { address: at + 8, of: 0, awaited: false })
    );
}

#[test]
fn an_access_that_names_what_it_is_for_says_so_when_it_is_lost() {
    let at = map(1, None);
    lose(at);
    let what = [0u8; 5];
    let (of, base, offset) = (&raw const what[3], at as u64 - 0x1000, 0x1010);
    let lost = Lost { address: at + 0x10, of: of as usize, awaited: false };
    // SAFETY: guarded; nothing to drop.
    unsafe {
        let all = within(at, PAGE);
        assert_eq!(guarded(&all, || load_for::<u8, _>(of, base, offset)), Err(lost));
        assert_eq!(guarded(&all, || load_for::<u16, _>(of, base, offset)), Err(lost));
        assert_eq!(guarded(&all, || load_for::<u32, _>(of, base, offset)), Err(lost));
        assert_eq!(guarded(&all, || load_for::<u64, _>(of, base, offset)), Err(lost));
        assert_eq!(guarded(&all, || load128_for(of, base, offset)), Err(lost));
        assert_eq!(guarded(&all, || store_for(of, base, offset, 1u8)), Err(lost));
        assert_eq!(guarded(&all, || store_for(of, base, offset, 1u16)), Err(lost));
        assert_eq!(guarded(&all, || store_for(of, base, offset, 1u32)), Err(lost));
        assert_eq!(guarded(&all, || store_for(of, base, offset, 1u64)), Err(lost));
        assert_eq!(guarded(&all, || store128_for(of, base, offset, [1, 2])), Err(lost));
        libc::mprotect(at as *mut c_void, PAGE, libc::PROT_READ | libc::PROT_WRITE);
        store128_for(of, base, offset, [0x8081_8283_8485_8687, u64::MAX]);
        store_for(of, base, offset + 8, 0x7fu8);
        store_for(of, base, offset + 10, 0u16);
        store_for(of, base, offset + 12, 0x1234_5678u32);
        assert_eq!(load128_for(of, base, offset), [0x8081_8283_8485_8687, 0x1234_5678_0000_ff7f]);
        assert_eq!(load_for::<u64, _>(of, base, offset), 0x8081_8283_8485_8687);
        assert_eq!(load_for::<u32, _>(of, base, offset).to_u64(), 0x8485_8687);
        assert_eq!(load_for::<u16, _>(of, base, offset).to_u64(), 0x8687);
        assert_eq!(load_for::<u8, _>(of, base, offset).to_u64(), 0x87);
    }
}

#[test]
fn registers_that_a_call_keeps_are_kept_and_the_floating_point_environment_is_put_back() {
    let at = map(1, None);
    // SAFETY: this test's mapping; the host's MXCSR is as it was when the test ends.
    unsafe {
        lose(at);
        let mut kept = [1u64, 2, 3, 4, 5, 6];
        let before = mxcsr();
        for _ in 0..3 {
            let done: Result<(), Lost> = guarded(&within(at, PAGE), || {
                set_mxcsr(before ^ 0x6000);
                // Over all registers that a call keeps; it doesn't come to the end.
                core::arch::asm!("xor ebx, ebx", "xor ebp, ebp", "xor r12, r12", "xor r13, r13", "xor r14, r14",
                    "xor r15, r15", "std", "mov rax, [rdi]", "ud2", in("rdi") at, options(noreturn));
            });
            assert_eq!((done, mxcsr()), (Err(Lost { address: at, of: 0, awaited: false }), before));
            kept.iter_mut().for_each(|k| *k += std::hint::black_box(1));
        }
        assert_eq!(kept, [4, 5, 6, 7, 8, 9]);
        let flags: u64;
        core::arch::asm!("pushfq", "pop {}", out(reg) flags);
        assert_eq!(flags & 1 << 10, 0, "DF");
    }
}

fn mxcsr() -> u32 {
    let mut v = 0u32;
    // SAFETY: writes `v`.
    unsafe { core::arch::asm!("stmxcsr [{}]", in(reg) &raw mut v) };
    v
}

fn set_mxcsr(v: u32) {
    // SAFETY: the rounding mode, which the test puts back.
    unsafe { core::arch::asm!("ldmxcsr [{}]", in(reg) &raw const v) };
}

#[test]
fn the_innermost_guard_that_expects_the_address_ends() {
    let (a, b) = (map(1, None), map(1, None));
    // SAFETY: this test's mappings; nothing to drop.
    unsafe {
        lose(a);
        lose(b);
        let ended = guarded(&within(a, PAGE), || {
            let inner = guarded(&within(b, PAGE), || store(b));
            assert_eq!(inner, Err(Lost { address: b, of: 0, awaited: false }));
            guarded(&within(b, PAGE), || store(a)).is_ok()
        });
        assert_eq!(ended, Err(Lost { address: a, of: 0, awaited: false }));
        // What was left is forgotten.
        assert_eq!(guarded(&within(b, PAGE), || store(b)), Err(Lost { address: b, of: 0, awaited: false }));
    }
}

#[test]
fn panics_pass_through() {
    // SAFETY: nothing is lost.
    let ended = catch_unwind(|| unsafe { guarded(&|_| false, || panic!("as usual")) });
    assert_eq!(*ended.unwrap_err().downcast::<&str>().unwrap(), "as usual");
}

#[test]
fn each_thread_has_its_own_guards() {
    let at = map(1, None);
    lose(at);
    for _ in 0..3 {
        std::thread::scope(|s| {
            for n in 0..4 {
                s.spawn(move || {
                    for _ in 0..200 {
                        // SAFETY: nothing to drop.
                        let ended = unsafe { guarded(&within(at, PAGE), || store(at + 8 * n)) };
                        assert_eq!(ended, Err(Lost { address: at + 8 * n, of: 0, awaited: false }));
                    }
                });
            }
        });
    }
    assert!(all().count() < 40, "threads that have ended leave theirs to others");
}

/// Runs a test below in a process of its own; how that ended.
fn end_of(test: &str) -> std::process::ExitStatus {
    let name = format!("mem::lost::tests::ends::{test}");
    let program = std::env::current_exe().unwrap();
    let child = Command::new(program).args(["--ignored", "--exact", &name, "--test-threads=1"]).output();
    child.unwrap().status
}

#[test]
fn what_no_guard_expects_is_what_it_was() {
    assert_eq!(end_of("a_fault_that_no_guard_expects").signal(), Some(libc::SIGSEGV));
    assert_eq!(end_of("a_signal_that_somebody_sends").signal(), Some(libc::SIGBUS));
    assert_eq!(end_of("a_fault_of_which_there_was_a_handler").code(), Some(42));
    assert_eq!(end_of("a_signal_that_was_ignored").code(), Some(43));
}

/// Each ends its process.
mod ends {
    use super::*;

    fn prepare() -> usize {
        let at = map(1, None);
        // SAFETY: the guard expects everything, but has ended.
        unsafe {
            lose(at);
            libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 });
            guarded(&|_| true, || store(at)).unwrap_err();
        }
        at
    }

    #[test]
    #[ignore = "ends the process"]
    fn a_fault_that_no_guard_expects() {
        let at = prepare();
        // SAFETY: not expected.
        let _ = unsafe { guarded(&|address| address != at, || store(at)) };
    }

    #[test]
    #[ignore = "ends the process"]
    fn a_signal_that_somebody_sends() {
        // SAFETY: instead of the standard library's handler, which takes it for a fault that comes again.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        prepare();
        // SAFETY: ends the process, in spite of the guard.
        let _ = unsafe { guarded(&|_| true, || libc::raise(libc::SIGBUS)) };
    }

    #[test]
    #[ignore = "ends the process"]
    fn a_fault_of_which_there_was_a_handler() {
        extern "C" fn handler(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
            // SAFETY: the kernel's; the process ends.
            unsafe { libc::_exit(if (*info).si_addr() as usize != 0 { 42 } else { 1 }) }
        }
        // SAFETY: installs it.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGSEGV, &action, null_mut());
        }
        store(prepare());
    }

    #[test]
    #[ignore = "ends the process"]
    fn a_signal_that_was_ignored() {
        // SAFETY: sends a signal that is ignored.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_IGN) };
        prepare();
        // SAFETY: as above.
        unsafe {
            libc::raise(libc::SIGBUS);
            libc::_exit(43)
        }
    }
}

/// Memory of whose pages none is there, nor will be; None where the host lets nobody have a userfaultfd.
fn awaited(pages: usize) -> Option<(usize, File)> {
    const USER_MODE_ONLY: libc::c_int = 1;
    const API: libc::c_ulong = 0xc018_aa3f;
    const REGISTER: libc::c_ulong = 0xc020_aa00;
    let at = map(pages, None);
    // SAFETY: system calls with structures as the kernel has them (linux/userfaultfd.h).
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) as c_int;
        if fd < 0 {
            return None;
        }
        let file = File::from_raw_fd(fd);
        let mut api = [0xaau64, 0, 0];
        assert_eq!(libc::ioctl(fd, API, api.as_mut_ptr()), 0);
        let mut range = [at as u64, (pages * PAGE) as u64, 1, 0];
        assert_eq!(libc::ioctl(fd, REGISTER, range.as_mut_ptr()), 0);
        Some((at, file))
    }
}

#[test]
fn a_thread_that_waits_for_a_page_is_roused_and_no_other_is() {
    use std::sync::atomic::{AtomicI32, AtomicUsize};
    use std::time::Duration;
    let Some((at, file)) = awaited(8) else { return };
    // Closed, it lets everybody go on.
    let file = std::sync::Mutex::new(Some(file));
    let there = map(1, None);
    store(there);
    let own = [0u8; 64];
    let accesses: [(&str, &(dyn Fn() + Sync), usize); 5] = [
        ("load", &|| _ = std::hint::black_box(load(at + 8)), at + 8),
        ("store", &|| store(at + PAGE), at + PAGE),
        // SAFETY: guarded.
        (
            "exchange",
            &|| unsafe { _ = (*((at + 16) as *const AtomicUsize)).swap(1, Ordering::SeqCst) },
            at + 16,
        ),
        // SAFETY: guarded; the mapping has another page.
        (
            "copy",
            &|| unsafe { std::ptr::copy_nonoverlapping(own.as_ptr(), (at + 2 * PAGE) as *mut u8, 64) },
            0,
        ),
        // A store whose first half is in a page that is there.
        // SAFETY: guarded.
        ("crossing", &|| unsafe { ((at + PAGE - 4) as *mut u64).write_unaligned(1) }, at + PAGE - 4),
    ];
    for (what, access, address) in accesses {
        let thread = AtomicI32::new(0);
        std::thread::scope(|s| {
            let waiting = s.spawn(|| {
                // SAFETY: asks.
                thread.store(unsafe { libc::syscall(libc::SYS_gettid) } as i32, Ordering::SeqCst);
                // SAFETY: nothing to drop.
                unsafe { guarded_rousable(&within(at, 8 * PAGE), access) }
            });
            let end = std::time::Instant::now() + Duration::from_secs(30);
            while !waiting.is_finished() {
                if std::time::Instant::now() > end {
                    file.lock().unwrap().take();
                    panic!("{what}: it sleeps on");
                }
                std::thread::sleep(Duration::from_millis(1));
                match thread.load(Ordering::SeqCst) {
                    0 => {}
                    number => rouse(number),
                }
            }
            let lost = waiting.join().unwrap().unwrap_err();
            assert!(lost.awaited, "{what}: {lost:?}");
            assert!(address == 0 || lost.address.wrapping_sub(address) < 8, "{what}: {lost:?}");
        });
    }
    // One that works in memory that is there, and in a guard that cannot be begun again, stays.
    // SAFETY: asks; nothing to drop.
    unsafe {
        let me = libc::syscall(libc::SYS_gettid) as i32;
        let work = || {
            (0..2000u64).for_each(|n| {
                store(there);
                if n % 100 == 0 {
                    rouse(me);
                }
            });
        };
        assert_eq!(guarded_rousable(&within(there, PAGE), work), Ok(()));
        assert_eq!(guarded(&within(there, PAGE), work), Ok(()));
    }
}
