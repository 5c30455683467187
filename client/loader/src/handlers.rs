// SPDX-License-Identifier: Apache-2.0
//! Handlers of signals: the program's, behind ours.
//!
//! The kernel only knows ours. A signal that comes while its thread has a donor's thread pointer is left to the request
//! that it interrupts, whose end raises it again; on the program's own pointer and stack its handler is called.

use core::ffi::{c_int, c_void};
use core::mem::zeroed;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use libc::{siginfo_t, ucontext_t};
use softkvm_client::{cpuid, python};

use crate::calls;
use crate::donor;
use crate::raw::{getpid, gettid, raw};

const END: usize = 65;
const SA_RESTORER: i32 = 0x0400_0000;

/// What the program has for a signal: the kernel's `struct sigaction`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Action {
    pub handler: usize,
    pub flags: u64,
    pub restorer: usize,
    pub mask: u64,
}

struct Kept {
    handler: AtomicUsize,
    flags: AtomicU64,
    restorer: AtomicUsize,
    mask: AtomicU64,
}

static PROGRAM: [Kept; END] = [const {
    Kept {
        handler: AtomicUsize::new(0),
        flags: AtomicU64::new(0),
        restorer: AtomicUsize::new(0),
        mask: AtomicU64::new(0),
    }
}; END];

/// Our own way back from a handler.
static RESTORER: AtomicUsize = AtomicUsize::new(0);

fn kept(signal: c_int) -> Action {
    let kept = &PROGRAM[signal as usize];
    Action {
        handler: kept.handler.load(Ordering::SeqCst),
        flags: kept.flags.load(Ordering::SeqCst),
        restorer: kept.restorer.load(Ordering::SeqCst),
        mask: kept.mask.load(Ordering::SeqCst),
    }
}

/// Signals whose handler stays ours: what comes by SIGSYS, CPUID, and faults, some of which are guests'.
const OURS: [c_int; 4] = [libc::SIGSYS, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL];

fn is_ours(signal: c_int) -> bool {
    OURS.contains(&signal)
}

/// A signal's bit in a mask.
const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

/// The bits of signals that must not be blocked: those.
pub const OPEN: u64 = bit(OURS[0]) | bit(OURS[1]) | bit(OURS[2]) | bit(OURS[3]);

/// Does rt_sigaction() of the program's.
pub fn sigaction(signal: c_int, new: *const Action, old: *mut Action, size: usize) -> isize {
    if size != 8 || !(1..END as c_int).contains(&signal) || matches!(signal, libc::SIGKILL | libc::SIGSTOP) {
        return -(libc::EINVAL as isize);
    }
    let before = kept(signal);
    if !new.is_null() && donor::is_child() {
        // A child of vfork() has its parent's memory, where nothing may change, and handlers of its own, but for ours.
        if !is_ours(signal) {
            // SAFETY: the program's structure.
            let action = Action { mask: unsafe { *new }.mask & !OPEN, ..unsafe { *new } };
            raw!(libc::SYS_rt_sigaction, signal, &raw const action, 0, 8);
        }
    } else if !new.is_null() {
        // SAFETY: the program's structure.
        let new = unsafe { *new };
        let given = is_ours(signal) || new.handler <= libc::SIG_IGN || {
            let action = Action {
                handler: on_signal as *const () as usize,
                // That it is for once, ours sees to: it may put the signal off.
                flags: new.flags & !(libc::SA_RESETHAND as u64)
                    | libc::SA_SIGINFO as u64
                    | SA_RESTORER as u64,
                restorer: RESTORER.load(Ordering::SeqCst),
                mask: new.mask & !OPEN,
            };
            raw!(libc::SYS_rt_sigaction, signal, &raw const action, 0, 8) == 0
        };
        if !given {
            return -(libc::EINVAL as isize);
        }
        let kept = &PROGRAM[signal as usize];
        kept.handler.store(new.handler, Ordering::SeqCst);
        kept.flags.store(new.flags, Ordering::SeqCst);
        kept.restorer.store(new.restorer, Ordering::SeqCst);
        kept.mask.store(new.mask, Ordering::SeqCst);
        if !is_ours(signal) && new.handler <= libc::SIG_IGN {
            raw!(libc::SYS_rt_sigaction, signal, &raw const new, 0, 8);
        }
    }
    if !old.is_null() {
        // SAFETY: the program's structure.
        unsafe { *old = before };
    }
    0
}

/// The program's handler was for once.
fn reset(signal: c_int) {
    PROGRAM[signal as usize].handler.store(libc::SIG_DFL, Ordering::SeqCst);
}

/// What a signal does that has no handler.
fn default(signal: c_int, info: *const siginfo_t) {
    // SAFETY: all zeros are SIG_DFL; the kernel has passed the information.
    let (action, code): (Action, c_int) = unsafe { (zeroed(), (*info).si_code) };
    raw!(libc::SYS_rt_sigaction, signal, &raw const action, 0, 8);
    // A fault comes again when the handler returns; what somebody has sent does not.
    if code <= 0 {
        raw!(libc::SYS_tgkill, getpid(), gettid(), signal);
    }
}

/// Calls the program's handler, on its own thread pointer and stack.
fn call(signal: c_int, handler: usize, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: what the program has installed; all three are passed to either kind of handler, as the kernel does.
    unsafe {
        core::mem::transmute::<usize, extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(handler)(
            signal, info, context,
        );
    }
}

extern "C" fn on_signal(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    if donor::own().is_some_and(|donor| donor.lent.load(Ordering::SeqCst)) && !donor::is_child() {
        let put_off = python::core().is_some_and(|core| (core.put_off)(signal, info.cast(), context));
        if !put_off {
            // The C library's own signals cannot be blocked by its functions: it pends until the program's mask is back.
            // SAFETY: the kernel passes it; its sigset_t is 8 bytes.
            unsafe { *(&raw mut (*context.cast::<ucontext_t>()).uc_sigmask).cast::<u64>() |= bit(signal) };
            raw!(libc::SYS_rt_tgsigqueueinfo, getpid(), gettid(), signal, info);
        }
        return;
    }
    let action = kept(signal);
    match action.handler {
        libc::SIG_IGN => {}
        libc::SIG_DFL => default(signal, info),
        handler => {
            if action.flags & libc::SA_RESETHAND as u64 != 0 {
                reset(signal);
                // SAFETY: all zeros are SIG_DFL.
                let default: Action = unsafe { zeroed() };
                raw!(libc::SYS_rt_sigaction, signal, &raw const default, 0, 8);
            }
            call(signal, handler, info, context);
        }
    }
}

/// A fault that is no guest's: as the kernel would have it, whose handler this is not.
extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let action = kept(signal);
    // SAFETY: the kernel passes both; its sigset_t is 8 bytes.
    let (sent, mask) = unsafe {
        let context = &raw const (*context.cast::<ucontext_t>()).uc_sigmask;
        ((*info).si_code <= 0, *context.cast::<u64>())
    };
    match action.handler {
        libc::SIG_IGN if sent => return,
        libc::SIG_IGN | libc::SIG_DFL => return default(signal, info),
        _ => {}
    }
    let has = |flag: c_int| action.flags & flag as u64 != 0;
    if has(libc::SA_RESETHAND) {
        reset(signal);
    }
    // The return puts the one before back.
    let itself = if has(libc::SA_NODEFER) { 0 } else { bit(signal) };
    let within = (mask | action.mask | itself) & !OPEN;
    raw!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const within, 0, 8);
    call(signal, action.handler, info, context);
}

/// An instruction that is none, or that was CPUID.
extern "C" fn on_illegal(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    use libc::{REG_RAX, REG_RBX, REG_RCX, REG_RDX, REG_RIP};
    // SAFETY: the kernel passes it.
    let state = unsafe { &mut *context.cast::<ucontext_t>() };
    let registers = &mut state.uc_mcontext.gregs;
    if !cpuid::is_replaced(registers[REG_RIP as usize] as usize) {
        return on_fault(signal, info, context);
    }
    let (leaf, subleaf) = (registers[REG_RAX as usize] as u32, registers[REG_RCX as usize] as u32);
    for (register, value) in
        [REG_RAX, REG_RBX, REG_RCX, REG_RDX].into_iter().zip(cpuid::answer(leaf, subleaf))
    {
        registers[register as usize] = i64::from(value);
    }
    registers[REG_RIP as usize] += cpuid::SIZE as i64;
}

extern "C" fn on_system_call(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes both.
    unsafe { calls::handle(info, &mut *context.cast::<ucontext_t>()) };
}

/// All signals but those of faults, which cannot wait, and SIGSYS.
pub fn all_that_wait() -> libc::sigset_t {
    // SAFETY: sigfillset fills it in.
    unsafe {
        let mut set = zeroed();
        libc::sigfillset(&mut set);
        for signal in [libc::SIGSYS, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            libc::sigdelset(&mut set, signal);
        }
        set
    }
}

/// Installs those that are always there.
pub fn install() {
    // SAFETY: zeros are a sigaction with an empty mask; filled in on success.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        action.sa_sigaction = on_fault as *const () as usize;
        libc::sigaction(libc::SIGSEGV, &action, core::ptr::null_mut());
        libc::sigaction(libc::SIGBUS, &action, core::ptr::null_mut());
        action.sa_sigaction = on_system_call as *const () as usize;
        action.sa_mask = all_that_wait();
        libc::sigaction(libc::SIGSYS, &action, core::ptr::null_mut());
        action.sa_sigaction = on_illegal as *const () as usize;
        libc::sigaction(libc::SIGILL, &action, core::ptr::null_mut());
        // What the C library has given the kernel as the way back.
        let mut installed: Action = zeroed();
        raw!(libc::SYS_rt_sigaction, libc::SIGSYS, 0, &raw mut installed, 8);
        RESTORER.store(installed.restorer, Ordering::SeqCst);
        // Nothing may come in a request but faults; the C library would leave its own signals open.
        for signal in [libc::SIGSYS, libc::SIGILL] {
            raw!(libc::SYS_rt_sigaction, signal, 0, &raw mut installed, 8);
            installed.mask = !(OPEN | bit(libc::SIGFPE) | bit(libc::SIGTRAP));
            raw!(libc::SYS_rt_sigaction, signal, &raw const installed, 0, 8);
        }
    }
}
