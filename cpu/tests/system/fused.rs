// SPDX-License-Identifier: Apache-2.0
//! A comparison and the conditional jump behind it, which run as one: result, flags, count and faults are those of the
//! two instructions (APM vol. 3: CMP, TEST, AND, DEC, Jcc).

use iced_x86::code_asm::*;
use softcpu::x86::system::exitcode as exit;
use softcpu::x86::vmcb::save;

use crate::common::*;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Cmp,
    Test,
    And,
    Dec,
}

/// Where the operands are: A = rAX, B = rBX, M = memory at RCX, I = immediate.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    AB,
    AI,
    AM,
    MB,
    MI,
}

const FORMS: [(Kind, Form); 10] = [
    (Kind::Cmp, Form::AB),
    (Kind::Cmp, Form::AI),
    (Kind::Cmp, Form::AM),
    (Kind::Cmp, Form::MB),
    (Kind::Cmp, Form::MI),
    (Kind::Test, Form::AB),
    (Kind::Test, Form::AI),
    (Kind::Test, Form::MI),
    (Kind::And, Form::AI),
    (Kind::Dec, Form::AB),
];

const VALUES: [u64; 11] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    i64::MAX as u64,
    i64::MIN as u64,
    u64::MAX,
];
const IMMEDIATES: [i32; 5] = [0, 1, 0x7f, -128, -1];

fn emit(a: &mut CodeAssembler, kind: Kind, form: Form, size: u32, i: i32) -> Result<(), iced_x86::IcedError> {
    macro_rules! operation {
        ($op:ident) => {
            match (form, size) {
                (Form::AB, 1) => a.$op(al, bl),
                (Form::AB, 4) => a.$op(eax, ebx),
                (Form::AB, _) => a.$op(rax, rbx),
                (Form::AI, 1) => a.$op(al, i),
                (Form::AI, 4) => a.$op(eax, i),
                (Form::AI, _) => a.$op(rax, i),
                (Form::MB, 1) => a.$op(byte_ptr(rcx), bl),
                (Form::MB, 4) => a.$op(dword_ptr(rcx), ebx),
                (Form::MB, _) => a.$op(qword_ptr(rcx), rbx),
                (Form::MI, 1) => a.$op(byte_ptr(rcx), i),
                (Form::MI, 4) => a.$op(dword_ptr(rcx), i),
                (Form::MI, _) => a.$op(qword_ptr(rcx), i),
                (Form::AM, _) => unreachable!(),
            }
        };
    }
    match (kind, form, size) {
        (Kind::Cmp, Form::AM, 1) => a.cmp(al, byte_ptr(rcx)),
        (Kind::Cmp, Form::AM, 4) => a.cmp(eax, dword_ptr(rcx)),
        (Kind::Cmp, Form::AM, _) => a.cmp(rax, qword_ptr(rcx)),
        (Kind::Cmp, ..) => operation!(cmp),
        (Kind::Test, ..) => operation!(test),
        (Kind::And, ..) => operation!(and),
        (Kind::Dec, _, 1) => a.dec(al),
        (Kind::Dec, _, 4) => a.dec(eax),
        (Kind::Dec, ..) => a.dec(rax),
    }
}

const CF: u64 = 1;
const PF: u64 = 4;
const ZF: u64 = 0x40;
const SF: u64 = 0x80;
const OF: u64 = 0x800;

/// CF, PF, ZF, SF and OF after the operation on values of `bits`, all clear before.
fn flags(kind: Kind, bits: u32, a: u64, b: u64) -> u64 {
    let mask = u64::MAX >> (64 - bits);
    let signed = |v: u64| ((v << (64 - bits)) as i64 >> (64 - bits)) as i128;
    let (a, b) = (a & mask, if kind == Kind::Dec { 1 } else { b & mask });
    let (result, carry, overflow) = match kind {
        Kind::Test | Kind::And => (a & b, false, false),
        Kind::Cmp | Kind::Dec => {
            let r = a.wrapping_sub(b) & mask;
            (r, a < b && kind == Kind::Cmp, signed(a) - signed(b) != signed(r))
        }
    };
    let mut f = 0;
    for (bit, set) in [
        (CF, carry),
        (PF, (result as u8).count_ones() % 2 == 0),
        (ZF, result == 0),
        (SF, signed(result) < 0),
        (OF, overflow),
    ] {
        f |= if set { bit } else { 0 };
    }
    f
}

/// Condition `cc` of Jcc (APM vol. 3, table 1-10).
fn holds(cc: u8, f: u64) -> bool {
    let (cf, zf, sf, of) = (f & CF != 0, f & ZF != 0, f & SF != 0, f & OF != 0);
    let v = match cc >> 1 {
        0 => of,
        1 => cf,
        2 => zf,
        3 => cf | zf,
        4 => sf,
        5 => f & PF != 0,
        6 => sf != of,
        _ => zf | (sf != of),
    };
    v ^ (cc & 1 != 0)
}

#[test]
fn a_comparison_and_its_jump_do_what_the_two_do() {
    let mut g = Guest::long(|_| {});
    for (kind, form) in FORMS {
        for (size, cc) in [1u32, 4, 8].into_iter().flat_map(|s| (0..16u8).map(move |cc| (s, cc))) {
            let immediate = matches!(form, Form::AI | Form::MI);
            for (n, i) in IMMEDIATES.into_iter().enumerate() {
                if n > 0 && !immediate {
                    break;
                }
                g.assemble(64, CODE, |a| {
                    emit(a, kind, form, size, i).unwrap();
                    // Over MOV ESI, 0 and HLT.
                    a.db(&[0x70 + cc, 6]).unwrap();
                    a.mov(esi, 0).unwrap();
                    a.hlt().unwrap();
                    a.mov(esi, 1).unwrap();
                    a.hlt().unwrap();
                });
                for (m, x) in VALUES.into_iter().enumerate() {
                    for y in VALUES {
                        let b = if immediate { i as i64 as u64 } else { y };
                        // Now and then across two pages, which never takes the short way.
                        let at = if m % 4 == 3 { DATA + 0xfff } else { DATA };
                        g.set(save::RIP, CODE);
                        g.set(save::RFLAGS, 2u64);
                        g.set(save::RAX, x);
                        g.cpu.rb.gpr[3] = b;
                        g.cpu.rb.gpr[1] = at;
                        g.memory.write::<u64>(at, if form == Form::AM { b } else { x });
                        let before = g.cpu.engine.instructions();
                        g.expect_exit(exit::HLT);
                        let expected = flags(kind, size * 8, x, b);
                        let what = (kind, form, size, cc, x, b);
                        assert_eq!(g.rflags() & (CF | PF | ZF | SF | OF), expected, "{what:x?}");
                        assert_eq!(g.cpu.rb.gpr[6] != 0, holds(cc, expected), "{what:x?}");
                        assert_eq!(g.cpu.engine.instructions() - before, 3, "{what:x?}");
                        if immediate {
                            break;
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_comparison_that_faults_leaves_its_jump_undone() {
    let mut g = Guest::long(|a| {
        a.nop().unwrap();
        a.cmp(qword_ptr(rcx), rbx).unwrap();
        a.db(&[0x75, 0]).unwrap();
        a.hlt().unwrap();
    });
    g.cpu.rb.gpr[1] = DATA;
    g.memory.change_leaf(DATA, 0, pte::P);
    let before = g.cpu.engine.instructions();
    g.expect(14, Some(0), CODE + 1);
    assert_eq!(g.cpu.engine.instructions() - before, 1);
}
