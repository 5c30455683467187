// SPDX-License-Identifier: Apache-2.0
//! CPUID, where the client itself executes it: a client that has KVM sees the processor that KVM runs on.
//!
//! kvmtool looks for SVM with it, QEMU's `-cpu host` for the layout of XSAVE's area. No hardware that we may count on has
//! CPUID fault for this (`arch_prctl(ARCH_CPUID)`), so the instruction is replaced by UD2, which is as long, and answered
//! when it faults. That is done in as little as possible: in the parts of the process that have `/dev/kvm` in their
//! constants, and only where decoding says that it is one. What the client may use to choose among code of its own stays
//! what the host has, as well: instruction-set extensions are those of both.

use core::ffi::c_void;
use core::ops::Range;
use core::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use iced_x86::{Decoder, DecoderOptions, Mnemonic};

use crate::kernel::PAGE;

const CPUID: [u8; 2] = [0x0F, 0xA2];
const UD2: [u8; 2] = [0x0F, 0x0B];
/// How long both are.
pub const SIZE: usize = 2;
/// All flags of a segment.
const ALL: u32 = libc::PF_R | libc::PF_W | libc::PF_X;

// ---- what it answers -------------------------------------------------------------------------------------------------

/// Which bits of EAX, EBX, ECX and EDX are instructions that user code chooses by, by leaf and subleaf.
const INSTRUCTIONS: [(u32, u32, [u32; 4]); 4] = [
    (1, 0, [0, 0, 0x7ED8_3201, 0x0780_8110]),
    (7, 0, [0, 0xFFBF_0328, 0x0000_5F7A, 0x0090_011C]),
    (7, 1, [0xFFFF_FFFF, 0, 0, 0xFFFF_FFFF]),
    (0x8000_0001, 0, [0, 0, 0x4020_0961, 0x0000_0000]),
];

/// A leaf, a subleaf unless all are alike, and EAX, EBX, ECX and EDX. What is not among the rows is zero.
type Row = (u32, Option<u32>, [u32; 4]);

/// What the processor that KVM runs on answers, which `softkvm exec` tells in the environment: who only asks does not
/// wait for Python.
static SILICON: OnceLock<Option<Vec<Row>>> = OnceLock::new();

/// `LEAF.SUBLEAF:EAX,EBX,ECX,EDX` in hexadecimal, with `*` for any subleaf.
fn row(text: &str) -> Option<Row> {
    let number = |digits| u32::from_str_radix(digits, 16).ok();
    let (place, values) = text.split_once(':')?;
    let (leaf, subleaf) = place.split_once('.')?;
    let values: Vec<u32> = values.split(',').map(number).collect::<Option<_>>()?;
    let subleaf = if subleaf == "*" { None } else { Some(number(subleaf)?) };
    Some((number(leaf)?, subleaf, values.try_into().ok()?))
}

/// Reads what the processor answers; before that, and where nobody tells, it is what the host's does.
fn learn() {
    SILICON.get_or_init(|| std::env::var("SOFTKVM_CPUID").ok()?.split_whitespace().map(row).collect());
}

/// What the client gets; takes no locks.
pub fn answer(leaf: u32, subleaf: u32) -> [u32; 4] {
    let host = __cpuid_count(leaf, subleaf);
    let host = [host.eax, host.ebx, host.ecx, host.edx];
    let Some(Some(rows)) = SILICON.get() else { return host };
    let row = rows.iter().find(|(l, s, _)| *l == leaf && s.is_none_or(|s| s == subleaf));
    limited(leaf, subleaf, row.map_or([0; 4], |row| row.2), host)
}

fn limited(leaf: u32, subleaf: u32, mut values: [u32; 4], host: [u32; 4]) -> [u32; 4] {
    if let Some((_, _, masks)) =
        INSTRUCTIONS.iter().find(|(l, s, _)| *l == leaf && (*s == subleaf || leaf != 7))
    {
        for ((value, host), mask) in values.iter_mut().zip(host).zip(masks) {
            *value &= host | !mask;
        }
    }
    values
}

// ---- where it was replaced -------------------------------------------------------------------------------------------

/// As many are replaced; a client has a handful.
const MOST: usize = 1024;
static SITES: [AtomicUsize; MOST] = [const { AtomicUsize::new(0) }; MOST];
static REPLACED: AtomicUsize = AtomicUsize::new(0);

/// In how many places.
pub fn replaced() -> usize {
    REPLACED.load(Ordering::Acquire).min(MOST)
}

/// Whether the instruction at an address was a CPUID; takes no locks. The client may have a UD2 of its own.
pub fn is_replaced(address: usize) -> bool {
    SITES[..replaced()].iter().any(|site| site.load(Ordering::Relaxed) == address)
}

// ---- where it is -----------------------------------------------------------------------------------------------------

/// A part of the process that is mapped: where its addresses begin, and its program headers.
pub struct Module<'a> {
    pub base: usize,
    pub headers: &'a [libc::Elf64_Phdr],
    /// Where functions begin, ascending, if that is known otherwise than by the table of unwinding.
    pub functions: Vec<usize>,
}

impl Module<'_> {
    /// The segments of which the flags `of` are `flags`, and their protection.
    fn segments(&self, flags: u32, of: u32) -> impl Iterator<Item = (&'static [u8], u32)> {
        self.headers.iter().filter(move |h| h.p_type == libc::PT_LOAD && h.p_flags & of == flags).map(
            |header| {
                // SAFETY: who has made the module has mapped it, readable, and keeps it.
                let bytes = unsafe {
                    core::slice::from_raw_parts(
                        (self.base + header.p_vaddr as usize) as *const u8,
                        header.p_memsz as usize,
                    )
                };
                (bytes, header.p_flags)
            },
        )
    }

    /// Whether an address is in its code.
    pub fn has_code(&self, address: usize) -> bool {
        self.segments(libc::PF_X, libc::PF_X)
            .any(|(code, _)| code.as_ptr_range().contains(&(address as *const u8)))
    }

    /// Whether it is of a KVM client: `/dev/kvm` is among its constants, in whatever way its language ends strings.
    ///
    /// Constants are apart from code, unless the linker has put both into one segment. To look through code, too, would
    /// cost every program that the client starts more than its own start.
    pub fn is_client(&self) -> bool {
        let is_apart = self.segments(libc::PF_R, ALL).next().is_some();
        let flags = if is_apart { libc::PF_R } else { libc::PF_R | libc::PF_X };
        self.segments(flags, ALL).any(|(constants, _)| find(constants, b"/dev/kvm").is_some())
    }

    /// The table of unwinding's addresses of functions (`.eh_frame_hdr`: Linux Standard Base, core specification,
    /// 10.6.2): where it is, and how many.
    fn unwind_table(&self) -> Option<(usize, usize)> {
        let header = self.headers.iter().find(|h| h.p_type == libc::PT_GNU_EH_FRAME)?;
        let at = self.base + header.p_vaddr as usize;
        // SAFETY: mapped, of this size.
        let bytes = unsafe { core::slice::from_raw_parts(at as *const u8, header.p_memsz as usize) };
        // Version 1; the pointer of 4 bytes, a count of 4 bytes, a table of pairs of 4 bytes from here.
        let is_known = bytes.len() >= 12
            && bytes[0] == 1
            && bytes[1] & 0x0F == 0x0B
            && bytes[2] == 0x03
            && bytes[3] == 0x3B;
        let count = u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?) as usize;
        is_known.then(|| (at, count.min((bytes.len() - 12) / 8)))
    }

    /// The beginning of the function that an address is in.
    fn function(&self, address: usize) -> Option<usize> {
        let Some((at, count)) = self.unwind_table() else {
            let after = self.functions.partition_point(|start| *start <= address);
            return (after > 0).then(|| self.functions[after - 1]);
        };
        let start = |n: usize| {
            // SAFETY: within the table.
            let offset = unsafe { ((at + 12 + 8 * n) as *const i32).read_unaligned() };
            at.wrapping_add_signed(offset as isize)
        };
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = (low + high) / 2;
            if start(middle) <= address { low = middle + 1 } else { high = middle }
        }
        (low > 0).then(|| start(low - 1))
    }

    /// Whether the instruction at an address of a segment of code is CPUID: seen from its function's beginning, or, where
    /// nobody tells of functions, from everywhere before it.
    fn is_cpuid(&self, code: &[u8], offset: usize) -> bool {
        let start = code.as_ptr() as usize;
        match self.function(start + offset) {
            Some(function) if (start..=start + offset).contains(&function) => {
                arrives(code, function - start, offset) == Some(true)
            }
            _ => is_agreed(code, offset),
        }
    }

    /// Replaces it, wherever it is in the module's code, and SIGILL is handled if anybody runs there. What cannot be made
    /// writable stays.
    pub fn replace(&self) {
        learn();
        for (code, flags) in self.segments(libc::PF_X, libc::PF_X) {
            let mut from = 0;
            while let Some(found) = find(&code[from..], &CPUID) {
                let offset = from + found;
                from = offset + 1;
                if self.is_cpuid(code, offset) {
                    put(code.as_ptr() as usize + offset, flags & libc::PF_W != 0);
                }
            }
        }
    }
}

/// Whether decoding from one place comes to a CPUID at another; None: it comes to what is no instruction.
fn arrives(code: &[u8], from: usize, to: usize) -> Option<bool> {
    let mut decoder = Decoder::with_ip(64, &code[from..to + CPUID.len()], from as u64, DecoderOptions::NONE);
    for instruction in &mut decoder {
        if instruction.is_invalid() {
            return (instruction.ip() as usize + 15 > to).then_some(false);
        }
        if instruction.ip() as usize >= to {
            let is_cpuid = instruction.mnemonic() == Mnemonic::Cpuid && instruction.len() == CPUID.len();
            return Some(is_cpuid && instruction.ip() as usize == to);
        }
    }
    Some(false)
}

/// How far before a CPUID decoding begins that has not been told where: x86 code is decoded alike from wherever one
/// begins, after a few instructions (it synchronizes itself).
const APPROACH: Range<usize> = 64..96;

/// Whether decoding comes to a CPUID at `to` from all places before it, but for those that come to what is no
/// instruction.
fn is_agreed(code: &[u8], to: usize) -> bool {
    let mut seen = 0;
    for distance in APPROACH {
        let Some(from) = to.checked_sub(distance) else { break };
        match arrives(code, from, to) {
            Some(false) => return false,
            Some(true) => seen += 1,
            None => {}
        }
    }
    seen >= APPROACH.len() / 2
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    // SAFETY: searches within both.
    let found = unsafe { libc::memmem(bytes.as_ptr().cast(), bytes.len(), what.as_ptr().cast(), what.len()) };
    (!found.is_null()).then(|| found as usize - bytes.as_ptr() as usize)
}

fn put(address: usize, stays_writable: bool) {
    let number = REPLACED.load(Ordering::Relaxed);
    if number >= MOST {
        return;
    }
    let page = address & !(PAGE - 1);
    let size = (address + SIZE).next_multiple_of(PAGE) - page;
    // SAFETY: code of the process's own, which stays executable.
    unsafe {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        if libc::mprotect(page as *mut c_void, size, all) == 0 {
            SITES[number].store(address, Ordering::Relaxed);
            REPLACED.store(number + 1, Ordering::Release);
            // Their first bytes are the same, so whoever is about to execute it finds either.
            (*((address + 1) as *const AtomicU8)).store(UD2[1], Ordering::Release);
            if !stays_writable {
                libc::mprotect(page as *mut c_void, size, libc::PROT_READ | libc::PROT_EXEC);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{APPROACH, is_agreed, row};

    #[test]
    fn a_row_is_what_softkvm_exec_writes() {
        assert_eq!(
            row("80000001.*:830f10,0,1,ffffffff"),
            Some((0x8000_0001, None, [0x83_0F10, 0, 1, u32::MAX]))
        );
        assert_eq!(row("d.9:8,a80,0,0"), Some((0xD, Some(9), [8, 0xA80, 0, 0])));
        for broken in ["", "1:2,3,4,5", "1.0:2,3,4", "1.0:2,3,4,5,6", "1.x:2,3,4,5", "1.0:2,3,4,100000000"] {
            assert_eq!(row(broken), None, "{broken}");
        }
    }

    /// Code as compilers make it: mov eax, N; xor ecx, ecx; push rbx; …
    fn code_before() -> Vec<u8> {
        let step = [
            0xB8, 0x01, 0x00, 0x00, 0x80, 0x31, 0xC9, 0x53, 0x48, 0x89, 0xFB, 0x48, 0x83, 0xEC, 0x10, 0x85,
            0xC0,
        ];
        step.iter().copied().cycle().take(step.len() * 8).collect()
    }

    #[test]
    fn cpuid_is_seen_without_a_table_of_functions() {
        let mut code = code_before();
        let at = code.len();
        code.extend([0x0F, 0xA2, 0x89, 0x03, 0xC3]);
        assert!(is_agreed(&code, at));
    }

    #[test]
    fn the_bytes_within_another_instruction_are_no_cpuid() {
        // mov eax, 0xA20F; lea rax, [rip + 0xA20F1234]; add rax, 0xA20F
        for (head, length) in
            [(&[0xB8][..], 5), (&[0x48, 0x8D, 0x05, 0x34, 0x12][..], 7), (&[0x48, 0x05][..], 6)]
        {
            let mut code = code_before();
            let at = code.len() + head.len();
            code.extend(head);
            code.extend([0x0F, 0xA2]);
            code.resize(at - head.len() + length, 0);
            code.extend([0xC3; 16]);
            assert!(!is_agreed(&code, at), "{head:x?}");
        }
    }

    #[test]
    fn what_has_too_little_before_it_is_left_alone() {
        let mut code = code_before();
        code.truncate(APPROACH.start / 2);
        let at = code.len();
        code.extend([0x0F, 0xA2]);
        assert!(!is_agreed(&code, at));
    }
}
