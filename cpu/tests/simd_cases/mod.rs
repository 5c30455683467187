// SPDX-License-Identifier: Apache-2.0
//! Instructions and operands for the SIMD tests, and the software CPU to run them on.
#![allow(dead_code)] // each test uses its part

use iced_x86::{Code, Encoder, EncodingKind, Instruction, OpCodeOperandKind as Kind, OpKind, Register};
#[path = "../common/flat.rs"]
mod flat;

use softcpu::mem::Machine;
use softcpu::x86::state::Cpu;
use softcpu::x86::vmcb::{Vmcb, control, save};

/// A small random number generator (xorshift64*), so that runs repeat.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// The features under test, as iced names them.
const FEATURES: &[&str] =
    &["MMX", "SSE", "SSE2", "SSE3", "SSSE3", "SSE4_1", "SSE4_2", "AES", "PCLMULQDQ", "SHA"];

/// Instructions of these features that other families do.
const ELSEWHERE: &[&str] = &["Fisttp", "Ldmxcsr", "Stmxcsr", "Lfence", "Mfence", "Sfence", "Prefetch"];

/// Every legacy-encoded instruction of the features.
pub fn codes() -> Vec<Code> {
    Code::values()
        .filter(|c| c.encoding() == EncodingKind::Legacy)
        .filter(|c| c.cpuid_features().iter().any(|f| FEATURES.contains(&format!("{f:?}").as_str())))
        .filter(|c| !ELSEWHERE.iter().any(|e| format!("{c:?}").starts_with(e)))
        .collect()
}

const GENERAL: [Register; 10] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
];

fn general(r: &mut Random, size: usize) -> Register {
    let full = r.pick(&GENERAL);
    let n = full.number() as u32;
    let base = match size {
        1 => return [Register::AL, Register::CL, Register::DL, Register::BL, Register::SIL][r.below(5)],
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + n
}

/// One encoding of `code` with random registers; None if there is no form with (without) memory, or it can't be
/// encoded. The memory operand is at [RDI].
pub fn encode(r: &mut Random, code: Code, memory: bool, imm: u8) -> Option<(Vec<u8>, Instruction)> {
    let mut i = Instruction::default();
    i.set_code(code);
    let mut has_memory = false;
    for (n, &kind) in code.op_code().op_kinds().iter().enumerate() {
        let n = n as u32;
        let register = match kind {
            Kind::xmm_reg | Kind::xmm_rm => Some(Register::XMM0 + r.below(16) as u32),
            Kind::mm_reg | Kind::mm_rm => Some(Register::MM0 + r.below(8) as u32),
            Kind::r32_reg => Some(general(r, 4)),
            Kind::r64_reg => Some(general(r, 8)),
            Kind::xmm_or_mem if !memory => Some(Register::XMM0 + r.below(16) as u32),
            Kind::mm_or_mem if !memory => Some(Register::MM0 + r.below(8) as u32),
            Kind::r8_or_mem if !memory => Some(general(r, 1)),
            Kind::r16_or_mem if !memory => Some(general(r, 2)),
            Kind::r32_or_mem if !memory => Some(general(r, 4)),
            Kind::r64_or_mem if !memory => Some(general(r, 8)),
            _ => None,
        };
        if let Some(register) = register {
            i.set_op_kind(n, OpKind::Register);
            i.set_op_register(n, register);
        } else if kind == Kind::imm8 {
            i.set_op_kind(n, OpKind::Immediate8);
            i.set_immediate8(imm);
        } else if kind == Kind::seg_rDI {
            has_memory = true;
            i.set_op_kind(n, OpKind::MemorySegRDI);
        } else {
            has_memory = true;
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_base(Register::RDI);
        }
    }
    if has_memory != memory {
        return None;
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&i, 0).ok()?;
    Some((encoder.take_buffer(), i))
}

const F32: [u32; 24] = [
    0,
    1,
    0x7f_ffff,
    0x80_0000,
    0x80_0001,
    0x100_0000,
    0x3f80_0000,
    0x3f80_0001,
    0x4000_0000,
    0x3f00_0000,
    0x4b00_0001,
    0x4b80_0001,
    0x4eff_ffff,
    0x4f00_0000,
    0x5eff_ffff,
    0x5f00_0000,
    0x7f7f_ffff,
    0x7f80_0000,
    0x7f80_0001,
    0x7fa0_0000,
    0x7fc0_0000,
    0x7fff_ffff,
    0x3fc0_0000,
    0x0040_0000,
];
const F64: [u64; 26] = [
    0,
    1,
    0xf_ffff_ffff_ffff,
    1 << 52,
    (1 << 52) + 1,
    1 << 53,
    0x3ff0_0000_0000_0000,
    0x3ff0_0000_0000_0001,
    0x4000_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    0x41df_ffff_ffc0_0000,
    0x41e0_0000_0000_0000,
    0x41df_ffff_ffe0_0000,
    0x43df_ffff_ffff_ffff,
    0x43e0_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0x7ff0_0000_0000_0001,
    0x7ff4_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0x36a0_0000_0000_0001,
    0x380f_ffff_ffff_ffff,
    0x3810_0000_0000_0000,
    0x47ef_ffff_f000_0000,
    0x3ff8_0000_0000_0000,
    0x4340_0000_0000_0001,
];

fn f32_bits(r: &mut Random) -> u32 {
    let sign = (r.next() as u32) & 0x8000_0000;
    sign | match r.below(4) {
        0 => r.pick(&F32),
        // Few significant bits of moderate size: exact results and ties.
        1 => ((r.below(512) as f32 - 200.0) / 8.0).to_bits() & 0x7fff_ffff,
        2 => (r.next() as u32 & 0x7f_ffff) | (0x7f - 20 + r.below(60) as u32) << 23,
        _ => r.next() as u32 & 0x7fff_ffff,
    }
}

fn f64_bits(r: &mut Random) -> u64 {
    let sign = r.next() & 1 << 63;
    sign | match r.below(4) {
        0 => r.pick(&F64),
        1 => ((r.below(512) as f64 - 200.0) / 8.0).to_bits() & !(1 << 63),
        2 => (r.next() & ((1 << 52) - 1)) | (0x3ff - 30 + r.below(100) as u64) << 52,
        _ => r.next() & !(1 << 63),
    }
}

/// 16 bytes of one of several kinds.
pub fn vector(r: &mut Random) -> [u64; 2] {
    match r.below(8) {
        0 => [r.next(), r.next()],
        1 | 2 => core::array::from_fn(|_| f32_bits(r) as u64 | (f32_bits(r) as u64) << 32),
        3 | 4 => [f64_bits(r), f64_bits(r)],
        // Bytes at the ends of their ranges.
        5 => core::array::from_fn(|_| {
            u64::from_le_bytes(core::array::from_fn(|_| r.pick(&[0, 1, 0x7f, 0x80, 0x81, 0xff, 0xfe, 0x40])))
        }),
        // Short texts of few letters.
        6 => core::array::from_fn(|_| {
            u64::from_le_bytes(core::array::from_fn(|_| r.pick(&[b'a', b'b', b'c', b'a', 0, 1])))
        }),
        // Small numbers: shift counts.
        _ => [r.below(80) as u64, if r.below(2) == 0 { 0 } else { r.next() }],
    }
}

/// Registers before and after one instruction.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(C, align(64))]
pub struct State {
    /// FXSAVE image of the vector state only: what is compared.
    pub xmm: [[u64; 2]; 16],
    /// MMX registers, R0 to R7.
    pub mm: [u64; 8],
    /// RAX, RCX, RDX, RBX, RSP (unused), RBP (unused), RSI, RDI, R8 to R12.
    pub gpr: [u64; 13],
    pub rflags: u64,
    pub mxcsr: u32,
    pub fsw: u16,
    /// One bit per register: not empty.
    pub tags: u8,
    pub memory: [u64; 8],
    /// Vector of the exception, or none.
    pub fault: Option<u8>,
}

/// A state of random values; RDI points into `memory`, which is at address `at`.
pub fn state(r: &mut Random, at: u64, misaligned: bool) -> State {
    let mut s = State {
        xmm: core::array::from_fn(|_| vector(r)),
        mm: core::array::from_fn(|_| vector(r)[0]),
        gpr: core::array::from_fn(|_| match r.below(3) {
            0 => r.next(),
            1 => r.below(40) as u64,
            _ => (r.below(40) as i64 - 20) as u64,
        }),
        rflags: 0x202 | r.next() & 0x8d5,
        mxcsr: 0x1f80,
        fsw: (r.below(8) << 11) as u16,
        tags: r.next() as u8,
        memory: core::array::from_fn(|_| r.next()),
        fault: None,
    };
    let v = vector(r);
    s.memory[2..4].copy_from_slice(&v);
    s.gpr[7] = at + 16 + if misaligned { 1 + r.below(15) as u64 } else { 0 };
    if r.below(4) != 0 {
        s.mxcsr = 0x1f80 | (r.below(4) as u32) << 13 | (r.next() as u32 & 0x8040);
    }
    if r.below(2) == 0 {
        s.mxcsr |= r.next() as u32 & 0x3f;
    }
    s
}

/// 2 MiB for the software CPU, and a page behind it for native code.
pub const AT: usize = 0x2000_0000;

/// Maps the memory at [`AT`].
pub fn map_memory() {
    // SAFETY: a fixed address that nothing uses (the call fails otherwise).
    let p = unsafe {
        libc::mmap(
            AT as *mut _,
            (2 << 20) + 4096,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    assert_eq!(p as usize, AT);
}

impl State {
    /// A 64-bit digest of everything (FNV-1a over its text).
    pub fn digest(&self) -> u64 {
        format!("{self:?}")
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3))
    }
}

/// The cases of the golden file: for every instruction and form a name, the code and states to start from. The same on
/// every host. What has several right answers, or what the host that made the file didn't have, is left out.
pub fn golden_cases() -> Vec<(String, Vec<u8>, Vec<State>)> {
    let mut all = Vec::new();
    for code in codes() {
        let name = format!("{code:?}");
        if ["Rcp", "Rsqrt", "Sha"].iter().any(|p| name.starts_with(p)) {
            continue;
        }
        let mut r = Random(name.bytes().fold(7, |h, b| h * 31 % 0xffff_ffff_ffff + b as u64));
        for memory in [false, true] {
            let imm = r.next() as u8;
            if let Some((bytes, _)) = encode(&mut r, code, memory, imm) {
                let states = (0..12).map(|_| state(&mut r, AT as u64, false)).collect();
                all.push((format!("{name}{}", if memory { "/memory" } else { "" }), bytes, states));
            }
        }
    }
    all
}

/// The arithmetic flags: what is compared of RFLAGS.
pub const FLAGS: u64 = 0x8d5;

/// The software CPU running single instructions in 64-bit mode at CPL 0, addresses one to one.
pub struct Soft {
    cpu: Box<Cpu>,
    machine: std::sync::Arc<Machine>,
    vmcb: usize,
    code: usize,
    data: usize,
}

/// HLT, behind the instruction.
const HLT: u8 = 0xf4;

impl Soft {
    /// Uses 2 MiB of memory at `at`, a multiple of that below 1 GiB: data at its start, code at 4 KiB, the rest its own.
    ///
    /// # Safety
    /// The memory must be mapped and stay so.
    pub unsafe fn new(at: usize) -> Soft {
        let machine = Machine::new();
        // SAFETY: promised by the caller.
        unsafe { machine.add_region(at, 2 << 20).unwrap() };
        let page = |n: usize| at + 0x1_0000 + n * 4096;
        let put = |address: usize, v: usize| {
            // SAFETY: within the 2 MiB.
            unsafe { (address as *mut u64).write(v as u64) }
        };
        // Guest tables in pages 1 to 3, nested ones in 4 to 6, all one to one.
        for first in [1, 4] {
            put(page(first), page(first + 1) | 7);
            put(page(first + 1), page(first + 2) | 7);
            put(page(first + 2) + 8 * (at >> 21), at | 0xe7);
        }
        // SAFETY: a page of the region.
        let v = unsafe { Vmcb::new(page(0)) };
        v.set(control::INTERCEPTS + 8, u32::MAX);
        flat::long_mode(v, page(4), page(1) as u64);
        let cpu = Cpu::new(machine.clone(), 0);
        Soft { cpu, machine, vmcb: page(0), code: at + 4096, data: at }
    }

    /// Sets CR0 and CR4.
    pub fn control(&self, cr0: u64, cr4: u64) {
        // SAFETY: a page of the region.
        let v = unsafe { Vmcb::new(self.vmcb) };
        v.set(save::CR0, cr0);
        v.set(save::CR4, cr4);
    }

    /// Puts the instruction in place.
    pub fn code(&self, bytes: &[u8]) {
        // SAFETY: within the region; instructions are at most 15 bytes.
        unsafe {
            core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code as *mut u8, bytes.len());
            (self.code as *mut u8).add(bytes.len()).write(HLT);
        }
        self.machine.notify_write(self.code, 16);
    }

    /// Runs the instruction from `s`.
    pub fn run(&mut self, s: &State) -> State {
        let c = &mut self.cpu;
        // SAFETY: a page of the region.
        let v = unsafe { Vmcb::new(self.vmcb) };
        for n in 0..16 {
            c.rb.ymm[n] = [s.xmm[n][0], s.xmm[n][1], 0x1111 * n as u64, !0];
        }
        for n in 0..8 {
            c.rb.st[n] = [s.mm[n], 0xffff];
        }
        c.rb.gpr[..13].copy_from_slice(&s.gpr);
        v.set(save::RAX, s.gpr[0]);
        v.set(save::RSP, 0u64);
        v.set(save::RFLAGS, s.rflags & !0x200);
        v.set(save::RIP, self.code as u64);
        c.rb.mxcsr = s.mxcsr;
        c.rb.fsw = s.fsw;
        c.rb.ftw = (0..8).fold(0, |w, n| w | if s.tags >> n & 1 != 0 { 0 } else { 3 << (2 * n) });
        // SAFETY: within the region.
        unsafe { (self.data as *mut [u64; 8]).write(s.memory) };
        let exit = c.vmrun(self.vmcb).expect("a registered VMCB");
        let fault = match exit {
            0x78 => None,
            0x40..=0x5f => Some(exit as u8 - 0x40),
            _ => panic!(
                "exit {exit:#x} {:#x} {:#x} rip {:#x} {:?}",
                v.get::<u64>(control::EXITINFO1),
                v.get::<u64>(control::EXITINFO2),
                v.get::<u64>(save::RIP),
                c.exception
            ),
        };
        let mut gpr: [u64; 13] = c.rb.gpr[..13].try_into().unwrap();
        gpr[0] = v.get(save::RAX);
        gpr[4] = s.gpr[4];
        for n in 0..16 {
            assert_eq!(c.rb.ymm[n][2..], [0x1111 * n as u64, !0], "upper half of YMM{n}");
        }
        State {
            xmm: core::array::from_fn(|n| [c.rb.ymm[n][0], c.rb.ymm[n][1]]),
            mm: core::array::from_fn(|n| c.rb.st[n][0]),
            gpr,
            rflags: v.get::<u64>(save::RFLAGS) & FLAGS,
            mxcsr: c.rb.mxcsr,
            fsw: c.rb.fsw,
            tags: (0..8).fold(0, |t, n| t | ((c.rb.ftw >> (2 * n) & 3 != 3) as u8) << n),
            // SAFETY: within the region.
            memory: unsafe { (self.data as *const [u64; 8]).read() },
            fault,
        }
    }
}
