// SPDX-License-Identifier: Apache-2.0
//! The host's own instructions, where the host is x86: results are the same by definition, and one instruction beats
//! what the compiler makes of portable code. Integer instructions are chosen when a block is translated; floating-point
//! ones are the fast halves of handlers whose slow halves are portable.

use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::Instruction;

use super::super::op::Handler;
use super::form::Form;

static PORTABLE: AtomicBool = AtomicBool::new(false);

/// Makes integer instructions translated from now on portable ones; for tests and comparisons.
pub fn set_portable(portable: bool) {
    PORTABLE.store(portable, Ordering::Relaxed);
}

/// Translates instructions that the host has too.
pub fn translate(i: &Instruction, form: Form) -> Option<Handler> {
    if PORTABLE.load(Ordering::Relaxed) { None } else { host::translate(i, form) }
}

pub use host::clear_flags;

#[cfg(not(target_arch = "x86_64"))]
mod host {
    use super::*;

    /// Nothing: the host is another machine.
    pub fn translate(_: &Instruction, _: Form) -> Option<Handler> {
        None
    }

    /// Nothing to clear.
    pub fn clear_flags() {}
}

#[cfg(not(target_arch = "x86_64"))]
macro_rules! hardware {
    ($($t:tt)*) => {
        |_, _, _| None
    };
}
#[cfg(not(target_arch = "x86_64"))]
macro_rules! hardware_to_general {
    ($($t:tt)*) => {
        |_, _| None
    };
}
#[cfg(not(target_arch = "x86_64"))]
macro_rules! hardware_from_general {
    ($insn:literal, $t:ty) => {
        |_, _: $t, _| None
    };
}
#[cfg(not(target_arch = "x86_64"))]
macro_rules! hardware_compare {
    ($($t:tt)*) => {
        |_, _, _| None
    };
}

// The floating-point instruction runs under the host's MXCSR. Its sticky flags may hold older ones too, whoever raised
// them; as long as all of them are set in the guest's MXCSR already, the instruction changed nothing there. Otherwise
// the portable code finds out, and clears the host's flags. The asm may change MXCSR's flags: it doesn't say
// `preserves_flags`. It has MXCSR on the stack, below what the compiler has there (it doesn't say `nostack`): a variable
// of which the address is known would keep the handler from jumping to the next one.

/// A floating-point instruction of the host, as `|a, b, mxcsr| -> Option<result>`; None if its flags would change MXCSR
/// or MXCSR's controls are not the default ones. With `imm`: an immediate operand.
#[cfg(target_arch = "x86_64")]
macro_rules! hardware {
    ($insn:literal $(, imm $imm:literal)?) => {
        |a: $crate::x86::simd::vector::V, b: $crate::x86::simd::vector::V, mxcsr: u32| {
            let mut r = $crate::x86::simd::native::host::m(a);
            let b = $crate::x86::simd::native::host::m(b);
            let csr: u32;
            // SAFETY: a baseline instruction (or one found) on registers; what is below the stack is free.
            unsafe {
                core::arch::asm!(
                    concat!($insn, " {r}, {b}" $(, ", ", $imm)?), "stmxcsr [rsp - 8]", "mov {c:e}, [rsp - 8]",
                    r = inout(xmm_reg) r, b = in(xmm_reg) b, c = out(reg) csr);
            }
            $crate::x86::simd::native::host::unchanged(csr, mxcsr)
                .then(|| $crate::x86::simd::native::host::v(r))
        }
    };
}

/// The same from a vector to a general register of type `$t`, as `|b, mxcsr| -> Option<$t>`.
#[cfg(target_arch = "x86_64")]
macro_rules! hardware_to_general {
    ($insn:literal, $t:ty) => {
        |b: $crate::x86::simd::vector::V, mxcsr: u32| {
            let b = $crate::x86::simd::native::host::m(b);
            let csr: u32;
            let r: $t;
            // SAFETY: as in `hardware`.
            unsafe {
                if size_of::<$t>() == 8 {
                    let r64: u64;
                    core::arch::asm!(concat!($insn, " {r:r}, {b}"), "stmxcsr [rsp - 8]", "mov {c:e}, [rsp - 8]",
                        r = out(reg) r64, b = in(xmm_reg) b, c = out(reg) csr);
                    r = r64 as $t;
                } else {
                    let r32: u32;
                    core::arch::asm!(concat!($insn, " {r:e}, {b}"), "stmxcsr [rsp - 8]", "mov {c:e}, [rsp - 8]",
                        r = out(reg) r32, b = in(xmm_reg) b, c = out(reg) csr);
                    r = r32 as $t;
                }
            }
            $crate::x86::simd::native::host::unchanged(csr, mxcsr).then_some(r)
        }
    };
}

/// The same from a general register of type `$t`, as `|a, v: $t, mxcsr| -> Option<V>`.
#[cfg(target_arch = "x86_64")]
macro_rules! hardware_from_general {
    ($insn:literal, $t:ty) => {
        |a: $crate::x86::simd::vector::V, v: $t, mxcsr: u32| {
            let mut r = $crate::x86::simd::native::host::m(a);
            let csr: u32;
            // SAFETY: as in `hardware`.
            unsafe {
                if size_of::<$t>() == 8 {
                    core::arch::asm!(concat!($insn, " {r}, {v:r}"), "stmxcsr [rsp - 8]", "mov {c:e}, [rsp - 8]",
                        r = inout(xmm_reg) r, v = in(reg) v as u64, c = out(reg) csr);
                } else {
                    core::arch::asm!(concat!($insn, " {r}, {v:e}"), "stmxcsr [rsp - 8]", "mov {c:e}, [rsp - 8]",
                        r = inout(xmm_reg) r, v = in(reg) v as u32, c = out(reg) csr);
                }
            }
            $crate::x86::simd::native::host::unchanged(csr, mxcsr)
                .then(|| $crate::x86::simd::native::host::v(r))
        }
    };
}

/// COMIS* and UCOMIS*, as `|a, b, mxcsr| -> Option<(ZF, PF, CF)>`.
#[cfg(target_arch = "x86_64")]
macro_rules! hardware_compare {
    ($insn:literal) => {
        |a: $crate::x86::simd::vector::V, b: $crate::x86::simd::vector::V, mxcsr: u32| {
            let (a, b) = ($crate::x86::simd::native::host::m(a), $crate::x86::simd::native::host::m(b));
            let (csr, z, p, c): (u32, u8, u8, u8);
            // SAFETY: as in `hardware`.
            unsafe {
                core::arch::asm!(
                    concat!($insn, " {a}, {b}"), "stmxcsr [rsp - 8]", "mov {m:e}, [rsp - 8]", "sete {z}", "setp {p}", "setb {c}",
                    a = in(xmm_reg) a, b = in(xmm_reg) b, m = out(reg) csr,
                    z = out(reg_byte) z, p = out(reg_byte) p, c = out(reg_byte) c);
            }
            $crate::x86::simd::native::host::unchanged(csr, mxcsr).then_some((z != 0, p != 0, c != 0))
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) mod host {
    use core::arch::asm;
    use core::arch::x86_64::__m128i;

    use iced_x86::Code;

    use super::super::form::{M128, U128};
    use super::super::shuffle::PSHUFD;
    use super::super::vector::V;
    use super::*;

    #[inline(always)]
    pub fn m(v: V) -> __m128i {
        // SAFETY: same size, any bits are valid.
        unsafe { core::mem::transmute(v) }
    }

    #[inline(always)]
    pub fn v(m: __m128i) -> V {
        // SAFETY: same size, any bits are valid.
        unsafe { core::mem::transmute(m) }
    }

    /// Default controls, no flags.
    const DEFAULT: u32 = 0x1f80;
    const FLAGS: u32 = 0x3f;

    /// Whether the host's MXCSR after an instruction says that the guest's stays as it is, both with default controls.
    #[inline(always)]
    pub fn unchanged(host: u32, guest: u32) -> bool {
        ((host & !(guest & FLAGS)) ^ DEFAULT) | ((guest & 0xffff & !FLAGS) ^ DEFAULT) == 0
    }

    /// Clears the sticky flags of the host's MXCSR.
    #[inline(always)]
    pub fn clear_flags() {
        let mut csr = 0u32;
        // SAFETY: only exception flags change, which asm without `preserves_flags` may do.
        unsafe {
            asm!("stmxcsr [{c}]", "and dword ptr [{c}], -64", "ldmxcsr [{c}]", c = in(reg) &raw mut csr,
                options(nostack));
        }
    }

    /// `a op b`.
    macro_rules! two {
        ($insn:literal, $a:expr, $b:expr) => {{
            let mut r = m($a);
            // SAFETY: an instruction on registers that the host has (baseline, or found before use).
            unsafe {
                asm!(concat!($insn, " {r}, {b}"), r = inout(xmm_reg) r, b = in(xmm_reg) m($b),
                    options(pure, nomem, nostack, preserves_flags));
            }
            v(r)
        }};
    }

    /// `op b`.
    macro_rules! one {
        ($insn:literal, $b:expr) => {{
            let r;
            // SAFETY: as in `two`.
            unsafe {
                asm!(concat!($insn, " {r}, {b}"), r = out(xmm_reg) r, b = in(xmm_reg) m($b),
                    options(pure, nomem, nostack, preserves_flags));
            }
            v(r)
        }};
    }

    /// Rows `Code "instruction";` of two-operand instructions.
    macro_rules! pairs {
        ($i:expr, $form:expr; $($rows:tt)*) => {
            pairs!($i, $form, M128; $($rows)*)
        };
        ($i:expr, $form:expr, $size:ident; $($code:ident $insn:literal;)*) => {
            match $i.code() {
                $(Code::$code => return Some($form.x2::<$size>(|a, b| two!($insn, a, b))),)*
                _ => {}
            }
        };
    }

    /// Rows `Code source-size "instruction";` of one-operand instructions.
    macro_rules! singles {
        ($i:expr, $form:expr; $($code:ident $size:tt $insn:literal;)*) => {
            match $i.code() {
                $(Code::$code => return Some($form.x1::<$size>(|b| one!($insn, b))),)*
                _ => {}
            }
        };
    }

    /// Rows `Code "instruction";` of shifts by an immediate, done as shifts by a register.
    macro_rules! shifts {
        ($i:expr, $form:expr; $($code:ident $insn:literal;)*) => {
            match $i.code() {
                $(Code::$code => return Some($form.xi(|a, n| two!($insn, a, n))),)*
                _ => {}
            }
        };
    }

    /// Translates instructions that the host has too.
    pub fn translate(i: &Instruction, form: Form) -> Option<Handler> {
        pairs! { i, form;
            Packssdw_xmm_xmmm128 "packssdw";
            Packsswb_xmm_xmmm128 "packsswb";
            Packuswb_xmm_xmmm128 "packuswb";
            Paddb_xmm_xmmm128 "paddb";
            Paddd_xmm_xmmm128 "paddd";
            Paddq_xmm_xmmm128 "paddq";
            Paddsb_xmm_xmmm128 "paddsb";
            Paddsw_xmm_xmmm128 "paddsw";
            Paddusb_xmm_xmmm128 "paddusb";
            Paddusw_xmm_xmmm128 "paddusw";
            Paddw_xmm_xmmm128 "paddw";
            Pavgb_xmm_xmmm128 "pavgb";
            Pavgw_xmm_xmmm128 "pavgw";
            Pcmpeqb_xmm_xmmm128 "pcmpeqb";
            Pcmpeqd_xmm_xmmm128 "pcmpeqd";
            Pcmpeqw_xmm_xmmm128 "pcmpeqw";
            Pcmpgtb_xmm_xmmm128 "pcmpgtb";
            Pcmpgtd_xmm_xmmm128 "pcmpgtd";
            Pcmpgtw_xmm_xmmm128 "pcmpgtw";
            Pmaddwd_xmm_xmmm128 "pmaddwd";
            Pmaxsw_xmm_xmmm128 "pmaxsw";
            Pmaxub_xmm_xmmm128 "pmaxub";
            Pminsw_xmm_xmmm128 "pminsw";
            Pminub_xmm_xmmm128 "pminub";
            Pmulhuw_xmm_xmmm128 "pmulhuw";
            Pmulhw_xmm_xmmm128 "pmulhw";
            Pmullw_xmm_xmmm128 "pmullw";
            Pmuludq_xmm_xmmm128 "pmuludq";
            Psadbw_xmm_xmmm128 "psadbw";
            Pslld_xmm_xmmm128 "pslld";
            Psllq_xmm_xmmm128 "psllq";
            Psllw_xmm_xmmm128 "psllw";
            Psrad_xmm_xmmm128 "psrad";
            Psraw_xmm_xmmm128 "psraw";
            Psrld_xmm_xmmm128 "psrld";
            Psrlq_xmm_xmmm128 "psrlq";
            Psrlw_xmm_xmmm128 "psrlw";
            Psubb_xmm_xmmm128 "psubb";
            Psubd_xmm_xmmm128 "psubd";
            Psubq_xmm_xmmm128 "psubq";
            Psubsb_xmm_xmmm128 "psubsb";
            Psubsw_xmm_xmmm128 "psubsw";
            Psubusb_xmm_xmmm128 "psubusb";
            Psubusw_xmm_xmmm128 "psubusw";
            Psubw_xmm_xmmm128 "psubw";
            Punpckhbw_xmm_xmmm128 "punpckhbw";
            Punpckhdq_xmm_xmmm128 "punpckhdq";
            Punpckhqdq_xmm_xmmm128 "punpckhqdq";
            Punpckhwd_xmm_xmmm128 "punpckhwd";
            Punpcklbw_xmm_xmmm128 "punpcklbw";
            Punpckldq_xmm_xmmm128 "punpckldq";
            Punpcklqdq_xmm_xmmm128 "punpcklqdq";
            Punpcklwd_xmm_xmmm128 "punpcklwd";
            Unpcklps_xmm_xmmm128 "punpckldq";
            Unpckhps_xmm_xmmm128 "punpckhdq";
        }
        shifts! { i, form;
            Pslld_xmm_imm8 "pslld";
            Psllq_xmm_imm8 "psllq";
            Psllw_xmm_imm8 "psllw";
            Psrad_xmm_imm8 "psrad";
            Psraw_xmm_imm8 "psraw";
            Psrld_xmm_imm8 "psrld";
            Psrlq_xmm_imm8 "psrlq";
            Psrlw_xmm_imm8 "psrlw";
        }
        if matches!(i.code(), Code::Pmovmskb_r32_xmm | Code::Pmovmskb_r64_xmm) {
            return Some(form.gx(|b| {
                let r: u32;
                // SAFETY: as in `two`.
                unsafe {
                    asm!("pmovmskb {r:e}, {b}", r = out(reg) r, b = in(xmm_reg) m(b),
                        options(pure, nomem, nostack, preserves_flags));
                }
                r
            }));
        }
        if is_x86_feature_detected!("ssse3") {
            pairs! { i, form;
                Phaddd_xmm_xmmm128 "phaddd";
                Phaddsw_xmm_xmmm128 "phaddsw";
                Phaddw_xmm_xmmm128 "phaddw";
                Phsubd_xmm_xmmm128 "phsubd";
                Phsubsw_xmm_xmmm128 "phsubsw";
                Phsubw_xmm_xmmm128 "phsubw";
                Pmaddubsw_xmm_xmmm128 "pmaddubsw";
                Pmulhrsw_xmm_xmmm128 "pmulhrsw";
                Pshufb_xmm_xmmm128 "pshufb";
                Psignb_xmm_xmmm128 "psignb";
                Psignd_xmm_xmmm128 "psignd";
                Psignw_xmm_xmmm128 "psignw";
            }
            singles! { i, form;
                Pabsb_xmm_xmmm128 M128 "pabsb";
                Pabsd_xmm_xmmm128 M128 "pabsd";
                Pabsw_xmm_xmmm128 M128 "pabsw";
            }
            // Shuffles by an immediate are byte shuffles by a table's entry.
            match i.code() {
                Code::Pshufd_xmm_xmmm128_imm8 => {
                    return Some(form.x1i::<M128>(|b, n| two!("pshufb", b, PSHUFD[n as usize])));
                }
                Code::Shufps_xmm_xmmm128_imm8 => {
                    return Some(form.x2i::<M128>(|a, b, n| {
                        let low = two!("pshufb", a, PSHUFD[n as usize]);
                        let high = two!("pshufb", b, PSHUFD[n as usize]);
                        [low[0], high[1]]
                    }));
                }
                _ => {}
            }
        }
        if is_x86_feature_detected!("sse4.1") {
            pairs! { i, form;
                Packusdw_xmm_xmmm128 "packusdw";
                Pcmpeqq_xmm_xmmm128 "pcmpeqq";
                Pmaxsb_xmm_xmmm128 "pmaxsb";
                Pmaxsd_xmm_xmmm128 "pmaxsd";
                Pmaxud_xmm_xmmm128 "pmaxud";
                Pmaxuw_xmm_xmmm128 "pmaxuw";
                Pminsb_xmm_xmmm128 "pminsb";
                Pminsd_xmm_xmmm128 "pminsd";
                Pminud_xmm_xmmm128 "pminud";
                Pminuw_xmm_xmmm128 "pminuw";
                Pmuldq_xmm_xmmm128 "pmuldq";
                Pmulld_xmm_xmmm128 "pmulld";
            }
            singles! { i, form;
                Pmovsxbd_xmm_xmmm32 4 "pmovsxbd";
                Pmovsxbq_xmm_xmmm16 2 "pmovsxbq";
                Pmovsxbw_xmm_xmmm64 8 "pmovsxbw";
                Pmovsxdq_xmm_xmmm64 8 "pmovsxdq";
                Pmovsxwd_xmm_xmmm64 8 "pmovsxwd";
                Pmovsxwq_xmm_xmmm32 4 "pmovsxwq";
                Pmovzxbd_xmm_xmmm32 4 "pmovzxbd";
                Pmovzxbq_xmm_xmmm16 2 "pmovzxbq";
                Pmovzxbw_xmm_xmmm64 8 "pmovzxbw";
                Pmovzxdq_xmm_xmmm64 8 "pmovzxdq";
                Pmovzxwd_xmm_xmmm64 8 "pmovzxwd";
                Pmovzxwq_xmm_xmmm32 4 "pmovzxwq";
            }
        }
        if is_x86_feature_detected!("sse4.2") {
            pairs! { i, form;
                Pcmpgtq_xmm_xmmm128 "pcmpgtq";
            }
        }
        if is_x86_feature_detected!("aes") {
            pairs! { i, form;
                Aesdec_xmm_xmmm128 "aesdec";
                Aesdeclast_xmm_xmmm128 "aesdeclast";
                Aesenc_xmm_xmmm128 "aesenc";
                Aesenclast_xmm_xmmm128 "aesenclast";
            }
            singles! { i, form;
                Aesimc_xmm_xmmm128 M128 "aesimc";
            }
        }
        if is_x86_feature_detected!("pclmulqdq") && i.code() == Code::Pclmulqdq_xmm_xmmm128_imm8 {
            return Some(form.x2i::<M128>(|a, b, n| {
                two!("pclmullqlqdq", [a[n as usize & 1], 0], [b[n as usize >> 4 & 1], 0])
            }));
        }
        if is_x86_feature_detected!("sha") {
            pairs! { i, form, U128;
                Sha1nexte_xmm_xmmm128 "sha1nexte";
                Sha1msg1_xmm_xmmm128 "sha1msg1";
                Sha1msg2_xmm_xmmm128 "sha1msg2";
                Sha256msg1_xmm_xmmm128 "sha256msg1";
                Sha256msg2_xmm_xmmm128 "sha256msg2";
            }
            if i.code() == Code::Sha256rnds2_xmm_xmmm128 {
                return Some(form.x3::<U128>(|a, b, wk| {
                    let mut r = m(a);
                    // SAFETY: as in `two`.
                    unsafe {
                        asm!("sha256rnds2 {r}, {b}, xmm0", r = inout(xmm_reg) r, b = in(xmm_reg) m(b),
                            in("xmm0") m(wk), options(pure, nomem, nostack, preserves_flags));
                    }
                    v(r)
                }));
            }
        }
        None
    }
}

pub(super) use {hardware, hardware_compare, hardware_from_general, hardware_to_general};
