// SPDX-License-Identifier: Apache-2.0
//! CPUID, where the client itself executes it: a client that has KVM sees the processor that KVM runs on.
//!
//! kvmtool looks for SVM with it, QEMU's `-cpu host` for the layout of XSAVE's area. No hardware that we may count on has
//! CPUID fault for this (`arch_prctl(ARCH_CPUID)`), so the instruction is replaced by UD2, which is as long, and answered
//! when it faults. That is done in as little as possible: in the parts of the process that have `/dev/kvm` in their
//! constants, where a function's code, decoded from its beginning, has a CPUID. What the client may use to choose among
//! code of its own stays what the host has, as well: instruction-set extensions are those of both.

use core::ffi::{c_int, c_void};
use core::ptr::{null, null_mut};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::arch::x86_64::__cpuid_count;
use std::cell::UnsafeCell;
use std::mem::{MaybeUninit, zeroed};

use iced_x86::{Decoder, DecoderOptions, Mnemonic};

use crate::handlers::real_sigaction;
use crate::load;

const CPUID: [u8; 2] = [0x0F, 0xA2];
const UD2: [u8; 2] = [0x0F, 0x0B];
const PAGE: usize = 4096;

/// Whether anything was replaced: then SIGILL is ours.
static PATCHED: AtomicBool = AtomicBool::new(false);
/// Whether a part of the process has `/dev/kvm` in its constants.
static IS_CLIENT: AtomicBool = AtomicBool::new(false);
/// How many.
static SITES: AtomicUsize = AtomicUsize::new(0);

// ---- what the client has for SIGILL ----------------------------------------------------------------------------------

struct ClientAction(UnsafeCell<libc::sigaction>);
// SAFETY: changed by sigaction() alone; as with the kernel's, who calls it twice at once gets either.
unsafe impl Sync for ClientAction {}
// SAFETY: all zeros are SIG_DFL.
static CLIENT: ClientAction = ClientAction(UnsafeCell::new(unsafe { zeroed() }));

/// Does sigaction() for SIGILL, behind our handler; None: that is not there.
pub fn client_action(new: *const libc::sigaction, old: *mut libc::sigaction) -> Option<c_int> {
    if !PATCHED.load(Ordering::Acquire) {
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
    // SAFETY: the kernel passes the thread's registers; RIP is where an instruction was fetched.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = registers[libc::REG_RIP as usize] as *const [u8; 2];
        if *at == UD2 {
            let leaf = registers[libc::REG_RAX as usize] as u32;
            let subleaf = registers[libc::REG_RCX as usize] as u32;
            for (register, value) in [libc::REG_RAX, libc::REG_RBX, libc::REG_RCX, libc::REG_RDX]
                .into_iter()
                .zip(answer(leaf, subleaf))
            {
                registers[register as usize] = i64::from(value);
            }
            registers[libc::REG_RIP as usize] += 2;
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

/// Which bits of EAX, EBX, ECX and EDX are instructions that user code chooses by, by leaf and subleaf.
const INSTRUCTIONS: [(u32, u32, [u32; 4]); 4] = [
    (1, 0, [0, 0, 0x7ED8_3201, 0x0780_8110]),
    (7, 0, [0, 0xFFBF_0328, 0x0000_5F7A, 0x0090_011C]),
    (7, 1, [0xFFFF_FFFF, 0, 0, 0xFFFF_FFFF]),
    (0x8000_0001, 0, [0, 0, 0x4020_0961, 0x0000_0000]),
];

fn answer(leaf: u32, subleaf: u32) -> [u32; 4] {
    let host = __cpuid_count(leaf, subleaf);
    let host = [host.eax, host.ebx, host.ecx, host.edx];
    let Some(core) = load() else { return host };
    let mut values = [0; 4];
    (core.cpuid)(leaf, subleaf, &mut values);
    if let Some((_, _, masks)) =
        INSTRUCTIONS.iter().find(|(l, s, _)| *l == leaf && (*s == subleaf || leaf != 7))
    {
        for ((value, host), mask) in values.iter_mut().zip(host).zip(masks) {
            *value &= host | !mask;
        }
    }
    values
}

// ---- where it is -----------------------------------------------------------------------------------------------------

/// A part of the process: its program headers.
struct Module<'a> {
    base: usize,
    headers: &'a [libc::Elf64_Phdr],
}

impl Module<'_> {
    fn segments(&self, flags: u32, of: u32) -> impl Iterator<Item = &'static [u8]> {
        self.headers.iter().filter(move |h| h.p_type == libc::PT_LOAD && h.p_flags & of == flags).map(
            |header| {
                // SAFETY: the linker has mapped it, readable, and keeps it.
                unsafe {
                    core::slice::from_raw_parts(
                        (self.base + header.p_vaddr as usize) as *const u8,
                        header.p_memsz as usize,
                    )
                }
            },
        )
    }

    fn is_client(&self) -> bool {
        self.segments(libc::PF_R, libc::PF_R | libc::PF_W)
            .any(|constants| find(constants, b"/dev/kvm\0").is_some())
    }

    /// The beginning of the function that an address is in, from the table of unwinding (`.eh_frame_hdr`: Linux Standard
    /// Base, core specification, 10.6.2).
    fn function(&self, address: usize) -> Option<usize> {
        let header = self.headers.iter().find(|h| h.p_type == libc::PT_GNU_EH_FRAME)?;
        let at = self.base + header.p_vaddr as usize;
        // SAFETY: mapped by the linker, of this size.
        let bytes = unsafe { core::slice::from_raw_parts(at as *const u8, header.p_memsz as usize) };
        // Version 1; the pointer of 4 bytes, a count of 4 bytes, a table of pairs of 4 bytes from here.
        if bytes.len() < 12
            || bytes[0] != 1
            || bytes[2] != 0x03
            || bytes[3] != 0x3B
            || bytes[1] & 0x0F != 0x0B
        {
            return None;
        }
        let word = |n: usize| -> i32 {
            bytes.get(n..n + 4).map_or(0, |b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        };
        let count = (word(8) as usize).min((bytes.len() - 12) / 8);
        let start = |n: usize| at.wrapping_add_signed(word(12 + 8 * n) as isize);
        let mut low = 0;
        let mut high = count;
        while low < high {
            let middle = (low + high) / 2;
            if start(middle) <= address { low = middle + 1 } else { high = middle }
        }
        (low > 0).then(|| start(low - 1))
    }

    /// Whether the instruction at an address of a segment of code is CPUID, seen from its function's beginning.
    fn is_cpuid(&self, code: &[u8], offset: usize) -> bool {
        let start = code.as_ptr() as usize;
        let Some(function) = self.function(start + offset).filter(|f| (start..=start + offset).contains(f))
        else {
            return false;
        };
        let bytes = &code[function - start..offset + CPUID.len()];
        let mut decoder = Decoder::with_ip(64, bytes, function as u64, DecoderOptions::NONE);
        decoder.iter().last().is_some_and(|i| i.mnemonic() == Mnemonic::Cpuid && i.len() == CPUID.len())
    }

    fn replace(&self) {
        for code in self.segments(libc::PF_X, libc::PF_X) {
            let mut from = 0;
            while let Some(found) = find(&code[from..], &CPUID) {
                let offset = from + found;
                from = offset + 1;
                if self.is_cpuid(code, offset) {
                    put(code.as_ptr() as usize + offset);
                }
            }
        }
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    // SAFETY: searches within both.
    let found = unsafe { libc::memmem(bytes.as_ptr().cast(), bytes.len(), what.as_ptr().cast(), what.len()) };
    (!found.is_null()).then(|| found as usize - bytes.as_ptr() as usize)
}

fn put(address: usize) {
    let page = address & !(PAGE - 1);
    let size = (address + UD2.len()).next_multiple_of(PAGE) - page;
    // SAFETY: code of the process's own, before any of it runs; it stays executable. Where it cannot be made writable it
    // stays as it is.
    unsafe {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        if libc::mprotect(page as *mut c_void, size, all) == 0 {
            if !PATCHED.swap(true, Ordering::AcqRel) {
                install();
            }
            (address as *mut [u8; 2]).write_unaligned(UD2);
            libc::mprotect(page as *mut c_void, size, libc::PROT_READ | libc::PROT_EXEC);
            SITES.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn install() {
    // SAFETY: zeros are a sigaction with an empty mask; filled in on success.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = on_illegal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        let mut before = MaybeUninit::uninit();
        if real_sigaction(libc::SIGILL, &action, before.as_mut_ptr()) == 0 {
            *CLIENT.0.get() = before.assume_init();
        }
    }
}

unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: the linker's description of a part that is mapped.
    let module = unsafe {
        Module {
            base: (*info).dlpi_addr as usize,
            headers: core::slice::from_raw_parts((*info).dlpi_phdr, (*info).dlpi_phnum as usize),
        }
    };
    let own = look as *const () as usize;
    let is_own =
        module.segments(libc::PF_X, libc::PF_X).any(|code| code.as_ptr_range().contains(&(own as *const u8)));
    if !is_own && module.is_client() {
        IS_CLIENT.store(true, Ordering::Relaxed);
        module.replace();
    }
    0
}

/// Whether the process is one that may use KVM.
pub fn is_client() -> bool {
    IS_CLIENT.load(Ordering::Relaxed)
}

/// How many instructions were replaced.
pub fn replaced() -> usize {
    SITES.load(Ordering::Relaxed)
}

extern "C" fn at_start() {
    // SAFETY: calls `look` for every part of the process.
    unsafe { libc::dl_iterate_phdr(Some(look), null::<c_void>().cast_mut()) };
}

#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = at_start;
