// SPDX-License-Identifier: Apache-2.0
//! A KVM client: a guest in real mode that says hello on a serial port.
//!
//!     rustc hello.rs && softkvm exec -- ./hello

use std::ffi::{c_int, c_ulong, c_void};
use std::fs::OpenOptions;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{addr_of_mut, null_mut};

extern "C" {
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn mmap(at: *mut c_void, size: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
}
const PROT_READ_WRITE: c_int = 3;
const MAP_SHARED: c_int = 1;
const MAP_PRIVATE_ANONYMOUS: c_int = 0x22;

// Requests, as linux/kvm.h has them.
const KVM_CREATE_VM: c_ulong = 0xAE01;
const KVM_GET_VCPU_MMAP_SIZE: c_ulong = 0xAE04;
const KVM_CREATE_VCPU: c_ulong = 0xAE41;
const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_AE46;
const KVM_RUN: c_ulong = 0xAE80;
const KVM_SET_REGS: c_ulong = 0x4090_AE82;
const KVM_GET_SREGS: c_ulong = 0x8138_AE83;
const KVM_SET_SREGS: c_ulong = 0x4138_AE84;

const KVM_EXIT_IO: u32 = 2;
const KVM_EXIT_HLT: u32 = 5;

const RAM: usize = 0x10000;
const ENTRY: usize = 0x1000;
const SERIAL: u16 = 0x3F8;

// mov si, text; mov dx, 0x3F8; again: lodsb; test al, al; jz done; out dx, al; jmp again; done: hlt; text
const GUEST: &[u8] = b"\xBE\x0F\x10\xBA\xF8\x03\xAC\x84\xC0\x74\x03\xEE\xEB\xF8\xF4hello from Rust\n\0";

#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
}

/// rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15, rip, rflags.
type Registers = [u64; 18];

/// The code segment comes first: base, limit, selector; the rest stays as it is.
#[repr(C)]
struct SpecialRegisters {
    base: u64,
    limit: u32,
    selector: u16,
    rest: [u16; 149],
}

/// The beginning of `struct kvm_run`, up to the exit for I/O.
#[repr(C)]
struct Run {
    _entry: [u8; 8],
    exit_reason: u32,
    _state: [u8; 20],
    _direction: u8,
    _size: u8,
    port: u16,
    _count: u32,
    data_offset: u64,
}

fn request<T>(fd: &impl AsRawFd, number: c_ulong, argument: T) -> Result<c_int> {
    // SAFETY: the callers give each request what it takes.
    let result = unsafe { ioctl(fd.as_raw_fd(), number, argument) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

fn new_file(fd: &impl AsRawFd, number: c_ulong) -> Result<OwnedFd> {
    // SAFETY: a descriptor that has just been made.
    request(fd, number, 0).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn map(size: usize, flags: c_int, fd: c_int) -> Result<*mut u8> {
    // SAFETY: memory that is new.
    let memory = unsafe { mmap(null_mut(), size, PROT_READ_WRITE, flags, fd, 0) };
    if memory as isize == -1 { Err(Error::last_os_error()) } else { Ok(memory.cast()) }
}

fn main() -> Result<()> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let vm = new_file(&kvm, KVM_CREATE_VM)?;
    let ram = map(RAM, MAP_PRIVATE_ANONYMOUS, -1)?;
    // SAFETY: within the memory.
    unsafe { ram.add(ENTRY).copy_from(GUEST.as_ptr(), GUEST.len()) };
    let region = MemoryRegion {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: RAM as u64,
        userspace_addr: ram as u64,
    };
    request(&vm, KVM_SET_USER_MEMORY_REGION, &region)?;

    let vcpu = new_file(&vm, KVM_CREATE_VCPU)?;
    let size = request(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0)? as usize;
    let page = map(size, MAP_SHARED, vcpu.as_raw_fd())?;
    let mut special = SpecialRegisters { base: 0, limit: 0, selector: 0, rest: [0; 149] };
    request(&vcpu, KVM_GET_SREGS, addr_of_mut!(special))?;
    (special.base, special.selector) = (0, 0);
    request(&vcpu, KVM_SET_SREGS, &special)?;
    let mut registers: Registers = [0; 18];
    (registers[16], registers[17]) = (ENTRY as u64, 2);
    request(&vcpu, KVM_SET_REGS, &registers)?;

    loop {
        match request(&vcpu, KVM_RUN, 0) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            result => result?,
        };
        // SAFETY: the page of the vCPU, which does not run now; data lies within it.
        let run = unsafe { page.cast::<Run>().read_volatile() };
        match run.exit_reason {
            KVM_EXIT_HLT => return Ok(()),
            KVM_EXIT_IO if run.port == SERIAL => {
                print!("{}", char::from(unsafe { page.add(run.data_offset as usize).read_volatile() }));
            }
            reason => return Err(Error::other(format!("exit {reason}"))),
        }
    }
}
