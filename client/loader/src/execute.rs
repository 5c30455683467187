// SPDX-License-Identifier: Apache-2.0
//! Programs that the program executes: those that need the loader get it, the others what is preloaded into them.
//!
//! Which is which tells the program's header. It may be a child of vfork() that asks: memory is the parent's, and the
//! stack may be small. So what is read and made here is in memory of its own, given back when the kernel says that the
//! child has left the parent's memory (`CLONE_CHILD_CLEARTID`).

use core::ffi::{CStr, c_char};
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::ffi::CString;
use std::sync::OnceLock;

use softkvm_client::programs::{Kind, NAME, Reader, kind_of};

use crate::calls::{Call, Outcome};
use crate::raw::{gettid, raw};
use crate::{donor, names};

/// The variable of the environment that has what is preloaded, whatever it is called for the process, and its names.
const TO_LINKER: &str = "LD_PRELOAD=";
const TO_LOADER: &str = "SOFTKVM_PRELOAD=";

/// It as it is for a dynamic linker, and as it is for a loader.
static PRELOADED: OnceLock<(CString, CString)> = OnceLock::new();

/// Remembers what to preload.
pub fn start() {
    use std::os::unix::ffi::OsStrExt;
    let Some(libraries) = std::env::var_os("SOFTKVM_PRELOAD") else { return };
    let entry = |name: &str| CString::new([name.as_bytes(), libraries.as_bytes()].concat());
    if let (Ok(linkers), Ok(loaders)) = (entry(TO_LINKER), entry(TO_LOADER)) {
        let _ = PRELOADED.set((linkers, loaders));
    }
}

// ---- memory for it ---------------------------------------------------------------------------------------------------

/// Memory, for as long as a thread executes a program; the kernel sets a word to 0 behind that.
struct Lease {
    owner: AtomicU32,
    address: AtomicUsize,
    size: AtomicUsize,
}

static LEASES: [Lease; 64] =
    [const { Lease { owner: AtomicU32::new(0), address: AtomicUsize::new(0), size: AtomicUsize::new(0) } };
        64];

impl Lease {
    fn take(size: usize) -> Option<&'static Lease> {
        let free = |lease: &&Lease| {
            lease.owner.compare_exchange(0, gettid(), Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        let lease = LEASES.iter().find(free)?;
        lease.unmap();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = raw!(libc::SYS_mmap, 0, size, libc::PROT_READ | libc::PROT_WRITE, flags, usize::MAX, 0);
        if at < 0 {
            lease.owner.store(0, Ordering::SeqCst);
            return None;
        }
        lease.address.store(at as usize, Ordering::SeqCst);
        lease.size.store(size, Ordering::SeqCst);
        if donor::is_child() {
            raw!(libc::SYS_set_tid_address, lease.owner.as_ptr());
        }
        Some(lease)
    }

    fn unmap(&self) {
        let before = self.address.swap(0, Ordering::SeqCst);
        if before != 0 {
            raw!(libc::SYS_munmap, before, self.size.load(Ordering::SeqCst));
        }
    }

    fn give_back(&self) {
        self.unmap();
        if donor::is_child() {
            raw!(libc::SYS_set_tid_address, 0);
        }
        self.owner.store(0, Ordering::SeqCst);
    }
}

/// A null-terminated list of strings of the program's, or of none.
fn list(at: usize) -> &'static [usize] {
    if at < 4096 {
        return &[];
    }
    let at = at as *const usize;
    let mut length = 0;
    // SAFETY: the program's; one that is not there is its own fault, and ends it.
    unsafe {
        while *at.add(length) != 0 {
            length += 1;
        }
        core::slice::from_raw_parts(at, length)
    }
}

fn begins(string: usize, with: &str) -> bool {
    // SAFETY: a string of the program's.
    unsafe { CStr::from_ptr(string as *const c_char) }.to_bytes().starts_with(with.as_bytes())
}

/// Reads files by system calls alone.
struct Raw;
impl Reader for Raw {
    fn open(&self, path: &CStr) -> Option<i32> {
        let fd = raw!(
            libc::SYS_openat,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK
        );
        (fd >= 0).then_some(fd as i32)
    }
    fn read(&self, fd: i32, bytes: &mut [u8], at: u64) -> usize {
        raw!(libc::SYS_pread64, fd, bytes.as_mut_ptr(), bytes.len(), at).max(0) as usize
    }
    fn close(&self, fd: i32) {
        raw!(libc::SYS_close, fd);
    }
}

// ---- the calls -------------------------------------------------------------------------------------------------------

/// Behind the arguments and the environment: the texts of `#!` lines, and the end marks.
const EXTRA: usize = 2 * NAME + 64 * size_of::<usize>();

/// execve().
pub fn execute(call: &mut Call, path: usize, arguments: usize, environment: usize) -> Outcome {
    if path < 4096 {
        return Outcome::Again;
    }
    let is_own = names::is_own_program(path);
    let path = if is_own { names::program().as_ptr() as usize } else { path };
    let (arguments, environment) = (list(arguments), list(environment));
    let words = arguments.len() + environment.len();
    let size = (EXTRA + words * size_of::<usize>()).next_multiple_of(4096);
    let Some(lease) = Lease::take(size) else { return Outcome::Again };
    let result = prepare_and_execute(call, lease, is_own, path, arguments, environment);
    lease.give_back();
    result.map_or(Outcome::Again, Outcome::Result)
}

fn prepare_and_execute(
    call: &mut Call,
    lease: &Lease,
    is_own: bool,
    path: usize,
    arguments: &[usize],
    environment: &[usize],
) -> Option<isize> {
    let at = lease.address.load(Ordering::SeqCst);
    // SAFETY: of the lease, new, and as large as `execute` has reckoned.
    let (text, words) = unsafe {
        (
            &mut *(at as *mut [u8; 2 * NAME]),
            core::slice::from_raw_parts_mut(
                (at + 2 * NAME) as *mut usize,
                (lease.size.load(Ordering::SeqCst) - 2 * NAME) / size_of::<usize>(),
            ),
        )
    };
    // SAFETY: a string of the program's.
    let file = unsafe { CStr::from_ptr(path as *const c_char) };
    let kind = if is_own { Kind::Loaded } else { kind_of(&Raw, file, text) };
    let (linkers, loaders) =
        PRELOADED.get().map_or((0, 0), |(a, b)| (a.as_ptr() as usize, b.as_ptr() as usize));
    let (given, other, entry, program) = match kind {
        Kind::Linked if linkers != 0 => (TO_LOADER, TO_LINKER, linkers, path),
        Kind::Loaded | Kind::Script => (TO_LINKER, TO_LOADER, loaders, names::loader().as_ptr() as usize),
        _ => return None,
    };
    // Only what may be executed: the loader would be in its place.
    if kind != Kind::Linked {
        let allowed = raw!(libc::SYS_access, path, libc::X_OK);
        if allowed < 0 {
            return Some(allowed);
        }
    }
    let mut used = 0;
    let mut push = |word: usize| {
        words[used] = word;
        used += 1;
    };
    if kind != Kind::Linked {
        push(c"softkvm-load".as_ptr() as usize);
        let mut first = path;
        if kind == Kind::Script {
            // The interpreter's name twice: as its file and as its own; then its argument, if there is one.
            let text = text.as_ptr() as usize;
            push(text);
            push(text);
            // SAFETY: of `kind_of`, ends with a null byte.
            if unsafe { *((text + NAME) as *const u8) } != 0 {
                push(text + NAME);
            }
        } else {
            push(path);
            first = arguments.first().copied().unwrap_or(path);
        }
        push(first);
        arguments.iter().skip(1).for_each(|word| push(*word));
    } else {
        arguments.iter().for_each(|word| push(*word));
    }
    push(0);
    let has = environment.iter().any(|variable| begins(*variable, given) || begins(*variable, other));
    for variable in environment {
        if !begins(*variable, given) && !begins(*variable, other) {
            push(*variable);
        }
    }
    if has && entry != 0 {
        push(entry);
    }
    push(0);
    let start = words.as_ptr() as usize;
    let behind = words[..used].iter().position(|word| *word == 0).unwrap_or(0) + 1;
    let mask = *call.mask();
    let mut blocked = 0u64;
    // What is executed inherits the mask.
    raw!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, &raw mut blocked, 8);
    let result = raw!(libc::SYS_execve, program, start, start + behind * size_of::<usize>());
    raw!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const blocked, 0, 8);
    Some(result)
}

/// execveat(): by a path, or by a descriptor that stays open.
pub fn execute_at(call: &mut Call) -> Outcome {
    let [directory, path, arguments, environment, flags, _] = call.arguments;
    if path < 4096 || flags as i32 & !libc::AT_EMPTY_PATH != 0 {
        return Outcome::Again;
    }
    // SAFETY: a string of the program's.
    let name = unsafe { CStr::from_ptr(path as *const c_char) }.to_bytes();
    if directory as i32 == libc::AT_FDCWD || name.first() == Some(&b'/') {
        return execute(call, path, arguments, environment);
    }
    let mut file = [0u8; 320];
    let prefix = b"/proc/self/fd/";
    let mut length = prefix.len();
    file[..length].copy_from_slice(prefix);
    let mut divisor = 1_000_000_000;
    let number = directory as u32;
    while divisor > 0 {
        if number >= divisor || divisor == 1 {
            file[length] = b'0' + (number / divisor % 10) as u8;
            length += 1;
        }
        divisor /= 10;
    }
    if !name.is_empty() {
        if length + 1 + name.len() >= file.len() {
            return Outcome::Again;
        }
        file[length] = b'/';
        file[length + 1..length + 1 + name.len()].copy_from_slice(name);
    }
    execute(call, file.as_ptr() as usize, arguments, environment)
}
