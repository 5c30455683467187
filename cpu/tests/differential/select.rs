// SPDX-License-Identifier: Apache-2.0
//! Which instructions are compared, and what is known of each: undefined flags, the sizes of its parts.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits,
};

/// Which instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    Integer,
    Simd,
    X87,
    All,
    /// Integer instructions in 32-bit code.
    Integer32,
    /// And in 16-bit code.
    Integer16,
}

impl Family {
    /// Default operand size of the code, as the decoder wants it.
    pub fn bits(self) -> u32 {
        match self {
            Family::Integer32 => 32,
            Family::Integer16 => 16,
            _ => 64,
        }
    }
}

fn feature_family(f: CpuidFeature) -> Option<Family> {
    use CpuidFeature::*;
    Some(match f {
        INTEL8086 | INTEL8086_ONLY | INTEL186 | INTEL286 | INTEL386 | INTEL386_ONLY | INTEL486 | X64
        | CMOV | CX8 | CMPXCHG16B | BMI1 | BMI2 | ADX | MOVBE | POPCNT | LZCNT | MULTIBYTENOP | PAUSE
        | CLFSH | CLFLUSHOPT | CLWB => Family::Integer,
        FPU | FPU287 | FPU387 => Family::X87,
        MMX | SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | AES | PCLMULQDQ => Family::Simd,
        SHA => Family::Simd,
        _ => return None,
    })
}

/// Whether the instruction belongs to what is compared.
pub fn wanted(i: &Instruction, family: Family) -> bool {
    use Mnemonic::*;
    let features = i.cpuid_features();
    let Some(own) = features.iter().map(|f| feature_family(*f)).collect::<Option<Vec<_>>>() else {
        return false;
    };
    if features.contains(&CpuidFeature::SHA) && !sha() {
        return false;
    }
    let kind = if family.bits() == 64 { family } else { Family::Integer };
    if kind != Family::All && !own.contains(&kind) {
        return false;
    }
    let bmi = features.iter().any(|f| matches!(f, CpuidFeature::BMI1 | CpuidFeature::BMI2));
    if !(i.code().encoding() == EncodingKind::Legacy || (i.code().encoding() == EncodingKind::VEX && bmi)) {
        return false;
    }
    if i.is_privileged() || matches!(i.segment_prefix(), Register::FS | Register::GS) {
        return false;
    }
    // Segment registers: only their values can be compared, and those are the host kernel's.
    if (0..i.op_count()).any(|n| {
        let r = i.op_register(n);
        i.op_kind(n) == OpKind::Register && (r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr())
    }) {
        return false;
    }
    match i.flow_control() {
        FlowControl::Next | FlowControl::ConditionalBranch | FlowControl::Return => {}
        FlowControl::UnconditionalBranch if i.is_jmp_short_or_near() => {}
        FlowControl::Call if i.is_call_near() => {}
        FlowControl::IndirectBranch if i.is_jmp_near_indirect() => {}
        // Not through memory: processors push before they notice a non-canonical target.
        FlowControl::IndirectCall if i.is_call_near_indirect() && i.op0_kind() == OpKind::Register => {}
        FlowControl::Exception => return matches!(i.mnemonic(), Ud2),
        _ => return false,
    }
    // Near branches with a 16-bit operand: AMD's and Intel's processors differ, but for 16-bit code.
    if family.bits() != 16
        && (i.op0_kind() == OpKind::NearBranch16
            || matches!(i.code(), Code::Retnw | Code::Retnw_imm16)
            || (i.flow_control() != FlowControl::Next && i.memory_size().size() == 2)
            || (i.flow_control() != FlowControl::Next
                && i.op0_kind() == OpKind::Register
                && i.op0_register().size() == 2))
    {
        return false;
    }
    // Undefined results.
    let short = matches!(i.mnemonic(), Shld | Shrd | Bswap) && i.op0_kind() == OpKind::Register;
    if (short && i.op0_register().size() == 2)
        || (matches!(i.mnemonic(), Shld | Shrd) && i.op1_register().size() == 2)
    {
        return false;
    }
    !matches!(
        i.mnemonic(),
        // Results that belong to the machine or to the kernel.
        Retf | Iret | Iretd | Iretq | Sysret | Syscall | Sysenter | Cpuid | Sgdt | Sidt | Sldt | Str | Smsw
            | Lar | Lsl | Verr | Verw | Popf | Popfd | Popfq | Les | Lds | Lss | Lfs | Lgs | Sysexit | Lmsw
            // Pointers and opcode of the last x87 instruction: AMD's and Intel's processors differ.
            | Fnstenv | Fnsave | Fstenv | Fsave | Fxsave | Fxrstor | Fxsave64 | Fxrstor64
            // Approximations.
            | Fsin | Fcos | Fsincos | Fptan | Fpatan | F2xm1 | Fyl2x | Fyl2xp1 | Rcpps | Rcpss | Rsqrtps
            | Rsqrtss
    )
}

#[cfg(target_arch = "x86_64")]
fn sha() -> bool {
    std::is_x86_feature_detected!("sha")
}
#[cfg(not(target_arch = "x86_64"))]
fn sha() -> bool {
    true
}

/// Undefined bits of RFLAGS after an instruction.
pub fn flags(bits: u32) -> u64 {
    let mut out = 0;
    for (from, to) in [
        (RflagsBits::OF, 11),
        (RflagsBits::SF, 7),
        (RflagsBits::ZF, 6),
        (RflagsBits::AF, 4),
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
    ] {
        if bits & from != 0 {
            out |= 1 << to;
        }
    }
    out
}

/// Instructions that leave flags alone when a count is zero.
pub fn may_keep_flags(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(i.mnemonic(), Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd)
        || i.has_rep_prefix()
        || i.has_repne_prefix()
}

/// A string instruction with 32-bit addresses.
pub fn truncated(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| matches!(i.op_kind(n), OpKind::MemorySegESI | OpKind::MemoryESEDI))
}

pub fn relative(i: &Instruction) -> bool {
    matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

/// Bytes of a relative branch's displacement.
pub fn displacement_size(i: &Instruction) -> usize {
    use iced_x86::OpCodeOperandKind::*;
    match i.op_code().op0_kind() {
        br16_1 | br32_1 | br64_1 => 1,
        br16_2 => 2,
        _ => 4,
    }
}
