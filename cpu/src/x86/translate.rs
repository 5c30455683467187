// SPDX-License-Identifier: Apache-2.0
//! From decoded instructions (iced-x86) to ops: what the families of instructions have in common.

use iced_x86::{Instruction, OpKind, Register};

use super::op::{Op, Operands, Res, SLOT_IP, SLOT_ZERO, flag, handler_registers};
use super::state::{Cpu, sreg};

/// What a family's translator gets beside the instruction.
pub struct Context {
    /// 2, 4 or 8: 16-bit, 32-bit or 64-bit code.
    pub code_size: u8,
    /// Offset of the instruction from the start of its block.
    pub offset: u16,
}

/// Register-file byte offset of a general register (any size), or of AH..BH.
pub fn gpr(r: Register) -> u8 {
    if r >= Register::AL && r <= Register::R15L {
        let n = r as u8 - Register::AL as u8;
        // AL CL DL BL AH CH DH BH SPL BPL SIL DIL R8L...
        match n {
            0..=3 => n * 8,
            4..=7 => (n - 4) * 8 + 1,
            _ => (n - 4) * 8,
        }
    } else if r.is_gpr() {
        r.full_register().number() as u8 * 8
    } else {
        SLOT_ZERO
    }
}

/// Number of a segment register, DS when there is none.
pub fn segment(r: Register) -> u8 {
    match r {
        Register::ES => sreg::ES as u8,
        Register::CS => sreg::CS as u8,
        Register::SS => sreg::SS as u8,
        Register::FS => sreg::FS as u8,
        Register::GS => sreg::GS as u8,
        _ => sreg::DS as u8,
    }
}

/// An op that raises #UD, with what every op has: length, flags, memory operand.
pub(super) fn common(i: &Instruction, cx: &Context) -> Op {
    let operands = Operands {
        next: cx.offset + i.len() as u16,
        len: i.len() as u8,
        seg: sreg::DS as u8,
        asize: cx.code_size,
        ..Operands::NONE
    };
    let mut op = Op::new(handler_registers(undefined), operands);
    if cx.code_size == 8 {
        op.flags |= flag::CODE64;
    }
    if i.has_lock_prefix() {
        op.flags |= flag::LOCK;
    }
    if i.has_rep_prefix() {
        op.flags |= flag::REP;
    }
    if i.has_repne_prefix() {
        op.flags |= flag::REPNE;
    }
    let has_memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if has_memory {
        memory(i, &mut op, cx);
    } else if cx.code_size != 8 {
        op.flags |= flag::LEGACY_EA;
    }
    op
}

/// Fills in base, index, scale, displacement, segment and address size of the explicit memory operand.
fn memory(i: &Instruction, op: &mut Op, cx: &Context) {
    let base = i.memory_base();
    let index = i.memory_index();
    op.seg = segment(i.memory_segment());
    if cx.code_size == 8 && op.seg < sreg::FS as u8 {
        // Overrides with the four flat ones are ignored (APM vol. 1, 2.2.2): the default decides between #GP and #SS.
        let stack = matches!(base.full_register(), Register::RSP | Register::RBP);
        op.seg = if stack { sreg::SS } else { sreg::DS } as u8;
    }
    op.scale = i.memory_index_scale().trailing_zeros() as u8;
    op.disp = i.memory_displacement64() as i32;
    if base == Register::RIP || base == Register::EIP {
        // iced gives the absolute target, computed from the IP it was told: the offset in the block.
        op.base = SLOT_IP;
        op.asize = if base == Register::RIP { 8 } else { 4 };
    } else {
        op.base = gpr(base);
        op.index = gpr(index);
        op.asize = if base != Register::None {
            base.size() as u8
        } else if index != Register::None {
            index.size() as u8
        } else {
            match i.memory_displ_size() {
                n @ (2 | 4 | 8) => n as u8,
                _ => cx.code_size,
            }
        };
    }
    if cx.code_size != 8 || op.asize != 8 {
        op.flags |= flag::LEGACY_EA;
    }
}

/// #UD.
pub fn undefined(cpu: &mut Cpu, _: &Op) -> Res {
    Err(cpu.ud())
}
