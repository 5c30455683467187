// SPDX-License-Identifier: Apache-2.0
//! Handlers that use the host's own instruction, where portable code is much slower and the host has it. The choice is
//! made when a block is translated; results are the same by definition.

use iced_x86::Instruction;

use super::super::op::Handler;
use super::form::Form;

/// Translates instructions for which the host has a fast way.
#[cfg(not(target_arch = "x86_64"))]
pub fn translate(_: &Instruction, _: Form) -> Option<Handler> {
    None
}

#[cfg(target_arch = "x86_64")]
pub use x86::translate;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::*;

    use iced_x86::Code;

    use super::super::form::M128;
    use super::super::vector::V;
    use super::*;

    #[inline(always)]
    fn m(v: V) -> __m128i {
        // SAFETY: same size, any bits are valid.
        unsafe { core::mem::transmute(v) }
    }

    #[inline(always)]
    fn v(m: __m128i) -> V {
        // SAFETY: same size, any bits are valid.
        unsafe { core::mem::transmute(m) }
    }

    /// Functions of two vectors that run one instruction.
    macro_rules! direct {
        ($($name:ident $feature:literal $intrinsic:ident;)*) => {$(
            #[target_feature(enable = $feature)]
            fn $name(a: V, b: V) -> V {
                v($intrinsic(m(a), m(b)))
            }
        )*};
    }

    direct! {
        aesenc "aes" _mm_aesenc_si128;
        aesenclast "aes" _mm_aesenclast_si128;
        aesdec "aes" _mm_aesdec_si128;
        aesdeclast "aes" _mm_aesdeclast_si128;
        pshufb "ssse3" _mm_shuffle_epi8;
    }

    #[target_feature(enable = "aes")]
    fn aesimc(b: V) -> V {
        v(_mm_aesimc_si128(m(b)))
    }

    #[target_feature(enable = "pclmulqdq")]
    fn pclmulqdq(x: u64, y: u64) -> V {
        v(_mm_clmulepi64_si128::<0>(m([x, 0]), m([y, 0])))
    }

    /// Translates instructions for which the host has a fast way.
    pub fn translate(i: &Instruction, form: Form) -> Option<Handler> {
        use Code::*;
        // SAFETY (all closures below): each is only made a handler after its feature has been detected.
        if is_x86_feature_detected!("aes") {
            match i.code() {
                Aesenc_xmm_xmmm128 => return Some(form.x2::<M128>(|a, b| unsafe { aesenc(a, b) })),
                Aesenclast_xmm_xmmm128 => return Some(form.x2::<M128>(|a, b| unsafe { aesenclast(a, b) })),
                Aesdec_xmm_xmmm128 => return Some(form.x2::<M128>(|a, b| unsafe { aesdec(a, b) })),
                Aesdeclast_xmm_xmmm128 => return Some(form.x2::<M128>(|a, b| unsafe { aesdeclast(a, b) })),
                Aesimc_xmm_xmmm128 => return Some(form.x1::<M128>(|b| unsafe { aesimc(b) })),
                _ => {}
            }
        }
        if is_x86_feature_detected!("pclmulqdq") && i.code() == Pclmulqdq_xmm_xmmm128_imm8 {
            return Some(form.x2i::<M128>(|a, b, imm| {
                let (x, y) = (a[imm as usize & 1], b[imm as usize >> 4 & 1]);
                unsafe { pclmulqdq(x, y) }
            }));
        }
        if is_x86_feature_detected!("ssse3") && i.code() == Pshufb_xmm_xmmm128 {
            return Some(form.x2::<M128>(|a, b| unsafe { pshufb(a, b) }));
        }
        None
    }
}
