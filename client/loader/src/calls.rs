// SPDX-License-Identifier: Apache-2.0
//! The program's system calls that have come to us.

use core::ffi::{c_char, c_int, c_uint, c_ulong};
use core::sync::atomic::{AtomicUsize, Ordering};

use libc::{siginfo_t, ucontext_t};
use softkvm_client::{Core, NOT_OURS, device};

use crate::donor::{self, Request};
use crate::elf::HEAP;
use crate::filter;
use crate::handlers::{self, Action, OPEN};
use crate::raw::{call, raw, syscall};

const KVM_RUN: usize = 0xAE80;

/// The program's heap: where it begins, and its end. Ours is the C library's.
static HEAP_START: AtomicUsize = AtomicUsize::new(0);
static HEAP_END: AtomicUsize = AtomicUsize::new(0);

fn is_device(directory: usize, path: usize) -> bool {
    device::is_device(directory as c_int, path as *const c_char, call)
}

fn open_device(request: &Request, core: &'static Core) -> isize {
    (core.open)(request.arguments[0] as c_int) as isize
}

fn ioctl(request: &Request, core: &'static Core) -> isize {
    let [fd, number, argument] = request.arguments;
    (core.ioctl)(fd as c_int, number as c_uint, argument as c_ulong) as isize
}

fn run(request: &Request, core: &'static Core) -> isize {
    let [fd, number, argument] = request.arguments;
    (core.block_in_run)(request.mask);
    (core.ioctl)(fd as c_int, number as c_uint, argument as c_ulong) as isize
}

fn end(_: &Request, core: &'static Core) -> isize {
    (core.at_exit)();
    0
}

/// brk(): the program's own.
fn brk(wanted: usize) -> isize {
    let mut start = HEAP_START.load(Ordering::SeqCst);
    if start == 0 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let at = raw!(libc::SYS_mmap, 0, HEAP, libc::PROT_READ | libc::PROT_WRITE, flags, usize::MAX, 0);
        if at < 0 {
            return at;
        }
        start = at as usize;
        HEAP_END.store(start, Ordering::SeqCst);
        HEAP_START.store(start, Ordering::SeqCst);
    }
    if (start..=start + HEAP).contains(&wanted) {
        let before = HEAP_END.swap(wanted, Ordering::SeqCst);
        if wanted < before {
            let from = wanted.next_multiple_of(4096);
            raw!(libc::SYS_madvise, from, before.next_multiple_of(4096) - from, libc::MADV_DONTNEED);
        }
    }
    HEAP_END.load(Ordering::SeqCst) as isize
}

/// rt_sigprocmask(): on the mask that the handler's return puts back.
fn sigprocmask(mask: &mut u64, how: usize, new: *const u64, old: *mut u64, size: usize) -> isize {
    if size != 8 {
        return -(libc::EINVAL as isize);
    }
    let before = *mask;
    if !new.is_null() {
        // SAFETY: the program's.
        let new = unsafe { *new };
        *mask = match how as c_int {
            libc::SIG_BLOCK => before | new,
            libc::SIG_UNBLOCK => before & !new,
            libc::SIG_SETMASK => new,
            _ => return -(libc::EINVAL as isize),
        } & !OPEN;
    }
    if !old.is_null() {
        // SAFETY: the program's.
        unsafe { *old = before };
    }
    0
}

/// Has the kernel describe the root, to find out whether there is room for it, and describes the device.
fn describe<T>(number: i64, arguments: [usize; 6], into: usize, describe: unsafe fn(*mut T)) -> isize {
    let result = call(number, arguments);
    if result == 0 {
        // SAFETY: the program's structure, which the kernel has just written.
        unsafe { describe(into as *mut T) };
    }
    result
}

fn permission(mode: usize) -> isize {
    -(device::permission(mode as c_int) as isize)
}

/// Handles one: its result goes to RAX.
pub fn handle(info: *mut siginfo_t, context: &mut ucontext_t) {
    use libc::{REG_R8, REG_R9, REG_R10, REG_RAX, REG_RDI, REG_RDX, REG_RSI};
    // SAFETY: si_syscall is behind the address of the call (`_sigsys`).
    let number = unsafe { i64::from(*info.cast::<i32>().add(6)) };
    let registers = &mut context.uc_mcontext.gregs;
    let arguments =
        [REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9].map(|r| registers[r as usize] as usize);
    let [a, b, c, d, ..] = arguments;
    // SAFETY: the kernel's sigset_t is 8 bytes.
    let mask = unsafe { &mut *(&raw mut context.uc_sigmask).cast::<u64>() };
    // SAFETY: the program's own call, as it has made it.
    let as_it_is = || unsafe { syscall(number, arguments) };
    const HERE: usize = libc::AT_FDCWD as usize;
    let root = c"/".as_ptr() as usize;
    let result = match number {
        libc::SYS_ioctl if donor::is_child() => as_it_is(),
        libc::SYS_ioctl => {
            let function = if b == KVM_RUN { run } else { ioctl };
            match donor::request(function, [a, b, c], *mask) {
                result if result == NOT_OURS as isize => as_it_is(),
                result => result,
            }
        }
        libc::SYS_open if is_device(HERE, a) && !donor::is_child() => {
            donor::request(open_device, [b, 0, 0], *mask)
        }
        libc::SYS_openat if is_device(a, b) && !donor::is_child() => {
            donor::request(open_device, [c, 0, 0], *mask)
        }
        libc::SYS_access if is_device(HERE, a) => permission(b),
        libc::SYS_faccessat if is_device(a, b) => permission(c),
        libc::SYS_faccessat2 if d & !device::ACCESS_FLAGS == 0 && is_device(a, b) => permission(c),
        libc::SYS_stat | libc::SYS_lstat if is_device(HERE, a) => {
            describe(number, [root, b, 0, 0, 0, 0], b, device::describe)
        }
        libc::SYS_newfstatat if is_device(a, b) => {
            describe(number, [a, root, c, d, 0, 0], c, device::describe)
        }
        libc::SYS_statx if is_device(a, b) => {
            describe(number, [a, root, c, d, arguments[4], 0], arguments[4], device::describe_x)
        }
        libc::SYS_brk => brk(a),
        libc::SYS_rt_sigaction => handlers::sigaction(a as c_int, b as *const Action, c as *mut Action, d),
        libc::SYS_rt_sigprocmask => sigprocmask(mask, a, b as *const u64, c as *mut u64, d),
        libc::SYS_seccomp | libc::SYS_prctl => filter::answer(number, [a, b, c]).unwrap_or_else(as_it_is),
        libc::SYS_exit_group => {
            if softkvm_client::python::core().is_some() && !donor::is_child() {
                donor::request(end, [0; 3], *mask);
            }
            as_it_is()
        }
        _ => as_it_is(),
    };
    registers[REG_RAX as usize] = result as i64;
}
