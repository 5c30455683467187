// SPDX-License-Identifier: Apache-2.0
//! Instructions that raise events: INT n, INT3, INTO, INT1, BOUND.

use super::exitcode;
use super::interrupt::{Event, class};
use crate::x86::access::Access;
use crate::x86::op::{Op, Res, Stop};
use crate::x86::state::{Cpu, vector};

fn software(cpu: &Cpu, op: &Op, vector: u8, int_n: bool) -> Event {
    let ip = cpu.mask_ip(cpu.next_ip(op));
    Event { vector, error: None, software: true, int_n, ext: 0, ip, resume: false }
}

/// INT n. The intercept comes before any exception.
pub(super) fn int_n(cpu: &mut Cpu, op: &Op) -> Res {
    let n = op.imm as u8;
    if cpu.intercepted(exitcode::SWINT) {
        return Err(cpu.vmexit(exitcode::SWINT, n as u64, 0));
    }
    let event = software(cpu, op, n, true);
    cpu.deliver_software(op, class::SOFTWARE, &event)
}

/// INT3 and INTO's trap: exceptions that software raises; an intercept saves the instruction's own RIP.
fn soft_exception(cpu: &mut Cpu, op: &Op, vector: u8) -> Res {
    if cpu.intercepted(exitcode::EXCP0 + (vector & 31) as u64) {
        return Err(cpu.vmexit(exitcode::EXCP0 + vector as u64, 0, 0));
    }
    let event = software(cpu, op, vector, false);
    cpu.deliver_software(op, class::EXCEPTION, &event)
}

/// INT3.
pub(super) fn int3(cpu: &mut Cpu, op: &Op) -> Res {
    soft_exception(cpu, op, vector::BP)
}

/// INTO.
pub(super) fn into(cpu: &mut Cpu, op: &Op) -> Res {
    if cpu.lf.of() { soft_exception(cpu, op, vector::OF) } else { Ok(()) }
}

/// INT1 (ICEBP): vector 1 without a DPL check; not subject to the #DB intercept.
pub(super) fn int1(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.intercept(exitcode::ICEBP)?;
    let event = Event { software: false, ext: 1, ..software(cpu, op, vector::DB, false) };
    let done = cpu.deliver_software(op, class::EXCEPTION, &event);
    if done == Err(Stop::EndBlock) {
        // Breakpoints that MOV SS held back are reported by this #DB.
        cpu.dr6 |= core::mem::take(&mut cpu.sys.deferred_hits);
    }
    done
}

/// BOUND.
pub(super) fn bound(cpu: &mut Cpu, op: &Op) -> Res {
    let linear = cpu.lin(op, 2 * op.osize() as usize, Access::Read)?;
    let outside = if op.osize() == 2 {
        let both = cpu.load_at::<u32>(op.seg, linear)?;
        let v = cpu.reg::<u16>(op.dst) as i16;
        v < both as i16 || v > (both >> 16) as i16
    } else {
        let both = cpu.load_at::<u64>(op.seg, linear)?;
        let v = cpu.reg::<u32>(op.dst) as i32;
        v < both as i32 || v > (both >> 32) as i32
    };
    if outside { Err(cpu.fault(vector::BR, None)) } else { Ok(()) }
}
