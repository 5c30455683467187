// SPDX-License-Identifier: Apache-2.0
//! What of a processor other threads touch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

use super::flush_queue::FlushQueue;
use super::{futex, lost};
use crate::clock::clock_ns;

/// Bits of [`Shared::pending`].
pub mod pending {
    #![allow(missing_docs)]
    pub const KICK: u32 = 1;
    /// Other processors want this one to drop writable translations of pages that became code, or of removed regions.
    pub const TLB_SYNC: u32 = 4;
    /// Decoded code may have changed in memory: check it before running it again.
    pub const CODE_CHANGED: u32 = 8;
    /// Another processor wants the bus ([`super::bus`]).
    pub const BUS: u32 = 16;
    /// Translations are to be forgotten ([`super::flush`]).
    pub const FLUSH: u32 = 32;
    /// Another processor, or the host, has set a bit of the virtual APIC's IRR (the doorbell of AVIC).
    pub const DOORBELL: u32 = 64;
}

/// Why a wait is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// What was waited for is pending.
    Event,
    /// The time is over.
    Timeout,
    /// A signal's handler has run on the waiting thread.
    Interrupted,
}

/// The part of a processor that other threads touch: atomics, so that nobody who stops half-way (a signal handler, a
/// process that forks) keeps another from it; but for flushes, which neither asks for.
#[derive(Default)]
pub struct Shared {
    /// Physical events; see [`pending`]. Waiting threads sleep on it.
    pub(crate) pending: AtomicU32,
    /// True inside VMRUN.
    pub(super) running: AtomicBool,
    /// True while it executes nothing although it is running, and won't without having had the bus ([`super::bus`]).
    pub(super) standing: AtomicBool,
    /// The machine's TLB-sync generation this processor has caught up with.
    pub(crate) synced: AtomicU64,
    /// Threads inside [`Shared::wait_for`].
    waiting: AtomicU32,
    pub(super) flushes: FlushQueue,
    /// The processor's thread is inside [`Shared::wait_watching`].
    watching: AtomicBool,
    /// Number of the processor in its machine.
    index: AtomicU32,
    /// The kernel's number of the thread that runs the processor, or did last; 0: not known.
    thread: AtomicI32,
}

impl Shared {
    /// Of a processor with nothing pending.
    pub const fn new() -> Shared {
        Shared {
            pending: AtomicU32::new(0),
            running: AtomicBool::new(false),
            standing: AtomicBool::new(false),
            synced: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            flushes: FlushQueue::new(),
            watching: AtomicBool::new(false),
            index: AtomicU32::new(u32::MAX),
            thread: AtomicI32::new(0),
        }
    }

    /// Tells which thread runs the processor from now on (gettid()), for [`Shared::rouse`].
    pub fn set_thread(&self, thread: i32) {
        self.thread.store(thread, Ordering::SeqCst);
    }

    /// Has the processor leave the guest, with VMEXIT_INTR, if it sleeps in an access to memory that is not there yet:
    /// it notices nothing else then. Async-signal-safe, but for `errno`.
    pub fn rouse(&self) {
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 && self.running.load(Ordering::SeqCst) {
            lost::rouse(thread);
        }
    }

    /// Gives the processor its number, by which others ring.
    pub fn set_index(&self, index: u32) {
        self.index.store(index, Ordering::SeqCst);
    }

    /// Its number.
    pub fn index(&self) -> u32 {
        self.index.load(Ordering::SeqCst)
    }

    /// A physical interrupt: the processor leaves the guest with VMEXIT_INTR, now or at its next VMRUN.
    /// Async-signal-safe, but for `errno`.
    pub fn kick(&self) {
        self.set_pending(pending::KICK);
    }

    /// The doorbell: a processor in a guest looks at its virtual APIC's IRR without leaving the guest; one that waits is
    /// woken. It stays pending until either.
    pub fn ring(&self) {
        if !self.rung() {
            self.set_pending(pending::DOORBELL);
        }
    }

    /// Sets pending bits, and wakes who waits for them.
    pub(super) fn set_pending(&self, bits: u32) {
        self.pending.fetch_or(bits, Ordering::SeqCst);
        // Whoever is about to sleep has counted itself before it looked at `pending`.
        if self.waiting.load(Ordering::SeqCst) != 0 {
            futex::wake(&self.pending);
        }
    }

    /// Takes a pending kick back; whether there was one.
    pub fn clear_kick(&self) -> bool {
        self.pending.fetch_and(!pending::KICK, Ordering::SeqCst) & pending::KICK != 0
    }

    /// Takes a pending doorbell back: whoever calls this looks at the IRR behind it.
    pub fn clear_doorbell(&self) {
        self.pending.fetch_and(!pending::DOORBELL, Ordering::SeqCst);
    }

    /// Whether the doorbell is pending.
    pub fn rung(&self) -> bool {
        self.pending.load(Ordering::SeqCst) & pending::DOORBELL != 0
    }

    /// Whether what ends a wait is pending: a kick or the doorbell.
    pub fn woken(&self) -> bool {
        self.pending.load(Ordering::SeqCst) & (pending::KICK | pending::DOORBELL) != 0
    }

    /// The processor is in a guest from now on; then it may have to wait for the bus ([`super::Bus::enter`]).
    pub fn start(&self) {
        self.running.store(true, Ordering::SeqCst);
    }

    /// It is not any more.
    pub fn stop(&self) {
        self.running.store(false, Ordering::SeqCst);
    }

    /// Whether it executes nothing now.
    pub(super) fn stands(&self) -> bool {
        !self.running.load(Ordering::SeqCst) || self.standing.load(Ordering::SeqCst)
    }

    /// Whether a thread is inside [`Shared::wait_for`].
    pub(super) fn waits(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) != 0
    }

    /// Whether anything is pending.
    pub fn is_pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst) != 0
    }

    /// Whether a kick is pending.
    pub fn kicked(&self) -> bool {
        self.pending.load(Ordering::SeqCst) & pending::KICK != 0
    }

    /// Blocks until a kick or the doorbell is pending (it stays pending), the physical clock reads `deadline` ns, or a
    /// signal has been handled.
    pub fn wait(&self, deadline: Option<u64>) -> Wake {
        self.wait_for(pending::KICK | pending::DOORBELL, deadline)
    }

    /// Blocks until one of `events` is pending, as [`Shared::wait`]. Only kicks are certain to be noticed at once.
    pub fn wait_for(&self, events: u32, deadline: Option<u64>) -> Wake {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let wake = loop {
            let seen = self.pending.load(Ordering::SeqCst);
            if seen & events != 0 {
                break Wake::Event;
            }
            if deadline.is_some_and(|end| clock_ns() >= end) {
                break Wake::Timeout;
            }
            let slept = futex::wait(&self.pending, seen, deadline);
            if slept.is_err_and(|e| e.raw_os_error() == Some(libc::EINTR)) {
                break if self.pending.load(Ordering::SeqCst) & events != 0 {
                    Wake::Event
                } else {
                    Wake::Interrupted
                };
            }
        };
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        wake
    }

    /// As [`Shared::wait_for`] anything, which is noticed at once, whatever it is; on the processor's own thread.
    pub fn wait_watching(&self, deadline: u64) -> Wake {
        self.watching.store(true, Ordering::SeqCst);
        let wake = self.wait_for(u32::MAX, Some(deadline));
        self.watching.store(false, Ordering::SeqCst);
        wake
    }
}

/// Sets pending bits of each of these processors but `me`.
pub(super) fn signal(processors: &[Arc<Shared>], me: Option<&Arc<Shared>>, bits: u32) {
    for shared in processors {
        if me.is_none_or(|m| !Arc::ptr_eq(m, shared)) {
            shared.pending.fetch_or(bits, Ordering::SeqCst);
            // Whoever is about to watch has said so before it looks at `pending`.
            if shared.watching.load(Ordering::SeqCst) {
                futex::wake(&shared.pending);
            }
        }
    }
}

/// How long a processor is waited for before it is roused, and between two times.
const ROUSE_NS: u64 = 2_000_000;
/// How often the others are looked at between two looks at the clock.
const LOOKS: u32 = 16;

/// Somebody's wait for processors: those that sleep in accesses to memory would keep him for as long as its owner likes.
#[derive(Default)]
pub(super) struct Patience {
    looks: u32,
    until: u64,
}

impl Patience {
    /// Gives the host's processor away; true if those that are waited for are to be roused.
    pub(super) fn pause(&mut self) -> bool {
        std::thread::yield_now();
        self.looks += 1;
        if self.looks % LOOKS != 0 {
            return false;
        }
        let now = clock_ns();
        let over = self.until != 0 && now >= self.until;
        if self.until == 0 || over {
            self.until = now + ROUSE_NS;
        }
        over
    }
}
