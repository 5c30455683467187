// SPDX-License-Identifier: Apache-2.0
//! Who is in a request: a processor's run for one. A runner is a lock, and what came meanwhile for the thread that has it.

use std::cell::{Cell, UnsafeCell};
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use libc::{c_int, c_void, siginfo_t, sigset_t};
use softcpu::mem::{Shared, forks, futex};

use super::sets::{END, members};

/// Bits of [`Runner::wanted`]: somebody called [`Runner::interrupt`], until it is taken.
const INTERRUPTED: u32 = 1;
/// A signal came in this run.
pub(super) const SIGNALLED: u32 = 2;

/// Who is in a request, a processor's run for one, and what came for him meanwhile.
pub struct Runner {
    next: AtomicPtr<Runner>,
    used: AtomicBool,
    /// `pthread_self` of the thread in a request whose signals are put off, 0 for none.
    pub(super) thread: AtomicUsize,
    /// The same, from before until after that: a lock, so that what follows is one thread's at a time.
    pub(super) owner: AtomicUsize,
    /// How many threads wait for the lock, on `turn`, which every release changes while there are any. One that was
    /// woken and found it taken once more is the `heir`: the next release is to him (the kernel's mutexes do so, too).
    pub(super) waiters: AtomicU32,
    turn: AtomicU32,
    pub(super) heir: AtomicUsize,
    /// The request is a run of the processor.
    pub(super) running: AtomicBool,
    pub(super) wanted: AtomicU32,
    /// The processor; a reference counted for as long as the runner is used, and until it is used again.
    shared: AtomicPtr<Shared>,
    /// Signals put off (bit n - 1 for signal n), when the first of them was, and what came with them.
    pub(super) put_off: AtomicU64,
    pub(super) since: AtomicU64,
    pub(super) infos: [UnsafeCell<MaybeUninit<siginfo_t>>; END - 1],
    /// Signals for Python that other threads have caught (bits as in `put_off`).
    pub(super) handed: AtomicU64,
    /// The thread's own mask, while the run has another.
    pub(super) mask: Cell<Option<sigset_t>>,
}

// SAFETY: `infos` and `mask` are touched by the owner only, in its handlers and outside of them, and an entry of `infos` by
// a handler only while its bit of `put_off` is clear.
unsafe impl Sync for Runner {}

/// All runners there have been.
static RUNNERS: AtomicPtr<Runner> = AtomicPtr::new(core::ptr::null_mut());

pub(super) fn runners() -> impl Iterator<Item = &'static Runner> {
    // SAFETY: runners are never freed.
    let at = |p: &AtomicPtr<Runner>| unsafe { p.load(Ordering::Acquire).as_ref() };
    std::iter::successors(at(&RUNNERS), move |r| at(&r.next))
}

pub(super) fn current_thread() -> usize {
    // SAFETY: always works; reads a register.
    unsafe { libc::pthread_self() as usize }
}

/// gettid(), without a system call if possible: none of this thread's, or of its parent's, number is kept for it where
/// threads may have each other's thread pointers.
pub(super) fn thread_number() -> c_int {
    thread_local!(static KNOWN: Cell<(u64, c_int)> = const { Cell::new((0, 0)) });
    // SAFETY: always works.
    let ask = || unsafe { libc::syscall(libc::SYS_gettid) as c_int };
    if FOREIGN.load(Ordering::SeqCst) {
        return ask();
    }
    let (forks, known) = KNOWN.get();
    if known != 0 && forks == self::forks() {
        return known;
    }
    let number = ask();
    KNOWN.set((self::forks(), number));
    number
}

impl Runner {
    /// Takes one that is free, or makes one.
    pub(super) fn take(shared: Option<&Arc<Shared>>) -> &'static Runner {
        let free = |r: &&Runner| !r.used.swap(true, Ordering::SeqCst);
        let runner = runners().find(free).unwrap_or_else(|| {
            let new = Box::leak(Box::new(Runner {
                next: AtomicPtr::default(),
                used: AtomicBool::new(true),
                thread: AtomicUsize::default(),
                owner: AtomicUsize::default(),
                waiters: AtomicU32::default(),
                turn: AtomicU32::default(),
                heir: AtomicUsize::default(),
                running: AtomicBool::default(),
                wanted: AtomicU32::default(),
                shared: AtomicPtr::default(),
                put_off: AtomicU64::default(),
                since: AtomicU64::default(),
                infos: [const { UnsafeCell::new(MaybeUninit::uninit()) }; END - 1],
                handed: AtomicU64::default(),
                mask: Cell::new(None),
            }));
            let mut first = RUNNERS.load(Ordering::Acquire);
            loop {
                new.next.store(first, Ordering::Release);
                match RUNNERS.compare_exchange(first, new, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => return &*new,
                    Err(now) => first = now,
                }
            }
        });
        runner.wanted.store(0, Ordering::SeqCst);
        let new = shared.map_or(core::ptr::null(), |shared| Arc::into_raw(shared.clone()));
        let old = runner.shared.swap(new.cast_mut(), Ordering::SeqCst);
        if !old.is_null() {
            // SAFETY: it came from `into_raw`, and its processor is gone.
            drop(unsafe { Arc::from_raw(old) });
        }
        runner
    }

    /// Gives it back; its processor is gone.
    pub fn release(&self) {
        // The thread may have been cancelled at its end.
        self.thread.store(0, Ordering::SeqCst);
        self.put_off.store(0, Ordering::SeqCst);
        self.used.store(false, Ordering::SeqCst);
    }

    pub(super) fn processor(&self) -> Option<&Shared> {
        // SAFETY: the runner holds a reference.
        unsafe { self.shared.load(Ordering::Acquire).as_ref() }
    }

    fn kick(&self) {
        if let Some(shared) = self.processor() {
            shared.kick();
        }
    }

    /// Ends the run, or the next one; from any thread, and from signal handlers.
    pub fn interrupt(&self) {
        self.wanted.fetch_or(INTERRUPTED, Ordering::SeqCst);
        self.kick();
        if let Some(shared) = self.processor() {
            shared.rouse();
        }
    }

    /// Whether the run is to end.
    pub fn interrupted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) != 0
    }

    /// [`Runner::interrupted`], and takes interrupts.
    pub fn take_interrupt(&self) -> bool {
        self.wanted.fetch_and(!INTERRUPTED, Ordering::SeqCst) != 0
    }

    /// A signal's handler has run on this thread, if that is in a run.
    pub fn signalled(&self) {
        if self.thread.load(Ordering::SeqCst) == current_thread() {
            self.end_run_early();
        }
    }

    pub(super) fn end_run_early(&self) {
        if self.running.load(Ordering::SeqCst) {
            self.wanted.fetch_or(SIGNALLED, Ordering::SeqCst);
            self.kick();
        }
    }

    /// Whether there are signals that wait for its end.
    pub fn waiting(&self) -> bool {
        self.put_off.load(Ordering::SeqCst) != 0
    }

    /// Whether this thread is in it.
    pub fn held(&self) -> bool {
        self.owner.load(Ordering::SeqCst) == current_thread()
    }

    /// Takes it for this thread, unless another has it.
    pub fn try_lock(&self) -> bool {
        self.owner.compare_exchange(0, current_thread(), Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Takes it, or waits until it can be had; false if a signal came first.
    pub fn lock(&self) -> bool {
        let me = current_thread();
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let (mut woken, mut heir) = (false, false);
        let mut locked = loop {
            let turn = self.turn.load(Ordering::SeqCst);
            if self.held() || self.try_lock() {
                break true;
            }
            if woken && !heir {
                heir = self.heir.compare_exchange(0, me, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            }
            match futex::wait(&self.turn, turn, None) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => break false,
                _ => woken = true,
            }
        };
        if heir && self.heir.compare_exchange(me, 0, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            // It was, or is just being, handed over.
            while !self.held() {
                std::hint::spin_loop();
            }
            locked = true;
        }
        self.waiters.fetch_sub(1, Ordering::SeqCst);
        locked
    }

    pub(super) fn unlock(&self) {
        if self.waiters.load(Ordering::SeqCst) == 0 {
            self.owner.store(0, Ordering::SeqCst);
            if self.waiters.load(Ordering::SeqCst) == 0 {
                return;
            }
        } else {
            self.owner.store(self.heir.swap(0, Ordering::SeqCst), Ordering::SeqCst);
        }
        self.turn.fetch_add(1, Ordering::SeqCst);
        futex::wake(&self.turn);
    }

    /// What came with signals that were put off.
    pub(super) fn infos(&self, signals: u64) -> Infos {
        let mut infos = [MaybeUninit::uninit(); END - 1];
        for signal in members(signals) {
            // SAFETY: those whose bit was set are filled in.
            infos[signal as usize - 1] = unsafe { *self.infos[signal as usize - 1].get() };
        }
        infos
    }
}

/// What came with signals, for each.
pub(super) type Infos = [MaybeUninit<siginfo_t>; END - 1];

/// [`Runner::interrupt`] for C.
///
/// # Safety
/// `runner` is what `Cpu.interrupt_function` gave for a processor that is still there.
pub unsafe extern "C" fn interrupt(runner: *const c_void) {
    // SAFETY: given; runners are never freed.
    let runner = unsafe { &*runner.cast::<Runner>() };
    // SAFETY: errno of this thread, which a handler has to leave alone.
    let errno = unsafe { libc::__errno_location() };
    let before = unsafe { *errno };
    runner.interrupt();
    unsafe { *errno = before };
}

/// Somebody else stands before the handlers, and calls [`put_off`]. Its threads have all signals blocked outside of runs.
pub(super) static FOREIGN: AtomicBool = AtomicBool::new(false);

/// Whether somebody else stands before the handlers.
pub fn leave_handlers(foreign: bool) {
    FOREIGN.store(foreign, Ordering::SeqCst);
}

/// Ends the run that a thread (`pthread_self`) is in, if it is in one, as a signal does.
pub fn end_run_of(thread: usize) {
    for runner in runners().filter(|r| r.thread.load(Ordering::SeqCst) == thread) {
        runner.end_run_early();
    }
}
