// SPDX-License-Identifier: Apache-2.0
//! Stands before the C library's functions in a KVM client: what is about `/dev/kvm` goes to the KVM in its process.
//!
//! `softkvm exec` has the dynamic linker load this into the client, and into what the client starts. There is no Python
//! in here; the interpreter and KVM come with the first `open("/dev/kvm")` (`python.rs`). Until then a function costs a
//! comparison more, and afterwards those that are about no descriptor or memory of the KVM's do.
//!
//! Functions with a variable argument list are declared with the most arguments that they may have: on all of Linux's
//! 64-bit architectures those come in registers, and one that is not there is not looked at.

#![allow(clippy::missing_safety_doc)] // the C library's own functions, with its rules

mod calls;
mod cpuid;
mod descriptors;
mod files;
mod handlers;
mod memory;
mod programs;
mod real;
mod sanitizers;
mod transfers;

use softkvm_client::{Client, Core, python};

/// The KVM, loaded if it is not.
fn load() -> Option<&'static Core> {
    python::load(cpuid::at_open, |core| {
        (core.start)(&Client {
            mark: descriptors::mark,
            sigaction: handlers::real_sigaction,
            tells_closing: true,
            cpuid_sites: softkvm_client::cpuid::replaced(),
            handlers: false,
        });
    })
}
