// SPDX-License-Identifier: Apache-2.0
//! The processor time of a vCPU, that of its guest apart, and the host's timers on a thread's clock.
//!
//! The whole is the clock of the thread that runs the processor, exact. The guest's share is measured around VMRUN by a
//! clock that is cheap and also runs while the thread has no processor; so the two shares of KVM_RUN are scaled to what
//! the thread's clock says (as Linux's `cputime_adjust` scales a task's user and system time), and neither ever falls.

use std::cell::Cell;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering, fence};

use libc::{c_int, clockid_t, timespec};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use softcpu::clock::clock_ns;

/// What the thread is doing; indices of [`Account::raw`].
pub const GUEST: u32 = 0;
pub const HOST: u32 = 1;
/// It sleeps, or waits for the interpreter.
pub const OFF: u32 = 2;
/// It is not in KVM_RUN.
const OUTSIDE: u32 = 3;

thread_local!(static TID: Cell<i32> = const { Cell::new(0) });

/// The thread that a forked child has is another one.
pub fn after_fork() {
    TID.set(0);
}

fn tid() -> i32 {
    if TID.get() == 0 {
        // SAFETY: cannot fail.
        TID.set(unsafe { libc::gettid() });
    }
    TID.get()
}

/// A thread's clock (clock_getcpuclockid(3): CPUCLOCK_SCHED of one thread, by its number).
fn clock_of(tid: i32) -> clockid_t {
    !tid << 3 | 6
}

fn read_clock(clock: clockid_t) -> Option<u64> {
    let mut t = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid pointer; a clock that isn't there is an error.
    let failed = unsafe { libc::clock_gettime(clock, &mut t) } != 0;
    (!failed).then(|| t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64)
}

fn own_clock() -> u64 {
    read_clock(libc::CLOCK_THREAD_CPUTIME_ID).unwrap_or(0)
}

/// One vCPU's processor time since [`Account::begin`]. Its thread writes, under a sequence count; others read.
#[derive(Default)]
pub struct Account {
    sequence: AtomicU32,
    tid: AtomicI32,
    /// What the account had more than the thread's clock when it came to the thread (wrapping).
    ahead: AtomicU64,
    state: AtomicU32,
    since: AtomicU64,
    /// By state, nanoseconds of the clock that always runs.
    raw: [AtomicU64; 4],
    /// The whole when KVM_RUN ended, and the time between the KVM_RUNs.
    left: AtomicU64,
    between: AtomicU64,
    /// What was told last: the guest's share, and the rest of KVM_RUN's.
    told: Mutex<(u64, u64)>,
}

impl Account {
    /// Changes what readers see, all at once; on the vCPU's thread.
    fn write(&self, change: impl FnOnce()) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change();
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    fn enter(&self, state: u32, now: u64) {
        let raw = &self.raw[self.state.load(Ordering::Relaxed) as usize];
        raw.store(
            raw.load(Ordering::Relaxed) + (now - self.since.load(Ordering::Relaxed)),
            Ordering::Relaxed,
        );
        self.since.store(now, Ordering::Relaxed);
        self.state.store(state, Ordering::Relaxed);
    }

    /// The thread does something else from now on.
    pub fn switch(&self, state: u32) {
        let now = clock_ns();
        self.write(|| self.enter(state, now));
    }

    /// The account begins, on the thread that is in KVM_RUN.
    pub fn begin(&self) {
        let (now, clock) = (clock_ns(), own_clock());
        self.write(|| {
            self.tid.store(tid(), Ordering::Relaxed);
            self.ahead.store(0u64.wrapping_sub(clock), Ordering::Relaxed);
            self.since.store(now, Ordering::Relaxed);
            self.state.store(HOST, Ordering::Relaxed);
        });
    }

    /// KVM_RUN begins; whether on another thread than before. What the thread has done since the last one is the
    /// vCPU's, unless it is another thread.
    pub fn enter_run(&self) -> bool {
        let (now, clock) = (clock_ns(), own_clock());
        let moved = self.tid.load(Ordering::Relaxed) != tid();
        self.write(|| {
            let left = self.left.load(Ordering::Relaxed);
            if moved {
                self.tid.store(tid(), Ordering::Relaxed);
                self.ahead.store(left.wrapping_sub(clock), Ordering::Relaxed);
            }
            let total = self.ahead.load(Ordering::Relaxed).wrapping_add(clock);
            self.between.store(self.between.load(Ordering::Relaxed) + (total - left), Ordering::Relaxed);
            self.enter(HOST, now);
        });
        moved
    }

    /// KVM_RUN ends.
    pub fn leave_run(&self) {
        let (now, clock) = (clock_ns(), own_clock());
        self.write(|| {
            self.left.store(self.ahead.load(Ordering::Relaxed).wrapping_add(clock), Ordering::Relaxed);
            self.enter(OUTSIDE, now);
        });
    }

    /// The thread that is in KVM_RUN, 0 for none, and how much the account is ahead of its clock.
    pub fn thread(&self) -> (i32, i64) {
        self.read(|| {
            let inside = self.state.load(Ordering::Relaxed) != OUTSIDE;
            let tid = if inside { self.tid.load(Ordering::Relaxed) } else { 0 };
            (tid, self.ahead.load(Ordering::Relaxed) as i64)
        })
    }

    fn read<R>(&self, look: impl Fn() -> R) -> R {
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let seen = look();
            fence(Ordering::Acquire);
            if before & 1 == 0 && self.sequence.load(Ordering::Relaxed) == before {
                return seen;
            }
            std::hint::spin_loop();
        }
    }

    /// The whole, and the guest's share of it, in nanoseconds. While the vCPU is not in KVM_RUN it is what it was then.
    pub fn times(&self) -> (u64, u64) {
        let mut told = self.told.lock().unwrap_or_else(|e| e.into_inner());
        let (total, run, guest, host) = self.read(|| {
            let state = self.state.load(Ordering::Relaxed);
            let mut raw = [GUEST, HOST].map(|s| self.raw[s as usize].load(Ordering::Relaxed));
            let left = self.left.load(Ordering::Relaxed);
            let tid = self.tid.load(Ordering::Relaxed);
            let mut total = left;
            if tid != 0 && state != OUTSIDE {
                // The thread is in KVM_RUN, so it is there, unless it has changed since it was looked at.
                let clock = read_clock(clock_of(tid));
                total = clock.map_or(left, |c| self.ahead.load(Ordering::Relaxed).wrapping_add(c));
            }
            if let Some(raw) = raw.get_mut(state as usize) {
                *raw += clock_ns().saturating_sub(self.since.load(Ordering::Relaxed));
            }
            (total, total.wrapping_sub(self.between.load(Ordering::Relaxed)), raw[0], raw[1])
        });
        *told = cputime_adjust(run, guest, host, *told);
        (total, told.0)
    }
}

/// Splits `run`, which is exact, as two measured shares are to each other; neither is less than before.
#[pyfunction]
pub fn cputime_adjust(run: u64, guest: u64, host: u64, before: (u64, u64)) -> (u64, u64) {
    if before.0 + before.1 >= run {
        return before;
    }
    let measured = guest as u128 + host as u128;
    let guest = (run as u128 * guest as u128).checked_div(measured).unwrap_or(0) as u64;
    let guest = guest.max(before.0).min(run - before.1);
    (guest, run - guest)
}

/// A timer of the host's on a thread's clock, which sends a signal to another thread of the process.
#[pyclass(frozen, name = "ThreadTimer", module = "softkvm._softcpu")]
pub struct PyThreadTimer {
    id: usize,
    /// A child has none of them, and may give their numbers to its own.
    process: u32,
}

#[pymethods]
impl PyThreadTimer {
    #[new]
    fn new(tid: i32, signal: c_int, receiver: i32) -> PyResult<PyThreadTimer> {
        if tid <= 0 || receiver <= 0 {
            return Err(PyValueError::new_err("expected the numbers of threads"));
        }
        // SAFETY: zeroes are a valid sigevent, and its fields are set below.
        let mut event: libc::sigevent = unsafe { core::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        event.sigev_notify_thread_id = receiver;
        let mut id: libc::timer_t = core::ptr::null_mut();
        // SAFETY: valid pointers; what is wrong with the numbers is an error.
        if unsafe { libc::timer_create(clock_of(tid), &mut event, &mut id) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
        Ok(PyThreadTimer { id: id as usize, process: std::process::id() })
    }

    /// Sends the signal once the thread's clock reads `deadline_ns`; 0: not.
    fn arm(&self, deadline_ns: u64) -> PyResult<()> {
        let zero = timespec { tv_sec: 0, tv_nsec: 0 };
        let value = timespec {
            tv_sec: (deadline_ns / 1_000_000_000).min(i64::MAX as u64) as i64,
            tv_nsec: (deadline_ns % 1_000_000_000) as i64,
        };
        let wanted = libc::itimerspec { it_interval: zero, it_value: value };
        if self.process != std::process::id() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL).into());
        }
        // SAFETY: the timer is there as long as the object, and the pointer is valid.
        let failed = unsafe {
            libc::timer_settime(self.id as libc::timer_t, libc::TIMER_ABSTIME, &wanted, core::ptr::null_mut())
                != 0
        };
        if failed { Err(io::Error::last_os_error().into()) } else { Ok(()) }
    }
}

impl Drop for PyThreadTimer {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            // SAFETY: it is deleted once.
            unsafe { libc::timer_delete(self.id as libc::timer_t) };
        }
    }
}
