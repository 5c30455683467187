// SPDX-License-Identifier: Apache-2.0
//! Every SIMD instruction on the software CPU against the host's processor: registers, flags, MXCSR, memory, faults.
//!
//! Bounded by default; `SOFTCPU_SIMD_CASES=1000` runs as many cases per encoding. `SOFTCPU_SIMD_GOLDEN=FILE` writes the
//! host's results for `simd_golden.rs`.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[path = "common/processor.rs"]
mod processor;
mod simd_cases;

use core::arch::asm;

use iced_x86::Code;
use processor::{Processor, host, judge};
use simd_cases::{AT, FLAGS, Random, Soft, State, codes, encode, golden_cases, map_memory, state};
use softcpu::x86::simd::native::set_portable;

/// What the native run needs beside the registers.
#[repr(C, align(64))]
struct Frame {
    fx: [u8; 512],
    gpr: [u64; 13],
    rflags: u64,
    resume: u64,
    signal: u64,
}

const GPR: usize = 512;
const RFLAGS: usize = GPR + 13 * 8;
const RESUME: usize = RFLAGS + 8;

/// SIGFPE, SIGSEGV and SIGILL in the tested instruction: go on behind it, remembering the signal.
extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let _ = info;
    // SAFETY: the kernel passes a ucontext; in the tested instruction R15 is the frame and the stack has one address.
    unsafe {
        let regs = &mut (*(context as *mut libc::ucontext_t)).uc_mcontext.gregs;
        let frame = regs[libc::REG_R15 as usize] as *mut Frame;
        (*frame).signal = signal as u64;
        regs[libc::REG_RIP as usize] = (*frame).resume as i64;
        regs[libc::REG_RSP as usize] += 8;
    }
}

struct Native {
    code: usize,
    data: usize,
}

impl Native {
    /// # Safety
    /// `at` is an executable page of its own.
    unsafe fn new(code: usize, data: usize) -> Native {
        // SAFETY: a handler of the right type.
        unsafe {
            let mut action: libc::sigaction = core::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            for signal in [libc::SIGFPE, libc::SIGSEGV, libc::SIGILL] {
                libc::sigaction(signal, &action, core::ptr::null_mut());
            }
        }
        Native { code, data }
    }

    fn code(&self, bytes: &[u8]) {
        // SAFETY: our own page.
        unsafe {
            core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code as *mut u8, bytes.len());
            (self.code as *mut u8).add(bytes.len()).write(0xc3);
        }
    }

    fn run(&self, s: &State) -> State {
        let mut f = Frame { fx: [0; 512], gpr: s.gpr, rflags: s.rflags, resume: 0, signal: 0 };
        let top = (s.fsw >> 11 & 7) as usize;
        f.fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        f.fx[2..4].copy_from_slice(&s.fsw.to_le_bytes());
        f.fx[4] = s.tags;
        f.fx[24..28].copy_from_slice(&s.mxcsr.to_le_bytes());
        for n in 0..8 {
            let at = 32 + 16 * ((n + 8 - top) & 7);
            f.fx[at..at + 8].copy_from_slice(&s.mm[n].to_le_bytes());
            f.fx[at + 8..at + 10].copy_from_slice(&[0xff, 0xff]);
        }
        for n in 0..16 {
            f.fx[160 + 16 * n..168 + 16 * n].copy_from_slice(&s.xmm[n][0].to_le_bytes());
            f.fx[168 + 16 * n..176 + 16 * n].copy_from_slice(&s.xmm[n][1].to_le_bytes());
        }
        // SAFETY: the data page is ours. The tested instruction changes nothing but what is saved in the frame, the
        // data page and what is declared; faults come back behind the call. MXCSR and x87 are reset at the end.
        unsafe {
            (self.data as *mut [u64; 8]).write(s.memory);
            let mxcsr = 0x1f80u32;
            asm!(
                "push rbx",
                "push rbp",
                "push r13",
                "lea rax, [rip + 2f]",
                "mov [r15 + {resume}], rax",
                "fxrstor64 [r15]",
                "push qword ptr [r15 + {rflags}]",
                "popfq",
                "mov rax, [r15 + {gpr}]",
                "mov rcx, [r15 + {gpr} + 8]",
                "mov rdx, [r15 + {gpr} + 16]",
                "mov rbx, [r15 + {gpr} + 24]",
                "mov rsi, [r15 + {gpr} + 48]",
                "mov rdi, [r15 + {gpr} + 56]",
                "mov r8, [r15 + {gpr} + 64]",
                "mov r9, [r15 + {gpr} + 72]",
                "mov r10, [r15 + {gpr} + 80]",
                "mov r11, [r15 + {gpr} + 88]",
                "mov r12, [r15 + {gpr} + 96]",
                "call r14",
                "2:",
                "mov [r15 + {gpr}], rax",
                "mov [r15 + {gpr} + 8], rcx",
                "mov [r15 + {gpr} + 16], rdx",
                "mov [r15 + {gpr} + 24], rbx",
                "mov [r15 + {gpr} + 48], rsi",
                "mov [r15 + {gpr} + 56], rdi",
                "mov [r15 + {gpr} + 64], r8",
                "mov [r15 + {gpr} + 72], r9",
                "mov [r15 + {gpr} + 80], r10",
                "mov [r15 + {gpr} + 88], r11",
                "mov [r15 + {gpr} + 96], r12",
                "pushfq",
                "pop qword ptr [r15 + {rflags}]",
                "fxsave64 [r15]",
                "fninit",
                "pop r13",
                "pop rbp",
                "pop rbx",
                "ldmxcsr [r13]",
                gpr = const GPR,
                rflags = const RFLAGS,
                resume = const RESUME,
                in("r15") &mut f,
                in("r14") self.code,
                in("r13") &mxcsr,
                out("r12") _,
                clobber_abi("sysv64"),
            );
        }
        let word = |at: usize| u64::from_le_bytes(f.fx[at..at + 8].try_into().unwrap());
        let fsw = u16::from_le_bytes([f.fx[2], f.fx[3]]);
        let top = (fsw >> 11 & 7) as usize;
        State {
            xmm: core::array::from_fn(|n| [word(160 + 16 * n), word(168 + 16 * n)]),
            mm: core::array::from_fn(|n| word(32 + 16 * ((n + 8 - top) & 7))),
            gpr: f.gpr,
            rflags: f.rflags & FLAGS,
            mxcsr: word(24) as u32,
            fsw,
            tags: f.fx[4],
            // SAFETY: the data page is ours.
            memory: unsafe { (self.data as *const [u64; 8]).read() },
            fault: match f.signal as i32 {
                0 => None,
                libc::SIGFPE => Some(19),
                libc::SIGSEGV => Some(13),
                _ => Some(6),
            },
        }
    }
}

fn host_has(code: Code) -> bool {
    code.cpuid_features().iter().all(|f| match format!("{f:?}").as_str() {
        "SSE3" => is_x86_feature_detected!("sse3"),
        "SSSE3" => is_x86_feature_detected!("ssse3"),
        "SSE4_1" => is_x86_feature_detected!("sse4.1"),
        "SSE4_2" => is_x86_feature_detected!("sse4.2"),
        "AES" => is_x86_feature_detected!("aes"),
        "PCLMULQDQ" => is_x86_feature_detected!("pclmulqdq"),
        "SHA" => is_x86_feature_detected!("sha"),
        _ => true,
    })
}

/// Whether two results of RCP or RSQRT are both within the documented error (1.5 * 2^-12) of the same number; one next
/// to the smallest normal number may be flushed to zero.
fn close(a: u32, b: u32) -> bool {
    let (x, y) = (f32::from_bits(a), f32::from_bits(b));
    let tiny = |v: f32| v.abs() < f32::MIN_POSITIVE * 1.001;
    a == b
        || x.is_normal() && y.is_normal() && ((x - y) / y).abs() < 3.1 / 4096.0
        || tiny(x) && tiny(y) && (a ^ b) >> 31 == 0
}

/// Replaces approximate results that are close enough.
fn tolerate(soft: &mut State, native: &State) {
    for (s, n) in soft.xmm.iter_mut().flatten().zip(native.xmm.iter().flatten()) {
        if close(*s as u32, *n as u32) && close((*s >> 32) as u32, (*n >> 32) as u32) {
            *s = *n;
        }
    }
}

/// Whether the host's processor is known to do something else: DPPS and DPPD take the NaNs of several products in
/// another order on Intel's (neither maker's manual gives one).
fn peculiar(code: Code, native: &State) -> bool {
    let nan = |v: u64| {
        f64::from_bits(v).is_nan()
            || f32::from_bits(v as u32).is_nan()
            || f32::from_bits((v >> 32) as u32).is_nan()
    };
    host() == Some(Processor::Intel6)
        && matches!(code, Code::Dpps_xmm_xmmm128_imm8 | Code::Dppd_xmm_xmmm128_imm8)
        && native.xmm.iter().flatten().any(|v| nan(*v))
}

fn describe(before: &State, soft: &State, native: &State) -> String {
    let mut text = format!("mxcsr {:#x} fsw {:#x} tags {:#x}\n", before.mxcsr, before.fsw, before.tags);
    for n in 0..16 {
        if soft.xmm[n] != native.xmm[n] {
            text += &format!(
                "xmm{n}: before {:016x?} soft {:016x?} native {:016x?}\n",
                before.xmm[n], soft.xmm[n], native.xmm[n]
            );
        }
    }
    text += &format!("xmm before: {:016x?}\nmm before: {:016x?}\n", before.xmm, before.mm);
    text += &format!("gpr: before {:x?}\n", before.gpr);
    text += &format!("memory: before {:016x?}\n", before.memory);
    let tail = |s: &State| {
        format!(
            "mm {:016x?} gpr {:x?} rflags {:#x} mxcsr {:#x} fsw {:#x} tags {:#x} memory {:016x?} fault {:?}",
            s.mm, s.gpr, s.rflags, s.mxcsr, s.fsw, s.tags, s.memory, s.fault
        )
    };
    text + &format!("soft:   {}\nnative: {}\n", tail(soft), tail(native))
}

#[test]
fn every_instruction_does_what_the_host_does() {
    let cases = std::env::var("SOFTCPU_SIMD_CASES").ok().and_then(|v| v.parse().ok()).unwrap_or(30usize);
    let only = std::env::var("SOFTCPU_SIMD_ONLY").ok();
    map_memory();
    // SAFETY: just mapped.
    let native = unsafe { Native::new(AT + (2 << 20), AT) };
    if let Ok(path) = std::env::var("SOFTCPU_SIMD_GOLDEN") {
        let mut text = String::new();
        for (name, bytes, states) in golden_cases() {
            native.code(&bytes);
            let digest = states.iter().fold(0u64, |d, s| d.rotate_left(7) ^ native.run(s).digest());
            text += &format!("{name} {digest:016x}\n");
        }
        std::fs::write(path, text).unwrap();
    }
    let mut r = Random(0x1234_5678_9abc_def1);
    let mut failures = Vec::new();
    let mut tested = 0;
    // With the host's own instructions where there are such handlers, and without.
    for portable in [false, true] {
        set_portable(portable);
        // SAFETY: mapped above.
        let mut soft = unsafe { Soft::new(AT) };
        for code in codes().into_iter().filter(|c| host_has(*c)) {
            let name = format!("{code:?}");
            if only.as_ref().is_some_and(|o| !name.to_lowercase().starts_with(&o.to_lowercase())) {
                continue;
            }
            let immediates = if name.contains("imm8") { 24 } else { 3 };
            let approximate = name.starts_with("Rcp") || name.starts_with("Rsqrt");
            let mut done = false;
            'code: for memory in [false, true] {
                for _ in 0..immediates {
                    let imm = r.next() as u8;
                    let Some((bytes, instruction)) = encode(&mut r, code, memory, imm) else { continue };
                    done = true;
                    soft.code(&bytes);
                    native.code(&bytes);
                    for _ in 0..cases {
                        let misaligned = memory && r.below(8) == 0;
                        let mut before = state(&mut r, AT as u64, misaligned);
                        if r.below(4) == 0 {
                            // Some exceptions unmasked.
                            before.mxcsr &= !(r.next() as u32 & 0x1f80);
                        }
                        let n = native.run(&before);
                        let mut s = soft.run(&before);
                        s.mxcsr &= 0xffff;
                        if approximate {
                            tolerate(&mut s, &n);
                        }
                        if s != n && !peculiar(code, &n) {
                            failures.push(name.clone());
                            eprintln!(
                                "{name} portable {portable} imm {imm:#x} {bytes:02x?} operands {:?}\n{}",
                                (0..instruction.op_count())
                                    .map(|i| instruction.op_register(i))
                                    .collect::<Vec<_>>(),
                                describe(&before, &s, &n)
                            );
                            break 'code;
                        }
                    }
                }
            }
            assert!(done, "{name} cannot be encoded");
            tested += 1;
        }
    }
    eprintln!("{tested} instructions, failures: {failures:?}");
    assert!(only.is_some() || tested > 700);
    let record = "SOFTCPU_SIMD_GOLDEN=$PWD/found.txt cargo test --release --test simd_native";
    judge("SIMD instructions", failures.len(), tested, &[Processor::Amd19h, Processor::Intel6], record);
}
