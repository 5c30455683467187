// SPDX-License-Identifier: Apache-2.0
//! A child that is forked while other threads make and drop machines makes its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use softcpu::mem::{Machine, forked};

const CHILDREN: usize = 300;

extern "C" fn after_fork() {
    forked();
}

/// What a process needs of a machine: pages of its own, and some memory.
fn use_a_machine() {
    let machine = Machine::new();
    let page = machine.alloc_pages(1).expect("a page");
    machine.free_pages(page, 1);
}

/// Waits for a child; its status, None if it hangs.
fn wait(child: libc::pid_t) -> Option<libc::c_int> {
    let end = Instant::now() + Duration::from_secs(20);
    let mut status = 0;
    // SAFETY: `status` is there; the child is this process's own.
    unsafe {
        while libc::waitpid(child, &mut status, libc::WNOHANG) == 0 {
            if Instant::now() > end {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, &mut status, 0);
                return None;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
    Some(status)
}

#[test]
fn a_child_makes_machines_whatever_lock_another_thread_of_its_parent_held() {
    // SAFETY: the handler does what is allowed in a child: it stores to an atomic.
    unsafe { libc::pthread_atfork(None, None, Some(after_fork)) };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    use_a_machine();
                }
            });
        }
        let statuses: Vec<_> = (0..CHILDREN)
            .map(|_| {
                // SAFETY: the child calls nothing that waits for another thread, which is what is tested; the C
                // library's allocator is made ready for that.
                match unsafe { libc::fork() } {
                    0 => {
                        use_a_machine();
                        // SAFETY: ends the child.
                        unsafe { libc::_exit(0) }
                    }
                    child => wait(child),
                }
            })
            .take_while(|status| *status == Some(0))
            .collect();
        over.store(true, Ordering::Relaxed);
        assert_eq!(statuses.len(), CHILDREN, "a child hung, or failed");
    });
}
