// SPDX-License-Identifier: Apache-2.0
//! Programs that the client executes. Nothing is loaded into one without our C library's dynamic linker: if it is a KVM
//! client, the loader runs it, as `softkvm exec` has it run.
//!
//! It may be a child of vfork() that calls, on its parent's memory: no locks, and no memory but what it maps itself.

use core::ffi::{CStr, c_char, c_int, c_void};
use core::mem::zeroed;
use core::ptr::null;
use core::slice;

use libc::pid_t;
use softkvm_client::device;
use softkvm_client::programs::{Kind, NAME, Reader, kind_of};

use crate::real;
use crate::real::call;

type Strings = *const *const c_char;

const PRELOAD: &[u8] = b"LD_PRELOAD=";
const LOADER: &[u8] = b"SOFTKVM_LOADER=";
/// What the loader has the list of preloaded libraries from, for what the program starts.
const PRELOAD_OF_PROGRAM: &[u8] = b"SOFTKVM_PRELOAD=";

unsafe extern "C" {
    static environ: Strings;
}

/// Memory of our own, given back when it is dropped.
struct Room {
    address: usize,
    size: usize,
}

impl Room {
    fn map(size: usize, protection: c_int, flags: c_int, fd: isize) -> Option<Room> {
        let arguments = [0, size, protection as usize, (libc::MAP_PRIVATE | flags) as usize, fd as usize, 0];
        let address = call(libc::SYS_mmap, arguments);
        (address > 0).then_some(Room { address: address as usize, size })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: mapped, for as long as this is there.
        unsafe { slice::from_raw_parts(self.address as *const u8, self.size) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        call(libc::SYS_munmap, [self.address, self.size, 0, 0, 0, 0]);
    }
}

/// A number of strings, up to null.
///
/// # Safety
/// `strings` is null or a list that ends with null.
unsafe fn count(strings: Strings) -> usize {
    // SAFETY: as said.
    if strings.is_null() { 0 } else { (0..).take_while(|&n| unsafe { !(*strings.add(n)).is_null() }).count() }
}

/// The contents of a plain file that may be executed, and gives its process no rights.
fn executable(path: *const c_char) -> Option<Room> {
    device::path(path, call)?;
    let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK;
    if call(libc::SYS_access, [path as usize, libc::X_OK as usize, 0, 0, 0, 0]) != 0 {
        return None;
    }
    let fd = call(libc::SYS_open, [path as usize, flags as usize, 0, 0, 0, 0]);
    if fd < 0 {
        return None;
    }
    // SAFETY: all zeros are a stat.
    let mut stat: libc::stat = unsafe { zeroed() };
    let described = call(libc::SYS_fstat, [fd as usize, (&raw mut stat) as usize, 0, 0, 0, 0]) == 0;
    let plain =
        stat.st_mode & libc::S_IFMT == libc::S_IFREG && stat.st_mode & (libc::S_ISUID | libc::S_ISGID) == 0;
    let contents = if described && plain && stat.st_size > 0 {
        Room::map(stat.st_size as usize, libc::PROT_READ, 0, fd)
    } else {
        None
    };
    call(libc::SYS_close, [fd as usize, 0, 0, 0, 0, 0]);
    contents
}

/// Reads files by system calls alone.
struct Calls;
impl Reader for Calls {
    fn open(&self, path: &CStr) -> Option<c_int> {
        let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = call(libc::SYS_open, [path.as_ptr() as usize, flags as usize, 0, 0, 0, 0]);
        (fd >= 0).then_some(fd as c_int)
    }
    fn read(&self, fd: c_int, bytes: &mut [u8], at: u64) -> usize {
        let arguments = [fd as usize, bytes.as_mut_ptr() as usize, bytes.len(), at as usize, 0, 0];
        call(libc::SYS_pread64, arguments).max(0) as usize
    }
    fn close(&self, fd: c_int) {
        call(libc::SYS_close, [fd as usize, 0, 0, 0, 0, 0]);
    }
}

/// Whether this process has a filter of system calls. It may be one that a loader has put on a program that has started
/// this one: by it a program without a dynamic linker would end whose code has the same addresses.
fn is_filtered() -> bool {
    const FILTER: isize = 2;
    call(libc::SYS_prctl, [libc::PR_GET_SECCOMP as usize, 0, 0, 0, 0, 0]) == FILTER
}

/// Whether a file that may be executed has `/dev/kvm` in it, or could not run for a client's filter.
fn is_client(path: *const c_char) -> bool {
    let Some(contents) = executable(path) else { return false };
    if is_filtered() {
        return true;
    }
    let (bytes, what) = (contents.bytes(), b"/dev/kvm");
    // SAFETY: searches within both.
    let found = unsafe { libc::memmem(bytes.as_ptr().cast(), bytes.len(), what.as_ptr().cast(), what.len()) };
    !found.is_null()
}

/// What is executed in the place of a program: the loader, with these.
struct Redirected {
    loader: *const c_char,
    arguments: Strings,
    environment: Strings,
    _lists: Room,
    _line: Room,
}

/// How a client that is not for our dynamic linker is run in an environment that has ours; None: as it is.
///
/// # Safety
/// As execve()'s.
unsafe fn redirected(path: *const c_char, arguments: Strings, environment: Strings) -> Option<Redirected> {
    const WRITABLE: c_int = libc::PROT_READ | libc::PROT_WRITE;
    device::path(path, call)?;
    // SAFETY: strings, and lists of them that end with null; what is written is in the room made for it.
    unsafe {
        let (ours, theirs) = (count(environment), count(arguments));
        let variable = |name: &[u8]| {
            (0..ours).find(|&n| CStr::from_ptr(*environment.add(n)).to_bytes().starts_with(name))
        };
        let (preload, loader) = (variable(PRELOAD)?, variable(LOADER)?);
        // A script's interpreter, and the argument that it is given.
        let line = Room::map(2 * NAME, WRITABLE, libc::MAP_ANONYMOUS, -1)?;
        let text = line.address as *const c_char;
        let name = if theirs > 0 { *arguments } else { path };
        // The program's file, its name, and what comes before its arguments.
        let first = match kind_of(&Calls, CStr::from_ptr(path), &mut *(line.address as *mut [u8; 2 * NAME])) {
            Kind::Loaded if is_client(path) => [path, name, null(), null()],
            Kind::Script if executable(path).is_some() && is_client(text) => match *text.add(NAME) {
                0 => [text, text, path, null()],
                _ => [text, text, text.add(NAME), path],
            },
            _ => return None,
        };
        let libraries = &CStr::from_ptr(*environment.add(preload)).to_bytes_with_nul()[PRELOAD.len()..];
        let arguments_size = 1 + first.len() + theirs + 1;
        let words = arguments_size + ours + 1;
        let size = words * size_of::<usize>() + PRELOAD_OF_PROGRAM.len() + libraries.len();
        let room = Room::map(size, WRITABLE, libc::MAP_ANONYMOUS, -1)?;
        let lists = slice::from_raw_parts_mut(room.address as *mut *const c_char, words);
        let entry = slice::from_raw_parts_mut(
            (room.address + words * size_of::<usize>()) as *mut u8,
            PRELOAD_OF_PROGRAM.len() + libraries.len(),
        );
        entry[..PRELOAD_OF_PROGRAM.len()].copy_from_slice(PRELOAD_OF_PROGRAM);
        entry[PRELOAD_OF_PROGRAM.len()..].copy_from_slice(libraries);
        // The room is of zeros: null ends both lists.
        let (new_arguments, new_environment) = lists.split_at_mut(arguments_size);
        let given = (1..theirs).map(|n| *arguments.add(n));
        let all = [c"softkvm-load".as_ptr()]
            .into_iter()
            .chain(first.into_iter().filter(|p| !p.is_null()))
            .chain(given);
        new_arguments.iter_mut().zip(all).for_each(|(place, argument)| *place = argument);
        for (n, place) in new_environment.iter_mut().enumerate().take(ours) {
            *place = if n == preload { entry.as_ptr().cast() } else { *environment.add(n) };
        }
        Some(Redirected {
            loader: (*environment.add(loader)).add(LOADER.len()),
            arguments: new_arguments.as_ptr(),
            environment: new_environment.as_ptr(),
            _lists: room,
            _line: line,
        })
    }
}

/// Calls a function with the file that a name without a slash stands for, the first in PATH that may be executed (exec(3)).
///
/// # Safety
/// `name` is a string.
unsafe fn search<R>(name: *const c_char, function: impl FnOnce(*const c_char) -> Option<R>) -> Option<R> {
    // SAFETY: strings; the candidate ends with null.
    unsafe {
        let name = device::path(name, call)?;
        if name.contains(&b'/') {
            return function(name.as_ptr().cast());
        }
        let path = libc::getenv(c"PATH".as_ptr());
        let path = if path.is_null() { c"/bin:/usr/bin" } else { CStr::from_ptr(path) };
        let mut candidate = [0u8; libc::PATH_MAX as usize + 1];
        for directory in path.to_bytes().split(|&byte| byte == b':') {
            let directory = if directory.is_empty() { b"." } else { directory };
            let length = directory.len() + 1 + name.len();
            if name.is_empty() || length >= candidate.len() {
                continue;
            }
            candidate[..directory.len()].copy_from_slice(directory);
            candidate[directory.len()] = b'/';
            candidate[directory.len() + 1..length].copy_from_slice(name);
            candidate[length] = 0;
            if call(libc::SYS_access, [candidate.as_ptr() as usize, libc::X_OK as usize, 0, 0, 0, 0]) == 0 {
                return function(candidate.as_ptr().cast());
            }
        }
        None
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn execve(
    path: *const c_char,
    arguments: Strings,
    environment: Strings,
) -> c_int {
    // SAFETY: the caller's lists.
    let redirected = unsafe { redirected(path, arguments, environment) };
    let (path, arguments, environment) = match &redirected {
        Some(loader) => (loader.loader, loader.arguments, loader.environment),
        None => (path, arguments, environment),
    };
    real!(execve(path: *const c_char, arguments: Strings, environment: Strings) -> c_int)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn execv(path: *const c_char, arguments: Strings) -> c_int {
    // SAFETY: the caller's list, and the process's.
    unsafe { execve(path, arguments, environ) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn execvpe(
    name: *const c_char,
    arguments: Strings,
    environment: Strings,
) -> c_int {
    // SAFETY: the caller's string and lists.
    let loader =
        unsafe { search(name, |path| redirected(path, arguments, environment).map(|r| execute(&r))) };
    match loader {
        Some(result) => result,
        None => real!(execvpe(name: *const c_char, arguments: Strings, environment: Strings) -> c_int),
    }
}

fn execute(redirected: &Redirected) -> c_int {
    let (path, arguments, environment) = (redirected.loader, redirected.arguments, redirected.environment);
    real!(execve(path: *const c_char, arguments: Strings, environment: Strings) -> c_int)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn execvp(name: *const c_char, arguments: Strings) -> c_int {
    // SAFETY: the caller's string and list, and the process's.
    unsafe { execvpe(name, arguments, environ) }
}

/// What is done in the child before, may change its directory: then a path of a program is not what it is here.
fn is_same_there(path: *const c_char, actions: *const c_void) -> bool {
    // SAFETY: a string, as `device::path` has found.
    actions.is_null() || device::path(path, call).is_some_and(|bytes| bytes.starts_with(b"/"))
}

macro_rules! spawns {
    ($($name:ident($path:ident) $find:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(
            pid: *mut pid_t,
            $path: *const c_char,
            actions: *const c_void,
            attributes: *const c_void,
            arguments: Strings,
            environment: Strings,
        ) -> c_int {
            let with = |path: *const c_char| {
                // SAFETY: the caller's lists.
                if is_same_there(path, actions) { unsafe { redirected(path, arguments, environment) } } else { None }
            };
            let find: unsafe fn(*const c_char, &dyn Fn(*const c_char) -> Option<Redirected>) -> Option<Redirected> = $find;
            // SAFETY: the caller's string.
            let loader = unsafe { find($path, &with) };
            if let Some(loader) = &loader {
                let ($path, arguments, environment) = (loader.loader, loader.arguments, loader.environment);
                return real!(posix_spawn(
                    pid: *mut pid_t, $path: *const c_char, actions: *const c_void, attributes: *const c_void,
                    arguments: Strings, environment: Strings
                ) -> c_int);
            }
            real!($name(
                pid: *mut pid_t, $path: *const c_char, actions: *const c_void, attributes: *const c_void,
                arguments: Strings, environment: Strings
            ) -> c_int)
        }
    )*};
}

spawns! {
    posix_spawn(path) |path, with| with(path);
    posix_spawnp(name) |name, with| unsafe { search(name, with) };
}
