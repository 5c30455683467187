// SPDX-License-Identifier: Apache-2.0
//! Probes on the host's processor, in a forked child whose signal handler goes from one to the next.

use std::sync::{Mutex, MutexGuard, OnceLock};

use crate::case::{CODE, DATA, DATA_SIZE, END, WRITABLE};
use crate::native::{Context, Saved, catch, load_data_segments, map, native};
use crate::probe::{Answer, Probe, digest, template};

/// Most probes of one child.
pub const BATCH: usize = 4096;
/// Seconds a child may take.
const TIMEOUT_S: u32 = 60;

#[repr(C)]
struct Shared {
    count: usize,
    /// The probe that runs.
    current: usize,
    probes: [Probe; BATCH],
    answers: [Answer; BATCH],
}

/// What the handler remembers; only the child uses it.
struct Child {
    shared: *mut Shared,
    code: *mut [u8; 4096],
    data: *mut [u8; DATA_SIZE],
    inside: bool,
    saved: Saved,
}

static mut CHILD: Child = Child {
    shared: std::ptr::null_mut(),
    code: std::ptr::null_mut(),
    data: std::ptr::null_mut(),
    inside: false,
    saved: Saved::NONE,
};

/// The host as a processor under test; one user at a time.
pub struct Prober {
    shared: usize,
}

static PROBER: OnceLock<Mutex<Prober>> = OnceLock::new();

pub fn prober() -> MutexGuard<'static, Prober> {
    let prober = PROBER.get_or_init(|| {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        Mutex::new(Prober { shared: map(0, size_of::<Shared>(), prot, -1, 0) })
    });
    prober.lock().unwrap_or_else(|e| e.into_inner())
}

impl Prober {
    /// Runs up to [`BATCH`] probes. None: it killed the child.
    pub fn run(&mut self, probes: &[Probe]) -> Vec<Option<Answer>> {
        assert!(probes.len() <= BATCH);
        template();
        let shared = self.shared as *mut Shared;
        let mut out = Vec::with_capacity(probes.len());
        while out.len() < probes.len() {
            let rest = &probes[out.len()..];
            // SAFETY: the mapping has the size of Shared, the child that shares it is not there yet or gone.
            unsafe {
                (*shared).count = rest.len();
                (*shared).current = 0;
                (&raw mut (*shared).probes).cast::<Probe>().copy_from(rest.as_ptr(), rest.len());
            }
            let finished = fork(shared);
            // SAFETY: as above; the answers before `current` have been written.
            unsafe {
                let done = if finished { rest.len() } else { (*shared).current };
                let answers = &raw const (*shared).answers;
                out.extend((0..done).map(|i| Some((*answers.cast::<Answer>().add(i)).settled())));
                if !finished {
                    out.push(None);
                }
            }
        }
        out
    }
}

/// Runs the probes in a child; whether it came to its end.
fn fork(shared: *mut Shared) -> bool {
    let native = native();
    // SAFETY: plain calls; the child doesn't allocate, and it is the only thread there.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0, "fork");
        if pid == 0 {
            catch(handler, TIMEOUT_S);
            let child = (&raw mut CHILD).as_mut().unwrap_unchecked();
            child.shared = shared;
            child.code = native.code as *mut [u8; 4096];
            child.data = native.data as *mut [u8; DATA_SIZE];
            (*child.code).fill(END);
            *child.data = *template();
            // So that a write finds the read-only page present, and a read of the code page too.
            ((DATA as usize + WRITABLE) as *const u8).read_volatile();
            (CODE as *const u8).read_volatile();
            // Into the first probe; the handler goes on to the next until the last, and comes back then.
            core::arch::asm!("ud2");
            libc::_exit(0)
        }
        let mut status = 0;
        assert!(libc::waitpid(pid, &mut status, 0) == pid);
        status == 0
    }
}

extern "C" fn handler(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: called by the kernel with a valid context; CHILD belongs to this thread alone.
    unsafe {
        let child = (&raw mut CHILD).as_mut().unwrap_unchecked();
        let shared = &mut *child.shared;
        let mut context = Context::new(context);
        if !child.inside {
            child.inside = true;
            context.save(&mut child.saved);
        } else {
            let bits = shared.probes[shared.current].bits;
            let answer = &mut shared.answers[shared.current];
            (answer.vector, answer.error, answer.address) = context.leave(&mut answer.state, bits);
            answer.memory = digest(&mut *child.data);
            (&raw mut shared.current).write_volatile(shared.current + 1);
        }
        if shared.current == shared.count {
            context.restore(&child.saved);
            return;
        }
        let probe = &shared.probes[shared.current];
        probe.place(&mut *child.code);
        load_data_segments(probe.bits);
        context.enter(&probe.state(), probe.bits);
    }
}
