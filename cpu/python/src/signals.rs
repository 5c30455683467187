// SPDX-License-Identifier: Apache-2.0
//! Signals to the thread that runs a processor: they end the run, and are handled behind it.
//!
//! The kernel's KVM_RUN is a system call: a signal makes it return, and its handler runs then, never in the middle.
//! Here a run is code of the process, which handlers interrupt anywhere. So handlers are called through ours, which
//! puts a signal off while its thread is in a run, kicks the processor, and lets the run's end raise the signal again
//! with all that came with it. On a thread that is in no run the handler is called as if ours were not there.
//!
//! The kernel does every other request like that, too. So a thread that is in one holds a [`Runner`]: the vCPU's, which
//! is its mutex at the same time, or one of the thread's own.
//!
//! Python's handlers are two: the interpreter's in C marks the signal, on whatever thread the kernel has chosen, and its
//! main thread calls the one in Python soon after, in the middle of anything. So one that another thread has caught is
//! handed to the request that the main thread is in, whose end marks it ([`hand_to_main`]).
//!
//! Which handlers a process has, the kernel tells nobody. Python's are reported as they are installed
//! ([`watch_signal`]); for those of other languages [`watch`] looks now and then.
//!
//! Everything that a handler may touch is atomic and never freed; the thread is recognized by its `pthread_self`.

use std::cell::{Cell, UnsafeCell};
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use libc::{c_int, c_void, siginfo_t, sigset_t, ucontext_t};
use softcpu::clock::clock_ns;
use softcpu::mem::lost::actions::{action_of, call_handler, set_action, set_default};
use softcpu::mem::{Shared, forks, futex, lost};
use softkvm_client::sanitizers::Unseen;

/// How old a look at the handlers may be when a run begins.
const WATCH_NS: u64 = 20_000_000;
/// A signal that comes again so long after it was put off is handled at once: the run does not end.
const PATIENCE_NS: u64 = 1_000_000_000;
/// How many handlers of one signal may have been installed over each other, each calling the one before.
const LEVELS: usize = 4;
/// One more than the last signal.
const END: usize = 65;

/// Bits of [`Runner::wanted`]: somebody called [`Runner::interrupt`], until it is taken.
const INTERRUPTED: u32 = 1;
/// A signal came in this run.
const SIGNALLED: u32 = 2;

/// Who is in a request, a processor's run for one, and what came for him meanwhile.
pub struct Runner {
    next: AtomicPtr<Runner>,
    used: AtomicBool,
    /// `pthread_self` of the thread in a request whose signals are put off, 0 for none.
    thread: AtomicUsize,
    /// The same, from before until after that: a lock, so that what follows is one thread's at a time.
    owner: AtomicUsize,
    /// How many threads wait for the lock, on `turn`, which every release changes while there are any. One that was
    /// woken and found it taken once more is the `heir`: the next release is to him (the kernel's mutexes do so, too).
    waiters: AtomicU32,
    turn: AtomicU32,
    heir: AtomicUsize,
    /// The request is a run of the processor.
    running: AtomicBool,
    wanted: AtomicU32,
    /// The processor; a reference counted for as long as the runner is used, and until it is used again.
    shared: AtomicPtr<Shared>,
    /// Signals put off (bit n - 1 for signal n), when the first of them was, and what came with them.
    put_off: AtomicU64,
    since: AtomicU64,
    infos: [UnsafeCell<MaybeUninit<siginfo_t>>; END - 1],
    /// Signals for Python that other threads have caught (bits as in `put_off`).
    handed: AtomicU64,
    /// The thread's own mask, while the run has another.
    mask: Cell<Option<sigset_t>>,
}

// SAFETY: `infos` and `mask` are touched by the owner only, in its handlers and outside of them, and an entry of `infos` by a handler only while its bit of `put_off` is clear.
unsafe impl Sync for Runner {}

/// All runners there have been.
static RUNNERS: AtomicPtr<Runner> = AtomicPtr::new(core::ptr::null_mut());

fn runners() -> impl Iterator<Item = &'static Runner> {
    // SAFETY: runners are never freed.
    let at = |p: &AtomicPtr<Runner>| unsafe { p.load(Ordering::Acquire).as_ref() };
    std::iter::successors(at(&RUNNERS), move |r| at(&r.next))
}

fn current_thread() -> usize {
    // SAFETY: always works; reads a register.
    unsafe { libc::pthread_self() as usize }
}

/// gettid(), without a system call if possible: none of this thread's, or of its parent's, number is kept for it where
/// threads may have each other's thread pointers.
fn thread_number() -> c_int {
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
    /// A runner for a processor, or for a thread's other requests.
    pub fn new(shared: Option<&Arc<Shared>>) -> &'static Runner {
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
        watch();
        runner
    }

    /// Gives it back; its processor is gone.
    pub fn release(&self) {
        // The thread may have been cancelled at its end.
        self.thread.store(0, Ordering::SeqCst);
        self.put_off.store(0, Ordering::SeqCst);
        self.used.store(false, Ordering::SeqCst);
    }

    fn processor(&self) -> Option<&Shared> {
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

    fn end_run_early(&self) {
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

    fn unlock(&self) {
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

    /// What came with signals that were put off.
    fn infos(&self, signals: u64) -> Infos {
        let mut infos = [MaybeUninit::uninit(); END - 1];
        for signal in members(signals) {
            // SAFETY: those whose bit was set are filled in.
            infos[signal as usize - 1] = unsafe { *self.infos[signal as usize - 1].get() };
        }
        infos
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

/// What came with signals, for each.
type Infos = [MaybeUninit<siginfo_t>; END - 1];

/// Raises signals once more that this thread has put off, and those that were handed to Python's main thread.
#[cold]
fn raise(signals: u64, handed: u64, infos: &Infos) {
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

// ---- handlers ----------------------------------------------------------------------------------------------------

type Handler = extern "C-unwind" fn(c_int, *mut siginfo_t, *mut c_void);

unsafe extern "C-unwind" {
    /// libc's is declared as one that no handler of a signal unwinds.
    fn syscall(number: libc::c_long, ...) -> libc::c_long;
}

/// A handler that ours stands before.
struct Previous {
    known: AtomicBool,
    handler: AtomicUsize,
    flags: AtomicI32,
}

impl Previous {
    fn set(&self, action: &libc::sigaction) {
        self.handler.store(action.sa_sigaction, Ordering::SeqCst);
        self.flags.store(action.sa_flags, Ordering::SeqCst);
        self.known.store(true, Ordering::SeqCst);
    }

    /// The handler, and its flags.
    fn action(&self) -> (usize, c_int) {
        (self.handler.load(Ordering::SeqCst), self.flags.load(Ordering::SeqCst))
    }
}

/// The level of ours that a signal has.
static FRONT: [AtomicUsize; END] = [const { AtomicUsize::new(0) }; END];

static PREVIOUS: [[Previous; END]; LEVELS] = [const {
    [const { Previous { known: AtomicBool::new(false), handler: AtomicUsize::new(0), flags: AtomicI32::new(0) } };
        END]
}; LEVELS];

/// Ours, one for each level: a handler that was installed over ours may call it, and means the one below.
const OURS: [Handler; LEVELS] = [on_signal::<0>, on_signal::<1>, on_signal::<2>, on_signal::<3>];

extern "C-unwind" fn on_signal<const LEVEL: usize>(
    signal: c_int,
    info: *mut siginfo_t,
    context: *mut c_void,
) {
    // SAFETY: errno of this thread, which a handler has to leave alone.
    let errno = unsafe { libc::__errno_location() };
    let before = unsafe { *errno };
    if !put_off(signal, info, context.cast()) {
        call_previous(LEVEL, signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *errno = before };
}

/// Puts a signal off if this thread is in a run; false: it is to be handled now.
pub fn put_off(signal: c_int, info: *const siginfo_t, context: *mut ucontext_t) -> bool {
    let me = current_thread();
    let bit = 1u64 << (signal - 1);
    let (mut done, mut runs) = (false, false);
    for runner in runners().filter(|r| r.thread.load(Ordering::SeqCst) == me) {
        runner.signalled();
        runs |= runner.running.load(Ordering::SeqCst);
        if core::mem::replace(&mut done, true) {
            continue; // a run inside of another
        }
        let before = runner.put_off.load(Ordering::SeqCst);
        if before & bit != 0 {
            let waits_since = runner.since.load(Ordering::SeqCst);
            if clock_ns().saturating_sub(waits_since) < PATIENCE_NS || FOREIGN.load(Ordering::SeqCst) {
                continue; // as if it were still pending
            }
            runner.put_off.fetch_and(!bit, Ordering::SeqCst);
            return false;
        }
        // SAFETY: this is the run's thread, and the entry is free; the kernel gave valid pointers.
        unsafe {
            (*runner.infos[signal as usize - 1].get()).write(*info);
            if signal >= libc::SIGRTMIN() {
                // Such signals queue up: the kernel keeps the next ones.
                libc::sigaddset(&raw mut (*context).uc_sigmask, signal);
            }
        }
        if before == 0 {
            runner.since.store(clock_ns(), Ordering::SeqCst);
        }
        runner.put_off.fetch_or(bit, Ordering::SeqCst);
    }
    if runs {
        // SAFETY: the context of a handler.
        unsafe { lost::leave_awaited(context.cast()) }; // or the run would not end before the memory is there
    }
    done
}

fn call_previous(level: usize, signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let previous = &PREVIOUS[level][signal as usize];
    let handler = previous.handler.load(Ordering::SeqCst);
    match handler {
        libc::SIG_IGN => {}
        libc::SIG_DFL => default_action(signal),
        _ if is_for_main(handler) => mark_for_python(signal),
        // SAFETY: a handler that somebody has installed for this signal, called as its flags say.
        _ => unsafe {
            let flags = previous.flags.load(Ordering::SeqCst);
            if flags & libc::SA_RESETHAND != 0 {
                set_default(signal);
            }
            let mut action: libc::sigaction = core::mem::zeroed();
            (action.sa_sigaction, action.sa_flags) = (handler, flags);
            call_handler(&action, signal, info, context);
        },
    }
}

/// The interpreter's handler, which only needs the signal's number, and its main thread's `pthread_self`; 0: not known.
static PYTHON: AtomicUsize = AtomicUsize::new(0);
static MAIN: AtomicUsize = AtomicUsize::new(0);
/// How many threads are in [`mark_for_python`].
static MARKING: AtomicUsize = AtomicUsize::new(0);

/// Whether a handler is the interpreter's, and this is not the thread on which it calls Python's.
fn is_for_main(handler: usize) -> bool {
    handler == PYTHON.load(Ordering::SeqCst) && current_thread() != MAIN.load(Ordering::SeqCst)
}

/// Lets the interpreter know of a signal, now or when its main thread's request ends.
fn mark_for_python(signal: c_int) {
    MARKING.fetch_add(1, Ordering::SeqCst);
    if !hand_to_main(signal) {
        // SAFETY: CPython's handler, which takes the number alone.
        unsafe { core::mem::transmute::<usize, extern "C" fn(c_int)>(PYTHON.load(Ordering::SeqCst))(signal) };
    }
    MARKING.fetch_sub(1, Ordering::SeqCst);
}

/// Leaves a signal to the request that Python's main thread is in; false: it is in none.
fn hand_to_main(signal: c_int) -> bool {
    let main = MAIN.load(Ordering::SeqCst);
    let bit = 1u64 << (signal - 1);
    runners().any(|runner| {
        let within = || runner.thread.load(Ordering::SeqCst) == main;
        if !within() {
            return false;
        }
        runner.handed.fetch_or(bit, Ordering::SeqCst);
        if within() {
            runner.end_run_early();
            return true;
        }
        // Its end has seen the bit, or does not any more.
        runner.handed.fetch_and(!bit, Ordering::SeqCst) & bit == 0
    })
}

/// What the kernel does with a signal that has no handler.
fn default_action(signal: c_int) {
    if matches!(signal, libc::SIGCHLD | libc::SIGURG | libc::SIGWINCH | libc::SIGCONT) {
        return;
    }
    set_default(signal);
    // SAFETY: the signal is blocked until our handler returns, and then ends or stops the process.
    unsafe { libc::raise(signal) };
}

/// When all handlers were looked at, and whether somebody does it now.
static LAST_WATCH: AtomicU64 = AtomicU64::new(0);
static LOOKING: AtomicBool = AtomicBool::new(false);

/// CLOCK_MONOTONIC, a few milliseconds late: a cheap way to ask.
fn now_about_ns() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid clock and a valid pointer.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Somebody else stands before the handlers, and calls [`put_off`]. Its threads have all signals blocked outside of runs.
static FOREIGN: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// What is blocked in the thread's next run, for threads that have all blocked.
    static IN_RUN: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Whether somebody else stands before the handlers.
pub fn leave_handlers(foreign: bool) {
    FOREIGN.store(foreign, Ordering::SeqCst);
}

/// Lets this thread's next run have these signals blocked.
pub fn block_in_run(mask: u64) {
    IN_RUN.set(Some(mask));
}

/// Puts ours before all handlers that are new.
fn watch() {
    if FOREIGN.load(Ordering::SeqCst) || LOOKING.swap(true, Ordering::SeqCst) {
        return;
    }
    LAST_WATCH.store(now_about_ns(), Ordering::SeqCst);
    (1..END as c_int).for_each(watch_signal);
    lost::watch();
    LOOKING.store(false, Ordering::SeqCst);
}

/// Puts ours before a signal's handler, if it has one.
pub fn watch_signal(signal: c_int) {
    if !can_be_caught(signal) || FOREIGN.load(Ordering::SeqCst) {
        return;
    }
    if let Some(action) = action_of(signal).filter(|a| a.sa_sigaction > libc::SIG_IGN && !is_ours(a)) {
        install(signal, action);
    }
}

/// [`watch_signal`] for one whose handler Python has just installed; its handlers run on the thread `main`.
pub fn watch_python_signal(signal: c_int, main: usize) {
    let Some(action) = action_of(signal) else { return };
    let handler = match own_level(&action) {
        Some(level) => PREVIOUS[level][signal as usize].handler.load(Ordering::SeqCst),
        None => action.sa_sigaction,
    };
    if handler > libc::SIG_IGN {
        PYTHON.store(handler, Ordering::SeqCst);
        MAIN.store(main, Ordering::SeqCst);
    }
    watch_signal(signal);
}

/// Puts ours before whatever a signal does, unless it is ignored; whether it is there.
fn catch(signal: c_int) -> bool {
    if FOREIGN.load(Ordering::SeqCst) {
        return true;
    }
    match action_of(signal) {
        Some(action) if action.sa_sigaction == libc::SIG_IGN => false,
        Some(action) => is_ours(&action) || install(signal, action),
        None => false,
    }
}

fn is_ours(action: &libc::sigaction) -> bool {
    own_level(action).is_some()
}

/// The level of ours, if it is `action`'s handler.
fn own_level(action: &libc::sigaction) -> Option<usize> {
    OURS.iter().position(|&ours| ours as usize == action.sa_sigaction)
}

/// Puts ours before `action`, which a signal has; false if it cannot be.
fn install(signal: c_int, mut action: libc::sigaction) -> bool {
    loop {
        let Some(level) = level_of(signal, &action) else { return false };
        let Some(replaced) = put_in_front(signal, level, &action) else { return false };
        if replaced.sa_sigaction == action.sa_sigaction || is_ours(&replaced) {
            return true;
        }
        // Somebody has changed it since we looked: that is what ours has to stand before.
        action = replaced;
    }
}

/// Installs ours, otherwise as `action`; returns what was there, None if it cannot be.
fn put_in_front(signal: c_int, level: usize, action: &libc::sigaction) -> Option<libc::sigaction> {
    FRONT[signal as usize].store(level, Ordering::SeqCst);
    let mut ours = *action;
    ours.sa_sigaction = OURS[level] as usize;
    // That it is for once, ours sees to: it may put the signal off.
    ours.sa_flags = ours.sa_flags & !libc::SA_RESETHAND | libc::SA_SIGINFO;
    // SAFETY: a handler as its flags say.
    unsafe { set_action(signal, &ours) }
}

/// The level at which ours calls `action`'s handler.
fn level_of(signal: c_int, action: &libc::sigaction) -> Option<usize> {
    (0..LEVELS).find(|&level| {
        let previous = &PREVIOUS[level][signal as usize];
        if !previous.known.load(Ordering::SeqCst) {
            previous.set(action);
        }
        let is_it = previous.handler.load(Ordering::SeqCst) == action.sa_sigaction;
        if is_it {
            previous.set(action);
        }
        is_it
    })
}

// ---- for a client that is not to know of ours ----------------------------------------------------------------------

/// sigaction() behind ours, which stays in front of any handler; None: it is for the C library's.
pub fn client_action(signal: c_int, new: Option<&libc::sigaction>) -> Option<Result<libc::sigaction, c_int>> {
    if !can_be_caught(signal) {
        return lost::client_action(signal, new).map(Ok);
    }
    let level = FRONT[signal as usize].load(Ordering::SeqCst);
    let before = PREVIOUS[level][signal as usize].action();
    let old = match new {
        None => action_of(signal),
        Some(action) if action.sa_sigaction > libc::SIG_IGN => {
            PREVIOUS[level][signal as usize].set(action);
            put_in_front(signal, level, action)
        }
        // SAFETY: no handler.
        Some(action) => unsafe { set_action(signal, action) },
    };
    let Some(mut old) = old else { return Some(Err(libc::EINVAL)) };
    if own_level(&old) == Some(level) {
        (old.sa_sigaction, old.sa_flags) = before;
    }
    Some(Ok(old))
}

/// Somebody has changed what a signal does, by a function that is none of [`client_action`]'s: ours goes in front.
pub fn client_action_changed(signal: c_int) {
    if !can_be_caught(signal) {
        return lost::client_action_changed(signal);
    }
    if let Some(action) = action_of(signal).filter(|a| a.sa_sigaction > libc::SIG_IGN && !is_ours(a)) {
        let level = FRONT[signal as usize].load(Ordering::SeqCst);
        PREVIOUS[level][signal as usize].set(&action);
        put_in_front(signal, level, &action);
    }
}

/// The handler that one of ours stands before; any other is itself.
pub fn client_handler(signal: c_int, handler: usize) -> usize {
    if !can_be_caught(signal) {
        return lost::client_handler(signal, handler);
    }
    let level = OURS.iter().position(|&ours| ours as usize == handler);
    level.map_or(handler, |level| PREVIOUS[level][signal as usize].action().0)
}

/// Ends the run that a thread (`pthread_self`) is in, if it is in one, as a signal does.
pub fn end_run_of(thread: usize) {
    for runner in runners().filter(|r| r.thread.load(Ordering::SeqCst) == thread) {
        runner.end_run_early();
    }
}

// ---- sets --------------------------------------------------------------------------------------------------------

/// Signals that an instruction raises: they cannot wait.
fn is_synchronous(signal: c_int) -> bool {
    use libc::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
    matches!(signal, SIGABRT | SIGBUS | SIGFPE | SIGILL | SIGSEGV | SIGSYS | SIGTRAP)
}

/// Signals whose handlers are ours to call: not those of the C library (32 and 33) either.
fn can_be_caught(signal: c_int) -> bool {
    let in_range = (1..END as c_int).contains(&signal);
    let reserved = (32..libc::SIGRTMIN()).contains(&signal);
    in_range && !is_synchronous(signal) && !reserved && !matches!(signal, libc::SIGKILL | libc::SIGSTOP)
}

fn members(bits: u64) -> impl Iterator<Item = c_int> {
    (1..END as c_int).filter(move |s| bits >> (s - 1) & 1 != 0)
}

fn members_of(kind: fn(c_int) -> bool) -> u64 {
    (1..END as c_int).filter(|&s| kind(s)).fold(0, |bits, s| bits | 1 << (s - 1))
}

fn set_of(bits: u64) -> sigset_t {
    // SAFETY: sigemptyset fills it in; the C library refuses its own signals.
    unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for signal in members(bits) {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

fn bits_of(set: &sigset_t) -> u64 {
    // SAFETY: asks.
    let holds = |s: c_int| unsafe { libc::sigismember(set, s) == 1 };
    (1..END as c_int).filter(|&s| holds(s)).fold(0, |bits, s| bits | 1 << (s - 1))
}

fn set_mask(how: c_int, set: &sigset_t) {
    // SAFETY: a valid set; only a wrong `how` fails.
    unsafe { libc::pthread_sigmask(how, set, core::ptr::null_mut()) };
}

/// Starts a thread that takes no signal, and that no sanitizer looks at: both are for the client's threads.
pub fn spawn_quiet(name: &str, main: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut before = set_of(0);
    // SAFETY: valid sets; the new thread inherits the mask.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set_of(!members_of(is_synchronous)), &mut before) };
    let main = || {
        let _unseen = Unseen::new();
        main();
    };
    let spawned = std::thread::Builder::new().name(name.into()).spawn(main);
    set_mask(libc::SIG_SETMASK, &before);
    spawned.map(drop)
}

/// A forked child has one thread, which is in no request of its own.
pub fn after_fork() {
    LOOKING.store(false, Ordering::SeqCst);
    MARKING.store(0, Ordering::SeqCst);
    MAIN.store(current_thread(), Ordering::SeqCst);
    for runner in runners() {
        runner.thread.store(0, Ordering::SeqCst);
        runner.owner.store(0, Ordering::SeqCst);
        runner.waiters.store(0, Ordering::SeqCst);
        runner.heir.store(0, Ordering::SeqCst);
        runner.put_off.store(0, Ordering::SeqCst);
        runner.handed.store(0, Ordering::SeqCst);
    }
}
