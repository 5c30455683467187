// SPDX-License-Identifier: Apache-2.0
//! Moves between vector registers, MMX registers, general registers and memory.

use iced_x86::{Code, Instruction, OpKind};

use super::super::access::Access;
use super::super::access::Align;
use super::super::flags::Int;
use super::super::op::{Handler, Op, Res, SLOT_ZERO, flag, handler, handler_fast};
use super::super::state::{Cpu, reg};
use super::super::translate::segment;
use super::form::{A128, Form, M128, U128};
use super::integer::{movmskpd, movmskps, pmovmskb};
use super::shuffle::{extract, insert, insertps, movshdup, movsldup};
use super::vector::{V, split, with_low32, with_low64};

/// XMM to XMM or 16 bytes of memory.
fn store128<const ALIGNED: bool>(form: Form) -> Handler {
    fn slow<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Res {
        cpu.sse_ready()?;
        let v = cpu.xmm(op.src);
        cpu.store128(op, v, if ALIGNED { Align::Always } else { Align::Any })
    }
    #[inline(always)]
    fn fast<const ALIGNED: bool, const SIMPLE: bool>(cpu: &mut Cpu, op: &Op) -> bool {
        let v = cpu.xmm(op.src);
        cpu.sse_enabled() && cpu.quick_store128::<ALIGNED, SIMPLE>(op, v)
    }
    if !form.mem {
        form.load::<M128>()
    } else if form.simple {
        handler_fast(fast::<ALIGNED, true>, slow::<ALIGNED>)
    } else {
        handler_fast(fast::<ALIGNED, false>, slow::<ALIGNED>)
    }
}

/// XMM to memory of type T: the value `f` picks.
fn store<T: Int>(form: Form, f: impl Fn(V, u8) -> T + Copy + 'static) -> Handler {
    let slow = move |cpu: &mut Cpu, op: &Op| {
        cpu.sse_ready()?;
        let v = f(cpu.xmm(op.src), op.imm as u8);
        cpu.store::<T>(op, v)
    };
    if form.simple {
        handler_fast(
            move |cpu: &mut Cpu, op: &Op| {
                let v = f(cpu.xmm(op.src), op.imm as u8);
                cpu.sse_enabled() && cpu.quick_store::<T, true>(op, v)
            },
            slow,
        )
    } else {
        handler_fast(
            move |cpu: &mut Cpu, op: &Op| {
                let v = f(cpu.xmm(op.src), op.imm as u8);
                cpu.sse_enabled() && cpu.quick_store::<T, false>(op, v)
            },
            slow,
        )
    }
}

/// MOVSS or MOVSD to XMM: memory clears the rest, a register leaves it.
fn load_scalar<const SIZE: u32>(form: Form, merge: impl Fn(V, V) -> V + Copy + 'static) -> Handler {
    if form.mem { form.load::<SIZE>() } else { form.x2::<SIZE>(merge) }
}

/// `f` without a source that can fault.
fn register_only(f: impl Fn(&mut Cpu, &Op) + Copy + 'static) -> Handler {
    handler_fast(
        move |cpu: &mut Cpu, op: &Op| {
            if !cpu.sse_enabled() {
                return false;
            }
            f(cpu, op);
            true
        },
        move |cpu: &mut Cpu, op: &Op| {
            cpu.sse_ready()?;
            f(cpu, op);
            Ok(())
        },
    )
}

/// General register or memory of type T to XMM, the rest cleared.
macro_rules! from_general {
    ($t:ty, $form:expr) => {
        if $form.mem {
            $form.load::<{ size_of::<$t>() as u32 }>()
        } else {
            register_only(|cpu: &mut Cpu, op: &Op| {
                let v: $t = cpu.reg(op.src);
                cpu.set_xmm(op.dst, [v as u64, 0]);
            })
        }
    };
}

/// Element of XMM to memory of type T, or zero-extended to a general register.
fn to_general<T: Int>(form: Form, f: impl Fn(V, u8) -> T + Copy + 'static) -> Handler {
    if form.mem {
        store::<T>(form, f)
    } else {
        register_only(move |cpu: &mut Cpu, op: &Op| {
            let v = f(cpu.xmm(op.src), op.imm as u8);
            cpu.set_reg::<u64>(op.dst, v.to_u64());
        })
    }
}

/// General register or memory of `SIZE` bytes inserted into XMM.
fn insert_general<const SIZE: u32>(form: Form, f: impl Fn(V, u64, u8) -> V + Copy + 'static) -> Handler {
    if form.mem {
        form.x2i::<SIZE>(move |a, b, n| f(a, b[0], n))
    } else {
        register_only(move |cpu: &mut Cpu, op: &Op| {
            let r = f(cpu.xmm(op.dst), cpu.reg(op.src), op.imm as u8);
            cpu.set_xmm(op.dst, r);
        })
    }
}

/// General register or memory of type T to MMX.
macro_rules! mmx_from_general {
    ($t:ty, $form:expr) => {
        if $form.mem {
            $form.mm2::<{ size_of::<$t>() as u32 }>(|_, b| b)
        } else {
            handler(|cpu: &mut Cpu, op: &Op| {
                cpu.mmx_ready()?;
                let v: $t = cpu.reg(op.src);
                cpu.set_mm(op.dst, v as u64);
                Ok(())
            })
        }
    };
}

/// MMX to memory of type T, or zero-extended to a general register.
macro_rules! mmx_to_general {
    ($t:ty, $form:expr) => {
        if $form.mem {
            handler(|cpu: &mut Cpu, op: &Op| {
                cpu.mmx_ready()?;
                let v = cpu.mm(op.src) as $t;
                cpu.store::<$t>(op, v)?;
                cpu.mmx_enter();
                Ok(())
            })
        } else {
            handler(|cpu: &mut Cpu, op: &Op| {
                cpu.mmx_ready()?;
                let v = cpu.mm(op.src) as $t;
                cpu.mmx_enter();
                cpu.set_reg::<u64>(op.dst, v as u64);
                Ok(())
            })
        }
    };
}

/// PINSRW into MMX.
fn pinsrw_mm(form: Form) -> Handler {
    fn put(cpu: &mut Cpu, op: &Op, x: u64) {
        let r = insert::<u16, 8>([cpu.mm(op.dst), 0], x as u16, op.imm as u8 & 3)[0];
        cpu.set_mm(op.dst, r);
    }
    if form.mem {
        handler(|cpu: &mut Cpu, op: &Op| {
            cpu.mmx_ready()?;
            let x = cpu.load::<u16>(op)?;
            put(cpu, op, x as u64);
            Ok(())
        })
    } else {
        handler(|cpu: &mut Cpu, op: &Op| {
            cpu.mmx_ready()?;
            let x = cpu.reg(op.src);
            put(cpu, op, x);
            Ok(())
        })
    }
}

/// MOVQ2DQ.
fn movq2dq(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.sse_ready()?;
    cpu.mmx_ready()?;
    let v = cpu.mm(op.src);
    cpu.mmx_enter();
    cpu.set_xmm(op.dst, [v, 0]);
    Ok(())
}

/// MOVDQ2Q.
fn movdq2q(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.sse_ready()?;
    cpu.mmx_ready()?;
    let v = cpu.xmm(op.src)[0];
    cpu.set_mm(op.dst, v);
    Ok(())
}

/// EMMS: TOP = 0 too, as in processors (the manuals only tell of the tags).
fn emms(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.mmx_ready()?;
    cpu.mmx_enter();
    cpu.rb.ftw = 0xffff;
    Ok(())
}

/// Writes the bytes of `data` whose mask byte has its top bit set to the implicit operand at rDI; all or nothing. Faults
/// are those of the whole operand, whatever the mask says (APM vol. 5, MASKMOVQ: they may be).
fn store_masked(cpu: &mut Cpu, op: &Op, data: &[u8], mask: &[u8]) -> Res {
    let linear = cpu.lin(op, data.len(), Access::Write)?;
    let selected = |i: &usize| mask[*i] & 0x80 != 0;
    cpu.probe_write(op.seg, linear, data.len())?;
    for i in (0..data.len()).filter(selected) {
        cpu.store_at::<u8>(op.seg, linear.wrapping_add(i as u64), data[i])?;
    }
    Ok(())
}

/// MASKMOVDQU.
fn maskmovdqu(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.sse_ready()?;
    let (data, mask) = (split::<u8, 16>(cpu.xmm(op.src)), split::<u8, 16>(cpu.xmm(op.aux)));
    store_masked(cpu, op, &data, &mask)
}

/// MASKMOVQ.
fn maskmovq(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.mmx_ready()?;
    let (data, mask) = (cpu.mm(op.src).to_le_bytes(), cpu.mm(op.aux).to_le_bytes());
    store_masked(cpu, op, &data, &mask)?;
    cpu.mmx_enter();
    Ok(())
}

/// Makes rDI the memory operand of MASKMOV*.
fn implicit_rdi(i: &Instruction, op: &mut Op) {
    op.base = reg::RDI as u8 * 8;
    op.index = SLOT_ZERO;
    op.disp = 0;
    op.seg = segment(i.memory_segment());
    op.asize = match i.op0_kind() {
        OpKind::MemorySegRDI => 8,
        OpKind::MemorySegEDI => 4,
        _ => 2,
    };
    if op.asize != 8 {
        op.flags |= flag::LEGACY_EA;
    }
}

/// Stores of general registers past the caches (MOVNTI); no vector state is touched, so none is checked.
macro_rules! movnti {
    ($t:ty) => {
        handler(|cpu: &mut Cpu, op: &Op| {
            let v: $t = cpu.reg(op.src);
            cpu.store(op, v)
        })
    };
}

/// Translates moves.
pub fn translate(i: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 | Movntdqa_xmm_m128 => {
            form.load::<A128>()
        }
        Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Lddqu_xmm_m128 => form.load::<U128>(),
        Movaps_xmmm128_xmm | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm | Movntps_m128_xmm
        | Movntpd_m128_xmm | Movntdq_m128_xmm => store128::<true>(form),
        Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm => store128::<false>(form),

        Movss_xmm_xmmm32 => load_scalar::<4>(form, |a, b| with_low32(a, b[0] as u32)),
        Movsd_xmm_xmmm64 => load_scalar::<8>(form, |a, b| with_low64(a, b[0])),
        Movss_xmmm32_xmm if form.mem => to_general::<u32>(form, |v, _| v[0] as u32),
        Movss_xmmm32_xmm => form.x2::<4>(|a, b| with_low32(a, b[0] as u32)),
        Movsd_xmmm64_xmm if form.mem => store::<u64>(form, |v, _| v[0]),
        Movsd_xmmm64_xmm => form.x2::<8>(|a, b| with_low64(a, b[0])),
        Movq_xmm_xmmm64 => form.x1::<8>(|b| [b[0], 0]),
        Movq_xmmm64_xmm if form.mem => store::<u64>(form, |v, _| v[0]),
        Movq_xmmm64_xmm => form.x1::<8>(|b| [b[0], 0]),
        Movlps_xmm_m64 | Movlpd_xmm_m64 => form.x2::<8>(|a, b| [b[0], a[1]]),
        Movhps_xmm_m64 | Movhpd_xmm_m64 => form.x2::<8>(|a, b| [a[0], b[0]]),
        Movlps_m64_xmm | Movlpd_m64_xmm => store::<u64>(form, |v, _| v[0]),
        Movhps_m64_xmm | Movhpd_m64_xmm => store::<u64>(form, |v, _| v[1]),
        Movhlps_xmm_xmm => form.x2::<M128>(|a, b| [b[1], a[1]]),
        Movlhps_xmm_xmm => form.x2::<M128>(|a, b| [a[0], b[0]]),
        Movsldup_xmm_xmmm128 => form.x1::<M128>(movsldup),
        Movshdup_xmm_xmmm128 => form.x1::<M128>(movshdup),
        Movddup_xmm_xmmm64 => form.x1::<8>(|b| [b[0], b[0]]),

        Movd_xmm_rm32 => from_general!(u32, form),
        Movq_xmm_rm64 => from_general!(u64, form),
        Movd_rm32_xmm => to_general::<u32>(form, |v, _| v[0] as u32),
        Movq_rm64_xmm => to_general::<u64>(form, |v, _| v[0]),
        Pextrb_r32m8_xmm_imm8 | Pextrb_r64m8_xmm_imm8 => to_general::<u8>(form, extract),
        Pextrw_r32_xmm_imm8 | Pextrw_r64_xmm_imm8 | Pextrw_r32m16_xmm_imm8 | Pextrw_r64m16_xmm_imm8 => {
            to_general::<u16>(form, extract)
        }
        Pextrd_rm32_xmm_imm8 | Extractps_rm32_xmm_imm8 | Extractps_r64m32_xmm_imm8 => {
            to_general::<u32>(form, extract)
        }
        Pextrq_rm64_xmm_imm8 => to_general::<u64>(form, extract),
        Pinsrb_xmm_r32m8_imm8 | Pinsrb_xmm_r64m8_imm8 => {
            insert_general::<1>(form, |v, x, n| insert(v, x as u8, n))
        }
        Pinsrw_xmm_r32m16_imm8 | Pinsrw_xmm_r64m16_imm8 => {
            insert_general::<2>(form, |v, x, n| insert(v, x as u16, n))
        }
        Pinsrd_xmm_rm32_imm8 => insert_general::<4>(form, |v, x, n| insert(v, x as u32, n)),
        Pinsrq_xmm_rm64_imm8 => insert_general::<8>(form, insert),
        Insertps_xmm_xmmm32_imm8 if form.mem => form.x2i::<4>(|a, b, n| insertps(a, b[0] as u32, n)),
        Insertps_xmm_xmmm32_imm8 => form.x2i::<4>(|a, b, n| insertps(a, extract(b, n >> 6), n)),
        Pmovmskb_r32_xmm | Pmovmskb_r64_xmm => form.gx(pmovmskb),
        Movmskps_r32_xmm | Movmskps_r64_xmm => form.gx(movmskps),
        Movmskpd_r32_xmm | Movmskpd_r64_xmm => form.gx(movmskpd),

        Movd_mm_rm32 => mmx_from_general!(u32, form),
        Movq_mm_rm64 => mmx_from_general!(u64, form),
        Movd_rm32_mm => mmx_to_general!(u32, form),
        Movq_rm64_mm => mmx_to_general!(u64, form),
        Movq_mm_mmm64 => form.mm2::<8>(|_, b| b),
        Movq_mmm64_mm if form.mem => mmx_to_general!(u64, form),
        Movq_mmm64_mm => form.mm2::<8>(|_, b| b),
        Movntq_m64_mm => mmx_to_general!(u64, form),
        Pinsrw_mm_r32m16_imm8 | Pinsrw_mm_r64m16_imm8 => pinsrw_mm(form),
        Pextrw_r32_mm_imm8 | Pextrw_r64_mm_imm8 => form.gm(|v, n| extract::<u16, 8>([v, 0], n & 3) as u32),
        Pmovmskb_r32_mm | Pmovmskb_r64_mm => form.gm(|v, _| pmovmskb([v, 0])),
        Movq2dq_xmm_mm => handler(movq2dq),
        Movdq2q_mm_xmm => handler(movdq2q),
        Emms => handler(emms),

        Maskmovdqu_rDI_xmm_xmm => {
            implicit_rdi(i, op);
            handler(maskmovdqu)
        }
        Maskmovq_rDI_mm_mm => {
            implicit_rdi(i, op);
            handler(maskmovq)
        }
        Movnti_m32_r32 => movnti!(u32),
        Movnti_m64_r64 => movnti!(u64),
        _ => return None,
    })
}
