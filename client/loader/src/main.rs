// SPDX-License-Identifier: Apache-2.0
//! `softkvm-load PROGRAM NAME [ARGUMENT…]`: runs a KVM client that the preload is not for: one without a dynamic linker,
//! or with another C library's.
//!
//! The process belongs to two worlds. Ours, with the C library, the interpreter and KVM, is there first. Then the
//! program is mapped and jumped to, as the kernel would (`elf.rs`, `stack.rs`). It never calls our C library, and makes
//! system calls from its own code alone; a seccomp filter sends those that are about KVM, or about what both worlds
//! share, to a handler of SIGSYS (`filter.rs`, `calls.rs`). The handler runs on the program's thread, whose thread
//! pointer and stack are the program's: for a request it borrows both from a thread of ours (`donor.rs`).
//!
//! Code that runs with the program's thread pointer must not use thread-local storage, errno among it: it makes system
//! calls by itself (`raw.rs`), takes no locks and allocates nothing.

mod again;
mod calls;
mod descriptors;
mod donor;
mod elf;
mod execute;
mod filter;
mod fork;
mod handlers;
mod memory;
mod names;
mod place;
mod raw;
mod stack;

use std::ffi::{CStr, CString, OsString};
use std::os::unix::ffi::OsStringExt;
use std::process::exit;

use softkvm_client::forks;

/// Exit statuses as the shell's.
const NOT_EXECUTABLE: i32 = 126;

fn fail(why: &str, status: i32) -> ! {
    eprintln!("softkvm: {why}");
    exit(status)
}

fn main() {
    let given: Vec<CString> =
        std::env::args_os().skip(1).filter_map(|a: OsString| CString::new(a.into_vec()).ok()).collect();
    let Some((path, arguments)) = given.split_first().filter(|(_, arguments)| !arguments.is_empty()) else {
        fail("softkvm-load PROGRAM NAME [ARGUMENT…]: expected a program, and what it is to be called", 2)
    };
    let text = path.to_string_lossy().into_owned();
    let image = elf::map(path).unwrap_or_else(|why| fail(&format!("{text}: {why}"), NOT_EXECUTABLE));
    names::start(path);
    execute::start();
    again::start();
    forks::follow();
    donor::start();
    handlers::install();
    let name = CStr::to_bytes(path).rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    // SAFETY: at most 16 bytes are read, up to a null byte: there is one behind the path.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    let stack = stack::make(path, arguments, &image);
    filter::install(image.code).unwrap_or_else(|error| fail(&format!("seccomp: {error}"), NOT_EXECUTABLE));
    stack::jump(image.start, stack)
}
