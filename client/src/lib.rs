// SPDX-License-Identifier: Apache-2.0
//! The seam between what is in a client's process from its start and the KVM that is loaded at its first use.
//!
//! On the client's side is a library without Python (`preload/`), on the other the extension module (`cpu/python/src/
//! client/`). They are built together, and meet in a [`Core`], whose address Python hands over.

mod bpf;
pub mod cpuid;
pub mod device;
pub mod forks;
pub mod kernel;
pub mod programs;
pub mod python;
pub mod sanitizers;
pub mod seccomp;

use core::ffi::{c_int, c_long, c_uint, c_ulong, c_void};

/// What [`Core::ioctl`] returns for a descriptor that is none of the KVM's.
pub const NOT_OURS: c_long = c_long::MIN;

/// What [`Core::kind`] returns: a descriptor is none of the KVM's.
pub const KIND_NONE: c_int = 0;
/// It is of `/dev/kvm`, a character device.
pub const KIND_DEVICE: c_int = 1;
/// Of a VM, an anonymous file.
pub const KIND_VM: c_int = 2;
/// Of a vCPU, which can be mapped.
pub const KIND_VCPU: c_int = 3;
/// Of statistics, which can be read.
pub const KIND_STATISTICS: c_int = 4;
/// Of memory for guests alone, a plain file that can be neither read, written nor mapped.
pub const KIND_GUEST_MEMFD: c_int = 5;

/// Whether an advice of `madvise()` takes memory away, or what it holds: guests that have it are told.
pub fn takes_memory(advice: c_int) -> bool {
    /// Of Linux 5.18, and of 6.13: pages that fault from now on.
    const MADV_DONTNEED_LOCKED: c_int = 24;
    const MADV_GUARD_INSTALL: c_int = 102;
    matches!(
        advice,
        libc::MADV_DONTNEED | libc::MADV_REMOVE | libc::MADV_FREE | MADV_DONTNEED_LOCKED | MADV_GUARD_INSTALL
    )
}

/// What [`Core::forking`] is told of: it is about to be, or has been, in the parent and in the child.
pub const FORK_BEFORE: c_int = 0;
pub const FORK_PARENT: c_int = 1;
pub const FORK_CHILD: c_int = 2;

/// A descriptor is the client's, of a file of the KVM's.
pub const MARK_CLIENTS: u8 = 1;
/// A descriptor is the KVM's own.
pub const MARK_OURS: u8 = 2;

/// What [`Core::sigaction`] returns for a signal that is none of the KVM's.
pub const NOT_OUR_SIGNAL: c_int = c_int::MIN;

/// What the KVM does for the client's side. Results below 0 are errno, negated. A handler that waits for the end of a
/// request may end the thread, which unwinds it.
#[repr(C)]
pub struct Core {
    /// Opens the system file, with open()'s flags; returns its descriptor.
    pub open: extern "C-unwind" fn(flags: c_int) -> c_int,
    /// A request on a descriptor; [`NOT_OURS`].
    pub ioctl: extern "C-unwind" fn(fd: c_int, request: c_uint, argument: c_ulong) -> c_long,
    /// What a descriptor is: `KIND_*`.
    pub kind: extern "C-unwind" fn(fd: c_int) -> c_int,
    /// Descriptors have been closed: gives back what nobody has open any more.
    pub collect: extern "C-unwind" fn(),
    /// Whether this thread is in a request: then what it closes may be the KVM's own.
    pub in_request: extern "C-unwind" fn() -> bool,
    /// A descriptor is about to be read: brings up to date what stands in its file; −EINVAL if there is nothing to read.
    pub refresh: extern "C-unwind" fn(fd: c_int) -> c_int,
    /// A descriptor was mapped at `address`, shared or as a copy; −errno if that cannot be.
    pub mapped: extern "C-unwind" fn(
        fd: c_int,
        address: usize,
        size: usize,
        offset: usize,
        protection: c_int,
        shared: bool,
    ) -> c_int,
    /// Whether a guest has memory of these addresses; from anywhere, takes no locks.
    pub concerns: extern "C-unwind" fn(address: usize, size: usize) -> bool,
    /// The memory at these addresses is about to go, or to become other memory.
    pub unmapping: extern "C-unwind" fn(address: usize, size: usize),
    /// sigaction() for who is not to see the KVM's handlers, which stay in front; [`NOT_OUR_SIGNAL`].
    pub sigaction:
        extern "C-unwind" fn(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int,
    /// A handler has been installed by another function, which has returned the one before: returns what that is to the
    /// client.
    pub handler_changed: extern "C-unwind" fn(signal: c_int, before: usize) -> usize,
    /// A thread whose cancellation may be asynchronous has been cancelled, perhaps in the middle of a request.
    pub cancelled: extern "C-unwind" fn(thread: usize),
    /// A signal has come: leaves it to the end of the request that the thread is in; false if it is in none. The last two
    /// arguments are of the handler.
    pub put_off: extern "C-unwind" fn(signal: c_int, info: *mut c_void, context: *mut c_void) -> bool,
    /// The next KVM_RUN of this thread has these signals blocked, unless KVM_SET_SIGNAL_MASK has said which: the thread
    /// has blocked all.
    pub block_in_run: extern "C-unwind" fn(mask: u64),
    /// A fork: `FORK_*`.
    pub forking: extern "C-unwind" fn(stage: c_int),
    /// The process is about to end.
    pub at_exit: extern "C-unwind" fn(),
    /// The client's side is ready.
    pub start: extern "C-unwind" fn(client: &Client),
    /// The interpreter is the client's own: its threads may hold the lock anywhere.
    pub client_is_python: extern "C-unwind" fn(),
}

/// What the client's side does for the KVM.
#[repr(C)]
pub struct Client {
    /// To be called for every descriptor that the KVM makes, for the client or for itself.
    pub mark: extern "C-unwind" fn(fd: c_int, kind: u8),
    /// The C library's sigaction().
    pub sigaction:
        unsafe extern "C" fn(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int,
    /// It calls `collect` as soon as a descriptor that was marked is closed, not only now and then.
    pub tells_closing: bool,
    /// In how many places CPUID has been replaced.
    pub cpuid_sites: usize,
    /// It stands before the process's handlers of signals, calls `put_off` and `block_in_run`; else the KVM does.
    pub handlers: bool,
}
