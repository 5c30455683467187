// SPDX-License-Identifier: Apache-2.0
//! System calls that touch nothing but registers.

use core::arch::asm;

/// A system call; errno, negated, if it fails.
///
/// # Safety
/// As the system call's.
pub unsafe fn syscall(number: i64, arguments: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the kernel changes RAX, RCX and R11, and what the call is for.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
             in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// [`syscall`], for who knows what it does (`softkvm_client::kernel`).
pub fn call(number: i64, arguments: [usize; 6]) -> isize {
    // SAFETY: the caller's.
    unsafe { syscall(number, arguments) }
}

macro_rules! raw {
    ($number:expr $(, $argument:expr)* $(,)?) => {{
        let given: &[usize] = &[$($argument as usize),*];
        let mut all = [0; 6];
        let mut n = 0;
        while n < given.len() {
            all[n] = given[n];
            n += 1;
        }
        // SAFETY: as the system call's; said where it is called.
        #[allow(unused_unsafe)]
        unsafe { $crate::raw::syscall($number, all) }
    }};
}
pub(crate) use raw;

use core::sync::atomic::AtomicU32;

/// Sleeps while a word has a value.
pub fn sleep_on(word: &AtomicU32, value: u32) {
    raw!(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, value, 0, 0, 0);
}

/// Wakes all who sleep on a word.
pub fn wake(word: &AtomicU32) {
    raw!(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX, 0, 0, 0);
}

pub fn gettid() -> u32 {
    raw!(libc::SYS_gettid) as u32
}

pub fn getpid() -> i32 {
    raw!(libc::SYS_getpid) as i32
}
