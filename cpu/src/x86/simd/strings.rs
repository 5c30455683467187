// SPDX-License-Identifier: Apache-2.0
//! PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (APM vol. 4, 1.3 "String compare instructions").

use iced_x86::{Code, Instruction};

use super::super::flags::rf;
use super::super::op::{Handler, Op, Res, handler};
use super::super::state::{Cpu, reg};
use super::form::{Form, U128, memory};
use super::vector::{V, split};

/// One operand: its elements, sign- or zero-extended, and how many are valid.
struct Text {
    at: [i32; 16],
    len: usize,
}

/// Elements per operand under `imm`.
fn elements(imm: u8) -> usize {
    if imm & 1 != 0 { 8 } else { 16 }
}

impl Text {
    fn of(v: V, imm: u8, len: Option<usize>) -> Text {
        let mut at = [0; 16];
        match imm & 3 {
            0 => at = split::<u8, 16>(v).map(i32::from),
            2 => at = split::<i8, 16>(v).map(i32::from),
            1 => at[..8].copy_from_slice(&split::<u16, 8>(v).map(i32::from)),
            _ => at[..8].copy_from_slice(&split::<i16, 8>(v).map(i32::from)),
        }
        let n = elements(imm);
        let len = len.unwrap_or_else(|| at[..n].iter().position(|&x| x == 0).unwrap_or(n));
        Text { at, len: len.min(n) }
    }

    fn get(&self, i: usize) -> Option<i32> {
        self.at[..self.len].get(i).copied()
    }
}

/// What a comparison gives: one bit per element of the second operand, and the six flags as an RFLAGS image.
pub struct Found {
    /// IntRes2.
    pub bits: u32,
    /// CF, ZF, SF and OF.
    pub flags: u64,
}

/// Compares `a` (first operand) with `b` (second). Lengths are explicit or, None, up to the first zero element.
pub fn compare(a: V, b: V, imm: u8, len_a: Option<usize>, len_b: Option<usize>) -> Found {
    let n = elements(imm);
    let (a, b) = (Text::of(a, imm, len_a), Text::of(b, imm, len_b));
    let matches = |j: usize| match imm >> 2 & 3 {
        // Equal any, ranges: a set of elements, of pairs.
        0 => b.get(j).is_some_and(|x| a.at[..a.len].contains(&x)),
        1 => b.get(j).is_some_and(|x| a.at[..a.len & !1].chunks(2).any(|r| r[0] <= x && x <= r[1])),
        // Equal each: ends of both match too.
        2 => a.get(j) == b.get(j),
        // Equal ordered: `a` is found at `j`, as far as it is seen.
        _ => (0..a.len.min(n - j)).all(|i| a.get(i) == b.get(j + i)),
    };
    let bits = (0..n).fold(0, |r, j| r | (matches(j) as u32) << j);
    let negated = match imm >> 4 & 3 {
        1 => (1u32 << n) - 1,
        3 => (1u32 << b.len) - 1,
        _ => 0,
    };
    let bits = bits ^ negated;
    let mut flags = 0;
    let mut set = |bit, on| flags |= if on { bit } else { 0 };
    set(rf::CF, bits != 0);
    set(rf::ZF, b.len < n);
    set(rf::SF, a.len < n);
    set(rf::OF, bits & 1 != 0);
    Found { bits, flags }
}

/// The index output: of the lowest or (`imm` bit 6) highest bit set, or the number of elements.
pub fn index(bits: u32, imm: u8) -> u32 {
    if bits == 0 {
        elements(imm) as u32
    } else if imm & 0x40 != 0 {
        bits.ilog2()
    } else {
        bits.trailing_zeros()
    }
}

/// The mask output: the bits themselves, or (`imm` bit 6) each widened to its element.
pub fn mask(bits: u32, imm: u8) -> V {
    if imm & 0x40 == 0 {
        return [bits as u64, 0];
    }
    let size = 16 / elements(imm);
    super::vector::build::<u8, 16>(|i| if bits >> (i / size) & 1 != 0 { 0xff } else { 0 })
}

/// Explicit length in a register: its absolute value, at most 16.
fn length(v: i64) -> Option<usize> {
    Some(v.unsigned_abs().min(16) as usize)
}

/// One instruction; `LEN`: bytes of the length registers, 0 = implicit lengths. `INDEX`: result in ECX, else in XMM0.
fn run<const LEN: u32, const INDEX: bool, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.sse_ready()?;
    let b = if MEM { memory::<U128>(cpu, op)? } else { cpu.xmm(op.src) };
    let a = cpu.xmm(op.dst);
    let (rax, rdx) = (cpu.rb.gpr[reg::RAX], cpu.rb.gpr[reg::RDX]);
    let (len_a, len_b) = match LEN {
        0 => (None, None),
        4 => (length(rax as i32 as i64), length(rdx as i32 as i64)),
        _ => (length(rax as i64), length(rdx as i64)),
    };
    let imm = op.imm as u8;
    let found = compare(a, b, imm, len_a, len_b);
    if INDEX {
        cpu.rb.gpr[reg::RCX] = index(found.bits, imm) as u64;
    } else {
        cpu.set_xmm(0, mask(found.bits, imm));
    }
    cpu.lf.set_all(found.flags);
    Ok(())
}

/// Translates the four instructions.
pub fn translate(i: &Instruction, form: Form) -> Option<Handler> {
    use Code::*;
    macro_rules! either {
        ($len:literal, $index:literal) => {
            if form.mem { handler(run::<$len, $index, true>) } else { handler(run::<$len, $index, false>) }
        };
    }
    Some(match i.code() {
        Pcmpestri_xmm_xmmm128_imm8 => either!(4, true),
        Pcmpestri64_xmm_xmmm128_imm8 => either!(8, true),
        Pcmpestrm_xmm_xmmm128_imm8 => either!(4, false),
        Pcmpestrm64_xmm_xmmm128_imm8 => either!(8, false),
        Pcmpistri_xmm_xmmm128_imm8 => either!(0, true),
        Pcmpistrm_xmm_xmmm128_imm8 => either!(0, false),
        _ => return None,
    })
}
