// SPDX-License-Identifier: Apache-2.0
//! Flag instructions, no-operations, hints, fences, random numbers (APM vol. 3: CLC, STC, CMC, CLD, STD, NOP, ENDBR,
//! PREFETCH, UD0-UD2, MFENCE, LFENCE, SFENCE, CLFLUSH, CLFLUSHOPT, CLWB, RDRAND, RDSEED, RDPID).

use core::cell::RefCell;
use core::sync::atomic::{Ordering, fence};

use iced_x86::{Instruction, Mnemonic};

use super::operand::{reg, size, sized_word};
use crate::x86::flags::{Int, rf};
use crate::x86::op::{Handler, Op, Res, handler, handler_registers};
use crate::x86::state::Cpu;
use crate::x86::translate::undefined;

fn nop(_: &mut Cpu, _: &Op) -> Res {
    Ok(())
}

fn carry<const SET: bool>(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.lf.set_cf(SET);
    Ok(())
}

fn cmc(cpu: &mut Cpu, _: &Op) -> Res {
    let cf = cpu.lf.cf();
    cpu.lf.set_cf(!cf);
    Ok(())
}

fn direction<const DOWN: bool>(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.rflags = if DOWN { cpu.rflags | rf::DF } else { cpu.rflags & !rf::DF };
    Ok(())
}

/// MFENCE, LFENCE, SFENCE: as strong as the strongest.
fn memory_fence(_: &mut Cpu, _: &Op) -> Res {
    fence(Ordering::SeqCst);
    Ok(())
}

/// CLFLUSH, CLFLUSHOPT, CLWB: permissions and faults of a byte load.
fn flush_line(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.load::<u8>(op)?;
    fence(Ordering::SeqCst);
    Ok(())
}

/// Random bytes of the system, 256 at a time.
struct Pool {
    bytes: [u8; 256],
    used: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { bytes: [0; 256], used: 256 }) };
}

/// Eight bytes from the system's random number generator, or None when it has none.
fn random() -> Option<u64> {
    POOL.with(|pool| {
        let mut pool = pool.try_borrow_mut().ok()?;
        if pool.used + 8 > pool.bytes.len() {
            let p = pool.bytes.as_mut_ptr();
            // SAFETY: 256 writable bytes, the most that one call gives.
            if unsafe { libc::getentropy(p.cast(), 256) } != 0 {
                return None;
            }
            pool.used = 0;
        }
        let at = pool.used;
        let mut v = [0; 8];
        v.copy_from_slice(pool.bytes.get(at..at + 8)?);
        pool.bytes[at..at + 8].fill(0);
        pool.used = at + 8;
        Some(u64::from_le_bytes(v))
    })
}

/// RDRAND and RDSEED: CF = 1 with a value, CF = 0 and zero without; the other flags are cleared.
fn rdrand<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = random();
    cpu.lf.set_all(v.is_some() as u64);
    cpu.set_reg(op.dst, T::from_u64(v.unwrap_or(0)));
    Ok(())
}

fn rdpid(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.rb.tsc_aux;
    cpu.set_reg(op.dst, v);
    Ok(())
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match i.mnemonic() {
        // Hints, and the opcodes that processors without MPX, CET or CLDEMOTE treat as NOP with a ModRM byte.
        Mnemonic::Nop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Cldemote
        | Mnemonic::Reservednop
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Bndcl
        | Mnemonic::Bndcu
        | Mnemonic::Bndcn
        | Mnemonic::Bndmk
        | Mnemonic::Bndmov
        | Mnemonic::Bndldx
        | Mnemonic::Bndstx => handler_registers(nop),
        Mnemonic::Clc => handler_registers(carry::<false>),
        Mnemonic::Stc => handler_registers(carry::<true>),
        Mnemonic::Cmc => handler_registers(cmc),
        Mnemonic::Cld => handler_registers(direction::<false>),
        Mnemonic::Std => handler_registers(direction::<true>),
        Mnemonic::Mfence | Mnemonic::Lfence | Mnemonic::Sfence => handler_registers(memory_fence),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => handler(flush_line),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => handler_registers(undefined),
        Mnemonic::Rdrand | Mnemonic::Rdseed => {
            op.dst = reg(i, 0);
            sized_word!(size(i, 0), |T| handler(rdrand::<T>))
        }
        Mnemonic::Rdpid => {
            op.dst = reg(i, 0);
            handler(rdpid)
        }
        _ => return None,
    })
}
