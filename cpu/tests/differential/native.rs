// SPDX-License-Identifier: Apache-2.0
//! Runs cases on the host's processor, in a forked child: a signal handler puts the case's registers into the context
//! it returns to, the case runs to a fault, and the handler of that takes the registers out again.

use std::sync::{Mutex, MutexGuard, OnceLock};

use crate::case::{
    CODE, Case, DATA, DATA_SIZE, END, LIMIT16, OFFSET16, Outcome, SEGMENT16, State, WRITABLE, fill,
};

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
    saved: Saved,
}

static mut CHILD: Child = Child { shared: std::ptr::null_mut(), inside: false, saved: Saved::NONE };

/// The mappings, made once.
pub struct Native {
    shared: usize,
    /// Writable views of the code and the data.
    pub code: usize,
    pub data: usize,
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

pub fn map(address: u64, size: usize, prot: i32, fd: i32, offset: i64) -> usize {
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
                    out.state.settle();
                    out
                })
                .collect())
        }
    }

    /// The child's life. It must not allocate: other threads of the parent may have held locks.
    unsafe fn child(&self, shared: *mut Shared) -> ! {
        catch(handler, TIMEOUT_S);
        // SAFETY: only this thread exists here; what is pointed to is mapped.
        unsafe {
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
                load_data_segments(case.bits);
                // Into the case and out again, both by way of the handler.
                core::arch::asm!("ud2");
                (*shared).outcomes[i].data.copy_from_slice(data);
            }
            libc::_exit(0)
        }
    }
}

/// A handler of signals with their information.
pub type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// Has every signal that a case can end with handled on a stack of its own, and SIGALRM kill after `timeout_s` seconds.
/// For a forked child: it doesn't allocate.
pub fn catch(handler: Handler, timeout_s: u32) {
    const STACK: usize = 256 << 10;
    // SAFETY: plain calls; the stack is mapped for good.
    unsafe {
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
        libc::alarm(timeout_s);
    }
}

/// First address that Linux doesn't give to processes.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// Linux's selector of 32-bit user code.
const COMPATIBILITY_CS: i64 = 0x23;
/// And of 64-bit user code.
const USER_CS: i64 = 0x33;
/// And of flat user data.
const USER_DS: u16 = 0x2b;
/// Selectors of the LDT's two descriptors.
const LDT_CODE: i64 = 0x07;
const LDT_DATA: u16 = 0x0f;

const XSTATE_MAGIC: u32 = 0x4650_5853;
const PAGE_FAULT: u64 = 14;

/// Bytes of the FXSAVE image that a signal frame has, and its XSAVE header's first word.
const FP_SIZE: usize = 513;

/// The interrupted context of a signal.
pub struct Context<'a> {
    gregs: &'a mut [i64; 23],
    fp: &'a mut [u8],
}

/// What the context was before a case was put into it.
pub struct Saved {
    gregs: [i64; 23],
    fp: [u8; 512],
}

impl Saved {
    pub const NONE: Saved = Saved { gregs: [0; 23], fp: [0; 512] };
}

impl Context<'_> {
    /// # Safety
    /// `context` must be what the kernel gave the handler that runs.
    pub unsafe fn new<'a>(context: *mut libc::c_void) -> Context<'a> {
        // SAFETY: given; the kernel's image of the x87 and SSE state is longer than what is used.
        unsafe {
            let context = &mut *(context as *mut libc::ucontext_t).cast::<libc::ucontext_t>();
            let fp = std::slice::from_raw_parts_mut(context.uc_mcontext.fpregs as *mut u8, FP_SIZE);
            Context { gregs: &mut context.uc_mcontext.gregs, fp }
        }
    }

    /// Remembers the context.
    pub fn save(&self, saved: &mut Saved) {
        saved.gregs = *self.gregs;
        saved.fp.copy_from_slice(&self.fp[..512]);
    }

    /// Puts back what was, and goes on behind the UD2 there.
    pub fn restore(&mut self, saved: &Saved) {
        *self.gregs = saved.gregs;
        self.gregs[libc::REG_RIP as usize] += 2;
        self.fp[..512].copy_from_slice(&saved.fp);
        self.mark();
    }

    fn has_xstate(&self) -> bool {
        u32::from_le_bytes([self.fp[464], self.fp[465], self.fp[466], self.fp[467]]) == XSTATE_MAGIC
    }

    /// XSTATE_BV: x87 and SSE are not in their initial state.
    fn mark(&mut self) {
        if self.has_xstate() {
            self.fp[512] |= 3;
        }
    }

    /// Makes the handler return to a case's first instruction.
    pub fn enter(&mut self, s: &State, bits: u32) {
        let gregs = &mut *self.gregs;
        for (i, &at) in GREGS.iter().enumerate() {
            gregs[at as usize] = s.gpr[i] as i64;
        }
        // CS is in the low quarter, SS in the high one.
        let selectors = &mut gregs[libc::REG_CSGSFS as usize];
        *selectors = *selectors & 0xffff_ffff_0000
            | match bits {
                64 => USER_CS | (USER_DS as i64) << 48,
                32 => COMPATIBILITY_CS | (USER_DS as i64) << 48,
                _ => LDT_CODE | (LDT_DATA as i64) << 48,
            };
        gregs[libc::REG_RIP as usize] = s.rip as i64;
        gregs[libc::REG_EFL as usize] = s.rflags as i64;
        let fp = &mut *self.fp;
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
        self.mark();
    }

    /// The registers at the fault that ended a case; vector, error code and CR2.
    pub fn leave(&self, s: &mut State, bits: u32) -> (u64, u64, u64) {
        let (gregs, fp) = (&*self.gregs, &*self.fp);
        for (i, &at) in GREGS.iter().enumerate() {
            s.gpr[i] = gregs[at as usize] as u64;
        }
        if bits == 16 {
            // A return to a 16-bit stack leaves the kernel's own bits above (Linux, espfix_64).
            s.gpr[4] &= 0xffff_ffff;
        }
        s.rip = gregs[libc::REG_RIP as usize] as u64;
        s.rflags = gregs[libc::REG_EFL as usize] as u64;
        let vector = gregs[libc::REG_TRAPNO as usize] as u64;
        let mut error = gregs[libc::REG_ERR as usize] as u64;
        let address = if vector == PAGE_FAULT { gregs[libc::REG_CR2 as usize] as u64 } else { 0 };
        if vector == PAGE_FAULT && address >= TASK_SIZE {
            // The kernel says "present" of its own addresses, whatever is there.
            error &= !1;
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
        let bv = if self.has_xstate() { fp[512] } else { 3 };
        if bv & 1 == 0 {
            (s.fcw, s.fsw, s.tags) = (0x37f, 0, 0);
            s.st = [[0; 2]; 8];
        }
        if bv & 2 == 0 {
            s.xmm = [[0; 2]; 16];
        }
        (vector, error, address)
    }
}

/// DS and ES are not in the context; 64-bit code does without.
pub fn load_data_segments(bits: u32) {
    let selector = if bits == 16 { LDT_DATA } else { USER_DS };
    // SAFETY: flat data segments, or 16-bit ones that 64-bit code doesn't look at.
    unsafe { core::arch::asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) selector) };
}

extern "C" fn handler(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: called by the kernel with a valid context; CHILD belongs to this thread alone.
    unsafe {
        let child = (&raw mut CHILD).as_mut().unwrap_unchecked();
        let shared = &mut *child.shared;
        let current = shared.current;
        let mut context = Context::new(context);
        let bits = shared.cases[current].bits;
        if !child.inside {
            child.inside = true;
            context.save(&mut child.saved);
            context.enter(&shared.cases[current].state, bits);
        } else {
            child.inside = false;
            let out = &mut shared.outcomes[current];
            (out.vector, out.error, out.address) = context.leave(&mut out.state, bits);
            context.restore(&child.saved);
        }
    }
}
