// SPDX-License-Identifier: Apache-2.0
//! The program by its names, which the kernel takes for the loader.

use core::ffi::{CStr, c_char, c_int};
use std::ffi::CString;
use std::sync::OnceLock;

use softkvm_client::device;

use crate::raw::{call, getpid, gettid};

/// The program's file, by an absolute path.
static PROGRAM: OnceLock<CString> = OnceLock::new();

/// The loader's own file.
static LOADER: OnceLock<CString> = OnceLock::new();

/// Remembers which program it is.
pub fn start(program: &CStr) {
    use std::os::unix::ffi::OsStringExt;
    let absolute = |path: std::path::PathBuf| CString::new(path.into_os_string().into_vec()).ok();
    let resolved = program.to_str().ok().and_then(|path| std::fs::canonicalize(path).ok()).and_then(absolute);
    let _ = PROGRAM.set(resolved.unwrap_or_else(|| program.to_owned()));
    // SAFETY: the kernel's string, or null.
    let name = unsafe { libc::getauxval(libc::AT_EXECFN) } as *const c_char;
    let started_as = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_owned());
    if let Some(path) = std::env::current_exe().ok().and_then(absolute).or(started_as) {
        let _ = LOADER.set(path);
    }
}

pub fn program() -> &'static CStr {
    PROGRAM.get().map_or(c"", CString::as_c_str)
}

pub fn loader() -> &'static CStr {
    LOADER.get().map_or(c"", CString::as_c_str)
}

/// Whether decimal digits are a number.
fn is_number(digits: &[u8], number: u32) -> bool {
    let mut value = 0u32;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return false;
        }
        value = value.wrapping_mul(10).wrapping_add(u32::from(digit - b'0'));
    }
    !digits.is_empty() && value == number
}

/// Whether a path is the link to the process's own program.
pub fn is_own_program(path: usize) -> bool {
    let Some(process) = device::path(path as *const c_char, call)
        .and_then(|p| p.strip_prefix(b"/proc/"))
        .and_then(|p| p.strip_suffix(b"/exe"))
    else {
        return false;
    };
    process == b"self"
        || process == b"thread-self"
        || is_number(process, getpid() as u32)
        || is_number(process, gettid())
}

/// readlink() of that link.
pub fn read_own_program(buffer: usize, size: usize) -> isize {
    let size = size as c_int;
    if size <= 0 {
        return -(libc::EINVAL as isize);
    }
    let name = program().to_bytes();
    let length = name.len().min(size as usize);
    // SAFETY: the program's buffer.
    unsafe { core::ptr::copy_nonoverlapping(name.as_ptr(), buffer as *mut u8, length) };
    length as isize
}
