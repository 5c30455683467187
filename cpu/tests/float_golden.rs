// SPDX-License-Identifier: Apache-2.0
//! The software floating point against answers that x86 processors gave earlier, on every host.
//!
//! The file was recorded on an Intel processor of family 6. Each line: operation, control word (FCW or MXCSR), operands, result, flags, C1, in hexadecimal.
//! `SOFTCPU_FLOAT_GOLDEN=FILE cargo test --test float_native` writes such lines on an x86-64 host.

mod float_cases;

use float_cases::intel_differs;
use softcpu::float::*;

const GOLDEN: &str = include_str!("float_golden.txt");

type X87 = fn(F80, F80, &mut Env) -> F80;
type Sse = fn(u64, u64, &mut Env) -> u64;

const X87_OPS: &[(&str, X87)] = &[
    ("fadd", f80_add),
    ("fsub", f80_sub),
    ("fmul", f80_mul),
    ("fdiv", f80_div),
    ("fscale", f80_scale),
    ("fsqrt", |a, _, e| f80_sqrt(a, e)),
    ("frndint", |a, _, e| f80_round(a, e)),
    ("fxtract", |a, _, e| f80_extract(a, e).1),
    ("fsin", |a, _, e| f80_sin(a, e).unwrap_or(a)),
    ("fcos", |a, _, e| f80_cos(a, e).unwrap_or(a)),
    ("fpatan", |a, b, e| f80_atan2(b, a, e)),
    ("f2xm1", |a, _, e| f80_2xm1(a, e)),
    ("fyl2x", |a, b, e| f80_yl2x(b, a, e)),
    ("fyl2xp1", |a, b, e| f80_yl2xp1(b, a, e)),
];

const SSE_OPS: &[(&str, Sse)] = &[
    ("addss", |a, b, e| f32_add(a as u32, b as u32, e).into()),
    ("subss", |a, b, e| f32_sub(a as u32, b as u32, e).into()),
    ("mulss", |a, b, e| f32_mul(a as u32, b as u32, e).into()),
    ("divss", |a, b, e| f32_div(a as u32, b as u32, e).into()),
    ("minss", |a, b, e| f32_min(a as u32, b as u32, e).into()),
    ("maxss", |a, b, e| f32_max(a as u32, b as u32, e).into()),
    ("sqrtss", |_, b, e| f32_sqrt(b as u32, e).into()),
    ("addsd", f64_add),
    ("subsd", f64_sub),
    ("mulsd", f64_mul),
    ("divsd", f64_div),
    ("minsd", f64_min),
    ("maxsd", f64_max),
    ("sqrtsd", |_, b, e| f64_sqrt(b, e)),
    ("cvtsd2ss", |a, b, e| a & !0xffff_ffff | u64::from(f64_to_f32(b, e))),
    ("cvtss2sd", |_, b, e| f32_to_f64(b as u32, e)),
];

#[test]
fn results_and_flags_equal_those_of_real_processors() {
    let (mut seen, mut peculiar) = (0, 0);
    for line in GOLDEN.lines().filter(|l| !l.starts_with('#')) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| u128::from_str_radix(words[i], 16).expect("a hexadecimal number");
        let (control, a, b, value) = (number(1) as u32, number(2), number(3), number(4));
        let (flags, c1) = (number(5) as u8, number(6) != 0);
        if let Some((_, op)) = X87_OPS.iter().find(|o| o.0 == words[0]) {
            let (a, b) = (F80::from_bits(a), F80::from_bits(b));
            if intel_differs(words[0], a, b) {
                peculiar += 1;
                continue;
            }
            let mut env = Env::x87(control as u16);
            let r = op(a, b, &mut env);
            assert_eq!((r, env.flags, env.c1), (F80::from_bits(value), flags, c1), "{line}");
        } else if let Some((_, op)) = SSE_OPS.iter().find(|o| o.0 == words[0]) {
            let mut env = Env::sse(control);
            let r = op(a as u64, b as u64, &mut env);
            let mut mxcsr = control;
            assert!(!env.commit_sse(&mut mxcsr), "{line}");
            assert_eq!((r, mxcsr as u8 & ALL), (value as u64, flags), "{line}");
        } else {
            panic!("unknown operation: {line}");
        }
        seen += 1;
    }
    assert!(seen > 1000, "only {seen} golden lines");
    assert!(peculiar < seen / 20, "{peculiar} lines show peculiarities of Intel's");
}
