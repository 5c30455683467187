// SPDX-License-Identifier: Apache-2.0
//! A request's beginning and end, where signals that were put off are raised again.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use softcpu::mem::Shared;

use super::handlers::catch;
use super::python::{MAIN, MARKING, mark_for_python};
use super::runner::{Infos, Runner, SIGNALLED, current_thread, thread_number};
use super::sets::{bits_of, can_be_caught, is_synchronous, members, members_of, set_mask, set_of};
use super::watch::{LAST_WATCH, now_about_ns, watch};

/// How old a look at the handlers may be when a run begins.
const WATCH_NS: u64 = 20_000_000;

unsafe extern "C-unwind" {
    /// libc's is declared as one that no handler of a signal unwinds.
    fn syscall(number: libc::c_long, ...) -> libc::c_long;
}

impl Runner {
    /// A runner for a processor, or for a thread's other requests.
    pub fn new(shared: Option<&Arc<Shared>>) -> &'static Runner {
        let runner = Runner::take(shared);
        watch();
        runner
    }

    /// Begins a request of the thread that has it.
    pub fn begin(&self) {
        let me = current_thread();
        self.thread.store(me, Ordering::SeqCst);
        // A handler that has not seen this marks its signal first, for Python to look before the request.
        while MARKING.load(Ordering::SeqCst) != 0 && MAIN.load(Ordering::SeqCst) == me {
            std::thread::yield_now();
        }
    }

    /// Makes the request a run, with signals blocked as `mask` says if there is one.
    pub fn begin_run(&self, mask: Option<u64>) {
        self.running.store(true, Ordering::SeqCst);
        if let Some(shared) = self.processor() {
            shared.set_thread(thread_number());
        }
        if now_about_ns().saturating_sub(LAST_WATCH.load(Ordering::SeqCst)) >= WATCH_NS {
            watch();
        }
        if let Some(mask) = mask.or_else(|| IN_RUN.take()) {
            self.change_mask(mask);
        }
    }

    /// Ends the request, or run, and raises again what was put off; whether there was something. Another thread may
    /// have it then.
    pub fn end(&self) -> bool {
        if let Some(mask) = self.mask.take() {
            set_mask(libc::SIG_SETMASK, &mask);
        }
        self.thread.store(0, Ordering::SeqCst);
        self.running.store(false, Ordering::SeqCst);
        self.wanted.fetch_and(!SIGNALLED, Ordering::SeqCst);
        let signals = self.put_off.swap(0, Ordering::SeqCst);
        let handed = self.handed.swap(0, Ordering::SeqCst);
        if signals | handed == 0 {
            self.unlock();
            return false;
        }
        let infos = self.infos(signals);
        // Nothing is held any more when handlers run: one may jump out of here.
        self.unlock();
        raise(signals, handed, &infos);
        true
    }

    /// Takes a thread's own, which no other waits for, and begins a request; false: this thread is in one, or another.
    /// Handlers may jump out anywhere, so at no time is it taken and signals are not put off.
    pub fn enter(&self) -> bool {
        if self.owner.load(Ordering::SeqCst) != 0 {
            return false;
        }
        self.begin();
        self.owner.store(current_thread(), Ordering::SeqCst);
        true
    }

    /// Ends what [`Runner::enter`] has begun: calls the function, and raises again what was put off.
    pub fn leave(&self, function: impl FnOnce()) {
        self.owner.store(0, Ordering::SeqCst);
        function();
        self.thread.store(0, Ordering::SeqCst);
        let signals = self.put_off.load(Ordering::SeqCst);
        let handed = self.handed.swap(0, Ordering::SeqCst);
        if signals | handed != 0 {
            let infos = self.infos(signals);
            raise(signals & self.put_off.fetch_and(!signals, Ordering::SeqCst), handed, &infos);
        }
    }

    /// Blocks what KVM_SET_SIGNAL_MASK says, and nothing else: what it leaves open and the thread had blocked comes to
    /// our handler, and pends again behind the run.
    fn change_mask(&self, mask: u64) {
        let mut own = set_of(0);
        // SAFETY: reads the thread's mask.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, core::ptr::null(), &mut own) };
        let mut blocked = mask & !members_of(is_synchronous);
        for signal in members(bits_of(&own) & !mask).filter(|&s| can_be_caught(s)) {
            if !catch(signal) {
                blocked |= 1 << (signal - 1);
            }
        }
        self.mask.set(Some(own));
        set_mask(libc::SIG_SETMASK, &set_of(blocked));
    }
}

/// Raises signals once more that this thread has put off, and those that were handed to Python's main thread.
#[cold]
pub(super) fn raise(signals: u64, handed: u64, infos: &Infos) {
    // SAFETY: system calls about the calling thread, which may give itself any siginfo.
    unsafe {
        let (process, thread) = (libc::getpid(), libc::syscall(libc::SYS_gettid));
        for signal in members(signals) {
            let info = infos[signal as usize - 1].as_ptr();
            syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, signal, info);
        }
    }
    let queued = signals & !((1 << (libc::SIGRTMIN() - 1)) - 1);
    if queued != 0 {
        set_mask(libc::SIG_UNBLOCK, &set_of(queued));
    }
    members(handed).for_each(mark_for_python);
}

thread_local! {
    /// What is blocked in the thread's next run, for threads that have all blocked.
    static IN_RUN: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Lets this thread's next run have these signals blocked.
pub fn block_in_run(mask: u64) {
    IN_RUN.set(Some(mask));
}
