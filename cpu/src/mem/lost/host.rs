// SPDX-License-Identifier: Apache-2.0
//! What guards take of the host's registers.

use std::ffi::c_void;

/// What is called inside of a guard.
pub type Run = unsafe extern "C" fn(*mut c_void);

// `softcpu_call_guarded(guard, f, argument)` calls f(argument) and returns 1, or 0 after `softcpu_leave_guarded(guard)`.
// What a call keeps (System V ABI, 3.2.1) is on the stack; `*guard` is where.
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
core::arch::global_asm!(
    ".pushsection .text.softcpu_guarded, \"ax\", @progbits",
    ".hidden softcpu_call_guarded, softcpu_leave_guarded",
    ".globl softcpu_call_guarded, softcpu_leave_guarded",
    ".type softcpu_call_guarded, @function",
    "softcpu_call_guarded:",
    ".cfi_startproc",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "push rbx",
    ".cfi_def_cfa_offset 24",
    ".cfi_offset rbx, -24",
    "push r12",
    ".cfi_def_cfa_offset 32",
    ".cfi_offset r12, -32",
    "push r13",
    ".cfi_def_cfa_offset 40",
    ".cfi_offset r13, -40",
    "push r14",
    ".cfi_def_cfa_offset 48",
    ".cfi_offset r14, -48",
    "push r15",
    ".cfi_def_cfa_offset 56",
    ".cfi_offset r15, -56",
    "sub rsp, 8",
    ".cfi_def_cfa_offset 64",
    "stmxcsr [rsp]",
    "fnstcw [rsp + 4]",
    "mov [rdi], rsp",
    "mov rdi, rdx",
    "call rsi",
    "mov eax, 1",
    "2:",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "pop rbp",
    ".cfi_def_cfa_offset 8",
    "ret",
    ".cfi_endproc",
    ".size softcpu_call_guarded, . - softcpu_call_guarded",
    ".type softcpu_leave_guarded, @function",
    "softcpu_leave_guarded:",
    "cld",
    "mov rsp, [rdi]",
    "ldmxcsr [rsp]",
    "fldcw [rsp + 4]",
    "xor eax, eax",
    "jmp 2b",
    ".size softcpu_leave_guarded, . - softcpu_leave_guarded",
    ".popsection",
    // The section is there even if a program has no such access: one that is nowhere.
    ".pushsection softcpu_accesses, \"aR\", @progbits",
    ".balign 8",
    ".quad 0",
    ".popsection",
);

#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
unsafe extern "C" {
    #[link_name = "softcpu_call_guarded"]
    pub fn call_guarded(guard: *mut usize, f: Run, argument: *mut c_void) -> u32;
    #[link_name = "softcpu_leave_guarded"]
    fn leave_guarded(guard: *mut usize) -> !;
}

/// Has the thread that was interrupted leave the guard.
///
/// # Safety
/// `context` is the handler's, `guard` one of its thread under way.
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
pub unsafe fn go_on_leaving(context: *mut c_void, guard: *mut usize) {
    // SAFETY: given.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    #[cfg(softcpu_asan)]
    {
        unsafe extern "C" {
            fn __asan_unpoison_memory_region(start: usize, size: usize);
        }
        let from = registers[libc::REG_RSP as usize] as usize;
        // SAFETY: what the calls that are left have on the stack, which the sanitizer thinks is theirs still.
        unsafe { __asan_unpoison_memory_region(from, (*guard).saturating_sub(from)) };
    }
    registers[libc::REG_RIP as usize] = leave_guarded as *const () as i64;
    registers[libc::REG_RDI as usize] = guard as i64;
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
pub unsafe fn call_guarded(_: *mut usize, f: Run, argument: *mut c_void) -> u32 {
    // SAFETY: given.
    unsafe { f(argument) };
    1
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
pub unsafe fn go_on_leaving(_: *mut c_void, _: *mut usize) {
    std::process::abort()
}

/// An access that names what it is for: see [`super::named`].
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
#[repr(C, align(8))]
struct Named {
    /// Where the host's instruction is, from here.
    instruction: i32,
    /// The register's name.
    register: [u8; 4],
}

#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
unsafe extern "C" {
    // The linker's, for a section of this name; hidden, as each library has its own.
    #[link_name = "__start_softcpu_accesses"]
    static START: Named;
    #[link_name = "__stop_softcpu_accesses"]
    static STOP: Named;
}

/// What the access that was interrupted is for, or 0. Async-signal-safe.
///
/// # Safety
/// `context` is the handler's.
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
pub unsafe fn named(context: *mut c_void) -> usize {
    const REGISTERS: [(&[u8], libc::c_int); 15] = [
        (b"rax", libc::REG_RAX),
        (b"rbx", libc::REG_RBX),
        (b"rcx", libc::REG_RCX),
        (b"rdx", libc::REG_RDX),
        (b"rsi", libc::REG_RSI),
        (b"rdi", libc::REG_RDI),
        (b"rbp", libc::REG_RBP),
        (b"r8", libc::REG_R8),
        (b"r9", libc::REG_R9),
        (b"r10", libc::REG_R10),
        (b"r11", libc::REG_R11),
        (b"r12", libc::REG_R12),
        (b"r13", libc::REG_R13),
        (b"r14", libc::REG_R14),
        (b"r15", libc::REG_R15),
    ];
    // SAFETY: given; the section holds nothing but these.
    let (registers, all) = unsafe {
        let (start, stop) = (&raw const START, &raw const STOP);
        let all = std::slice::from_raw_parts(start, stop.offset_from(start) as usize);
        (&(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs, all)
    };
    let at = registers[libc::REG_RIP as usize] as usize;
    let is_it = |n: &&Named| (&raw const n.instruction as usize).wrapping_add(n.instruction as usize) == at;
    let Some(access) = all.iter().find(is_it) else { return 0 };
    let name = access.register.split(|b| *b == 0).next();
    let register = REGISTERS.iter().find(|(n, _)| Some(*n) == name);
    register.map_or(0, |(_, register)| registers[*register as usize] as usize)
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
pub unsafe fn named(_: *mut c_void) -> usize {
    0
}
