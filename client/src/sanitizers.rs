// SPDX-License-Identifier: Apache-2.0
//! Sanitizers that the client is built with: what the KVM does in its process is not theirs to judge.
//!
//! LeakSanitizer, which AddressSanitizer brings, would call leaked what only the interpreter's own memory points to, and
//! MemorySanitizer takes what code without its instrumentation has written for uninitialized. Both can be told to leave
//! out what a thread does (`sanitizer/lsan_interface.h`, `sanitizer/msan_interface.h`).

use core::ffi::CStr;
use core::mem::transmute;
use std::sync::OnceLock;

/// What has a sanitizer look away from a thread, and back again; they count.
const PAIRS: [[&CStr; 2]; 2] = [
    [c"__lsan_disable", c"__lsan_enable"],
    [c"__msan_scoped_disable_interceptor_checks", c"__msan_scoped_enable_interceptor_checks"],
];

type Function = extern "C" fn();

/// Those of the pairs that are in the process.
fn present() -> &'static [[Function; 2]] {
    static PRESENT: OnceLock<Vec<[Function; 2]>> = OnceLock::new();
    PRESENT.get_or_init(|| {
        let find = |name: &CStr| {
            // SAFETY: looks a name up; null is none.
            unsafe {
                transmute::<*mut libc::c_void, Option<Function>>(libc::dlsym(
                    libc::RTLD_DEFAULT,
                    name.as_ptr(),
                ))
            }
        };
        PAIRS.iter().filter_map(|[away, back]| Some([find(away)?, find(back)?])).collect()
    })
}

/// Whether one looks at what threads there are and what they own.
pub fn watches() -> bool {
    !present().is_empty()
}

/// Why KVM cannot be in a process with its sanitizer. ThreadSanitizer calls handlers when the thread next calls one of its
/// functions; it takes none of KVM's for such unless they are behind its own, as they are if the program has those.
pub fn obstacle() -> Option<&'static str> {
    // SAFETY: looks a name up in what comes behind this library.
    let behind = unsafe { libc::dlsym(libc::RTLD_NEXT, c"__tsan_init".as_ptr()) };
    (!behind.is_null()).then_some(
        "ThreadSanitizer's shared library would hold signals back from KVM_RUN: link it statically (-static-libtsan)",
    )
}

/// As long as there is one, sanitizers leave out what its thread does.
pub struct Unseen(());

impl Unseen {
    pub fn new() -> Unseen {
        present().iter().for_each(|[away, _]| away());
        Unseen(())
    }
}

impl Default for Unseen {
    fn default() -> Unseen {
        Unseen::new()
    }
}

impl Drop for Unseen {
    fn drop(&mut self) {
        present().iter().for_each(|[_, back]| back());
    }
}
