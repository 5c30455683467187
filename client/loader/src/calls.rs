// SPDX-License-Identifier: Apache-2.0
//! The program's system calls that have come to us.

use core::ffi::{c_char, c_int, c_uint, c_ulong};

use libc::{siginfo_t, ucontext_t};
use softkvm_client::kernel::are_readable;
use softkvm_client::{NOT_OURS, device, python};

use crate::donor::{self, Request};
use crate::handlers::{self, Action, OPEN};
use crate::names::{self, is_own_program};
use crate::raw::call as kernel;
use crate::{again, descriptors, elf, execute, filter, fork, memory};

const KVM_RUN: usize = 0xAE80;
const KVM_GET_STATS_FD: usize = 0xAECE;

/// What becomes of a call.
pub enum Outcome {
    /// It has been done; −errno if it has failed.
    Result(isize),
    /// The program makes it, as it is.
    Again,
}
use Outcome::{Again, Result};

/// A call of the program's.
pub struct Call<'a> {
    pub number: i64,
    pub arguments: [usize; 6],
    /// Its thread, as it goes on behind the call.
    pub context: &'a mut ucontext_t,
}

impl Call<'_> {
    /// The signals that are blocked then.
    pub fn mask(&mut self) -> &mut u64 {
        // SAFETY: the kernel's sigset_t is 8 bytes.
        unsafe { &mut *(&raw mut self.context.uc_sigmask).cast::<u64>() }
    }

    /// Makes it here.
    fn make(&self) -> isize {
        kernel(self.number, self.arguments)
    }
}

fn is_device(directory: usize, path: usize) -> bool {
    device::is_device(directory as c_int, path as *const c_char, kernel)
}

fn open_device(request: &Request) -> isize {
    if python::core().is_none() {
        elf::replace_in_libraries();
    }
    let Some(core) = donor::core() else { return -(libc::ENOENT as isize) };
    if let Err(error) = filter::follow_memory() {
        return -(error.raw_os_error().unwrap_or(libc::EAGAIN) as isize);
    }
    (core.open)(request.arguments[0] as c_int) as isize
}

fn ioctl(request: &Request) -> isize {
    let Some(core) = python::core() else { return NOT_OURS as isize };
    let [fd, number, argument] = request.arguments;
    if number == KVM_RUN {
        (core.block_in_run)(request.mask);
    }
    let result = (core.ioctl)(fd as c_int, number as c_uint, argument as c_ulong) as isize;
    if number == KVM_GET_STATS_FD && result >= 0 {
        filter::follow_reads(result as i32);
    }
    result
}

fn end(_: &Request) -> isize {
    if let Some(core) = python::core() {
        (core.at_exit)();
    }
    0
}

/// open() of a file of ours; `at` is the argument that has the path.
fn open(call: &mut Call, directory: usize, at: usize, flags: usize) -> Outcome {
    let (number, path) = (call.number, call.arguments[at]);
    if is_device(directory, path) {
        if donor::is_child() {
            return Result(-(libc::ENODEV as isize));
        }
        let mask = *call.mask();
        return Result(donor::request(open_device, [flags, 0, 0], mask));
    }
    if number != libc::SYS_creat && is_own_program(path) {
        call.arguments[at] = names::program().as_ptr() as usize;
        return Result(call.make());
    }
    Again
}

/// openat2(): as openat(), but that its flags are in a structure, which may ask for more.
fn open_by_structure(call: &mut Call) -> Outcome {
    const SIZE: usize = 24;
    let [directory, _, how, size, ..] = call.arguments;
    if size != SIZE || !are_readable(kernel, how, size) {
        return Again;
    }
    // SAFETY: the program's structure: flags, mode, resolve.
    let [flags, _, resolve] = unsafe { (how as *const [u64; 3]).read_unaligned() };
    if resolve != 0 || flags > c_int::MAX as u64 {
        return Again;
    }
    open(call, directory, 1, flags as usize)
}

/// Has the kernel describe the root, to find out whether there is room for it, and describes the device.
fn describe<T>(number: i64, arguments: [usize; 6], into: usize, describe: unsafe fn(*mut T)) -> isize {
    let result = kernel(number, arguments);
    if result == 0 {
        // SAFETY: the program's structure, which the kernel has just written.
        unsafe { describe(into as *mut T) };
    }
    result
}

fn permission(mode: usize) -> isize {
    -(device::permission(mode as c_int) as isize)
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

fn done_if(condition: bool, function: impl FnOnce() -> isize) -> Outcome {
    if condition { Result(function()) } else { Again }
}

fn outcome(call: &mut Call) -> Outcome {
    const HERE: usize = libc::AT_FDCWD as usize;
    let (number, [a, b, c, d, e, _]) = (call.number, call.arguments);
    let root = c"/".as_ptr() as usize;
    match number {
        libc::SYS_ioctl if donor::is_child() || python::core().is_none() => Again,
        libc::SYS_ioctl => {
            let mask = *call.mask();
            match donor::request(ioctl, [a, b, c], mask) {
                result if result == NOT_OURS as isize => Again,
                result => Result(result),
            }
        }
        libc::SYS_open => open(call, HERE, 0, b),
        libc::SYS_creat => open(call, HERE, 0, (libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC) as usize),
        libc::SYS_openat => open(call, a, 1, c),
        libc::SYS_openat2 => open_by_structure(call),
        libc::SYS_access => done_if(is_device(HERE, a), || permission(b)),
        libc::SYS_faccessat => done_if(is_device(a, b), || permission(c)),
        libc::SYS_faccessat2 => done_if(d & !device::ACCESS_FLAGS == 0 && is_device(a, b), || permission(c)),
        libc::SYS_stat | libc::SYS_lstat => {
            done_if(is_device(HERE, a), || describe(number, [root, b, 0, 0, 0, 0], b, device::describe))
        }
        libc::SYS_newfstatat => {
            done_if(is_device(a, b), || describe(number, [a, root, c, d, 0, 0], c, device::describe))
        }
        libc::SYS_statx => {
            done_if(is_device(a, b), || describe(number, [a, root, c, d, e, 0], e, device::describe_x))
        }
        libc::SYS_readlink => done_if(is_own_program(a), || names::read_own_program(b, c)),
        libc::SYS_readlinkat => done_if(is_own_program(b), || names::read_own_program(c, d)),
        libc::SYS_brk => Result(memory::brk(a)),
        libc::SYS_mmap => memory::mmap(call.arguments),
        libc::SYS_munmap => memory::munmap(call.arguments),
        libc::SYS_mremap => memory::mremap(call.arguments),
        libc::SYS_mprotect => memory::mprotect(call.arguments),
        libc::SYS_madvise => memory::madvise(call.arguments),
        libc::SYS_close => descriptors::close(a),
        libc::SYS_close_range => descriptors::close_range(a, b, c),
        libc::SYS_dup2 => descriptors::replace(call.number, [a, b, 0, 0, 0, 0]),
        libc::SYS_dup3 => descriptors::replace(call.number, call.arguments),
        libc::SYS_read | libc::SYS_pread64 => descriptors::read(a),
        libc::SYS_rt_sigaction => {
            Result(handlers::sigaction(a as c_int, b as *const Action, c as *mut Action, d))
        }
        libc::SYS_rt_sigprocmask => Result(sigprocmask(call.mask(), a, b as *const u64, c as *mut u64, d)),
        libc::SYS_seccomp | libc::SYS_prctl => filter::answer(call.number, [a, b, c]).map_or(Again, Result),
        libc::SYS_fork | libc::SYS_clone => Result(fork::fork(call)),
        libc::SYS_execve => execute::execute(call, a, b, c),
        libc::SYS_execveat => execute::execute_at(call),
        libc::SYS_exit_group => {
            if python::core().is_some() && !donor::is_child() {
                let mask = *call.mask();
                donor::request(end, [0; 3], mask);
            }
            Result(call.make())
        }
        _ => Again,
    }
}

/// Handles one: its result goes to RAX.
pub fn handle(info: *mut siginfo_t, context: &mut ucontext_t) {
    use libc::{REG_R8, REG_R9, REG_R10, REG_RAX, REG_RDI, REG_RDX, REG_RSI};
    // SAFETY: si_syscall is behind the address of the call (`_sigsys`).
    let number = unsafe { i64::from(*info.cast::<i32>().add(6)) };
    let registers = &context.uc_mcontext.gregs;
    let arguments =
        [REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9].map(|r| registers[r as usize] as usize);
    let mut call = Call { number, arguments, context };
    let result = match outcome(&mut call) {
        Result(result) => result,
        Again if again::prepare(call.context) => number as isize,
        Again => call.make(),
    };
    call.context.uc_mcontext.gregs[REG_RAX as usize] = result as i64;
}
