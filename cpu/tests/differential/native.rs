// SPDX-License-Identifier: Apache-2.0
//! Runs cases on the host's processor, in a forked child: a signal handler puts the case's registers into the context
//! it returns to, the case runs to a fault, and the handler of that takes the registers out again.

use std::sync::{Mutex, MutexGuard, OnceLock};

use crate::case::{CODE, Case, DATA, DATA_SIZE, END, LIMIT16, OFFSET16, Outcome, SEGMENT16, WRITABLE, fill};

/// Most cases of one child.
pub const BATCH: usize = 256;
/// Seconds a child may take.
const TIMEOUT_S: u32 = 10;

const SIGNALS: [i32; 6] =
    [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGBUS, libc::SIGSYS];

/// Shared between parent and child.
#[repr(C)]
struct Shared {
    count: usize,
    /// The case that runs, while it does.
    current: usize,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// What the handler remembers; only the child uses it.
struct Child {
    shared: *mut Shared,
    inside: bool,
    gregs: [i64; 23],
    fp: [u8; 512],
}

static mut CHILD: Child = Child { shared: std::ptr::null_mut(), inside: false, gregs: [0; 23], fp: [0; 512] };

/// The mappings, made once.
pub struct Native {
    shared: usize,
    /// Writable views of the code and the data.
    code: usize,
    data: usize,
}

static NATIVE: OnceLock<Mutex<Native>> = OnceLock::new();

/// General registers in the order of [`crate::case::State`].
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

fn map(address: u64, size: usize, prot: i32, fd: i32, offset: i64) -> usize {
    let fixed = if address != 0 { libc::MAP_FIXED_NOREPLACE } else { 0 };
    let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    // SAFETY: new mappings only (NOREPLACE).
    let p = unsafe {
        libc::mmap(address as *mut _, size, prot, libc::MAP_SHARED | fixed | anonymous, fd, offset)
    };
    assert!(p != libc::MAP_FAILED && (address == 0 || p as u64 == address), "mmap at {address:#x}");
    p as usize
}

/// Linux's `struct user_desc`.
#[repr(C)]
struct UserDesc {
    entry_number: u32,
    base: u32,
    limit: u32,
    flags: u32,
}
/// `user_desc.contents` of a code segment.
const CONTENTS_CODE: u32 = 2 << 1;
/// modify_ldt's function that writes an entry.
const WRITE_LDT: i32 = 1;

/// Makes the segments of 16-bit code, for this process and its children; whether the kernel has modify_ldt.
pub fn has_16_bit_segments() -> bool {
    static DONE: OnceLock<bool> = OnceLock::new();
    *DONE.get_or_init(|| {
        [(0, CODE - OFFSET16, CONTENTS_CODE), (1, SEGMENT16, 0)].into_iter().all(
            |(entry_number, base, flags)| {
                let entry = UserDesc { entry_number, base: base as u32, limit: LIMIT16, flags };
                // SAFETY: the kernel reads the structure; nothing uses these LDT entries yet.
                let result = unsafe {
                    libc::syscall(libc::SYS_modify_ldt, WRITE_LDT, &raw const entry, size_of::<UserDesc>())
                };
                result == 0
            },
        )
    })
}

/// The host as a processor under test; one user at a time.
pub fn native() -> MutexGuard<'static, Native> {
    let native = NATIVE.get_or_init(|| {
        let (read, write, exec) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
        let shared = map(0, size_of::<Shared>(), read | write, -1, 0);
        // SAFETY: plain calls; the name is a C string.
        let fd = unsafe {
            let fd = libc::memfd_create(c"differential".as_ptr(), 0);
            assert!(fd >= 0 && libc::ftruncate(fd, (4096 + DATA_SIZE) as i64) == 0);
            fd
        };
        let code = map(0, 4096, read | write, fd, 0);
        let data = map(0, DATA_SIZE, read | write, fd, 4096);
        map(CODE, 4096, read | exec, fd, 0);
        map(DATA, WRITABLE, read | write, fd, 4096);
        map(DATA + WRITABLE as u64, DATA_SIZE - WRITABLE, read, fd, 4096 + WRITABLE as i64);
        Mutex::new(Native { shared, code, data })
    });
    native.lock().unwrap_or_else(|e| e.into_inner())
}

impl Native {
    /// Runs up to [`BATCH`] cases. Err: index of the case that killed or hung the child.
    pub fn run(&mut self, cases: &[Case]) -> Result<Vec<Box<Outcome>>, usize> {
        assert!(cases.len() <= BATCH);
        let shared = self.shared as *mut Shared;
        // SAFETY: the mapping has the size of Shared, the child that shares it is not there yet or gone.
        unsafe {
            (*shared).count = cases.len();
            (*shared).current = 0;
            for (i, case) in cases.iter().enumerate() {
                (&raw mut (*shared).cases[i]).write(*case);
            }
            let pid = libc::fork();
            assert!(pid >= 0, "fork");
            if pid == 0 {
                self.child(shared);
            }
            let mut status = 0;
            assert!(libc::waitpid(pid, &mut status, 0) == pid);
            if status != 0 {
                eprintln!("child status {status:#x}");
                return Err((*shared).current);
            }
            Ok((0..cases.len())
                .map(|i| {
                    let mut out = Box::new((*shared).outcomes[i]);
                    out.settle();
                    out
                })
                .collect())
        }
    }

    /// The child's life. It must not allocate: other threads of the parent may have held locks.
    unsafe fn child(&self, shared: *mut Shared) -> ! {
        // SAFETY: only this thread exists here; what is pointed to is mapped.
        unsafe {
            const STACK: usize = 256 << 10;
            let stack = libc::mmap(
                std::ptr::null_mut(),
                STACK,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            let alternate = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK };
            libc::sigaltstack(&alternate, std::ptr::null_mut());
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            for signal in SIGNALS {
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
            libc::signal(libc::SIGALRM, libc::SIG_DFL);
            libc::alarm(TIMEOUT_S);
            (&raw mut CHILD.shared).write(shared);
            // So that a write finds the read-only page present.
            ((DATA as usize + WRITABLE) as *const u8).read_volatile();
            for i in 0..(*shared).count {
                (&raw mut (*shared).current).write_volatile(i);
                let case = &(*shared).cases[i];
                let code = std::slice::from_raw_parts_mut(self.code as *mut u8, 4096);
                let data = std::slice::from_raw_parts_mut(self.data as *mut u8, DATA_SIZE);
                code.fill(END);
                code[..case.length].copy_from_slice(case.code());
                fill(case.seed, data);
                // Not in the context; 64-bit code does without.
                let selector = if case.bits == 16 { LDT_DATA } else { USER_DS };
                core::arch::asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) selector);
                // Into the case and out again, both by way of the handler.
                core::arch::asm!("ud2");
                (*shared).outcomes[i].data.copy_from_slice(data);
            }
            libc::_exit(0)
        }
    }
}

/// First address that Linux doesn't give to processes.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// Linux's selector of 32-bit user code.
const COMPATIBILITY_CS: i64 = 0x23;
/// And of flat user data.
const USER_DS: u16 = 0x2b;
/// Selectors of the LDT's two descriptors.
const LDT_CODE: i64 = 0x07;
const LDT_DATA: u16 = 0x0f;

const XSTATE_MAGIC: u32 = 0x4650_5853;

extern "C" fn handler(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: called by the kernel with a valid context; CHILD belongs to this thread alone.
    unsafe {
        let child = (&raw mut CHILD).as_mut().unwrap_unchecked();
        let shared = &mut *child.shared;
        let current = shared.current;
        let context = &mut *(context as *mut libc::ucontext_t).cast::<libc::ucontext_t>();
        let gregs = &mut context.uc_mcontext.gregs;
        let fp = std::slice::from_raw_parts_mut(context.uc_mcontext.fpregs as *mut u8, 1024);
        if !child.inside {
            child.inside = true;
            child.gregs = *gregs;
            child.fp.copy_from_slice(&fp[..512]);
            let s = &shared.cases[current].state;
            for (i, &at) in GREGS.iter().enumerate() {
                gregs[at as usize] = s.gpr[i] as i64;
            }
            // CS is in the low quarter, SS in the high one.
            let selectors = &mut gregs[libc::REG_CSGSFS as usize];
            match shared.cases[current].bits {
                64 => {}
                32 => *selectors = *selectors & !0xffff | COMPATIBILITY_CS,
                _ => *selectors = *selectors & 0xffff_ffff_0000 | LDT_CODE | (LDT_DATA as i64) << 48,
            }
            gregs[libc::REG_RIP as usize] = s.rip as i64;
            gregs[libc::REG_EFL as usize] = s.rflags as i64;
            fp[0..2].copy_from_slice(&s.fcw.to_le_bytes());
            fp[2..4].copy_from_slice(&s.fsw.to_le_bytes());
            fp[4..6].copy_from_slice(&s.tags.to_le_bytes());
            fp[24..28].copy_from_slice(&s.mxcsr.to_le_bytes());
            for i in 0..8 {
                fp[32 + 16 * i..40 + 16 * i].copy_from_slice(&s.st[i][0].to_le_bytes());
                fp[40 + 16 * i..48 + 16 * i].copy_from_slice(&s.st[i][1].to_le_bytes());
            }
            for i in 0..16 {
                fp[160 + 16 * i..168 + 16 * i].copy_from_slice(&s.xmm[i][0].to_le_bytes());
                fp[168 + 16 * i..176 + 16 * i].copy_from_slice(&s.xmm[i][1].to_le_bytes());
            }
            if u32::from_le_bytes([fp[464], fp[465], fp[466], fp[467]]) == XSTATE_MAGIC {
                // XSTATE_BV: x87 and SSE are not in their initial state.
                fp[512] |= 3;
            }
        } else {
            child.inside = false;
            let out = &mut shared.outcomes[current];
            let s = &mut out.state;
            for (i, &at) in GREGS.iter().enumerate() {
                s.gpr[i] = gregs[at as usize] as u64;
            }
            if shared.cases[current].bits == 16 {
                // A return to a 16-bit stack leaves the kernel's own bits above (Linux, espfix_64).
                s.gpr[4] &= 0xffff_ffff;
            }
            s.rip = gregs[libc::REG_RIP as usize] as u64;
            s.rflags = gregs[libc::REG_EFL as usize] as u64;
            out.vector = gregs[libc::REG_TRAPNO as usize] as u64;
            out.error = gregs[libc::REG_ERR as usize] as u64;
            out.address = if out.vector == 14 { gregs[libc::REG_CR2 as usize] as u64 } else { 0 };
            if out.vector == 14 && out.address >= TASK_SIZE {
                // The kernel says "present" of its own addresses, whatever is there.
                out.error &= !1;
            }
            let u16_at = |i: usize| u16::from_le_bytes([fp[i], fp[i + 1]]);
            let u64_at = |i: usize| (0..8).fold(0u64, |v, k| v | (fp[i + k] as u64) << (8 * k));
            s.fcw = u16_at(0);
            s.fsw = u16_at(2);
            s.tags = u16_at(4);
            s.mxcsr = u64_at(24) as u32;
            for i in 0..8 {
                s.st[i] = [u64_at(32 + 16 * i), u16_at(40 + 16 * i) as u64];
            }
            for i in 0..16 {
                s.xmm[i] = [u64_at(160 + 16 * i), u64_at(168 + 16 * i)];
            }
            let has_xstate = u32::from_le_bytes([fp[464], fp[465], fp[466], fp[467]]) == XSTATE_MAGIC;
            let bv = if has_xstate { fp[512] } else { 3 };
            if bv & 1 == 0 {
                (s.fcw, s.fsw, s.tags) = (0x37f, 0, 0);
                s.st = [[0; 2]; 8];
            }
            if bv & 2 == 0 {
                s.xmm = [[0; 2]; 16];
            }
            *gregs = child.gregs;
            gregs[libc::REG_RIP as usize] += 2;
            fp[..512].copy_from_slice(&child.fp);
            if has_xstate {
                fp[512] |= 3;
            }
        }
    }
}
