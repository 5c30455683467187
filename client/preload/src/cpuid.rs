// SPDX-License-Identifier: Apache-2.0
//! CPUID, where the client itself executes it: replaced, and answered as SIGILL's handler.
//!
//! In the program that is done when the process begins, as it may ask before it opens `/dev/kvm`; in libraries, libkrun for
//! one, when it opens that first. A program that has nothing to do with KVM, and large libraries, does not wait for it.

use core::ffi::{c_int, c_void};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, Ordering};
use std::cell::UnsafeCell;
use std::ffi::CStr;
use std::mem::{MaybeUninit, zeroed};

use softkvm_client::cpuid::{self, Module, is_replaced};
use softkvm_client::forks;

use crate::handlers::real_sigaction;

/// Whether a part of the process has `/dev/kvm` in its constants.
static IS_CLIENT: AtomicBool = AtomicBool::new(false);
/// Whether SIGILL is ours.
static INSTALLED: AtomicBool = AtomicBool::new(false);

// ---- what the client has for SIGILL ----------------------------------------------------------------------------------

struct ClientAction(UnsafeCell<libc::sigaction>);
// SAFETY: changed by sigaction() alone; as with the kernel's, who calls it twice at once gets either.
unsafe impl Sync for ClientAction {}
// SAFETY: all zeros are SIG_DFL.
static CLIENT: ClientAction = ClientAction(UnsafeCell::new(unsafe { zeroed() }));

/// Does sigaction() for SIGILL, behind our handler; None: that is not there.
pub fn client_action(new: *const libc::sigaction, old: *mut libc::sigaction) -> Option<c_int> {
    if !INSTALLED.load(Ordering::Acquire) {
        return None;
    }
    // SAFETY: the caller's structures, or null.
    unsafe {
        let before = *CLIENT.0.get();
        if !new.is_null() {
            *CLIENT.0.get() = *new;
        }
        if !old.is_null() {
            *old = before;
        }
    }
    Some(0)
}

extern "C-unwind" fn on_illegal(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the thread's registers.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        if is_replaced(registers[libc::REG_RIP as usize] as usize) {
            let leaf = registers[libc::REG_RAX as usize] as u32;
            let subleaf = registers[libc::REG_RCX as usize] as u32;
            for (register, value) in [libc::REG_RAX, libc::REG_RBX, libc::REG_RCX, libc::REG_RDX]
                .into_iter()
                .zip(cpuid::answer(leaf, subleaf))
            {
                registers[register as usize] = i64::from(value);
            }
            registers[libc::REG_RIP as usize] += cpuid::SIZE as i64;
            return;
        }
        let action = *CLIENT.0.get();
        match action.sa_sigaction {
            libc::SIG_IGN | libc::SIG_DFL => {
                let default: libc::sigaction = zeroed();
                // It comes again.
                real_sigaction(signal, &default, null_mut());
            }
            handler if action.sa_flags & libc::SA_SIGINFO != 0 => {
                core::mem::transmute::<usize, extern "C-unwind" fn(c_int, *mut libc::siginfo_t, *mut c_void)>(
                    handler,
                )(signal, info, context);
            }
            handler => core::mem::transmute::<usize, extern "C-unwind" fn(c_int)>(handler)(signal),
        }
    }
}

// ---- when the process begins -----------------------------------------------------------------------------------------

fn install() {
    // SAFETY: zeros are a sigaction with an empty mask; filled in on success.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = on_illegal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        let mut before = MaybeUninit::uninit();
        if real_sigaction(libc::SIGILL, &action, before.as_mut_ptr()) == 0 {
            *CLIENT.0.get() = before.assume_init();
            INSTALLED.store(true, Ordering::Release);
        }
    }
}

/// The extension module, which a client in Python may have loaded: its CPUID is the host's.
const EXTENSION: &[u8] = b"/_softcpu.";

/// Looks at a part of the process, if it is wanted.
unsafe fn look(info: *mut libc::dl_phdr_info, is_wanted: impl Fn(&Module) -> bool) {
    // SAFETY: the linker's description of a part that is mapped.
    let (module, name) = unsafe {
        let module = Module {
            base: (*info).dlpi_addr as usize,
            headers: core::slice::from_raw_parts((*info).dlpi_phdr, (*info).dlpi_phnum as usize),
            functions: Vec::new(),
        };
        (module, CStr::from_ptr((*info).dlpi_name).to_bytes())
    };
    let is_extension = name.windows(EXTENSION.len()).any(|part| part == EXTENSION);
    if !is_extension && is_wanted(&module) && module.is_client() {
        IS_CLIENT.store(true, Ordering::Relaxed);
        if !INSTALLED.load(Ordering::Acquire) {
            install();
        }
        module.replace();
    }
}

unsafe extern "C" fn look_at_program(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: the linker calls with a description; the first is the program's.
    unsafe { look(info, |_| true) };
    1
}

unsafe extern "C" fn look_at_library(
    info: *mut libc::dl_phdr_info,
    _: usize,
    is_behind_program: *mut c_void,
) -> c_int {
    // SAFETY: the linker calls with a description, and with what was given to it.
    unsafe {
        if core::mem::replace(&mut *is_behind_program.cast::<bool>(), true) {
            look(info, |module| !module.has_code(look_at_library as *const () as usize));
        }
    }
    0
}

/// Whether the process is one that may use KVM.
pub fn is_client() -> bool {
    IS_CLIENT.load(Ordering::Relaxed)
}

extern "C" fn at_start() {
    forks::follow();
    // SAFETY: calls `look_at_program` once.
    unsafe { libc::dl_iterate_phdr(Some(look_at_program), null_mut()) };
}

/// The process is about to use KVM, for the first time: looks at its libraries.
pub fn at_open() {
    let mut is_behind_program = false;
    // SAFETY: calls `look_at_library` for every part of the process.
    unsafe { libc::dl_iterate_phdr(Some(look_at_library), (&raw mut is_behind_program).cast()) };
}

#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = at_start;
