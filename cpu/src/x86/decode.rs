// SPDX-License-Identifier: Apache-2.0
//! AMD's decoding: iced-x86's decoder, and what it doesn't know of AMD's processors (APM vol. 3; where that is silent,
//! `tests/differential/encodings.rs` has compared all encodings with a processor).

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};

/// A decoder for 16, 32 or 64-bit code that lies at `ip`. Whatever it decodes goes through [`amend`].
pub fn decoder(bits: u32, bytes: &[u8], ip: u64) -> Decoder<'_> {
    Decoder::with_ip(bits, bytes, ip, DecoderOptions::AMD)
}

/// Has the decoder make its tables, which it does at its first use and has others wait for meanwhile: a child that is
/// forked then would wait for ever.
pub fn prepare() {
    decoder(64, &[], 0);
}

/// Decodes one instruction. What is no instruction of this processor is invalid.
pub fn decode(bits: u32, bytes: &[u8], ip: u64) -> Instruction {
    let mut i = decoder(bits, bytes, ip).decode();
    amend(&mut i, bytes);
    i
}

/// Makes of iced-x86's reading of `bytes` what an AMD processor makes of them.
#[inline]
pub fn amend(i: &mut Instruction, bytes: &[u8]) {
    match i.code() {
        Code::Pause => exchange_with_r8(i, bytes),
        // PREFETCH and PREFETCHW have no register form: 0F 0D with mod = 3 is undefined.
        Code::Reservednop_rm16_r16_0F0D
        | Code::Reservednop_rm32_r32_0F0D
        | Code::Reservednop_rm64_r64_0F0D
            if i.op0_kind() == OpKind::Register =>
        {
            i.set_code(Code::INVALID);
        }
        _ => {}
    }
}

/// 90 with REX.B is XCHG r8, rAX; F3 does not make a PAUSE of it (APM vol. 3, NOP and PAUSE).
fn exchange_with_r8(i: &mut Instruction, bytes: &[u8]) {
    const REX: u8 = 0x40;
    const REX_B: u8 = 1;
    const REX_W: u8 = 8;
    let Some((_, prefixes)) = bytes.get(..i.len()).and_then(|b| b.split_last()) else { return };
    let Some(&rex) = prefixes.last() else { return };
    if rex & 0xf0 != REX || rex & REX_B == 0 || i.code_size() != iced_x86::CodeSize::Code64 {
        return;
    }
    let (code, r8, rax) = if rex & REX_W != 0 {
        (Code::Xchg_r64_RAX, Register::R8, Register::RAX)
    } else if prefixes.contains(&0x66) {
        (Code::Xchg_r16_AX, Register::R8W, Register::AX)
    } else {
        (Code::Xchg_r32_EAX, Register::R8D, Register::EAX)
    };
    i.set_code(code);
    i.set_op0_kind(OpKind::Register);
    i.set_op0_register(r8);
    i.set_op1_kind(OpKind::Register);
    i.set_op1_register(rax);
}
