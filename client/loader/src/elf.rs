// SPDX-License-Identifier: Apache-2.0
//! Maps a program as the kernel does (System V ABI, chapter 5).

use std::ffi::{CStr, CString, OsStr};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use libc::{Elf64_Ehdr, Elf64_Phdr, Elf64_Shdr, Elf64_Sym};
use softkvm_client::cpuid::Module;
use softkvm_client::kernel::PAGE;
use softkvm_client::kernel::are_readable;

use crate::place;
use crate::raw::call;

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
/// A program in memory.
pub struct Image {
    pub entry: usize,
    /// Where its program headers are, and how many.
    pub headers: usize,
    pub header_count: usize,
    /// Where its dynamic linker's addresses begin, 0 for none, and where to begin: there, or at the entry.
    pub linker: usize,
    pub start: usize,
    /// Where its code is, and what it may load.
    pub code: Vec<Range<usize>>,
}

fn read<T: Copy>(file: &[u8], at: usize) -> Option<T> {
    let bytes = file.get(at..at.checked_add(size_of::<T>())?)?;
    // SAFETY: that many bytes; the structures of ELF may be anything.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

fn protection(flags: u32) -> i32 {
    [(libc::PF_R, libc::PROT_READ), (libc::PF_W, libc::PROT_WRITE), (libc::PF_X, libc::PROT_EXEC)]
        .into_iter()
        .filter(|(flag, _)| flags & flag != 0)
        .fold(0, |bits, (_, protection)| bits | protection)
}

/// Puts a program into memory, and the dynamic linker that it asks for.
pub fn map(path: &CStr) -> Result<Image, String> {
    let (mut image, linker) = map_file(path)?;
    image.linker = 0;
    if let Some(linker) = linker {
        let why = |why| format!("its dynamic linker {}: {why}", linker.to_string_lossy());
        let (mapped, another) = map_file(&linker).map_err(why)?;
        if another.is_some() {
            return Err(why("has one itself".into()));
        }
        image.linker = mapped.linker;
        image.start = mapped.entry;
        image.code.extend(mapped.code);
    }
    image.code.push(place::HERE);
    Ok(image)
}

/// Puts one file's bytes into memory; also returns what dynamic linker it asks for.
fn map_file(path: &CStr) -> Result<(Image, Option<CString>), String> {
    let name = OsStr::from_bytes(path.to_bytes());
    let file = std::fs::read(name).map_err(|error| error.to_string())?;
    let header: Elf64_Ehdr = read(&file, 0).ok_or("no ELF program")?;
    if &header.e_ident[..6] != b"\x7fELF\x02\x01" || header.e_machine != libc::EM_X86_64 {
        return Err("no 64-bit x86 ELF program".into());
    }
    if header.e_type != ET_EXEC && header.e_type != ET_DYN {
        return Err("no ELF program".into());
    }
    let headers: Vec<Elf64_Phdr> = (0..usize::from(header.e_phnum))
        .map(|n| read(&file, header.e_phoff as usize + n * usize::from(header.e_phentsize)))
        .collect::<Option<_>>()
        .ok_or("its program headers are not in the file")?;
    let linker = match headers.iter().find(|h| h.p_type == libc::PT_INTERP) {
        None => None,
        Some(h) => {
            let name = file.get(h.p_offset as usize..(h.p_offset + h.p_filesz) as usize);
            let name = name.and_then(|name| CStr::from_bytes_until_nul(name).ok());
            Some(name.ok_or("its dynamic linker's name is not in the file")?.to_owned())
        }
    };
    let loads: Vec<&Elf64_Phdr> = headers.iter().filter(|h| h.p_type == libc::PT_LOAD).collect();
    let low = loads.iter().map(|h| h.p_vaddr as usize & !(PAGE - 1)).min().ok_or("it has nothing to load")?;
    let high =
        loads.iter().map(|h| (h.p_vaddr + h.p_memsz) as usize).max().unwrap_or(low).next_multiple_of(PAGE);
    let base = reserve(header.e_type == ET_DYN, low, high)?;
    for load in &loads {
        place(&file, load, base)?;
    }
    let functions = functions(&file, &header, base).unwrap_or_default();
    let module = Module { base, headers: &headers, functions };
    if module.is_client() {
        module.replace();
    }
    let at = |h: &&&Elf64_Phdr| h.p_offset <= header.e_phoff && header.e_phoff < h.p_offset + h.p_filesz;
    let first =
        loads.iter().find(at).map_or(0, |h| base + (h.p_vaddr + header.e_phoff - h.p_offset) as usize);
    let entry = base + header.e_entry as usize;
    // Code that may be anywhere is where all of that is.
    let fixed = loads.iter().filter(|h| h.p_flags & libc::PF_X != 0 && header.e_type == ET_EXEC);
    let image = Image {
        entry,
        headers: first,
        header_count: headers.len(),
        linker: base,
        start: entry,
        code: fixed.map(|h| h.p_vaddr as usize..(h.p_vaddr + h.p_memsz) as usize).collect(),
    };
    Ok((image, linker))
}

/// Where functions begin, by the table of symbols, ascending; empty if the program has been stripped of it.
fn functions(file: &[u8], header: &Elf64_Ehdr, base: usize) -> Option<Vec<usize>> {
    const SHT_SYMTAB: u32 = 2;
    const STT_FUNC: u8 = 2;
    let section =
        |n: u16| read(file, header.e_shoff as usize + usize::from(n) * usize::from(header.e_shentsize));
    let table = (0..header.e_shnum)
        .map(section)
        .collect::<Option<Vec<Elf64_Shdr>>>()?
        .into_iter()
        .find(|section| section.sh_type == SHT_SYMTAB)?;
    let symbols = (0..table.sh_size as usize / size_of::<Elf64_Sym>())
        .map(|n| read::<Elf64_Sym>(file, table.sh_offset as usize + n * size_of::<Elf64_Sym>()));
    let mut functions: Vec<usize> = symbols
        .map_while(|symbol| symbol)
        .filter(|symbol| symbol.st_info & 0xF == STT_FUNC && symbol.st_value != 0)
        .map(|symbol| base + symbol.st_value as usize)
        .collect();
    functions.sort_unstable();
    Some(functions)
}

/// Replaces CPUID in the libraries that the program has loaded, where they are a KVM client's.
pub fn replace_in_libraries() {
    for at in place::libraries() {
        if !are_readable(call, at, size_of::<Elf64_Ehdr>()) {
            continue;
        }
        // SAFETY: it can be read; the structure may be anything.
        let header = unsafe { (at as *const Elf64_Ehdr).read() };
        let (from, count) = (at + header.e_phoff as usize, usize::from(header.e_phnum));
        let is_library = &header.e_ident[..6] == b"\x7fELF\x02\x01";
        if !is_library || !are_readable(call, from, count * size_of::<Elf64_Phdr>()) {
            continue;
        }
        // SAFETY: as above; the linker does not write there.
        let headers = unsafe { core::slice::from_raw_parts(from as *const Elf64_Phdr, count) };
        let loads = || headers.iter().filter(|h| h.p_type == libc::PT_LOAD);
        let first = loads().map(|h| h.p_vaddr as usize & !(PAGE - 1)).min().unwrap_or(0);
        let base = at - first;
        let is_there = |h: &Elf64_Phdr| {
            h.p_flags & libc::PF_W != 0 || are_readable(call, base + h.p_vaddr as usize, h.p_memsz as usize)
        };
        let module = Module { base, headers, functions: Vec::new() };
        if loads().all(is_there) && module.is_client() {
            module.replace();
        }
    }
}

fn map_memory(address: usize, size: usize, protection: i32, flags: i32) -> Result<usize, String> {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: new memory, or, with MAP_FIXED, memory that `reserve` has made.
    let at = unsafe { libc::mmap(address as *mut _, size, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED { Err(std::io::Error::last_os_error().to_string()) } else { Ok(at as usize) }
}

/// Finds the program's addresses free; returns what to add to those in the file.
fn reserve(anywhere: bool, low: usize, high: usize) -> Result<usize, String> {
    if anywhere {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        return match place::map(high - low, libc::PROT_NONE, flags, -1, 0) {
            error @ ..0 => Err(std::io::Error::from_raw_os_error(-error as i32).to_string()),
            at => Ok(at as usize - low),
        };
    }
    map_memory(low, high - low, libc::PROT_NONE, libc::MAP_FIXED_NOREPLACE)
        .map(|_| 0)
        .map_err(|why| format!("its addresses {low:#x}-{high:#x} are taken ({why})"))
}

fn place(file: &[u8], load: &Elf64_Phdr, base: usize) -> Result<(), String> {
    let start = base + load.p_vaddr as usize;
    let page = start & !(PAGE - 1);
    let end = (start + load.p_memsz as usize).next_multiple_of(PAGE);
    let bytes = file
        .get(load.p_offset as usize..(load.p_offset + load.p_filesz) as usize)
        .ok_or("its segments are not in the file")?;
    map_memory(page, end - page, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED)?;
    // SAFETY: mapped just now, of this size; nobody runs there yet.
    unsafe {
        core::ptr::copy_nonoverlapping(bytes.as_ptr(), start as *mut u8, bytes.len());
        if libc::mprotect(page as *mut _, end - page, protection(load.p_flags)) != 0 {
            return Err(std::io::Error::last_os_error().to_string());
        }
    }
    Ok(())
}
