// SPDX-License-Identifier: Apache-2.0
//! What a file is that is to be executed: whether a dynamic linker preloads into it, or the loader has to run it.
//!
//! Takes no memory and little stack: it may be a child of vfork() that asks, or a handler.

use core::ffi::CStr;

use libc::{Elf64_Ehdr, Elf64_Phdr};

/// What a file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A program that our C library's dynamic linker loads, or a script whose interpreter is one.
    Linked,
    /// A program without a dynamic linker, or with another C library's: for the loader.
    Loaded,
    /// A script whose interpreter is one for the loader.
    Script,
    /// Anything else, which is for the kernel to judge.
    Other,
}

/// How files are read.
pub trait Reader {
    fn open(&self, path: &CStr) -> Option<i32>;
    /// Reads at an offset; how many bytes it were.
    fn read(&self, fd: i32, bytes: &mut [u8], at: u64) -> usize;
    fn close(&self, fd: i32);
}

/// Room for the name of an interpreter, and for its argument (`BINPRM_BUF_SIZE`).
pub const NAME: usize = 256;

/// Tells what a file is. Of a [`Kind::Script`], `text` has the interpreter's path and, in its second half, the argument
/// that the script's line gives it, both ended by a null byte; none is empty.
pub fn kind_of(reader: &impl Reader, path: &CStr, text: &mut [u8; 2 * NAME]) -> Kind {
    let Some(fd) = reader.open(path) else { return Kind::Other };
    let kind = match program_kind(reader, fd) {
        Kind::Other => script_kind(reader, fd, text),
        kind => kind,
    };
    reader.close(fd);
    kind
}

fn read<T: Copy>(reader: &impl Reader, fd: i32, at: u64) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: its bytes; the structures of ELF may be anything.
    let bytes = unsafe { core::slice::from_raw_parts_mut(value.as_mut_ptr().cast::<u8>(), size_of::<T>()) };
    // SAFETY: as above.
    (reader.read(fd, bytes, at) == size_of::<T>()).then(|| unsafe { value.assume_init() })
}

fn program_kind(reader: &impl Reader, fd: i32) -> Kind {
    let Some(header) = read::<Elf64_Ehdr>(reader, fd, 0) else { return Kind::Other };
    if &header.e_ident[..6] != b"\x7fELF\x02\x01" || header.e_machine != libc::EM_X86_64 {
        return Kind::Other;
    }
    for n in 0..u64::from(header.e_phnum) {
        let at = header.e_phoff + n * u64::from(header.e_phentsize);
        let Some(segment) = read::<Elf64_Phdr>(reader, fd, at) else { return Kind::Other };
        if segment.p_type == libc::PT_INTERP {
            return linker_kind(reader, fd, &segment);
        }
    }
    Kind::Loaded
}

/// By the name of the dynamic linker that the program asks for.
fn linker_kind(reader: &impl Reader, fd: i32, segment: &Elf64_Phdr) -> Kind {
    let mut name = [0; 64];
    let length = reader.read(fd, &mut name, segment.p_offset).min(segment.p_filesz as usize);
    const OURS: &[u8] = if cfg!(target_env = "musl") { b"/ld-musl" } else { b"/ld-linux" };
    if name[..length].windows(OURS.len()).any(|part| part == OURS) { Kind::Linked } else { Kind::Loaded }
}

fn script_kind(reader: &impl Reader, fd: i32, text: &mut [u8; 2 * NAME]) -> Kind {
    let (interpreter, argument) = text.split_at_mut(NAME);
    let length = reader.read(fd, interpreter, 0);
    let Some(end) = interpreter[..length].iter().position(|&b| b == b'\n' || b == 0) else {
        return Kind::Other;
    };
    if !interpreter[..end].starts_with(b"#!") {
        return Kind::Other;
    }
    let is_blank = |b: &u8| matches!(b, b' ' | b'\t');
    let trimmed = |from: usize, to: usize, bytes: &[u8]| {
        let start = from + bytes[from..to].iter().take_while(|b| is_blank(b)).count();
        let blanks = bytes[start..to].iter().rev().take_while(|b| is_blank(b)).count();
        (start, to - blanks)
    };
    let (start, end) = trimmed(2, end, interpreter);
    let name_end = start + interpreter[start..end].iter().take_while(|b| !is_blank(b)).count();
    let (rest, rest_end) = trimmed(name_end, end, interpreter);
    argument.fill(0);
    argument[..rest_end - rest].copy_from_slice(&interpreter[rest..rest_end]);
    interpreter.copy_within(start..name_end, 0);
    interpreter[name_end - start..].fill(0);
    let Ok(path) = CStr::from_bytes_until_nul(interpreter) else { return Kind::Other };
    let Some(program) = reader.open(path) else { return Kind::Other };
    let kind = match program_kind(reader, program) {
        Kind::Loaded => Kind::Script,
        kind => kind,
    };
    reader.close(program);
    kind
}
