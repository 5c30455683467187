// SPDX-License-Identifier: Apache-2.0
//! The x87 unit, the state that MMX shares with it, and the instructions that save and restore it all.
//!
//! Arithmetic is in [`crate::float`]; here are the register stack, the exceptions and the images in memory.
//! FIP, FCS, FDP and FDS are updated by every instruction that isn't a control instruction, FOP when an unmasked
//! exception is recorded; FXSAVE and XSAVE always save them (CPUID 8000_0008.EBX bit 2).

pub mod arith;
pub mod control;
pub mod fxsave;
pub mod moves;
pub mod stack;
pub mod xsave;

use iced_x86::{Code, Instruction, OpKind, Register};

use super::op::{Handler, Op, handler};
use super::translate::Context;
use crate::float::{self, Constant};
use arith::{form, operation};
use moves::format;

pub use xsave::{SUPPORTED_XCR0, compacted_size, validate_xcr0, xsave_size};

/// Number of the ST(i) operand that isn't ST0 (0 if both are, or there is none).
fn stack_operand(i: &Instruction) -> u8 {
    (0..i.op_count())
        .filter(|&n| i.op_kind(n) == OpKind::Register)
        .map(|n| i.op_register(n))
        .filter(|r| (Register::ST0..=Register::ST7).contains(r))
        .map(|r| r as u8 - Register::ST0 as u8)
        .max()
        .unwrap_or(0)
}

/// Condition code of an FCMOVcc.
fn condition(code: Code) -> u8 {
    match code {
        Code::Fcmovb_st0_sti => 2,
        Code::Fcmovnb_st0_sti => 3,
        Code::Fcmove_st0_sti => 4,
        Code::Fcmovne_st0_sti => 5,
        Code::Fcmovbe_st0_sti => 6,
        Code::Fcmovnbe_st0_sti => 7,
        Code::Fcmovu_st0_sti => 10,
        _ => 11,
    }
}

/// Rows of one operation: code of each form.
macro_rules! arithmetic {
    ($code:expr, $($op:ident: $m32:ident $m64:ident $i16:ident $i32:ident $st0:ident $sti:ident $pop:ident;)+) => {
        match $code {
            $(
                Code::$m32 => Some(handler(arith::arithmetic::<{ operation::$op }, { form::M32 }>)),
                Code::$m64 => Some(handler(arith::arithmetic::<{ operation::$op }, { form::M64 }>)),
                Code::$i16 => Some(handler(arith::arithmetic::<{ operation::$op }, { form::I16 }>)),
                Code::$i32 => Some(handler(arith::arithmetic::<{ operation::$op }, { form::I32 }>)),
                Code::$st0 => Some(handler(arith::arithmetic::<{ operation::$op }, { form::ST0 }>)),
                Code::$sti => Some(handler(arith::arithmetic::<{ operation::$op }, { form::STI }>)),
                Code::$pop => Some(handler(arith::arithmetic::<{ operation::$op }, { form::POP }>)),
            )+
            _ => None,
        }
    };
}

fn arithmetic(code: Code) -> Option<Handler> {
    arithmetic!(code,
        ADD: Fadd_m32fp Fadd_m64fp Fiadd_m16int Fiadd_m32int Fadd_st0_sti Fadd_sti_st0 Faddp_sti_st0;
        MUL: Fmul_m32fp Fmul_m64fp Fimul_m16int Fimul_m32int Fmul_st0_sti Fmul_sti_st0 Fmulp_sti_st0;
        SUB: Fsub_m32fp Fsub_m64fp Fisub_m16int Fisub_m32int Fsub_st0_sti Fsub_sti_st0 Fsubp_sti_st0;
        SUBR: Fsubr_m32fp Fsubr_m64fp Fisubr_m16int Fisubr_m32int Fsubr_st0_sti Fsubr_sti_st0 Fsubrp_sti_st0;
        DIV: Fdiv_m32fp Fdiv_m64fp Fidiv_m16int Fidiv_m32int Fdiv_st0_sti Fdiv_sti_st0 Fdivp_sti_st0;
        DIVR: Fdivr_m32fp Fdivr_m64fp Fidivr_m16int Fidivr_m32int Fdivr_st0_sti Fdivr_sti_st0 Fdivrp_sti_st0;
    )
}

fn comparison(code: Code) -> Option<Handler> {
    use arith::{compare, compare_flags, compare_memory};
    Some(match code {
        Code::Fcom_m32fp => handler(compare_memory::<{ form::M32 }, 0>),
        Code::Fcom_m64fp => handler(compare_memory::<{ form::M64 }, 0>),
        Code::Ficom_m16int => handler(compare_memory::<{ form::I16 }, 0>),
        Code::Ficom_m32int => handler(compare_memory::<{ form::I32 }, 0>),
        Code::Fcomp_m32fp => handler(compare_memory::<{ form::M32 }, 1>),
        Code::Fcomp_m64fp => handler(compare_memory::<{ form::M64 }, 1>),
        Code::Ficomp_m16int => handler(compare_memory::<{ form::I16 }, 1>),
        Code::Ficomp_m32int => handler(compare_memory::<{ form::I32 }, 1>),
        Code::Fcom_st0_sti | Code::Fcom_st0_sti_DCD0 => handler(compare::<true, 0>),
        Code::Fcomp_st0_sti | Code::Fcomp_st0_sti_DCD8 | Code::Fcomp_st0_sti_DED0 => {
            handler(compare::<true, 1>)
        }
        Code::Fcompp => handler(compare::<true, 2>),
        Code::Fucom_st0_sti => handler(compare::<false, 0>),
        Code::Fucomp_st0_sti => handler(compare::<false, 1>),
        Code::Fucompp => handler(compare::<false, 2>),
        Code::Fcomi_st0_sti => handler(compare_flags::<true, false>),
        Code::Fcomip_st0_sti => handler(compare_flags::<true, true>),
        Code::Fucomi_st0_sti => handler(compare_flags::<false, false>),
        Code::Fucomip_st0_sti => handler(compare_flags::<false, true>),
        Code::Ftst => handler(arith::test),
        Code::Fxam => handler(arith::examine),
        _ => return None,
    })
}

fn function(code: Code) -> Option<Handler> {
    use arith::{binary_pop, constant, remainder, split, trigonometric, unary};
    Some(match code {
        Code::Fchs => handler(|c, o| unary(c, o, |v, _| v.neg())),
        Code::Fabs => handler(|c, o| unary(c, o, |v, _| v.abs())),
        Code::Fsqrt => handler(|c, o| unary(c, o, float::f80_sqrt)),
        Code::Frndint => handler(|c, o| unary(c, o, float::f80_round)),
        Code::F2xm1 => handler(|c, o| unary(c, o, float::f80_2xm1)),
        Code::Fsin => handler(|c, o| trigonometric(c, o, float::f80_sin)),
        Code::Fcos => handler(|c, o| trigonometric(c, o, float::f80_cos)),
        Code::Fsincos => handler(|c, o| split(c, o, true, float::f80_sincos)),
        Code::Fptan => handler(|c, o| split(c, o, true, float::f80_tan)),
        Code::Fxtract => handler(|c, o| split(c, o, false, |v, env| Some(float::f80_extract(v, env)))),
        Code::Fpatan => handler(|c, o| binary_pop(c, o, float::f80_atan2)),
        Code::Fyl2x => handler(|c, o| binary_pop(c, o, float::f80_yl2x)),
        Code::Fyl2xp1 => handler(|c, o| binary_pop(c, o, float::f80_yl2xp1)),
        Code::Fscale => handler(arith::scale),
        Code::Fprem => handler(remainder::<false>),
        Code::Fprem1 => handler(remainder::<true>),
        Code::Fld1 => handler(|c, o| constant(c, o, Constant::One)),
        Code::Fldl2t => handler(|c, o| constant(c, o, Constant::Log2Of10)),
        Code::Fldl2e => handler(|c, o| constant(c, o, Constant::Log2OfE)),
        Code::Fldpi => handler(|c, o| constant(c, o, Constant::Pi)),
        Code::Fldlg2 => handler(|c, o| constant(c, o, Constant::Log10Of2)),
        Code::Fldln2 => handler(|c, o| constant(c, o, Constant::LnOf2)),
        Code::Fldz => handler(|c, o| constant(c, o, Constant::Zero)),
        _ => return None,
    })
}

fn movement(code: Code) -> Option<Handler> {
    use moves::{load, store};
    Some(match code {
        Code::Fld_m32fp => handler(load::<{ format::F32 }>),
        Code::Fld_m64fp => handler(load::<{ format::F64 }>),
        Code::Fld_m80fp => handler(load::<{ format::F80 }>),
        Code::Fild_m16int => handler(load::<{ format::I16 }>),
        Code::Fild_m32int => handler(load::<{ format::I32 }>),
        Code::Fild_m64int => handler(load::<{ format::I64 }>),
        Code::Fbld_m80bcd => handler(load::<{ format::BCD }>),
        Code::Fst_m32fp => handler(store::<{ format::F32 }, false, false>),
        Code::Fst_m64fp => handler(store::<{ format::F64 }, false, false>),
        Code::Fstp_m32fp => handler(store::<{ format::F32 }, true, false>),
        Code::Fstp_m64fp => handler(store::<{ format::F64 }, true, false>),
        Code::Fstp_m80fp => handler(store::<{ format::F80 }, true, false>),
        Code::Fist_m16int => handler(store::<{ format::I16 }, false, false>),
        Code::Fist_m32int => handler(store::<{ format::I32 }, false, false>),
        Code::Fistp_m16int => handler(store::<{ format::I16 }, true, false>),
        Code::Fistp_m32int => handler(store::<{ format::I32 }, true, false>),
        Code::Fistp_m64int => handler(store::<{ format::I64 }, true, false>),
        Code::Fisttp_m16int => handler(store::<{ format::I16 }, true, true>),
        Code::Fisttp_m32int => handler(store::<{ format::I32 }, true, true>),
        Code::Fisttp_m64int => handler(store::<{ format::I64 }, true, true>),
        Code::Fbstp_m80bcd => handler(store::<{ format::BCD }, true, false>),
        Code::Fld_sti => handler(moves::load_register),
        Code::Fst_sti => handler(moves::store_register::<false>),
        Code::Fstp_sti | Code::Fstp_sti_DFD0 | Code::Fstp_sti_DFD8 => handler(moves::store_register::<true>),
        Code::Fstpnce_sti => handler(moves::store_register_quietly),
        Code::Fxch_st0_sti | Code::Fxch_st0_sti_DDC8 | Code::Fxch_st0_sti_DFC8 => handler(moves::exchange),
        Code::Fcmovb_st0_sti
        | Code::Fcmovnb_st0_sti
        | Code::Fcmove_st0_sti
        | Code::Fcmovne_st0_sti
        | Code::Fcmovbe_st0_sti
        | Code::Fcmovnbe_st0_sti
        | Code::Fcmovu_st0_sti
        | Code::Fcmovnu_st0_sti => handler(moves::conditional),
        Code::Ffree_sti => handler(moves::free::<false>),
        Code::Ffreep_sti => handler(moves::free::<true>),
        Code::Fincstp => handler(moves::rotate::<1>),
        Code::Fdecstp => handler(moves::rotate::<7>),
        _ => return None,
    })
}

fn control(code: Code) -> Option<Handler> {
    Some(match code {
        Code::Wait => handler(control::wait),
        Code::Fnop => handler(control::no_operation),
        Code::Fneni | Code::Fndisi | Code::Fnsetpm => handler(control::obsolete),
        Code::Fninit => handler(control::initialize),
        Code::Fnclex => handler(control::clear_exceptions),
        Code::Fldcw_m2byte => handler(control::load_control),
        Code::Fnstcw_m2byte => handler(control::store_control),
        Code::Fnstsw_m2byte => handler(control::store_status),
        Code::Fnstsw_AX => handler(control::store_status_ax),
        Code::Fnstenv_m14byte => handler(control::store_environment::<false>),
        Code::Fnstenv_m28byte => handler(control::store_environment::<true>),
        Code::Fldenv_m14byte => handler(control::load_environment::<false>),
        Code::Fldenv_m28byte => handler(control::load_environment::<true>),
        Code::Fnsave_m94byte => handler(control::save::<false>),
        Code::Fnsave_m108byte => handler(control::save::<true>),
        Code::Frstor_m94byte => handler(control::restore::<false>),
        Code::Frstor_m108byte => handler(control::restore::<true>),
        Code::Fxsave_m512byte => handler(fxsave::fxsave::<false>),
        Code::Fxsave64_m512byte => handler(fxsave::fxsave::<true>),
        Code::Fxrstor_m512byte => handler(fxsave::fxrstor::<false>),
        Code::Fxrstor64_m512byte => handler(fxsave::fxrstor::<true>),
        Code::Ldmxcsr_m32 => handler(fxsave::ldmxcsr),
        Code::Stmxcsr_m32 => handler(fxsave::stmxcsr),
        Code::Xsave_mem => handler(xsave::xsave::<false, false>),
        Code::Xsave64_mem => handler(xsave::xsave::<true, false>),
        Code::Xsaveopt_mem => handler(xsave::xsave::<false, true>),
        Code::Xsaveopt64_mem => handler(xsave::xsave::<true, true>),
        Code::Xsavec_mem => handler(xsave::xsavec::<false, false>),
        Code::Xsavec64_mem => handler(xsave::xsavec::<true, false>),
        Code::Xsaves_mem => handler(xsave::xsavec::<false, true>),
        Code::Xsaves64_mem => handler(xsave::xsavec::<true, true>),
        Code::Xrstor_mem => handler(xsave::xrstor::<false, false>),
        Code::Xrstor64_mem => handler(xsave::xrstor::<true, false>),
        Code::Xrstors_mem => handler(xsave::xrstor::<false, true>),
        Code::Xrstors64_mem => handler(xsave::xrstor::<true, true>),
        _ => return None,
    })
}

/// Translates this family's instructions.
pub fn translate(i: &Instruction, op: &mut Op, _: &Context) -> Option<Handler> {
    let code = i.code();
    let found =
        arithmetic(code).or_else(|| movement(code)).or_else(|| comparison(code)).or_else(|| function(code));
    if let Some(f) = found {
        op.aux = match code {
            Code::Fcompp | Code::Fucompp => 1,
            _ => stack_operand(i),
        };
        op.src = condition(code);
        return Some(f);
    }
    control(code)
}
