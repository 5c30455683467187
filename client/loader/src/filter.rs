// SPDX-License-Identifier: Apache-2.0
//! Which of the program's system calls come to the handler (seccomp(2)).
//!
//! Only those that its own code makes: ours, and those of programs that it executes, lie elsewhere. There are as few as
//! can be: calls about memory and descriptors come from when the program has KVM, reading when the descriptor is of
//! statistics.

use core::ffi::c_long;
use core::sync::atomic::{AtomicBool, Ordering};
use std::io;
use std::ops::Range;
use std::sync::{Mutex, OnceLock};

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    sock_filter, sock_fprog,
};
use softkvm_client::seccomp;

use crate::raw::{call, raw};

/// Where `struct seccomp_data` has the number, the address and the arguments.
const NUMBER: u32 = 0;
const ADDRESS: u32 = 8;
const ARGUMENTS: u32 = 16;

/// A call that comes if an argument's lower half has a value under a mask.
struct Rule {
    number: i64,
    argument: u32,
    mask: u32,
    value: u32,
}

const fn always(number: i64) -> Rule {
    Rule { number, argument: 0, mask: 0, value: 0 }
}

const fn when(number: i64, argument: u32, mask: u32, value: u32) -> Rule {
    Rule { number, argument, mask, value }
}

/// What every program's come for.
const FROM_THE_START: [Rule; 28] = [
    always(libc::SYS_open),
    always(libc::SYS_creat),
    always(libc::SYS_openat),
    always(libc::SYS_openat2),
    always(libc::SYS_access),
    always(libc::SYS_faccessat),
    always(libc::SYS_faccessat2),
    always(libc::SYS_stat),
    always(libc::SYS_lstat),
    always(libc::SYS_newfstatat),
    always(libc::SYS_statx),
    always(libc::SYS_readlink),
    always(libc::SYS_readlinkat),
    always(libc::SYS_brk),
    always(libc::SYS_rt_sigaction),
    always(libc::SYS_rt_sigprocmask),
    always(libc::SYS_seccomp),
    always(libc::SYS_exit_group),
    always(libc::SYS_execve),
    always(libc::SYS_execveat),
    always(libc::SYS_fork),
    // A process with memory of its own; threads, and vfork(), are made as ever.
    when(libc::SYS_clone, 0, libc::CLONE_VM as u32, 0),
    // Its flags are not among its arguments: who has no such call makes the older one.
    always(libc::SYS_clone3),
    when(libc::SYS_ioctl, 1, 0xFF00, 0xAE00),
    when(libc::SYS_prctl, 0, u32::MAX, libc::PR_SET_SECCOMP as u32),
    // What it takes to have filters.
    when(libc::SYS_prctl, 0, u32::MAX, libc::PR_SET_NO_NEW_PRIVS as u32),
    when(libc::SYS_prctl, 0, u32::MAX, libc::PR_GET_NO_NEW_PRIVS as u32),
    // Libraries, which have code.
    when(libc::SYS_mmap, 3, (libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_SHARED) as u32, 0),
];

/// What comes when there is a KVM: memory may be a guest's, a descriptor the KVM's.
const WITH_KVM: [Rule; 9] = [
    always(libc::SYS_mmap),
    always(libc::SYS_munmap),
    always(libc::SYS_mremap),
    always(libc::SYS_mprotect),
    always(libc::SYS_madvise),
    always(libc::SYS_close),
    always(libc::SYS_close_range),
    always(libc::SYS_dup2),
    always(libc::SYS_dup3),
];

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(code: u32, k: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter { code: code as u16, jt: yes, jf: no, k }
}

const LOAD: u32 = BPF_LD | BPF_W | BPF_ABS;
const EQUAL: u32 = BPF_JMP | BPF_JEQ | BPF_K;
const AT_LEAST: u32 = BPF_JMP | BPF_JGE | BPF_K;
const ABOVE: u32 = BPF_JMP | BPF_JGT | BPF_K;
const ALLOW: u32 = 0x7FFF_0000;
const TRAP: u32 = 0x0003_0000;
const NO_SUCH_CALL: u32 = 0x0005_0000 | libc::ENOSYS as u32;

fn done(action: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, action)
}

/// How long [`push_range`] is.
const RANGE: usize = 6;

/// Has a filter go on at a place behind it if the call is made in a range, none of which spans 4 GiB.
fn push_range(filter: &mut Vec<sock_filter>, range: &Range<usize>, calls: usize) {
    let ahead = calls - filter.len() - RANGE;
    filter.extend([
        statement(LOAD, ADDRESS + 4),
        jump(EQUAL, (range.start >> 32) as u32, 0, 4),
        statement(LOAD, ADDRESS),
        jump(AT_LEAST, range.start as u32, 0, 2),
        jump(ABOVE, (range.end - 1) as u32, 1, 0),
        statement(BPF_JMP | BPF_JA, ahead as u32),
    ]);
}

fn push_rule(filter: &mut Vec<sock_filter>, rule: &Rule) {
    let action = if rule.number == libc::SYS_clone3 { NO_SUCH_CALL } else { TRAP };
    filter.extend([
        statement(LOAD, NUMBER),
        jump(EQUAL, rule.number as u32, 0, 4),
        statement(LOAD, ARGUMENTS + 8 * rule.argument),
        statement(BPF_ALU | BPF_AND | BPF_K, rule.mask),
        jump(EQUAL, rule.value, 0, 1),
        done(action),
    ]);
}

/// The filter for code at these addresses.
fn program(code: &[Range<usize>], rules: &[Rule]) -> Vec<sock_filter> {
    let mut filter = Vec::new();
    let calls = code.len() * RANGE + 1;
    for range in code {
        push_range(&mut filter, range, calls);
    }
    filter.push(done(ALLOW));
    for rule in rules {
        push_rule(&mut filter, rule);
    }
    filter.push(done(ALLOW));
    filter
}

/// Where the program's code is.
static CODE: OnceLock<Vec<Range<usize>>> = OnceLock::new();

/// Puts a filter on all threads.
fn add(rules: &[Rule]) -> io::Result<()> {
    let mut filter = program(CODE.get().map_or(&[], Vec::as_slice), rules);
    let program = sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    const SET_MODE_FILTER: usize = 1;
    const TSYNC: usize = 1;
    let install = || raw!(libc::SYS_seccomp, SET_MODE_FILTER, TSYNC, &raw const program);
    let mut result = install();
    // It takes a right, or this: which the program has not asked for.
    if result == -(libc::EACCES as isize) && raw!(libc::SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    {
        ASKED.store(false, Ordering::SeqCst);
        result = install();
    }
    match result {
        0 => Ok(()),
        error @ ..0 => Err(io::Error::from_raw_os_error(-error as i32)),
        _ => Err(io::Error::other("a thread has a filter of its own")),
    }
}

/// Whether no_new_privs, where it is set, is the program's wish.
static ASKED: AtomicBool = AtomicBool::new(true);

/// What the program gets for a system call about filters, or no_new_privs; None: the kernel's answer.
pub fn answer(number: c_long, arguments: [usize; 3]) -> Option<isize> {
    let asked = ASKED.load(Ordering::SeqCst);
    if number == libc::SYS_prctl {
        match arguments[0] as i32 {
            libc::PR_SET_NO_NEW_PRIVS if arguments[1] == 1 => {
                ASKED.store(true, Ordering::SeqCst);
                return None;
            }
            libc::PR_GET_NO_NEW_PRIVS if !asked => return Some(0),
            _ => {}
        }
    }
    seccomp::answer(number, arguments, call, || asked && seccomp::may_filter(call))
}

/// Begins, for all threads.
pub fn install(code: Vec<Range<usize>>) -> io::Result<()> {
    let _ = CODE.set(code);
    add(&FROM_THE_START)
}

/// The program has opened KVM.
pub fn follow_memory() -> io::Result<()> {
    static DONE: Mutex<bool> = Mutex::new(false);
    let mut done = DONE.lock().unwrap_or_else(|e| e.into_inner());
    if !*done {
        add(&WITH_KVM)?;
        *done = true;
    }
    Ok(())
}

/// As many numbers of descriptors have their reads come: each makes all calls of the process a little slower.
const READ: usize = 64;

/// The descriptor is of statistics, to be brought up to date when it is read.
pub fn follow_reads(fd: i32) {
    static FOLLOWED: Mutex<Vec<i32>> = Mutex::new(Vec::new());
    let mut followed = FOLLOWED.lock().unwrap_or_else(|e| e.into_inner());
    if followed.len() < READ && !followed.contains(&fd) {
        let rules = [libc::SYS_read, libc::SYS_pread64].map(|number| when(number, 0, u32::MAX, fd as u32));
        if add(&rules).is_ok() {
            followed.push(fd);
        }
    }
}
