// SPDX-License-Identifier: Apache-2.0
//! The program's first stack: arguments, environment and auxiliary vector (System V ABI, AMD64 supplement, 3.4.1).

use core::arch::asm;
use core::ffi::c_char;
use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;

use crate::elf::Image;
use crate::fail;

const SIZE: usize = 8 << 20;
/// Entries of the auxiliary vector that are about the program; the others are as the kernel has given them to us.
const AT_PHDR: usize = 3;
const AT_PHNUM: usize = 5;
const AT_BASE: usize = 7;
const AT_ENTRY: usize = 9;
const AT_EXECFN: usize = 31;

unsafe extern "C" {
    static environ: *const *const c_char;
}

/// The vector as the kernel has given it to us: behind the environment.
///
/// # Safety
/// Nobody has changed the environment yet.
unsafe fn auxiliary() -> Vec<(usize, usize)> {
    // SAFETY: the environment ends with a null pointer, and the vector with AT_NULL.
    unsafe {
        let mut at = environ;
        while !(*at).is_null() {
            at = at.add(1);
        }
        let vector = at.add(1).cast::<(usize, usize)>();
        let length = (0..).take_while(|n| (*vector.add(*n)).0 != 0).count();
        core::slice::from_raw_parts(vector, length).to_vec()
    }
}

fn environment() -> Vec<CString> {
    std::env::vars_os()
        .filter_map(|(name, value)| {
            let mut text = name.into_vec();
            text.push(b'=');
            text.extend(value.into_vec());
            CString::new(text).ok()
        })
        .collect()
}

/// Makes the stack; returns its pointer. `path` is the program's, `arguments` begin with what it is called.
pub fn make(path: &CString, arguments: &[CString], image: &Image) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: new memory.
    let stack = unsafe { libc::mmap(core::ptr::null_mut(), SIZE, protection, flags, -1, 0) };
    if stack == libc::MAP_FAILED {
        fail("no memory for the program's stack", 1);
    }
    let kept = |strings: Vec<CString>| strings.into_iter().map(|s| s.into_raw() as usize).collect::<Vec<_>>();
    let name = kept(vec![path.clone()])[0];
    let arguments = kept(arguments.to_vec());
    let mut words = vec![arguments.len()];
    words.extend(arguments);
    words.push(0);
    words.extend(kept(environment()));
    words.push(0);
    // SAFETY: we have not changed it.
    for (key, value) in unsafe { auxiliary() } {
        let value = match key {
            AT_PHDR => image.headers,
            AT_PHNUM => image.header_count,
            AT_BASE => image.linker,
            AT_ENTRY => image.entry,
            AT_EXECFN => name,
            _ => value,
        };
        words.extend([key, value]);
    }
    words.extend([0, 0]);
    let pointer = (stack as usize + SIZE - words.len() * 8 - 4096) & !63;
    // SAFETY: within the new memory.
    unsafe { core::ptr::copy_nonoverlapping(words.as_ptr(), pointer as *mut usize, words.len()) };
    pointer
}

/// Begins the program.
pub fn jump(entry: usize, stack: usize) -> ! {
    // SAFETY: the program's entry, with the stack that it expects, and no function to call at its end.
    unsafe {
        asm!("mov rsp, {stack}", "xor edx, edx", "xor ebp, ebp", "jmp {entry}", stack = in(reg) stack,
             entry = in(reg) entry, options(noreturn))
    }
}
