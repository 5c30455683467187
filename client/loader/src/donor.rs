// SPDX-License-Identifier: Apache-2.0
//! Threads of ours whose thread pointer and stack a thread of the program borrows for a request.
//!
//! Such a thread does nothing but sleep. Our C library, and all that rests on it, takes who runs with its thread pointer
//! for it: locks, thread-local storage and the interpreter's state are the borrower's from the first request to the end.

use core::arch::global_asm;
use core::ffi::c_void;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering};

use softkvm_client::{Client, Core, cpuid, python};

use crate::descriptors;
use crate::handlers::all_that_wait;
use crate::raw::{getpid, gettid, raw, sleep_on, wake};

/// As many threads may have made requests at the same time.
const MOST: usize = 1024;
/// A donor's stack, and what it needs for itself.
const STACK: usize = 4 << 20;
const OWN: usize = 16 << 10;
/// How often a thread of ours looks for files that the program has closed, in nanoseconds.
const COLLECT_NS: i64 = 200_000_000;

/// A thread of the program, and the one that it borrows from.
pub struct Donor {
    /// The borrower, 0 for none.
    thread: AtomicU32,
    /// Whether the thread that lends has been started.
    started: AtomicBool,
    /// The thread pointer, and the stack's free end.
    pointer: AtomicUsize,
    stack: AtomicUsize,
    /// Whether they are known.
    ready: AtomicU32,
    /// It is lent just now.
    pub lent: AtomicBool,
}

static DONORS: [Donor; MOST] = [const {
    Donor {
        thread: AtomicU32::new(0),
        started: AtomicBool::new(false),
        pointer: AtomicUsize::new(0),
        stack: AtomicUsize::new(0),
        ready: AtomicU32::new(0),
        lent: AtomicBool::new(false),
    }
}; MOST];

/// How many donors there are at most, and how often one has been wanted; the manager makes them.
static USED: AtomicU32 = AtomicU32::new(0);
static WANTED: AtomicU32 = AtomicU32::new(0);
static PROCESS: AtomicI32 = AtomicI32::new(0);
static READY: AtomicU32 = AtomicU32::new(0);

fn donors() -> &'static [Donor] {
    &DONORS[..USED.load(Ordering::SeqCst).min(MOST as u32) as usize]
}

extern "C" fn donate(donor: *mut c_void) -> *mut c_void {
    // SAFETY: one of the static array.
    let donor = unsafe { &*donor.cast::<Donor>() };
    let here = 0u8;
    // SAFETY: always succeeds.
    donor.pointer.store(unsafe { libc::pthread_self() } as usize, Ordering::SeqCst);
    donor.stack.store((&raw const here as usize - OWN) & !63, Ordering::SeqCst);
    donor.ready.store(1, Ordering::SeqCst);
    wake(&donor.ready);
    let never = AtomicU32::new(0);
    loop {
        sleep_on(&never, 0);
    }
}

/// Starts a thread of ours with all signals blocked but those of faults.
fn spawn(main: extern "C" fn(*mut c_void) -> *mut c_void, argument: *mut c_void, stack: usize) {
    // SAFETY: valid pointers; the new thread inherits the mask.
    unsafe {
        let mut before = core::mem::zeroed();
        let mut attributes = core::mem::zeroed();
        libc::pthread_attr_init(&mut attributes);
        libc::pthread_attr_setstacksize(&mut attributes, stack);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all_that_wait(), &mut before);
        let mut thread = 0;
        if libc::pthread_create(&mut thread, &attributes, main, argument) == 0 {
            libc::pthread_detach(thread);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, core::ptr::null_mut());
    }
}

/// The thread that does for the program's what those cannot: it makes donors, and looks for files that nobody has.
extern "C" fn manage(_: *mut c_void) -> *mut c_void {
    READY.store(1, Ordering::SeqCst);
    wake(&READY);
    loop {
        let wanted = WANTED.load(Ordering::SeqCst);
        for donor in donors() {
            if donor.thread.load(Ordering::SeqCst) != 0 && !donor.started.swap(true, Ordering::SeqCst) {
                spawn(donate, (&raw const *donor).cast_mut().cast(), STACK);
            }
        }
        let time = libc::timespec { tv_sec: 0, tv_nsec: COLLECT_NS };
        let timeout = if python::core().is_some() { &raw const time } else { core::ptr::null() };
        raw!(
            libc::SYS_futex,
            WANTED.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            wanted,
            timeout,
            0,
            0
        );
        if let Some(core) = python::core() {
            (core.collect)();
        }
    }
}

/// The main thread, and 0 when that has ended; unless the program has the kernel clear a word of its own then, as C
/// libraries do.
static MAIN: AtomicU32 = AtomicU32::new(0);
const WATCHERS_STACK: usize = 64 << 10;

/// What its program gave a main thread to end with, a program without a C library: the process would end with it.
extern "C" fn watch(_: *mut c_void) -> *mut c_void {
    loop {
        match MAIN.load(Ordering::SeqCst) {
            0 => break,
            // The kernel wakes who waits for a word that processes share.
            thread => raw!(libc::SYS_futex, MAIN.as_ptr(), libc::FUTEX_WAIT, thread, 0, 0, 0),
        };
    }
    // The last field (proc_pid_stat(5)) is as wait() has it.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let status = stat.split_whitespace().last().and_then(|field| field.parse::<i32>().ok()).unwrap_or(0);
    raw!(libc::SYS_exit_group, status >> 8);
    core::ptr::null_mut()
}

/// Starts what makes donors, and what ends the process with the calling thread, its main one.
pub fn start() {
    PROCESS.store(getpid(), Ordering::SeqCst);
    spawn(manage, core::ptr::null_mut(), STACK);
    sleep_on(&READY, 0);
    MAIN.store(gettid(), Ordering::SeqCst);
    raw!(libc::SYS_set_tid_address, MAIN.as_ptr());
    spawn(watch, core::ptr::null_mut(), WATCHERS_STACK);
}

/// Whether this is a child that has not been made by `fork.rs`: the memory may be its parent's, and if not, nobody of
/// ours is there.
pub fn is_child() -> bool {
    getpid() != PROCESS.load(Ordering::SeqCst)
}

/// The calling thread is all there is of the parent's: the donor that it has just now stays its.
pub fn after_fork() {
    let lent = |donor: &&Donor| donor.lent.load(Ordering::SeqCst) && donor.pointer_is_set();
    let own = donors().iter().find(lent).map(core::ptr::from_ref);
    for donor in donors() {
        if own == Some(core::ptr::from_ref(donor)) {
            donor.thread.store(gettid(), Ordering::SeqCst);
            continue;
        }
        donor.thread.store(0, Ordering::SeqCst);
        donor.started.store(false, Ordering::SeqCst);
        donor.ready.store(0, Ordering::SeqCst);
        donor.lent.store(false, Ordering::SeqCst);
    }
    READY.store(0, Ordering::SeqCst);
    start();
}

impl Donor {
    /// Whether the calling thread runs with its thread pointer.
    fn pointer_is_set(&self) -> bool {
        // SAFETY: always succeeds.
        self.pointer.load(Ordering::SeqCst) == unsafe { libc::pthread_self() } as usize
    }
}

/// The calling thread's donor, if it has one.
pub fn own() -> Option<&'static Donor> {
    let me = gettid();
    donors().iter().find(|donor| donor.thread.load(Ordering::SeqCst) == me)
}

/// Whether a thread of this process is there.
fn is_alive(thread: u32) -> bool {
    raw!(libc::SYS_tgkill, PROCESS.load(Ordering::SeqCst), thread, 0) == 0
}

/// The calling thread's donor, or one that becomes it; None if there are too many.
fn find() -> Option<&'static Donor> {
    if let Some(donor) = own() {
        return Some(donor);
    }
    let me = gettid();
    // A borrower that has ended leaves its donor.
    let left = donors().iter().find(|donor| {
        let thread = donor.thread.load(Ordering::SeqCst);
        !is_alive(thread)
            && donor.thread.compare_exchange(thread, me, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    });
    let donor = match left {
        Some(donor) => {
            donor.lent.store(false, Ordering::SeqCst);
            donor
        }
        None => {
            let donor = DONORS.get(USED.fetch_add(1, Ordering::SeqCst) as usize)?;
            donor.thread.store(me, Ordering::SeqCst);
            donor
        }
    };
    if donor.ready.load(Ordering::SeqCst) == 0 {
        WANTED.fetch_add(1, Ordering::SeqCst);
        wake(&WANTED);
        sleep_on(&donor.ready, 0);
    }
    Some(donor)
}

// on_loan(function, argument, stack): calls a function on another stack.
global_asm!(
    ".globl softkvm_on_loan",
    "softkvm_on_loan:",
    "push rbp",
    "mov rbp, rsp",
    "mov rsp, rdx",
    "mov rax, rdi",
    "mov rdi, rsi",
    "call rax",
    "mov rsp, rbp",
    "pop rbp",
    "ret",
);

unsafe extern "C" {
    fn softkvm_on_loan(function: extern "C" fn(*mut c_void), request: *mut c_void, stack: usize);
}

const ARCH_SET_FS: usize = 0x1002;
const ARCH_GET_FS: usize = 0x1003;

/// What a thread of the program wants, and what comes of it.
pub struct Request {
    function: fn(&Request) -> isize,
    pub arguments: [usize; 3],
    /// The signals that the program's thread has blocked.
    pub mask: u64,
    result: isize,
}

/// The KVM, loaded if it is not; in a request.
pub fn core() -> Option<&'static Core> {
    python::load(
        || (),
        |core| {
            (core.start)(&Client {
                mark: descriptors::mark,
                sigaction: libc::sigaction,
                tells_closing: true,
                cpuid_sites: cpuid::replaced(),
                handlers: true,
            });
        },
    )
}

/// Does a request of the calling thread, all of whose signals are blocked; errno, negated, if it fails.
pub fn request(function: fn(&Request) -> isize, arguments: [usize; 3], mask: u64) -> isize {
    let Some(donor) = find() else { return -(libc::EAGAIN as isize) };
    let mut request = Request { function, arguments, mask, result: 0 };
    let mut pointer = 0usize;
    raw!(libc::SYS_arch_prctl, ARCH_GET_FS, &raw mut pointer);
    raw!(libc::SYS_arch_prctl, ARCH_SET_FS, donor.pointer.load(Ordering::SeqCst));
    donor.lent.store(true, Ordering::SeqCst);
    // SAFETY: the donor sleeps far above that; its thread pointer is set.
    unsafe {
        softkvm_on_loan(disable_and_serve, (&raw mut request).cast(), donor.stack.load(Ordering::SeqCst))
    };
    donor.lent.store(false, Ordering::SeqCst);
    raw!(libc::SYS_arch_prctl, ARCH_SET_FS, pointer);
    request.result
}

/// The program's alternate stack may hold the frames of what has led here: no handler may begin on it now. The return from
/// the handler puts it back.
extern "C" fn disable_and_serve(request: *mut c_void) {
    let none = libc::stack_t { ss_sp: core::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
    raw!(libc::SYS_sigaltstack, &raw const none, 0);
    // SAFETY: of `request`, which waits for it.
    let request = unsafe { &mut *request.cast::<Request>() };
    request.result = (request.function)(request);
}
