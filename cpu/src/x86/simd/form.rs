// SPDX-License-Identifier: Apache-2.0
//! The forms of SIMD instructions: availability checks, register access, and adaptors that make handlers of pure
//! functions.
//!
//! An adaptor's name tells its operands: `x` = XMM, `m` = MMX, `g` = general register, each followed by the number of
//! vector operands the function sees, then `i` for an immediate and `f` for a floating-point environment. `SIZE` is how
//! a memory source is read: [`M128`] aligned unless MXCSR.MM, [`A128`] aligned, [`U128`] any alignment, or 8, 4, 2 bytes zero-extended.

use iced_x86::{Instruction, OpKind};

use super::super::access::Align;
use super::super::op::{Handler, Op, Res, Stop, handler, handler_fast};
use super::super::state::{Cpu, cr0, cr4};
use super::super::translate::gpr;
use super::quick::is_simple;
use super::vector::V;

/// 16 bytes, #GP(0) unless aligned or MXCSR.MM.
pub const M128: u32 = 16;
/// 16 bytes, #GP(0) unless aligned: moves.
pub const A128: u32 = 18;
/// 16 bytes, any alignment.
pub const U128: u32 = 17;

/// x87 status word: an unmasked exception is pending.
const FSW_ES: u16 = 1 << 7;
/// x87 status word: top of stack.
const FSW_TOP: u16 = 7 << 11;

impl Cpu {
    /// #UD or #NM unless SSE instructions may run (APM vol. 2, 11.3.1 and the instructions' exception tables).
    #[inline(always)]
    pub fn sse_ready(&mut self) -> Res {
        if self.sse_enabled() { Ok(()) } else { Err(self.simd_unavailable(true)) }
    }

    /// #UD, #NM or #MF unless MMX instructions may run.
    #[inline(always)]
    pub fn mmx_ready(&mut self) -> Res {
        if self.cr0 & (cr0::EM | cr0::TS) | (self.rb.fsw & FSW_ES) as u64 == 0 {
            Ok(())
        } else {
            Err(self.simd_unavailable(false))
        }
    }

    #[cold]
    #[inline(never)]
    fn simd_unavailable(&mut self, sse: bool) -> Stop {
        if self.cr0 & cr0::EM != 0 || sse && self.cr4 & cr4::OSFXSR == 0 {
            self.ud()
        } else if self.cr0 & cr0::TS != 0 {
            self.nm()
        } else {
            self.x87_pending()
        }
    }

    /// The XMM register of an op's operand: its number times 16.
    #[inline(always)]
    pub fn xmm(&self, slot: u8) -> V {
        // SAFETY: at most 510 bytes from the first register the block has memory for a V, aligned for any even slot.
        unsafe { (&raw const self.rb.ymm).byte_add(slot as usize * 2).cast::<V>().read_unaligned() }
    }

    /// Writes the XMM register of an op's operand (number times 16); the upper half of the YMM register stays, as
    /// legacy SSE wants it.
    #[inline(always)]
    pub fn set_xmm(&mut self, slot: u8, v: V) {
        // SAFETY: as in `xmm`.
        unsafe { (&raw mut self.rb.ymm).byte_add(slot as usize * 2).cast::<V>().write_unaligned(v) };
    }

    /// MMX register `n`.
    #[inline(always)]
    pub fn mm(&self, n: u8) -> u64 {
        self.rb.st[n as usize & 7][0]
    }

    /// What every MMX instruction does to the x87 state (EMMS then empties it): TOP = 0, all tags valid.
    #[inline(always)]
    pub fn mmx_enter(&mut self) {
        self.rb.fsw &= !FSW_TOP;
        self.rb.ftw = 0;
    }

    /// Writes MMX register `n`, exponent bits all ones, and enters MMX state.
    #[inline(always)]
    pub fn set_mm(&mut self, n: u8, v: u64) {
        self.mmx_enter();
        self.rb.st[n as usize & 7] = [v, 0xffff];
    }
}

/// Loads the memory operand in the way `SIZE` says.
#[inline(always)]
pub fn memory<const SIZE: u32>(cpu: &mut Cpu, op: &Op) -> Result<V, Stop> {
    Ok(match SIZE {
        M128 => cpu.load128(op, Align::Masked)?,
        A128 => cpu.load128(op, Align::Always)?,
        U128 => cpu.load128(op, Align::Any)?,
        8 => [cpu.load::<u64>(op)?, 0],
        4 => [cpu.load::<u32>(op)? as u64, 0],
        2 => [cpu.load::<u16>(op)? as u64, 0],
        _ => [cpu.load::<u8>(op)? as u64, 0],
    })
}

/// Byte offset of a general register, number of an MMX register, 16 times the number of an XMM register.
fn number(i: &Instruction, n: u32) -> u8 {
    let r = i.op_register(n);
    if r.is_gpr() {
        gpr(r)
    } else if r.is_xmm() {
        r.number() as u8 * 16
    } else {
        r.number() as u8
    }
}

/// What is known of an instruction's operands, and the adaptors.
#[derive(Clone, Copy)]
pub struct Form {
    /// One operand is in memory.
    pub mem: bool,
    /// The memory operand is base and displacement only.
    pub simple: bool,
    /// The immediate operand, if there is one.
    pub imm: u8,
}

/// Loads the memory operand in the way `SIZE` says, if that needs no slow path.
#[inline(always)]
pub fn quick_memory<const SIZE: u32, const SIMPLE: bool>(cpu: &mut Cpu, op: &Op) -> Option<V> {
    match SIZE {
        M128 | A128 => cpu.quick_load128::<true, SIMPLE>(op),
        U128 => cpu.quick_load128::<false, SIMPLE>(op),
        8 => cpu.quick_load::<u64, SIMPLE>(op).map(|v| [v, 0]),
        4 => cpu.quick_load::<u32, SIMPLE>(op).map(|v| [v as u64, 0]),
        2 => cpu.quick_load::<u16, SIMPLE>(op).map(|v| [v as u64, 0]),
        _ => cpu.quick_load::<u8, SIMPLE>(op).map(|v| [v as u64, 0]),
    }
}

impl Form {
    /// Fills in the op's register and immediate operands: first operand in `dst`, second in `src`, third in `aux`.
    pub fn of(i: &Instruction, op: &mut Op) -> Form {
        let mut mem = false;
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register => match n {
                    0 => op.dst = number(i, 0),
                    1 => op.src = number(i, 1),
                    _ => op.aux = number(i, n),
                },
                OpKind::Memory => mem = true,
                OpKind::Immediate8 => op.imm = i.immediate8() as u64,
                _ => {}
            }
        }
        Form { mem, simple: mem && is_simple(op), imm: op.imm as u8 }
    }

    /// `fast` or, if that returns false (having changed nothing), `slow`, with the XMM source.
    #[inline(always)]
    pub fn sse_try<const SIZE: u32>(
        self,
        fast: impl Fn(&mut Cpu, &Op, V) -> bool + Copy + 'static,
        slow: impl Fn(&mut Cpu, &Op, V) -> Res + Copy + 'static,
    ) -> Handler {
        if self.mem {
            handler_fast(
                move |cpu: &mut Cpu, op: &Op| {
                    cpu.sse_enabled()
                        && quick_memory::<SIZE, false>(cpu, op).is_some_and(|b| fast(cpu, op, b))
                },
                move |cpu: &mut Cpu, op: &Op| {
                    cpu.sse_ready()?;
                    let b = memory::<SIZE>(cpu, op)?;
                    slow(cpu, op, b)
                },
            )
        } else {
            handler_fast(
                move |cpu: &mut Cpu, op: &Op| {
                    let b = cpu.xmm(op.src);
                    cpu.sse_enabled() && fast(cpu, op, b)
                },
                move |cpu: &mut Cpu, op: &Op| {
                    cpu.sse_ready()?;
                    let b = cpu.xmm(op.src);
                    slow(cpu, op, b)
                },
            )
        }
    }

    /// `f` with the XMM source; it can't fail.
    #[inline(always)]
    pub fn sse<const SIZE: u32>(self, f: impl Fn(&mut Cpu, &Op, V) + Copy + 'static) -> Handler {
        self.sse_try::<SIZE>(
            move |cpu, op, b| {
                f(cpu, op, b);
                true
            },
            move |cpu, op, b| {
                f(cpu, op, b);
                Ok(())
            },
        )
    }

    /// `dst = src`, the memory form with simple addresses made for it.
    pub fn load<const SIZE: u32>(self) -> Handler {
        if !self.simple {
            return self.x1::<SIZE>(|b| b);
        }
        handler_fast(
            |cpu: &mut Cpu, op: &Op| {
                let Some(b) = quick_memory::<SIZE, true>(cpu, op) else { return false };
                if !cpu.sse_enabled() {
                    return false;
                }
                cpu.set_xmm(op.dst, b);
                true
            },
            |cpu: &mut Cpu, op: &Op| {
                cpu.sse_ready()?;
                let b = memory::<SIZE>(cpu, op)?;
                cpu.set_xmm(op.dst, b);
                Ok(())
            },
        )
    }

    /// As [`Form::sse`], for what is more than a few instructions of the host: on a stack frame of its own, so that the
    /// handler can go on to the next one from where it was called.
    #[inline(always)]
    pub fn sse_apart<const SIZE: u32>(self, f: impl Fn(&mut Cpu, &Op, V) + Copy + 'static) -> Handler {
        if self.mem {
            handler(move |cpu: &mut Cpu, op: &Op| {
                cpu.sse_ready()?;
                let b = memory::<SIZE>(cpu, op)?;
                f(cpu, op, b);
                Ok(())
            })
        } else {
            handler(move |cpu: &mut Cpu, op: &Op| {
                cpu.sse_ready()?;
                let b = cpu.xmm(op.src);
                f(cpu, op, b);
                Ok(())
            })
        }
    }

    /// [`Form::x2`] on a stack frame of its own.
    pub fn x2_apart<const SIZE: u32>(self, f: impl Fn(V, V) -> V + Copy + 'static) -> Handler {
        self.sse_apart::<SIZE>(move |cpu, op, b| cpu.set_xmm(op.dst, f(cpu.xmm(op.dst), b)))
    }

    /// `dst = f(dst, src)`.
    pub fn x2<const SIZE: u32>(self, f: impl Fn(V, V) -> V + Copy + 'static) -> Handler {
        self.sse::<SIZE>(move |cpu, op, b| cpu.set_xmm(op.dst, f(cpu.xmm(op.dst), b)))
    }

    /// `dst = f(src)`.
    pub fn x1<const SIZE: u32>(self, f: impl Fn(V) -> V + Copy + 'static) -> Handler {
        self.sse::<SIZE>(move |cpu, op, b| cpu.set_xmm(op.dst, f(b)))
    }

    /// `dst = f(dst, src, imm8)`.
    pub fn x2i<const SIZE: u32>(self, f: impl Fn(V, V, u8) -> V + Copy + 'static) -> Handler {
        self.sse::<SIZE>(move |cpu, op, b| cpu.set_xmm(op.dst, f(cpu.xmm(op.dst), b, op.imm as u8)))
    }

    /// `dst = f(src, imm8)`.
    pub fn x1i<const SIZE: u32>(self, f: impl Fn(V, u8) -> V + Copy + 'static) -> Handler {
        self.sse::<SIZE>(move |cpu, op, b| cpu.set_xmm(op.dst, f(b, op.imm as u8)))
    }

    /// `dst = f(dst, src, XMM0)`.
    pub fn x3<const SIZE: u32>(self, f: impl Fn(V, V, V) -> V + Copy + 'static) -> Handler {
        self.sse::<SIZE>(move |cpu, op, b| cpu.set_xmm(op.dst, f(cpu.xmm(op.dst), b, cpu.xmm(0))))
    }

    /// `dst = f(dst, [imm8, 0])`: shifts by an immediate.
    pub fn xi(self, f: impl Fn(V, V) -> V + Copy + 'static) -> Handler {
        self.sse::<M128>(move |cpu, op, _| cpu.set_xmm(op.dst, f(cpu.xmm(op.dst), [op.imm & 0xff, 0])))
    }

    /// Six flags `= f(dst, src)`.
    pub fn x2_flags(self, f: impl Fn(V, V) -> u64 + Copy + 'static) -> Handler {
        self.sse::<M128>(move |cpu, op, b| cpu.lf.set_all(f(cpu.xmm(op.dst), b)))
    }

    /// General register (32 bits, zero-extended) `= f(src)`.
    pub fn gx(self, f: impl Fn(V) -> u32 + Copy + 'static) -> Handler {
        self.sse::<M128>(move |cpu, op, b| cpu.set_reg(op.dst, f(b)))
    }

    /// `f` with the MMX source; it can't fail and leaves entering MMX state to this.
    #[inline(always)]
    fn mmx<const SIZE: u32>(self, f: impl Fn(&mut Cpu, &Op, u64) + Copy + 'static) -> Handler {
        if self.mem {
            handler(move |cpu: &mut Cpu, op: &Op| {
                cpu.mmx_ready()?;
                let b = memory::<SIZE>(cpu, op)?[0];
                cpu.mmx_enter();
                f(cpu, op, b);
                Ok(())
            })
        } else {
            handler(move |cpu: &mut Cpu, op: &Op| {
                cpu.mmx_ready()?;
                let b = cpu.mm(op.src);
                cpu.mmx_enter();
                f(cpu, op, b);
                Ok(())
            })
        }
    }

    /// MMX `dst = f(dst, src)` of a function on the low halves.
    pub fn m2<const SIZE: u32>(self, f: impl Fn(V, V) -> V + Copy + 'static) -> Handler {
        self.mm2::<SIZE>(move |a, b| f([a, 0], [b, 0])[0])
    }

    /// MMX `dst = f(src)` of a function on the low halves.
    pub fn m1(self, f: impl Fn(V) -> V + Copy + 'static) -> Handler {
        self.mm2::<8>(move |_, b| f([b, 0])[0])
    }

    /// MMX `dst = f(dst, src)`.
    pub fn mm2<const SIZE: u32>(self, f: impl Fn(u64, u64) -> u64 + Copy + 'static) -> Handler {
        self.mmx::<SIZE>(move |cpu, op, b| cpu.set_mm(op.dst, f(cpu.mm(op.dst), b)))
    }

    /// MMX `dst = f(dst, src, imm8)`.
    pub fn mm2i(self, f: impl Fn(u64, u64, u8) -> u64 + Copy + 'static) -> Handler {
        self.mmx::<8>(move |cpu, op, b| cpu.set_mm(op.dst, f(cpu.mm(op.dst), b, op.imm as u8)))
    }

    /// MMX `dst = f(dst, [imm8, 0])`: shifts by an immediate.
    pub fn mi(self, f: impl Fn(V, V) -> V + Copy + 'static) -> Handler {
        self.mmx::<8>(move |cpu, op, _| cpu.set_mm(op.dst, f([cpu.mm(op.dst), 0], [op.imm & 0xff, 0])[0]))
    }

    /// General register (32 bits, zero-extended) `= f(MMX source, imm8)`.
    pub fn gm(self, f: impl Fn(u64, u8) -> u32 + Copy + 'static) -> Handler {
        self.mmx::<8>(move |cpu, op, b| cpu.set_reg(op.dst, f(b, op.imm as u8)))
    }
}
