// SPDX-License-Identifier: Apache-2.0
//! Translation of AES, PCLMULQDQ, SHA and CRC32.

use iced_x86::{Code, Instruction};

use super::super::flags::Int;
use super::super::op::{Handler, Op, handler};
use super::super::state::Cpu;
use super::aes::*;
use super::form::{Form, M128, U128};
use super::sha::*;

/// Remainders of a byte in the top of a reflected CRC-32C (polynomial 0x11EDC6F41).
static CRC32C: [u32; 256] = {
    let mut t = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut r = i as u32;
        let mut k = 0;
        while k < 8 {
            r = (r >> 1) ^ ((r & 1) * 0x82f6_3b78);
            k += 1;
        }
        t[i] = r;
        i += 1;
    }
    t
};

/// CRC32 of `bytes` low bytes of `v` appended to `crc`.
pub fn crc32(crc: u32, v: u64, bytes: usize) -> u32 {
    v.to_le_bytes()[..bytes].iter().fold(crc, |r, &b| r >> 8 ^ CRC32C[(r as u8 ^ b) as usize])
}

/// CRC32 with a source of type T; the destination is always zero-extended from 32 bits.
fn crc<T: Int>(form: Form) -> Handler {
    if form.mem {
        handler(|cpu: &mut Cpu, op: &Op| {
            let v: T = cpu.load(op)?;
            let r = crc32(cpu.reg(op.dst), v.to_u64(), T::BYTES);
            cpu.set_reg::<u32>(op.dst, r);
            Ok(())
        })
    } else {
        handler(|cpu: &mut Cpu, op: &Op| {
            let v: T = cpu.reg(op.src);
            let r = crc32(cpu.reg(op.dst), v.to_u64(), T::BYTES);
            cpu.set_reg::<u32>(op.dst, r);
            Ok(())
        })
    }
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, form: Form) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Aesenc_xmm_xmmm128 => form.x2_apart::<M128>(aesenc),
        Aesenclast_xmm_xmmm128 => form.x2_apart::<M128>(aesenclast),
        Aesdec_xmm_xmmm128 => form.x2_apart::<M128>(aesdec),
        Aesdeclast_xmm_xmmm128 => form.x2_apart::<M128>(aesdeclast),
        Aesimc_xmm_xmmm128 => form.x2_apart::<M128>(|_, b| aesimc(b)),
        Aeskeygenassist_xmm_xmmm128_imm8 => {
            form.sse_apart::<M128>(|cpu, op, b| cpu.set_xmm(op.dst, aeskeygenassist(b, op.imm as u8)))
        }
        Pclmulqdq_xmm_xmmm128_imm8 => form.x2i::<M128>(pclmulqdq),
        Sha1rnds4_xmm_xmmm128_imm8 => form.x2i::<U128>(sha1rnds4),
        Sha1nexte_xmm_xmmm128 => form.x2::<U128>(sha1nexte),
        Sha1msg1_xmm_xmmm128 => form.x2::<U128>(sha1msg1),
        Sha1msg2_xmm_xmmm128 => form.x2::<U128>(sha1msg2),
        Sha256rnds2_xmm_xmmm128 => form.x3::<U128>(sha256rnds2),
        Sha256msg1_xmm_xmmm128 => form.x2::<U128>(sha256msg1),
        Sha256msg2_xmm_xmmm128 => form.x2::<U128>(sha256msg2),
        Crc32_r32_rm8 | Crc32_r64_rm8 => crc::<u8>(form),
        Crc32_r32_rm16 => crc::<u16>(form),
        Crc32_r32_rm32 => crc::<u32>(form),
        Crc32_r64_rm64 => crc::<u64>(form),
        _ => return None,
    })
}
