// SPDX-License-Identifier: Apache-2.0
//! Lets the program make a call itself behind the handler that it came to.
//!
//! For one in the handler it may be the wrong place: a thread that ends unmaps the stack that the handler is on, and a
//! call that waits must be interrupted by signals, which are blocked there. So the program goes on at a copy of its
//! instruction, outside of the code that the filter looks at, which is followed by a jump back.

use core::sync::atomic::{AtomicUsize, Ordering};

use libc::ucontext_t;

use crate::raw::raw;

/// As many places of a program may make such calls; the calls of those beyond are made in the handler.
const MOST: usize = 4096;
/// SYSCALL; JMP to the address behind it.
const COPY: [u8; 8] = [0x0F, 0x05, 0xFF, 0x25, 0, 0, 0, 0];
const SIZE: usize = 16;

/// Where the copies jump to: an address, 0 for none, [`TAKEN`] while it is made.
static TARGETS: [AtomicUsize; MOST] = [const { AtomicUsize::new(0) }; MOST];
const TAKEN: usize = 1;
static CODE: AtomicUsize = AtomicUsize::new(0);

/// Makes room for the copies.
pub fn start() {
    let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let at = raw!(libc::SYS_mmap, 0, MOST * SIZE, protection, flags, usize::MAX, 0);
    if at > 0 {
        CODE.store(at as usize, Ordering::SeqCst);
    }
}

/// The copy for an instruction that ends at an address.
fn copy_for(target: usize) -> Option<usize> {
    let code = CODE.load(Ordering::SeqCst);
    if code == 0 {
        return None;
    }
    let first = (target >> 1) % MOST;
    for n in (first..MOST).chain(0..first) {
        let at = code + n * SIZE;
        match TARGETS[n].compare_exchange(0, TAKEN, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => {
                // SAFETY: an entry of ours, which nobody runs before its target is known.
                unsafe {
                    (at as *mut [u8; 8]).write(COPY);
                    (at as *mut usize).add(1).write(target);
                }
                TARGETS[n].store(target, Ordering::SeqCst);
                return Some(at);
            }
            Err(known) if known == target => return Some(at),
            Err(_) => {}
        }
    }
    None
}

/// Has the call be made when the handler returns; false: it has to be made now. RAX is its number still.
pub fn prepare(context: &mut ucontext_t) -> bool {
    let next = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
    match copy_for(*next as usize) {
        Some(copy) => {
            *next = copy as i64;
            true
        }
        None => false,
    }
}
