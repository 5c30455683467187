// SPDX-License-Identifier: Apache-2.0
//! Which of the program's system calls come to the handler (seccomp(2)).
//!
//! Only those that its own code makes: ours, and those of programs that it executes, lie elsewhere.

use core::ffi::c_long;
use core::sync::atomic::{AtomicBool, Ordering};
use std::io;
use std::ops::Range;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter,
};
use softkvm_client::seccomp;

use crate::raw::call;

/// Where `struct seccomp_data` has the number, the address and the arguments.
const NUMBER: u32 = 0;
const ADDRESS: u32 = 8;
const ARGUMENTS: u32 = 16;

/// Calls that come whatever their arguments are.
const ALWAYS: [i64; 13] = [
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_brk,
    libc::SYS_rt_sigaction,
    libc::SYS_seccomp,
    libc::SYS_exit_group,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
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
const ALLOW: u32 = 0x7FFF_0000;
const TRAP: u32 = 0x0003_0000;

fn done(action: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, action)
}

/// The filter for code at these addresses; all of them have the same upper half, as a program's do.
fn program(code: &[Range<usize>]) -> Vec<sock_filter> {
    let mut filter = Vec::new();
    let high = code.first().map_or(0, |range| range.start >> 32) as u32;
    filter.extend([
        statement(LOAD, ADDRESS + 4),
        jump(EQUAL, high, 1, 0),
        done(ALLOW),
        statement(LOAD, ADDRESS),
    ]);
    // Each range: below it, the next; from its end on, the next; else to the calls.
    for (n, range) in code.iter().enumerate() {
        let left = (code.len() - n - 1) as u8 * 2;
        filter.push(jump(AT_LEAST, range.start as u32, 0, 1));
        filter.push(jump(AT_LEAST, range.end as u32, 0, left + 1));
    }
    filter.push(done(ALLOW));
    filter.push(statement(LOAD, NUMBER));
    for number in ALWAYS {
        filter.extend([jump(EQUAL, number as u32, 0, 1), done(TRAP)]);
    }
    // ioctl() of KVM's type.
    filter.extend([
        jump(EQUAL, libc::SYS_ioctl as u32, 0, 5),
        statement(LOAD, ARGUMENTS + 8),
        statement(BPF_ALU | BPF_AND | BPF_K, 0xFF00),
        jump(EQUAL, 0xAE00, 0, 1),
        done(TRAP),
        done(ALLOW),
    ]);
    // rt_sigprocmask() that changes something; sigaltstack() is the program's own.
    filter.extend([
        jump(EQUAL, libc::SYS_rt_sigprocmask as u32, 0, 6),
        statement(LOAD, ARGUMENTS + 8),
        jump(EQUAL, 0, 0, 2),
        statement(LOAD, ARGUMENTS + 12),
        jump(EQUAL, 0, 1, 0),
        done(TRAP),
        done(ALLOW),
    ]);
    // prctl() of filters, and of what it takes to have them.
    filter.extend([
        jump(EQUAL, libc::SYS_prctl as u32, 0, 5),
        statement(LOAD, ARGUMENTS),
        jump(EQUAL, libc::PR_SET_SECCOMP as u32, 2, 0),
        jump(EQUAL, libc::PR_SET_NO_NEW_PRIVS as u32, 1, 0),
        jump(EQUAL, libc::PR_GET_NO_NEW_PRIVS as u32, 0, 1),
        done(TRAP),
        done(ALLOW),
    ]);
    filter
}

/// Installs it, for all threads.
pub fn install(code: &[Range<usize>]) -> io::Result<()> {
    let mut filter = program(code);
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    const SET_MODE_FILTER: usize = 1;
    const TSYNC: usize = 1;
    // SAFETY: a filter of this length, read by the kernel during the call.
    unsafe {
        let install = || libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, TSYNC, &program) == 0;
        if install() {
            return Ok(());
        }
        // It takes a right, or this: which the program has not asked for.
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || !install() {
            return Err(io::Error::last_os_error());
        }
    }
    ASKED.store(false, Ordering::SeqCst);
    Ok(())
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
