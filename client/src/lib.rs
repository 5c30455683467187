// SPDX-License-Identifier: Apache-2.0
//! The seam between what is in a client's process from its start and the KVM that is loaded at its first use.
//!
//! On the client's side is a library without Python (`preload/`), on the other the extension module (`cpu/python/src/
//! client/`). They are built together, and meet in a [`Core`], whose address Python hands over.

pub mod python;

use core::ffi::{c_int, c_long, c_uint, c_ulong, c_void};

/// What [`Core::ioctl`] returns for a descriptor that is none of the KVM's.
pub const NOT_OURS: c_long = c_long::MIN;

/// What the KVM does for the client's side. Results below 0 are errno, negated.
#[repr(C)]
pub struct Core {
    /// Opens the system file, with `O_CLOEXEC` of `flags`; returns its descriptor.
    pub open: extern "C" fn(flags: c_int) -> c_int,
    /// A request on a descriptor; [`NOT_OURS`].
    pub ioctl: extern "C" fn(fd: c_int, request: c_uint, argument: c_ulong) -> c_long,
    /// Descriptors have been closed: gives back what nobody has open any more.
    pub collect: extern "C" fn(),
    /// A descriptor is about to be read: brings up to date what stands in its file.
    pub refresh: extern "C" fn(fd: c_int),
    /// A descriptor was mapped at `address`, shared or as a copy; −errno if that cannot be.
    pub mapped: extern "C" fn(
        fd: c_int,
        address: usize,
        size: usize,
        offset: usize,
        protection: c_int,
        shared: bool,
    ) -> c_int,
    /// The memory at these addresses is about to go, or to become other memory.
    pub unmapping: extern "C" fn(address: usize, size: usize),
    /// A handler has been installed for a signal.
    pub handler_changed: extern "C" fn(signal: c_int),
    /// A signal has come to a thread in a request: leaves it to the request's end. The last two are of the handler.
    pub put_off: extern "C" fn(signal: c_int, info: *mut c_void, context: *mut c_void),
    /// The next KVM_RUN of this thread has these signals blocked, unless KVM_SET_SIGNAL_MASK has said which: the thread
    /// has blocked all.
    pub block_in_run: extern "C" fn(mask: u64),
    /// What the processor that KVM runs on answers to CPUID: EAX, EBX, ECX, EDX.
    pub cpuid: extern "C" fn(leaf: u32, subleaf: u32, values: &mut [u32; 4]),
    /// The process is about to end.
    pub at_exit: extern "C" fn(),
    /// The client's side is ready: `mark` is to be called for every descriptor that the KVM makes for the client.
    /// CPUID has been replaced in `cpuid_sites` places. `handlers`: the client's side stands before the process's handlers
    /// of signals, calls `put_off` and `block_in_run`; else the KVM does.
    pub start: extern "C" fn(mark: extern "C" fn(fd: c_int), cpuid_sites: usize, handlers: bool),
}
