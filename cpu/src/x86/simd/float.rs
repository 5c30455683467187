// SPDX-License-Identifier: Apache-2.0
//! Floating-point arithmetic and comparison on XMM registers (APM vol. 1, 4.7 to 4.10, and vol. 4).
//!
//! The arithmetic of one element is in [`crate::float`]; here it is applied to elements, and exceptions are raised.

use core::cmp::Ordering;

use iced_x86::{Code, Instruction};

use super::super::flags::rf;
use super::super::op::{Handler, Res, Stop};
use super::super::state::{Cpu, cr4, vector};
use super::form::{Form, M128};
use super::native::{clear_flags, hardware, hardware_compare};
use super::vector::{V, build, join, map1, split, with_low32, with_low64};
use crate::float::*;

impl Cpu {
    /// Ends an instruction with floating-point results: adds the flags to MXCSR; raises #XF (or #UD without
    /// CR4.OSXMMEXCPT) for unmasked ones, before any register changes.
    #[inline(always)]
    pub fn sse_commit(&mut self, env: &Env) -> Res {
        if env.commit_sse(&mut self.rb.mxcsr) { Err(self.simd_exception()) } else { Ok(()) }
    }

    #[cold]
    #[inline(never)]
    fn simd_exception(&mut self) -> Stop {
        if self.cr4 & cr4::OSXMMEXCPT != 0 { self.fault(vector::XF, None) } else { self.ud() }
    }
}

/// The host's instruction for an operation: see [`super::native`].
pub trait Hardware: Fn(V, V, u32) -> Option<V> + Copy + 'static {}
impl<F: Fn(V, V, u32) -> Option<V> + Copy + 'static> Hardware for F {}

impl Form {
    /// `dst = f(dst, src, imm8)` with floating-point exceptions; `fast` where it can.
    pub fn x2if<const SIZE: u32>(
        self,
        fast: impl Hardware,
        f: impl Fn(V, V, u8, &mut Env) -> V + Copy + 'static,
    ) -> Handler {
        self.sse_try::<SIZE>(
            move |cpu, op, b| match fast(cpu.xmm(op.dst), b, cpu.rb.mxcsr) {
                Some(r) => {
                    cpu.set_xmm(op.dst, r);
                    true
                }
                None => false,
            },
            move |cpu, op, b| {
                clear_flags();
                let mut env = Env::sse(cpu.rb.mxcsr);
                let r = f(cpu.xmm(op.dst), b, op.imm as u8, &mut env);
                cpu.sse_commit(&env)?;
                cpu.set_xmm(op.dst, r);
                Ok(())
            },
        )
    }

    /// `dst = f(dst, src)` with floating-point exceptions.
    pub fn x2f<const SIZE: u32>(
        self,
        fast: impl Hardware,
        f: impl Fn(V, V, &mut Env) -> V + Copy + 'static,
    ) -> Handler {
        self.x2if::<SIZE>(fast, move |a, b, _, env| f(a, b, env))
    }

    /// Packed single: `f` on every pair of elements.
    fn ps(self, fast: impl Hardware, f: impl Fn(u32, u32, u8, &mut Env) -> u32 + Copy + 'static) -> Handler {
        self.x2if::<M128>(fast, move |a, b, imm, env| {
            let (a, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
            build(|i| f(a[i], b[i], imm, env))
        })
    }

    /// Packed double: `f` on every pair of elements.
    fn pd(self, fast: impl Hardware, f: impl Fn(u64, u64, u8, &mut Env) -> u64 + Copy + 'static) -> Handler {
        self.x2if::<M128>(fast, move |a, b, imm, env| {
            let low = f(a[0], b[0], imm, env);
            [low, f(a[1], b[1], imm, env)]
        })
    }

    /// Scalar single: `f` on the lowest elements.
    fn ss(self, fast: impl Hardware, f: impl Fn(u32, u32, u8, &mut Env) -> u32 + Copy + 'static) -> Handler {
        self.x2if::<4>(fast, move |a, b, imm, env| with_low32(a, f(a[0] as u32, b[0] as u32, imm, env)))
    }

    /// Scalar double: `f` on the lowest elements.
    fn sd(self, fast: impl Hardware, f: impl Fn(u64, u64, u8, &mut Env) -> u64 + Copy + 'static) -> Handler {
        self.x2if::<8>(fast, move |a, b, imm, env| with_low64(a, f(a[0], b[0], imm, env)))
    }

    /// COMISS and the like: `f` on the lowest words to flags.
    fn compare<const SIZE: u32>(
        self,
        fast: impl Fn(V, V, u32) -> Option<(bool, bool, bool)> + Copy + 'static,
        f: impl Fn(u64, u64, &mut Env) -> Option<Ordering> + Copy + 'static,
    ) -> Handler {
        self.sse_try::<SIZE>(
            move |cpu, op, b| match fast(cpu.xmm(op.dst), b, cpu.rb.mxcsr) {
                Some((z, p, c)) => {
                    cpu.lf.set_all((z as u64) << 6 | (p as u64) << 2 | c as u64);
                    true
                }
                None => false,
            },
            move |cpu, op, b| {
                clear_flags();
                let mut env = Env::sse(cpu.rb.mxcsr);
                let order = f(cpu.xmm(op.dst)[0], b[0], &mut env);
                cpu.sse_commit(&env)?;
                cpu.lf.set_all(match order {
                    None => rf::ZF | rf::PF | rf::CF,
                    Some(Ordering::Greater) => 0,
                    Some(Ordering::Less) => rf::CF,
                    Some(Ordering::Equal) => rf::ZF,
                });
                Ok(())
            },
        )
    }
}

/// HADDPS, HSUBPS.
#[inline(always)]
fn neighbours32(a: V, b: V, env: &mut Env, f: impl Fn(u32, u32, &mut Env) -> u32) -> V {
    let (a, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
    let mut pair = |x: &[u32; 4], i| f(x[i], x[i + 1], env);
    join([pair(&a, 0), pair(&a, 2), pair(&b, 0), pair(&b, 2)])
}

/// HADDPD, HSUBPD.
#[inline(always)]
fn neighbours64(a: V, b: V, env: &mut Env, f: impl Fn(u64, u64, &mut Env) -> u64) -> V {
    let low = f(a[0], a[1], env);
    [low, f(b[0], b[1], env)]
}

/// ADDSUBPS: even elements subtracted, odd ones added.
fn addsubps(a: V, b: V, env: &mut Env) -> V {
    let (a, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
    build(|i| if i & 1 == 0 { f32_sub(a[i], b[i], env) } else { f32_add(a[i], b[i], env) })
}

/// ADDSUBPD.
fn addsubpd(a: V, b: V, env: &mut Env) -> V {
    let low = f64_sub(a[0], b[0], env);
    [low, f64_add(a[1], b[1], env)]
}

/// One step of DPPS or DPPD, an element at a time; its flags go to `mxcsr`. None: an unmasked exception, which ends
/// the instruction before its next step.
#[inline(always)]
fn step<T, const N: usize>(mxcsr: &mut u32, f: impl Fn(usize, &mut Env) -> T) -> Option<[T; N]> {
    let mut env = Env::sse(*mxcsr);
    let r = core::array::from_fn(|i| f(i, &mut env));
    (!env.commit_sse(mxcsr)).then_some(r)
}

/// DPPS: products that `imm[7:4]` picks, summed in pairs, the sum to the elements that `imm[3:0]` picks (APM vol. 4).
/// Which operand of an addition comes first shows when there are several NaNs.
pub fn dpps(a: V, b: V, imm: u8, mxcsr: &mut u32) -> Option<V> {
    let (a, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
    let p = step::<u32, 4>(mxcsr, |i, e| if imm >> (4 + i) & 1 != 0 { f32_mul(a[i], b[i], e) } else { 0 })?;
    let pairs = step::<u32, 2>(mxcsr, |i, e| f32_add(p[2 * i], p[2 * i + 1], e))?;
    let [sum] = step::<u32, 1>(mxcsr, |_, e| f32_add(pairs[0], pairs[1], e))?;
    Some(build::<u32, 4>(|i| if imm >> i & 1 != 0 { sum } else { 0 }))
}

/// DPPD.
pub fn dppd(a: V, b: V, imm: u8, mxcsr: &mut u32) -> Option<V> {
    let p = step::<u64, 2>(mxcsr, |i, e| if imm >> (4 + i) & 1 != 0 { f64_mul(a[i], b[i], e) } else { 0 })?;
    let [sum] = step::<u64, 1>(mxcsr, |_, e| f64_add(p[0], p[1], e))?;
    Some(build::<u64, 2>(|i| if imm >> i & 1 != 0 { sum } else { 0 }))
}

/// DPPS and DPPD.
fn dot(form: Form, f: impl Fn(V, V, u8, &mut u32) -> Option<V> + Copy + 'static) -> Handler {
    form.sse_try::<M128>(
        |_, _, _| false,
        move |cpu, op, b| match f(cpu.xmm(op.dst), b, op.imm as u8, &mut cpu.rb.mxcsr) {
            Some(r) => {
                cpu.set_xmm(op.dst, r);
                Ok(())
            }
            None => Err(cpu.simd_exception()),
        },
    )
}

/// All ones for true.
fn all32(x: bool) -> u32 {
    if x { u32::MAX } else { 0 }
}

/// All ones for true.
fn all64(x: bool) -> u64 {
    if x { u64::MAX } else { 0 }
}

/// CMP* with each of the eight predicates.
macro_rules! predicates {
    ($form:expr, $kind:ident, $insn:literal, $f:expr) => {
        match $form.imm & 7 {
            0 => $form.$kind(hardware!($insn, imm "0"), $f),
            1 => $form.$kind(hardware!($insn, imm "1"), $f),
            2 => $form.$kind(hardware!($insn, imm "2"), $f),
            3 => $form.$kind(hardware!($insn, imm "3"), $f),
            4 => $form.$kind(hardware!($insn, imm "4"), $f),
            5 => $form.$kind(hardware!($insn, imm "5"), $f),
            6 => $form.$kind(hardware!($insn, imm "6"), $f),
            _ => $form.$kind(hardware!($insn, imm "7"), $f),
        }
    };
}

/// Translates arithmetic and comparisons.
pub fn translate(i: &Instruction, form: Form) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Addps_xmm_xmmm128 => form.ps(hardware!("addps"), |a, b, _, e| f32_add(a, b, e)),
        Addpd_xmm_xmmm128 => form.pd(hardware!("addpd"), |a, b, _, e| f64_add(a, b, e)),
        Addss_xmm_xmmm32 => form.ss(hardware!("addss"), |a, b, _, e| f32_add(a, b, e)),
        Addsd_xmm_xmmm64 => form.sd(hardware!("addsd"), |a, b, _, e| f64_add(a, b, e)),
        Subps_xmm_xmmm128 => form.ps(hardware!("subps"), |a, b, _, e| f32_sub(a, b, e)),
        Subpd_xmm_xmmm128 => form.pd(hardware!("subpd"), |a, b, _, e| f64_sub(a, b, e)),
        Subss_xmm_xmmm32 => form.ss(hardware!("subss"), |a, b, _, e| f32_sub(a, b, e)),
        Subsd_xmm_xmmm64 => form.sd(hardware!("subsd"), |a, b, _, e| f64_sub(a, b, e)),
        Mulps_xmm_xmmm128 => form.ps(hardware!("mulps"), |a, b, _, e| f32_mul(a, b, e)),
        Mulpd_xmm_xmmm128 => form.pd(hardware!("mulpd"), |a, b, _, e| f64_mul(a, b, e)),
        Mulss_xmm_xmmm32 => form.ss(hardware!("mulss"), |a, b, _, e| f32_mul(a, b, e)),
        Mulsd_xmm_xmmm64 => form.sd(hardware!("mulsd"), |a, b, _, e| f64_mul(a, b, e)),
        Divps_xmm_xmmm128 => form.ps(hardware!("divps"), |a, b, _, e| f32_div(a, b, e)),
        Divpd_xmm_xmmm128 => form.pd(hardware!("divpd"), |a, b, _, e| f64_div(a, b, e)),
        Divss_xmm_xmmm32 => form.ss(hardware!("divss"), |a, b, _, e| f32_div(a, b, e)),
        Divsd_xmm_xmmm64 => form.sd(hardware!("divsd"), |a, b, _, e| f64_div(a, b, e)),
        Minps_xmm_xmmm128 => form.ps(hardware!("minps"), |a, b, _, e| f32_min(a, b, e)),
        Minpd_xmm_xmmm128 => form.pd(hardware!("minpd"), |a, b, _, e| f64_min(a, b, e)),
        Minss_xmm_xmmm32 => form.ss(hardware!("minss"), |a, b, _, e| f32_min(a, b, e)),
        Minsd_xmm_xmmm64 => form.sd(hardware!("minsd"), |a, b, _, e| f64_min(a, b, e)),
        Maxps_xmm_xmmm128 => form.ps(hardware!("maxps"), |a, b, _, e| f32_max(a, b, e)),
        Maxpd_xmm_xmmm128 => form.pd(hardware!("maxpd"), |a, b, _, e| f64_max(a, b, e)),
        Maxss_xmm_xmmm32 => form.ss(hardware!("maxss"), |a, b, _, e| f32_max(a, b, e)),
        Maxsd_xmm_xmmm64 => form.sd(hardware!("maxsd"), |a, b, _, e| f64_max(a, b, e)),
        Sqrtps_xmm_xmmm128 => form.ps(hardware!("sqrtps"), |_, b, _, e| f32_sqrt(b, e)),
        Sqrtpd_xmm_xmmm128 => form.pd(hardware!("sqrtpd"), |_, b, _, e| f64_sqrt(b, e)),
        Sqrtss_xmm_xmmm32 => form.ss(hardware!("sqrtss"), |_, b, _, e| f32_sqrt(b, e)),
        Sqrtsd_xmm_xmmm64 => form.sd(hardware!("sqrtsd"), |_, b, _, e| f64_sqrt(b, e)),
        // Legacy encodings have three bits of predicate, the others are ignored.
        Cmpps_xmm_xmmm128_imm8 => {
            predicates!(form, ps, "cmpps", |a, b, p, e| all32(f32_cmp_predicate(a, b, p & 7, e)))
        }
        Cmppd_xmm_xmmm128_imm8 => {
            predicates!(form, pd, "cmppd", |a, b, p, e| all64(f64_cmp_predicate(a, b, p & 7, e)))
        }
        Cmpss_xmm_xmmm32_imm8 => {
            predicates!(form, ss, "cmpss", |a, b, p, e| all32(f32_cmp_predicate(a, b, p & 7, e)))
        }
        Cmpsd_xmm_xmmm64_imm8 => {
            predicates!(form, sd, "cmpsd", |a, b, p, e| all64(f64_cmp_predicate(a, b, p & 7, e)))
        }
        Comiss_xmm_xmmm32 => {
            form.compare::<4>(hardware_compare!("comiss"), |a, b, e| f32_cmp(a as u32, b as u32, true, e))
        }
        Ucomiss_xmm_xmmm32 => {
            form.compare::<4>(hardware_compare!("ucomiss"), |a, b, e| f32_cmp(a as u32, b as u32, false, e))
        }
        Comisd_xmm_xmmm64 => form.compare::<8>(hardware_compare!("comisd"), |a, b, e| f64_cmp(a, b, true, e)),
        Ucomisd_xmm_xmmm64 => {
            form.compare::<8>(hardware_compare!("ucomisd"), |a, b, e| f64_cmp(a, b, false, e))
        }
        // No exceptions, no MXCSR.
        Rcpps_xmm_xmmm128 => form.x1::<M128>(|b| map1(b, f32_rcp_estimate)),
        Rcpss_xmm_xmmm32 => form.x2::<4>(|a, b| with_low32(a, f32_rcp_estimate(b[0] as u32))),
        Rsqrtps_xmm_xmmm128 => form.x1::<M128>(|b| map1(b, f32_rsqrt_estimate)),
        Rsqrtss_xmm_xmmm32 => form.x2::<4>(|a, b| with_low32(a, f32_rsqrt_estimate(b[0] as u32))),
        Haddps_xmm_xmmm128 => form.x2f::<M128>(|_, _, _| None, |a, b, e| neighbours32(a, b, e, f32_add)),
        Haddpd_xmm_xmmm128 => form.x2f::<M128>(|_, _, _| None, |a, b, e| neighbours64(a, b, e, f64_add)),
        Hsubps_xmm_xmmm128 => form.x2f::<M128>(|_, _, _| None, |a, b, e| neighbours32(a, b, e, f32_sub)),
        Hsubpd_xmm_xmmm128 => form.x2f::<M128>(|_, _, _| None, |a, b, e| neighbours64(a, b, e, f64_sub)),
        Addsubps_xmm_xmmm128 => form.x2f::<M128>(|_, _, _| None, addsubps),
        Addsubpd_xmm_xmmm128 => form.x2f::<M128>(|_, _, _| None, addsubpd),
        Dpps_xmm_xmmm128_imm8 => dot(form, dpps),
        Dppd_xmm_xmmm128_imm8 => dot(form, dppd),
        Roundps_xmm_xmmm128_imm8 => {
            form.ps(|_, _, _| None, |_, b, imm, e| super::convert::round32(b, imm, e))
        }
        Roundpd_xmm_xmmm128_imm8 => {
            form.pd(|_, _, _| None, |_, b, imm, e| super::convert::round64(b, imm, e))
        }
        Roundss_xmm_xmmm32_imm8 => form.ss(|_, _, _| None, |_, b, imm, e| super::convert::round32(b, imm, e)),
        Roundsd_xmm_xmmm64_imm8 => form.sd(|_, _, _| None, |_, b, imm, e| super::convert::round64(b, imm, e)),
        _ => return None,
    })
}
