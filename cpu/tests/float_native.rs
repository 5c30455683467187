// SPDX-License-Identifier: Apache-2.0
//! The software floating point against the x87 and SSE units of the host, bit by bit and flag by flag.
//!
//! Bounded by default; `SOFTCPU_FLOAT_CASES=1000000` runs as many random cases per operation and control setting.
#![cfg(target_arch = "x86_64")]

mod float_cases;
#[path = "common/processor.rs"]
mod processor;

use core::arch::asm;
use core::cmp::Ordering;
use float_cases::{Operands, cases, intel_differs};
use processor::{Processor, host, judge};
use softcpu::float::*;

/// Processors whose answers have all been equal.
const COMPARED: &[Processor] = &[Processor::Amd19h, Processor::Intel6];

/// The image FNSAVE writes in 32-bit format, and room to spare.
#[repr(C, align(16))]
struct Image([u8; 112]);

impl Image {
    const fn new() -> Image {
        Image([0; 112])
    }

    fn status(&self) -> u16 {
        u16::from_le_bytes([self.0[4], self.0[5]])
    }

    /// ST(i) and its raw bits.
    fn st(&self, i: usize) -> F80 {
        let at = 28 + 10 * i;
        let mant = u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap());
        let se = u16::from_le_bytes(self.0[at + 8..at + 10].try_into().unwrap());
        F80 { mant, se }
    }
}

fn tbyte(v: F80) -> [u8; 16] {
    v.to_bits().to_le_bytes()
}

/// Runs x87 instructions natively with ST0 = a, ST1 = b under a control word.
macro_rules! x87 {
    ($instruction:literal) => {
        |a: F80, b: F80, fcw: u16, mem: &mut [u8; 16]| -> Image {
            let (a, b) = (tbyte(a), tbyte(b));
            let mut image = Image::new();
            // SAFETY: the instructions touch the x87 registers (declared clobbered), `mem` and `image`, which are
            // large enough; FNSAVE leaves the x87 in its reset state, as the ABI wants it.
            unsafe {
                asm!(
                    "fninit",
                    "fld tbyte ptr [{b}]",
                    "fld tbyte ptr [{a}]",
                    "fldcw word ptr [{cw}]",
                    $instruction,
                    "fnsave [{image}]",
                    "/* {m} */", // most instructions don't use it
                    a = in(reg) a.as_ptr(),
                    b = in(reg) b.as_ptr(),
                    cw = in(reg) &fcw,
                    m = in(reg) mem.as_mut_ptr(),
                    image = in(reg) image.0.as_mut_ptr(),
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                    options(nostack),
                );
            }
            image
        }
    };
}

type Native = fn(F80, F80, u16, &mut [u8; 16]) -> Image;

const C1: u16 = 1 << 9;

/// Control words: every rounding mode and precision, everything masked.
fn masked_words() -> impl Iterator<Item = u16> {
    (0..4).flat_map(|rc| [0, 2, 3].map(|pc| 0x3f | pc << 8 | rc << 10))
}

/// Control words with some exceptions unmasked.
fn unmasked_words() -> impl Iterator<Item = u16> {
    [0x00u16, 0x0f, 0x2f, 0x37, 0x1f, 0x3d, 0x3e, 0x3b, 0x20]
        .into_iter()
        .flat_map(|mask| (0..4).map(move |rc| mask | 0x300 | rc << 10))
}

/// Whether the host's processor is known to answer something else.
fn peculiar(name: &str, a: F80, b: F80) -> bool {
    host() == Some(Processor::Intel6) && intel_differs(name, a, b)
}

struct Report {
    name: &'static str,
    failures: usize,
    count: usize,
}

impl Report {
    fn new(name: &'static str) -> Report {
        Report { name, failures: 0, count: 0 }
    }

    fn check(&mut self, same: bool, detail: impl FnOnce() -> String) {
        self.count += 1;
        if !same {
            self.failures += 1;
            if self.failures <= 12 {
                eprintln!("{}: {}", self.name, detail());
            }
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let record = "SOFTCPU_FLOAT_GOLDEN=$PWD/found.txt cargo test --release --test float_native";
            judge(self.name, self.failures, self.count, COMPARED, record);
        }
    }
}

fn show(v: F80) -> String {
    format!("{:04x}:{:016x}", v.se, v.mant)
}

fn stopped(env: &Env) -> bool {
    env.flags & !env.masks & PRE != 0
}

/// An operation whose result is a register: the value must match unless a pre-computation exception stops it.
fn check_register_op(name: &'static str, native: Native, at: usize, soft: fn(F80, F80, &mut Env) -> F80) {
    let mut report = Report::new(name);
    let mut mem = [0; 16];
    for fcw in masked_words().chain(unmasked_words()) {
        for Operands { a, b, .. } in cases(fcw.into()) {
            if peculiar(name, a, b) {
                continue;
            }
            let image = native(a, b, fcw, &mut mem);
            let mut env = Env::x87(fcw);
            let value = soft(a, b, &mut env);
            let flags = image.status() as u8 & ALL;
            let value_counts = !stopped(&env);
            if value_counts {
                let (value, c1) = (image.st(at).to_bits(), image.status() & C1 != 0);
                golden(name, fcw.into(), a.to_bits(), b.to_bits(), value, flags, c1);
            }
            let same = flags == env.flags
                && (!value_counts || (image.st(at) == value && (image.status() & C1 != 0) == env.c1));
            report.check(same, || {
                format!(
                    "fcw {fcw:04x} a {} b {}: native {} flags {flags:02x} c1 {}, soft {} flags {:02x} c1 {}",
                    show(a),
                    show(b),
                    show(image.st(at)),
                    image.status() & C1 != 0,
                    show(value),
                    env.flags,
                    env.c1
                )
            });
        }
    }
}

macro_rules! register_ops {
    ($($test:ident: $i:literal, ST($at:literal), $soft:expr;)+) => {$(
        #[test]
        fn $test() {
            check_register_op($i, x87!($i), $at, $soft);
        }
    )+};
}

register_ops! {
    x87_add_equals_the_processor: "fadd st, st(1)", ST(0), f80_add;
    x87_sub_equals_the_processor: "fsub st, st(1)", ST(0), f80_sub;
    x87_subr_equals_the_processor: "fsubr st, st(1)", ST(0), |a, b, e| f80_sub(b, a, e);
    x87_mul_equals_the_processor: "fmul st, st(1)", ST(0), f80_mul;
    x87_div_equals_the_processor: "fdiv st, st(1)", ST(0), f80_div;
    x87_divr_equals_the_processor: "fdivr st, st(1)", ST(0), |a, b, e| f80_div(b, a, e);
    x87_sqrt_equals_the_processor: "fsqrt", ST(0), |a, _, e| f80_sqrt(a, e);
    x87_rndint_equals_the_processor: "frndint", ST(0), |a, _, e| f80_round(a, e);
    x87_scale_equals_the_processor: "fscale", ST(0), f80_scale;
    x87_extract_significand_equals_the_processor: "fxtract", ST(0), |a, _, e| f80_extract(a, e).1;
    x87_extract_exponent_equals_the_processor: "fxtract ", ST(1), |a, _, e| f80_extract(a, e).0;
}

fn check_remainder(name: &'static str, native: Native, nearest: bool) {
    let mut report = Report::new(name);
    let mut mem = [0; 16];
    for fcw in [0x33f, 0xf3f, 0x30f, 0x32f, 0x33d] {
        for Operands { a, b, .. } in cases(fcw.into()) {
            let image = native(a, b, fcw, &mut mem);
            let mut env = Env::x87(fcw);
            let r = f80_remainder(a, b, nearest, &mut env);
            let sw = image.status();
            let flags = sw as u8 & ALL;
            let stop = stopped(&env);
            let c2 = sw & 0x400 != 0;
            let quotient = (sw >> 6 & 4 | sw >> 13 & 2 | sw >> 9 & 1) as u8;
            let invalid = flags & IE != 0;
            let same = flags == env.flags
                && (stop
                    || (image.st(0) == r.value
                        && c2 == r.incomplete
                        && (c2 || invalid || quotient == r.quotient)));
            report.check(same, || {
                format!(
                    "fcw {fcw:04x} a {} b {}: native {} sw {sw:04x}, soft {} flags {:02x} c2 {} q {}",
                    show(a),
                    show(b),
                    show(image.st(0)),
                    show(r.value),
                    env.flags,
                    r.incomplete,
                    r.quotient
                )
            });
        }
    }
}

/// With `SOFTCPU_FLOAT_GOLDEN=FILE` the processor's answers to some cases are added to FILE, for `float_golden.rs`.
fn golden(name: &str, control: u32, a: u128, b: u128, value: u128, flags: u8, c1: bool) {
    use std::io::Write;
    let Ok(path) = std::env::var("SOFTCPU_FLOAT_GOLDEN") else { return };
    let line = format!("{name} {control:x} {a:x} {b:x} {value:x} {flags:x} {}\n", u8::from(c1));
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut f| f.write_all(line.as_bytes())).expect("the golden file can be written");
}

#[test]
fn x87_prem_equals_the_processor() {
    check_remainder("fprem", x87!("fprem"), false);
}

#[test]
fn x87_prem1_equals_the_processor() {
    check_remainder("fprem1", x87!("fprem1"), true);
}

/// C3, C2, C0 of a comparison.
fn comparison_bits(o: Option<Ordering>) -> u16 {
    match o {
        None => 0x4500,
        Some(Ordering::Less) => 0x100,
        Some(Ordering::Equal) => 0x4000,
        Some(Ordering::Greater) => 0,
    }
}

#[test]
fn x87_comparisons_equal_the_processor() {
    let mut report = Report::new("compare");
    let mut mem = [0; 16];
    let natives: [(Native, bool); 2] = [(x87!("fcom st(1)"), true), (x87!("fucom st(1)"), false)];
    for fcw in [0x33f, 0x33d, 0x33e] {
        for (native, signaling) in natives {
            for Operands { a, b, .. } in cases(fcw.into()) {
                let sw = native(a, b, fcw, &mut mem).status();
                let mut env = Env::x87(fcw);
                let o = f80_cmp(a, b, signaling, &mut env);
                let same =
                    sw as u8 & ALL == env.flags && (stopped(&env) || sw & 0x4700 == comparison_bits(o));
                report.check(same, || {
                    format!(
                        "fcw {fcw:04x} signaling {signaling} a {} b {}: native {sw:04x}, soft {o:?} {:02x}",
                        show(a),
                        show(b),
                        env.flags
                    )
                });
            }
        }
    }
}

#[test]
fn x87_examine_equals_the_processor() {
    let mut report = Report::new("fxam");
    let mut mem = [0; 16];
    let native = x87!("fxam");
    for Operands { a, b, .. } in cases(7) {
        let sw = native(a, b, 0x33f, &mut mem).status();
        let bits = match f80_class(a) {
            Class::Unsupported => 0,
            Class::Nan => 0x100,
            Class::Normal => 0x400,
            Class::Infinity => 0x500,
            Class::Zero => 0x4000,
            Class::Denormal => 0x4400,
        } | (a.se >> 15) << 9;
        report.check(sw & 0x4700 == bits, || format!("a {}: native {sw:04x}, soft {bits:04x}", show(a)));
    }
}

fn check_store(name: &'static str, native: Native, size: usize, soft: fn(F80, &mut Env) -> u128) {
    let mut report = Report::new(name);
    for fcw in masked_words().filter(|w| w & 0x300 == 0x300).chain(unmasked_words()) {
        for Operands { a, b, .. } in cases(fcw.into()) {
            let mut mem = [0x5a; 16];
            let image = native(a, b, fcw, &mut mem);
            let mut env = Env::x87(fcw);
            let value = soft(a, &mut env).to_le_bytes();
            let sw = image.status();
            // Unmasked IE, OE and UE leave memory alone.
            let stored = env.flags & !env.masks & (IE | OE | UE) == 0;
            let expected = if stored { &value[..size] } else { &[0x5a; 16][..size] };
            let same = sw as u8 & ALL == env.flags
                && &mem[..size] == expected
                && (!stored || (sw & C1 != 0) == env.c1);
            report.check(same, || {
                format!(
                    "fcw {fcw:04x} a {}: native {:02x?} sw {sw:04x}, soft {:02x?} flags {:02x} c1 {}",
                    show(a),
                    &mem[..size],
                    &value[..size],
                    env.flags,
                    env.c1
                )
            });
        }
    }
}

macro_rules! stores {
    ($($test:ident: $i:literal, $size:literal, $soft:expr;)+) => {$(
        #[test]
        fn $test() {
            check_store(stringify!($test), x87!($i), $size, $soft);
        }
    )+};
}

fn toward_zero(env: &mut Env, f: impl Fn(&mut Env) -> u128) -> u128 {
    env.rounding = Rounding::Zero;
    f(env)
}

stores! {
    x87_store_f32_equals_the_processor: "fst dword ptr [{m}]", 4, |a, e| f80_to_f32(a, e).into();
    x87_store_f64_equals_the_processor: "fst qword ptr [{m}]", 8, |a, e| f80_to_f64(a, e).into();
    x87_store_i16_equals_the_processor: "fist word ptr [{m}]", 2, |a, e| f80_to_i16(a, e) as u16 as u128;
    x87_store_i32_equals_the_processor: "fist dword ptr [{m}]", 4, |a, e| f80_to_i32(a, e) as u32 as u128;
    x87_store_i64_equals_the_processor: "fistp qword ptr [{m}]", 8, |a, e| f80_to_i64(a, e) as u64 as u128;
    x87_truncate_i64_equals_the_processor: "fisttp qword ptr [{m}]", 8,
        |a, e| toward_zero(e, |e| f80_to_i64(a, e) as u64 as u128);
    x87_truncate_i16_equals_the_processor: "fisttp word ptr [{m}]", 2,
        |a, e| toward_zero(e, |e| f80_to_i16(a, e) as u16 as u128);
    x87_store_bcd_equals_the_processor: "fbstp tbyte ptr [{m}]", 10,
        |a, e| { let mut v = [0; 16]; v[..10].copy_from_slice(&f80_to_bcd(a, e)); u128::from_le_bytes(v) };
}

fn check_load(name: &'static str, native: Native, soft: fn(&[u8; 16], &mut Env) -> F80) {
    let mut report = Report::new(name);
    for fcw in [0x33f, 0x33e, 0x33d, 0x03f] {
        for c in cases(fcw.into()) {
            let mut mem = c.memory();
            let image = native(F80::ONE, F80::ONE, fcw, &mut mem);
            let mut env = Env::x87(fcw);
            let value = soft(&mem, &mut env);
            let sw = image.status();
            let same = sw as u8 & ALL == env.flags && (stopped(&env) || image.st(0) == value);
            report.check(same, || {
                format!(
                    "fcw {fcw:04x} {mem:02x?}: native {} sw {sw:04x}, soft {} flags {:02x}",
                    show(image.st(0)),
                    show(value),
                    env.flags
                )
            });
        }
    }
}

#[test]
fn x87_loads_equal_the_processor() {
    check_load("fld m32", x87!("fld dword ptr [{m}]"), |m, e| {
        f80_from_f32(u32::from_le_bytes(m[..4].try_into().unwrap()), e)
    });
    check_load("fld m64", x87!("fld qword ptr [{m}]"), |m, e| {
        f80_from_f64(u64::from_le_bytes(m[..8].try_into().unwrap()), e)
    });
    check_load("fild m64", x87!("fild qword ptr [{m}]"), |m, _| {
        f80_from_i64(i64::from_le_bytes(m[..8].try_into().unwrap()))
    });
    check_load("fild m16", x87!("fild word ptr [{m}]"), |m, _| {
        f80_from_i64(i16::from_le_bytes(m[..2].try_into().unwrap()).into())
    });
}

#[test]
fn x87_bcd_loads_equal_the_processor() {
    let mut report = Report::new("fbld");
    let native = x87!("fbld tbyte ptr [{m}]");
    for c in cases(3) {
        let mut mem = c.memory();
        for byte in &mut mem[..9] {
            *byte = (*byte & 15) % 10 + (*byte >> 4) % 10 * 16;
        }
        let image = native(F80::ONE, F80::ONE, 0x33f, &mut mem);
        let value = f80_from_bcd(mem[..10].try_into().unwrap());
        report.check(image.st(0) == value, || {
            format!("{mem:02x?}: native {}, soft {}", show(image.st(0)), show(value))
        });
    }
}

#[test]
fn x87_constants_equal_the_processor() {
    let mut report = Report::new("constants");
    let natives: [(Native, Constant); 7] = [
        (x87!("fld1"), Constant::One),
        (x87!("fldl2t"), Constant::Log2Of10),
        (x87!("fldl2e"), Constant::Log2OfE),
        (x87!("fldpi"), Constant::Pi),
        (x87!("fldlg2"), Constant::Log10Of2),
        (x87!("fldln2"), Constant::LnOf2),
        (x87!("fldz"), Constant::Zero),
    ];
    for fcw in masked_words() {
        for (native, constant) in natives {
            let v = native(F80::ONE, F80::ONE, fcw, &mut [0; 16]).st(0);
            let soft = f80_constant(constant, Env::x87(fcw).rounding);
            report.check(v == soft, || {
                format!("{constant:?} fcw {fcw:04x}: native {}, soft {}", show(v), show(soft))
            });
        }
    }
}

/// A value as an integer that counts representable numbers.
fn ordinal(v: F80) -> i128 {
    let magnitude = (i128::from(v.se & 0x7fff) << 63) + i128::from(v.mant & !(1 << 63));
    if v.sign() { -magnitude } else { magnitude }
}

type Several = fn(F80, F80, &mut Env) -> Option<[F80; 2]>;

/// Transcendental instructions: results within one unit in the last place of the processor's (which is allowed one
/// of its own), special values and flags equal. C1 tells of rounding, so it may differ where the result does.
fn check_transcendental(name: &'static str, native: Native, domain: fn(&Operands) -> bool, soft: Several) {
    let mut report = Report::new(name);
    let mut mem = [0; 16];
    // Of ordinary arguments, by rounding mode: (last bit differs, all).
    let mut ordinary = [(0u64, 0u64); 4];
    for fcw in [0x33f, 0x73f, 0xb3f, 0xf3f, 0x03f, 0x33d] {
        for c in cases(fcw.into()) {
            if !domain(&c) || peculiar(name, c.a, c.b) {
                continue;
            }
            let (a, b) = (c.a, c.b);
            let image = native(a, b, fcw, &mut mem);
            let sw = image.status();
            let mut env = Env::x87(fcw);
            let r = soft(a, b, &mut env);
            let same = match r {
                None => sw & 0x400 != 0 && image.st(0) == a && env.flags == sw as u8 & ALL,
                Some(_) if stopped(&env) => sw as u8 & ALL == env.flags,
                Some(values) => {
                    let worst = (0..2).map(|i| ordinal(image.st(i)).abs_diff(ordinal(values[i]))).max();
                    if a.mant >> 63 != 0 && (-60..=62).contains(&(i32::from(a.se & 0x7fff) - 16383)) {
                        let of_mode = &mut ordinary[usize::from(fcw >> 10 & 3)];
                        of_mode.0 += u64::from(worst != Some(0));
                        of_mode.1 += 1;
                    }
                    if worst == Some(0) {
                        let value = image.st(0).to_bits();
                        golden(name, fcw.into(), a.to_bits(), b.to_bits(), value, sw as u8 & ALL, env.c1);
                    }
                    // One unit may be the step from the largest number to infinity.
                    let step = worst == Some(1) && values[0].abs() == F80::inf(false);
                    let flags = sw as u8 & ALL == env.flags || (step && env.flags == OE | PE);
                    sw & 0x400 == 0 && flags && worst <= Some(1)
                }
            };
            report.check(same, || {
                format!(
                    "fcw {fcw:04x} a {} b {}: native {} {} sw {sw:04x}, soft {} flags {:02x}",
                    show(a),
                    show(b),
                    show(image.st(0)),
                    show(image.st(1)),
                    r.map_or("C2".into(), |v| format!("{} {}", show(v[0]), show(v[1]))),
                    env.flags
                )
            });
        }
    }
    let share = |i: usize| format!("{:.2} %", 100.0 * ordinary[i].0 as f64 / ordinary[i].1.max(1) as f64);
    eprintln!(
        "{name}: last bit differs to nearest, down, up, to zero: {}",
        (0..4).map(share).collect::<Vec<_>>().join(", ")
    );
}

macro_rules! transcendentals {
    ($($test:ident: $i:literal, $domain:expr, $soft:expr;)+) => {$(
        #[test]
        fn $test() {
            check_transcendental($i, x87!($i), $domain, $soft);
        }
    )+};
}

transcendentals! {
    x87_sin_agrees_with_the_processor: "fsin", |_| true, |a, b, e| f80_sin(a, e).map(|v| [v, b]);
    x87_cos_agrees_with_the_processor: "fcos", |_| true, |a, b, e| f80_cos(a, e).map(|v| [v, b]);
    x87_sincos_agrees_with_the_processor: "fsincos", |_| true, |a, _, e| f80_sincos(a, e).map(|(s, c)| [c, s]);
    x87_tan_agrees_with_the_processor: "fptan", |_| true, |a, _, e| f80_tan(a, e).map(|(t, one)| [one, t]);
    x87_atan_agrees_with_the_processor: "fpatan", |_| true,
        |a, b, e| Some([f80_atan2(b, a, e), F80::ZERO]);
    x87_2xm1_agrees_with_the_processor: "f2xm1", |_| true, |a, b, e| Some([f80_2xm1(a, e), b]);
    x87_yl2x_agrees_with_the_processor: "fyl2x", |_| true, |a, b, e| Some([f80_yl2x(b, a, e), F80::ZERO]);
    x87_yl2xp1_agrees_with_the_processor: "fyl2xp1", |c| c.a.se & 0x7fff != 0x3ffe, // -1/2 and beyond: undefined
        |a, b, e| Some([f80_yl2xp1(b, a, e), F80::ZERO]);
}

/// MXCSR settings: rounding modes with and without DAZ and FTZ, sticky flags clear and set.
fn mxcsr_words() -> impl Iterator<Item = u32> {
    (0..4u32).flat_map(|rc| [0x1f80, 0x1fa0, 0x9f80, 0x1fc0, 0x9fc0, 0x9fe0].map(|v| v | rc << 13))
}

macro_rules! sse {
    ($instruction:literal) => {
        |a: u64, b: u64, mxcsr: u32| -> (u64, u32) {
            let (mut out, mut status, saved) = (a, mxcsr, 0x1f80u32);
            // SAFETY: only the named registers and MXCSR are changed, and MXCSR is put back.
            unsafe {
                asm!(
                    "ldmxcsr [{status}]",
                    "movq {x}, {out}",
                    "movq {y}, {b}",
                    concat!($instruction, " {x}, {y}"),
                    "movq {out}, {x}",
                    "stmxcsr [{status}]",
                    "ldmxcsr [{saved}]",
                    x = out(xmm_reg) _,
                    y = out(xmm_reg) _,
                    out = inout(reg) out,
                    b = in(reg) b,
                    status = in(reg) &mut status,
                    saved = in(reg) &saved,
                    options(nostack),
                );
            }
            (out, status)
        }
    };
}

type NativeSse = fn(u64, u64, u32) -> (u64, u32);

fn check_sse(name: &'static str, native: NativeSse, width: u32, soft: fn(u64, u64, &mut Env) -> u64) {
    let mut report = Report::new(name);
    let keep = if width == 32 { 0xffff_ffff } else { u64::MAX };
    for mxcsr in mxcsr_words() {
        for c in cases(mxcsr.into()) {
            let (a, b) = if width == 32 { (c.single().0.into(), c.single().1.into()) } else { c.double() };
            let (value, status) = native(a, b, mxcsr);
            let mut env = Env::sse(mxcsr);
            let r = soft(a, b, &mut env);
            let mut after = mxcsr;
            let trap = env.commit_sse(&mut after);
            golden(name, mxcsr, a.into(), b.into(), (value & keep).into(), status as u8 & ALL, false);
            report.check(!trap && after == status && r & keep == value & keep, || {
                format!("mxcsr {mxcsr:04x} a {a:016x} b {b:016x}: native {value:016x} {status:04x}, soft {r:016x} {after:04x}")
            });
        }
    }
}

macro_rules! sse_ops {
    ($($test:ident: $i:literal, $width:literal, $soft:expr;)+) => {$(
        #[test]
        fn $test() {
            check_sse($i, sse!($i), $width, $soft);
        }
    )+};
}

macro_rules! sse_binary {
    ($($test:ident: $single:literal, $double:literal, $f32:ident, $f64:ident;)+) => {$(
        #[test]
        fn $test() {
            check_sse($single, sse!($single), 32, |a, b, e| $f32(a as u32, b as u32, e).into());
            check_sse($double, sse!($double), 64, |a, b, e| $f64(a, b, e));
        }
    )+};
}

sse_binary! {
    sse_add_equals_the_processor: "addss", "addsd", f32_add, f64_add;
    sse_sub_equals_the_processor: "subss", "subsd", f32_sub, f64_sub;
    sse_mul_equals_the_processor: "mulss", "mulsd", f32_mul, f64_mul;
    sse_div_equals_the_processor: "divss", "divsd", f32_div, f64_div;
    sse_min_equals_the_processor: "minss", "minsd", f32_min, f64_min;
    sse_max_equals_the_processor: "maxss", "maxsd", f32_max, f64_max;
}

/// SQRT, conversions: the source is the second operand. The upper part of a double-width result is not looked at.
fn keep_high(a: u64, low: u32) -> u64 {
    a & !0xffff_ffff | u64::from(low)
}

sse_ops! {
    sse_sqrtss_equals_the_processor: "sqrtss", 32, |_, b, e| f32_sqrt(b as u32, e).into();
    sse_sqrtsd_equals_the_processor: "sqrtsd", 64, |_, b, e| f64_sqrt(b, e);
    sse_cvtsd2ss_equals_the_processor: "cvtsd2ss", 64, |a, b, e| keep_high(a, f64_to_f32(b, e));
    sse_cvtss2sd_equals_the_processor: "cvtss2sd", 64, |_, b, e| f32_to_f64(b as u32, e);
    sse_cvtps2dq_equals_the_processor: "cvtps2dq", 64,
        |_, b, e| u64::from(f32_to_i32(b as u32, e) as u32) | u64::from(f32_to_i32((b >> 32) as u32, e) as u32) << 32;
    sse_cvttps2dq_equals_the_processor: "cvttps2dq", 64,
        |_, b, e| u64::from(f32_to_i32_trunc(b as u32, e) as u32)
            | u64::from(f32_to_i32_trunc((b >> 32) as u32, e) as u32) << 32;
    sse_cvtpd2dq_equals_the_processor: "cvtpd2dq", 32, |_, b, e| u64::from(f64_to_i32(b, e) as u32);
    sse_cvttpd2dq_equals_the_processor: "cvttpd2dq", 32, |_, b, e| u64::from(f64_to_i32_trunc(b, e) as u32);
    sse_cvtdq2ps_equals_the_processor: "cvtdq2ps", 32, |_, b, e| f32_from_i32(b as i32, e).into();
    sse_cvtdq2pd_equals_the_processor: "cvtdq2pd", 64, |_, b, e| f64_from_i32(b as i32, e);
}

macro_rules! sse_predicates {
    ($($n:literal)+) => {
        #[test]
        fn sse_compare_predicates_equal_the_processor() {$(
            check_sse(concat!("cmpss ", $n), |a, b, m| {
                let (mut out, mut status, saved) = (a, m, 0x1f80u32);
                // SAFETY: as above.
                unsafe {
                    asm!("ldmxcsr [{status}]", "movq {x}, {out}", "movq {y}, {b}",
                        concat!("cmpss {x}, {y}, ", $n), "movq {out}, {x}", "stmxcsr [{status}]", "ldmxcsr [{saved}]",
                        x = out(xmm_reg) _, y = out(xmm_reg) _, out = inout(reg) out, b = in(reg) b,
                        status = in(reg) &mut status, saved = in(reg) &saved, options(nostack));
                }
                (out, status)
            }, 32, |a, b, e| if f32_cmp_predicate(a as u32, b as u32, $n, e) { u32::MAX.into() } else { 0 });
        )+}
    };
}

sse_predicates!(0 1 2 3 4 5 6 7);

macro_rules! converts_to_integer {
    ($($test:ident: $i:literal, $reg:literal, $width:literal, $soft:expr;)+) => {$(
        #[test]
        fn $test() {
            check_sse(stringify!($test), |_, b, m| {
                let (out, mut status, saved): (u64, u32, u32);
                status = m;
                saved = 0x1f80;
                // SAFETY: as above.
                unsafe {
                    asm!("ldmxcsr [{status}]", "movq {y}, {b}", concat!($i, " {out", $reg, "}, {y}"),
                        "stmxcsr [{status}]", "ldmxcsr [{saved}]",
                        y = out(xmm_reg) _, out = out(reg) out, b = in(reg) b,
                        status = in(reg) &mut status, saved = in(reg) &saved, options(nostack));
                }
                (out, status)
            }, $width, $soft);
        }
    )+};
}

converts_to_integer! {
    sse_cvtsd2si_equals_the_processor: "cvtsd2si", ":r", 64, |_, b, e| f64_to_i64(b, e) as u64;
    sse_cvttsd2si_equals_the_processor: "cvttsd2si", ":r", 64, |_, b, e| f64_to_i64_trunc(b, e) as u64;
    sse_cvtss2si_equals_the_processor: "cvtss2si", ":r", 64, |_, b, e| f32_to_i64(b as u32, e) as u64;
    sse_cvtss2si_32_equals_the_processor: "cvtss2si", ":e", 32, |_, b, e| f32_to_i32(b as u32, e) as u32 as u64;
}

macro_rules! with_immediate {
    ($name:literal, $i:literal, $imm:literal, $width:literal, $soft:expr) => {
        check_sse(concat!($name, " ", $imm), |a, b, m| {
            let (mut out, mut status, saved) = (a, m, 0x1f80u32);
            // SAFETY: as above.
            unsafe {
                asm!("ldmxcsr [{status}]", "movq {x}, {out}", "movq {y}, {b}",
                    concat!($i, " {x}, {y}, ", $imm), "movq {out}, {x}", "stmxcsr [{status}]", "ldmxcsr [{saved}]",
                    x = out(xmm_reg) _, y = out(xmm_reg) _, out = inout(reg) out, b = in(reg) b,
                    status = in(reg) &mut status, saved = in(reg) &saved, options(nostack));
            }
            (out, status)
        }, $width, $soft);
    };
}

#[test]
fn sse_round_equals_the_processor() {
    if !std::arch::is_x86_feature_detected!("sse4.1") {
        return;
    }
    with_immediate!("roundsd", "roundsd", "4", 64, |_, b, e| f64_round(b, true, e));
    with_immediate!("roundsd", "roundsd", "12", 64, |_, b, e| f64_round(b, false, e));
    with_immediate!("roundss", "roundss", "4", 32, |_, b, e| f32_round(b as u32, true, e).into());
}

#[test]
fn fma_equals_the_processor() {
    if !std::arch::is_x86_feature_detected!("fma") {
        return;
    }
    let mut report = Report::new("vfmadd213sd");
    let mut report32 = Report::new("vfmadd213ss");
    macro_rules! native {
        ($i:literal, $a:expr, $b:expr, $c:expr, $m:expr) => {{
            let (mut out, mut status, saved) = ($a, $m, 0x1f80u32);
            // SAFETY: as above; FMA is there.
            unsafe {
                asm!("ldmxcsr [{status}]", "movq {x}, {out}", "movq {y}, {b}", "movq {z}, {c}",
                    concat!($i, " {x}, {y}, {z}"), "movq {out}, {x}", "stmxcsr [{status}]", "ldmxcsr [{saved}]",
                    x = out(xmm_reg) _, y = out(xmm_reg) _, z = out(xmm_reg) _, out = inout(reg) out,
                    b = in(reg) $b, c = in(reg) $c,
                    status = in(reg) &mut status, saved = in(reg) &saved, options(nostack));
            }
            (out, status)
        }};
    }
    for mxcsr in mxcsr_words() {
        let mut previous = 0u64;
        for case in cases(mxcsr.into()) {
            let (a, b) = case.double();
            // Every second case is close to cancellation.
            let c = if b & 1 == 0 {
                previous
            } else {
                (f64::from_bits(a) * f64::from_bits(b)).to_bits() ^ 1 << 63 ^ (previous & 7)
            };
            previous = a;
            let (value, status) = native!("vfmadd213sd", a, b, c, mxcsr);
            // Form 213 multiplies the second operand by the first.
            let mut env = Env::sse(mxcsr);
            let r = f64_fma(b, a, c, &mut env);
            let mut after = mxcsr;
            let _ = env.commit_sse(&mut after);
            report.check(after == status && r == value, || {
                format!("mxcsr {mxcsr:04x} {a:016x} {b:016x} {c:016x}: native {value:016x} {status:04x}, soft {r:016x} {after:04x}")
            });
            let (a, b) = case.single();
            let c = c as u32;
            let (value, status) = native!("vfmadd213ss", u64::from(a), u64::from(b), u64::from(c), mxcsr);
            let mut env = Env::sse(mxcsr);
            let r = f32_fma(b, a, c, &mut env);
            let mut after = mxcsr;
            let _ = env.commit_sse(&mut after);
            report32.check(after == status && r == value as u32, || {
                format!("mxcsr {mxcsr:04x} {a:08x} {b:08x} {c:08x}: native {value:08x} {status:04x}, soft {r:08x} {after:04x}")
            });
        }
    }
}
