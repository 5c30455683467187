// SPDX-License-Identifier: Apache-2.0
//! Random x87 instruction sequences on the software processor and on the host: status, tags, registers, memory and
//! flags must come out the same. The same machine code runs on both sides, under a random initial state.
//!
//! `SOFTCPU_X87_SEQUENCES=100000` runs more of them. The transcendental instructions are in `float_native.rs`.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod float_cases;
#[path = "common/processor.rs"]
mod processor;
mod x87_guest;

use float_cases::Random;
use processor::{Processor, judge};
use x87_guest::{DATA_SIZE, Guest, flat};

/// Places in the data page.
const INITIAL: usize = 0;
const FINAL: usize = 512;
const SCRATCH: usize = 1024;
const SCRATCH_SIZE: usize = 1024;
const RFLAGS_AT: usize = 2048;
const RAX_AT: usize = 2056;
const ENVIRONMENT: usize = 3072;

/// An executable page and a data page of this process.
struct Native {
    code: usize,
    data: usize,
}

impl Native {
    fn new() -> Native {
        Native { code: flat::map(0x1_0000, 4096, libc::PROT_EXEC), data: flat::map(DATA_SIZE, 4096, 0) }
    }

    fn run(&self, code: &[u8], data: &mut [u8; DATA_SIZE]) {
        assert!(code.len() < 0x1_0000);
        // SAFETY: the code is a self-contained sequence that ends with RET; it uses RAX, RFLAGS, the x87 state, which
        // it leaves reset, MXCSR, which its image keeps, the XMM registers and its data page.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.code as *mut u8, code.len());
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.data as *mut u8, DATA_SIZE);
            std::arch::asm!(
                "call {code}",
                code = in(reg) self.code,
                in("rdi") self.data,
                clobber_abi("C"),
            );
            std::ptr::copy_nonoverlapping(self.data as *const u8, data.as_mut_ptr(), DATA_SIZE);
        }
    }
}

/// Code under construction.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Code {
        self.0.extend_from_slice(bytes);
        self
    }

    /// An instruction with operand [rdi + at].
    fn memory(&mut self, opcode: &[u8], reg: u8, at: usize) -> &mut Code {
        self.bytes(opcode).bytes(&[0x87 | reg << 3]).bytes(&(at as u32).to_le_bytes())
    }

    /// FXRSTOR64 and the arithmetic flags, before a sequence.
    fn prologue(&mut self, flags: u32) -> &mut Code {
        self.memory(&[0x48, 0x0f, 0xae], 1, INITIAL);
        // mov eax, flags << 8 | 0x7f; inc al (sets OF); sahf
        self.bytes(&[0xb8]).bytes(&(flags << 8 & 0xff00 | 0x7f).to_le_bytes()).bytes(&[0xfe, 0xc0, 0x9e])
    }

    /// FXSAVE64, RAX and flags, a clean x87, after it.
    fn epilogue(&mut self) -> &mut Code {
        self.memory(&[0x48, 0x0f, 0xae], 0, FINAL);
        // lahf; seto al
        self.memory(&[0x48, 0x89], 0, RAX_AT).bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
        self.memory(&[0x48, 0x89], 0, RFLAGS_AT);
        self.bytes(&[0xdb, 0xe3]) // fninit
    }
}

/// Whether a register-form instruction takes part: defined ones but the transcendental.
fn takes_part(opcode: u8, modrm: u8) -> bool {
    match (opcode, modrm) {
        (0xd9, 0xd1..=0xdf | 0xe2 | 0xe3 | 0xe6 | 0xe7 | 0xef) => false,
        (0xd9, 0xf0..=0xf3 | 0xf9 | 0xfb | 0xfe | 0xff) => false,
        (0xda, 0xe0..=0xff) => modrm == 0xe9,
        (0xdb, 0xe0..=0xe7 | 0xf8..=0xff) => modrm == 0xe2,
        (0xdd, 0xf0..=0xff) => false,
        (0xde, 0xd8..=0xdf) => modrm == 0xd9,
        (0xdf, 0xe1..=0xe7 | 0xf8..=0xff) => false,
        _ => true,
    }
}

/// Appends a random x87 instruction.
fn instruction(r: &mut Random, code: &mut Code) {
    loop {
        let opcode = 0xd8 + r.below(8) as u8;
        if r.below(5) < 3 {
            let modrm = 0xc0 | r.below(64) as u8;
            if takes_part(opcode, modrm) {
                code.bytes(&[opcode, modrm]);
                return;
            }
            continue;
        }
        let reg = r.below(8) as u8;
        let at = SCRATCH + r.below((SCRATCH_SIZE - 128) as u64) as usize;
        match (opcode, reg) {
            // Undefined; FLDCW; FBLD of digits above nine is undefined.
            (0xd9, 1 | 5) | (0xdb, 4 | 6) | (0xdd, 5) | (0xdf, 4) => continue,
            (0xd9 | 0xdd, 4) => {
                code.memory(&[opcode], reg, ENVIRONMENT);
            }
            (0xd9 | 0xdd, 6) => {
                code.memory(&[opcode], reg, at);
                if opcode == 0xdd || reg == 6 {
                    // Not the pointers and FOP: they differ between the two sides.
                    for field in 3..7 {
                        code.memory(&[0xc7], 0, at + 4 * field).bytes(&[0; 4]);
                    }
                }
                if opcode == 0xdd && reg == 7 {
                    continue;
                }
            }
            _ => {
                code.memory(&[opcode], reg, at);
            }
        }
        return;
    }
}

/// Random data page: state, environment image, operands.
fn data_page(r: &mut Random, fcw: u16, flags: u16) -> [u8; DATA_SIZE] {
    let mut data = [0u8; DATA_SIZE];
    let status = |r: &mut Random| (r.bits() as u16 & 0x7f00) | flags & r.bits() as u16;
    data[0..2].copy_from_slice(&fcw.to_le_bytes());
    let fsw = status(r);
    data[2..4].copy_from_slice(&fsw.to_le_bytes());
    data[4] = match r.below(4) {
        0 => 0xff,
        1 => 0x7f,
        _ => r.bits() as u8,
    };
    data[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    for i in 0..8 {
        data[32 + 16 * i..][..16].copy_from_slice(&r.f80().to_bits().to_le_bytes());
    }
    for at in (SCRATCH..SCRATCH + SCRATCH_SIZE).step_by(8) {
        let v = match r.below(4) {
            0 => r.f64(),
            1 => u64::from(r.f32()) | u64::from(r.f32()) << 32,
            2 => r.f80().mant,
            _ => r.bits() >> r.below(64),
        };
        data[at..at + 8].copy_from_slice(&v.to_le_bytes());
    }
    let environment = [(fcw & 0xc00) | 0x37f, status(r), r.bits() as u16];
    for (i, v) in environment.into_iter().enumerate() {
        data[ENVIRONMENT + 4 * i..][..2].copy_from_slice(&v.to_le_bytes());
    }
    for i in 0..8 {
        let v = r.f80().to_bits().to_le_bytes();
        data[ENVIRONMENT + 28 + 10 * i..][..10].copy_from_slice(&v[..10]);
    }
    data
}

/// Takes out what may differ: FOP and the pointers, MXCSR_MASK, the vector registers.
fn comparable(data: &mut [u8; DATA_SIZE]) {
    data[FINAL + 6..FINAL + 24].fill(0);
    data[FINAL + 28..FINAL + 32].fill(0);
    for i in 0..8 {
        data[FINAL + 32 + 16 * i + 10..][..6].fill(0);
    }
    data[FINAL + 160..FINAL + 512].fill(0);
}

fn sequences() -> u64 {
    std::env::var("SOFTCPU_X87_SEQUENCES").ok().and_then(|v| v.parse().ok()).unwrap_or(3000)
}

/// Runs sequences of `length` instructions under the control words of `fcw` and compares.
fn compare(seed: u64, length: u64, fcw: fn(&mut Random) -> u16, flags: u16) {
    let mut r = Random::new(seed);
    let (mut guest, native) = (Guest::new(), Native::new());
    let mut failures = 0;
    for n in 0..sequences() {
        let mut code = Code::default();
        code.prologue(r.bits() as u32 & 0x8d5);
        let start = code.0.len();
        for _ in 0..1 + r.below(length) {
            instruction(&mut r, &mut code);
        }
        let end = code.0.len();
        code.epilogue();
        let control = fcw(&mut r);
        let data = data_page(&mut r, control, flags);
        let (mut soft, mut hard) = (data, data);
        code.bytes(&[0xc3]);
        let mut whole = code.0.clone();
        native.run(&whole, &mut hard);
        *whole.last_mut().unwrap() = 0xf4;
        let stop = guest.run(&whole, &mut soft);
        comparable(&mut soft);
        comparable(&mut hard);
        if stop != whole.len() - 1 || soft != hard {
            failures += 1;
            if failures <= 8 {
                eprintln!(
                    "sequence {n}: {:02x?} fcw {control:04x} stopped at {stop:#x}",
                    &code.0[start..end]
                );
                eprintln!("  before {:02x?}", &data[..6]);
                for at in (0..DATA_SIZE).step_by(16).filter(|&at| soft[at..at + 16] != hard[at..at + 16]) {
                    eprintln!(
                        "  data+{at:03x}: was {:02x?} native {:02x?} soft {:02x?}",
                        &data[at.saturating_sub(FINAL)..][..16],
                        &hard[at..at + 16],
                        &soft[at..at + 16]
                    );
                }
            }
        }
    }
    let record = "SOFTCPU_X87_SEQUENCES=3000 cargo test --release --test x87_sequences -- --nocapture";
    judge("x87 sequences", failures, sequences() as usize, &[Processor::Amd19h, Processor::Intel6], record);
}

#[test]
fn masked_sequences_equal_the_processor() {
    compare(1, 12, |r| 0x3f | (r.bits() as u16 & 0xf00), 0x7f);
}

#[test]
fn masked_single_instructions_equal_the_processor() {
    compare(2, 1, |r| 0x33f | (r.bits() as u16 & 0xc00), 0x7f);
}

#[test]
fn unmasked_single_instructions_equal_the_processor() {
    compare(3, 1, |r| 0x300 | (r.bits() as u16 & 0xc3f), 0);
}
