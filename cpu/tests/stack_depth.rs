// SPDX-License-Identifier: Apache-2.0
//! Instructions run one after the other take no more of the host's stack than one: every handler goes on to the next by
//! a jump. So a thread that runs a processor can do with a small stack.
//!
//! Debug builds make calls of the jumps, which the length of a chain bounds.
#![cfg(not(debug_assertions))]

#[path = "common/flat.rs"]
mod flat;

use flat::{Flat, put_segment};
use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, FlowControl, Instruction, OpCodeOperandKind as Kind, OpKind,
    Register,
};
use softcpu::x86::vmcb::{control, save};

const CODE: usize = 0x8_0000;
const DATA: usize = 0x10_0000;
const STACK: usize = 0x18_0000;
/// Copies of an instruction in a block, and rounds: together less than what runs without the run loop.
const COPIES: usize = 50;
const ROUNDS: u32 = 30;

/// How far below here a call's stack goes, at most [`PAINTED`] bytes.
#[inline(never)]
fn depth(f: &mut dyn FnMut()) -> usize {
    const PAINT: u64 = 0x5afe_57ac_5afe_57ac;
    let here = &raw const f as usize & !7;
    let words = || (here - PAINTED..here - 1024).step_by(8);
    // SAFETY: the thread's stack goes further down, and nothing has anything there: the loop's own is nearer.
    words().for_each(|at| unsafe { (at as *mut u64).write_volatile(PAINT) });
    f();
    // SAFETY: as above.
    let first = words().find(|at| unsafe { (*at as *const u64).read_volatile() } != PAINT);
    first.map_or(0, |at| here - at)
}

const PAINTED: usize = 160 << 10;

/// A register for an operand, which the programs neither count nor find memory with.
fn register(kind: Kind) -> Option<Register> {
    Some(match kind {
        Kind::r8_reg | Kind::r8_or_mem | Kind::r8_opcode => Register::BL,
        Kind::r16_reg | Kind::r16_or_mem | Kind::r16_opcode | Kind::r16_rm => Register::BX,
        Kind::r32_reg | Kind::r32_or_mem | Kind::r32_opcode | Kind::r32_rm | Kind::r32_vvvv => Register::EBX,
        Kind::r64_reg | Kind::r64_or_mem | Kind::r64_opcode | Kind::r64_rm | Kind::r64_vvvv => Register::RBX,
        Kind::xmm_reg | Kind::xmm_or_mem | Kind::xmm_rm => Register::XMM3,
        Kind::mm_reg | Kind::mm_or_mem | Kind::mm_rm => Register::MM3,
        Kind::st0 => Register::ST0,
        Kind::sti_opcode => Register::ST1,
        Kind::al => Register::AL,
        Kind::cl => Register::CL,
        Kind::ax => Register::AX,
        Kind::eax => Register::EAX,
        Kind::rax => Register::RAX,
        _ => return None,
    })
}

/// An encoding of the instruction, with memory at RDI or without; None if there is none that a program can run through.
fn encode(code: Code, memory: bool) -> Option<Vec<u8>> {
    let mut i = Instruction::default();
    i.set_code(code);
    if code.flow_control() != FlowControl::Next || code.is_privileged() {
        return None;
    }
    let mut has_memory = false;
    for (n, &kind) in (0..).zip(code.op_code().op_kinds()) {
        let either = format!("{kind:?}").ends_with("or_mem");
        match kind {
            Kind::imm8 => i.set_op_kind(n, OpKind::Immediate8),
            Kind::imm8sex16 => i.set_op_kind(n, OpKind::Immediate8to16),
            Kind::imm8sex32 => i.set_op_kind(n, OpKind::Immediate8to32),
            Kind::imm8sex64 => i.set_op_kind(n, OpKind::Immediate8to64),
            Kind::imm16 => i.set_op_kind(n, OpKind::Immediate16),
            Kind::imm32 => i.set_op_kind(n, OpKind::Immediate32),
            Kind::imm32sex64 => i.set_op_kind(n, OpKind::Immediate32to64),
            Kind::imm64 => i.set_op_kind(n, OpKind::Immediate64),
            Kind::imm8_const_1 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(1);
            }
            Kind::seg_rSI => i.set_op_kind(n, OpKind::MemorySegRSI),
            Kind::es_rDI => i.set_op_kind(n, OpKind::MemoryESRDI),
            Kind::seg_rDI => i.set_op_kind(n, OpKind::MemorySegRDI),
            _ if kind == Kind::mem || either && memory => {
                has_memory = true;
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base(Register::RDI);
            }
            _ => {
                i.set_op_kind(n, OpKind::Register);
                i.set_op_register(n, register(kind)?);
            }
        }
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&i, 0).ok()?;
    (has_memory == memory).then(|| encoder.take_buffer())
}

/// Runs it so many times, `rounds` times over; MXCSR is `mxcsr`.
fn run(g: &mut Flat, instruction: &[u8], copies: usize, rounds: u32, mxcsr: u32) {
    let mut code = vec![0x41, 0xbf]; // MOV R15D, rounds
    code.extend(rounds.to_le_bytes());
    let top = code.len();
    (0..copies).for_each(|_| code.extend(instruction));
    code.extend([0x41, 0xff, 0xcf, 0x0f, 0x85]); // DEC R15D; JNZ top
    code.extend((top as i32 - (code.len() as i32 + 4)).to_le_bytes());
    code.push(0xf4);
    // SAFETY: inside guest memory.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), (g.ram + CODE) as *mut u8, code.len()) };
    let v = g.vmcb();
    v.set(control::INTERCEPTS + 8, u32::MAX);
    v.set(save::CR0, 0x8000_0033u64);
    v.set(save::CR4, 0x4_06a0u64);
    put_segment(v, 1, 8, 0xa9b, 0, u32::MAX);
    v.set(save::RIP, CODE as u64);
    v.set(save::RSP, STACK as u64);
    v.set(save::RAX, 1u64);
    let rb = &mut g.cpu.rb;
    (rb.gpr[1], rb.gpr[3], rb.gpr[5]) = (1, 1, STACK as u64);
    (rb.gpr[6], rb.gpr[7]) = (DATA as u64 + 0x4_0000, DATA as u64 + 0x4_0000);
    (rb.fcw, rb.fsw, rb.ftw, rb.mxcsr, rb.xcr0) = (0x37f, 0, 0, mxcsr, 3);
    g.cpu.vmrun(g.page).unwrap();
}

#[test]
fn a_long_run_of_any_instruction_takes_no_more_of_the_stack_than_one() {
    let thread = std::thread::Builder::new().stack_size(PAINTED + (128 << 10)).spawn(|| {
        let mut g = Flat::new(4 << 20);
        let (mut seen, mut wrong) = (0, Vec::new());
        for code in Code::values() {
            let new =
                code.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::AVX | CpuidFeature::AVX2));
            if !matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX) || new {
                continue;
            }
            for memory in [false, true] {
                let Some(bytes) = encode(code, memory) else { continue };
                seen += 1;
                // With the default controls of SSE, and those for which no instruction of the host will do.
                for mxcsr in [0x1f80, 0x1fc0] {
                    let one = depth(&mut || run(&mut g, &bytes, 1, 1, mxcsr));
                    let many = depth(&mut || run(&mut g, &bytes, COPIES, ROUNDS, mxcsr));
                    if many > one + 1024 {
                        wrong.push(format!("{code:?}, memory {memory}: {one} -> {many}"));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(seen > 1000, "only {seen} instructions");
    });
    thread.unwrap().join().unwrap();
}
