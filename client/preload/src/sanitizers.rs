// SPDX-License-Identifier: Apache-2.0
//! What a sanitizer's library asks the process for when it begins (`sanitizer/asan_interface.h`).

use core::ffi::c_char;

/// AddressSanitizer's library ends a program in which another one stands before it, as this one does: its functions could
/// be hidden behind others. Ours call the next ones of their names, which are the sanitizer's.
#[unsafe(no_mangle)]
pub extern "C" fn __asan_default_options() -> *const c_char {
    c"verify_asan_link_order=0".as_ptr()
}
