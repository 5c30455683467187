// SPDX-License-Identifier: Apache-2.0
//! Fast system calls: SYSCALL, SYSRET, SYSENTER, SYSEXIT (APM vol. 2, 6.1; vol. 3).

use crate::x86::flags::rf;
use crate::x86::op::{Op, Res, Stop, flag};
use crate::x86::state::{Cpu, Exception, Segment, efer, reg, sreg, vector};
use crate::x86::system::debug::dr6;

/// Attributes of the flat segments that these instructions load: code at DPL 0 (32-bit), 64-bit code, data.
const CODE32: u16 = 0xC9B;
const CODE64: u16 = 0xA9B;
const DATA: u16 = 0xC93;

fn flat(selector: u16, attrib: u16, dpl: u8) -> Segment {
    Segment { selector, attrib: attrib | (dpl as u16) << 5, limit: u32::MAX, base: 0 }
}

/// Goes on at `ip` in flat segments at privilege level `cpl`.
fn enter(cpu: &mut Cpu, cs: Segment, ss: Segment, cpl: u8, ip: u64) -> Res {
    cpu.seg[sreg::CS] = cs;
    cpu.seg[sreg::SS] = ss;
    cpu.cpl = cpl;
    cpu.update_mode();
    cpu.rip = ip;
    Err(Stop::EndBlock)
}

/// SYSCALL.
pub(super) fn syscall(cpu: &mut Cpu, op: &Op) -> Res {
    if cpu.efer & efer::SCE == 0 {
        return Err(cpu.ud());
    }
    let star = cpu.msr.star;
    let selector = (star >> 32) as u16 & !3;
    let next = cpu.mask_ip(cpu.next_ip(op));
    let flags = cpu.rflags();
    let ss = flat(selector.wrapping_add(8), DATA, 0);
    if cpu.long_mode() {
        cpu.rb.gpr[reg::RCX] = next;
        cpu.rb.gpr[11] = flags & !rf::RF;
        cpu.set_rflags(flags & !cpu.msr.sfmask & !(rf::RF | rf::VM));
        cpu.sys.no_step = cpu.msr.sfmask & rf::TF != 0;
        let ip = if op.has(flag::CODE64) { cpu.msr.lstar } else { cpu.msr.cstar };
        enter(cpu, flat(selector, CODE64, 0), ss, 0, ip)
    } else {
        cpu.rb.gpr[reg::RCX] = next;
        cpu.set_rflags(flags & !(rf::IF | rf::RF | rf::VM));
        enter(cpu, flat(selector, CODE32, 0), ss, 0, star & 0xffff_ffff)
    }
}

/// SYSRET. As on AMD's processors only SS's selector is changed, its base, limit and attributes stay.
pub(super) fn sysret(cpu: &mut Cpu, op: &Op) -> Res {
    if cpu.efer & efer::SCE == 0 {
        return Err(cpu.ud());
    }
    if !cpu.protected() || cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let base = (cpu.msr.star >> 48) as u16;
    let rcx = cpu.rb.gpr[reg::RCX];
    let mut ss = cpu.seg[sreg::SS];
    ss.selector = base.wrapping_add(8) | 3;
    ss.attrib |= 0x60;
    let wide = op.has(flag::CODE64) && op.osize() == 8;
    if op.has(flag::CODE64) {
        let flags = cpu.rb.gpr[11] & !(rf::RF | rf::VM);
        cpu.set_rflags(flags);
    } else {
        let flags = cpu.rflags() | rf::IF;
        cpu.set_rflags(flags);
    }
    let done = if wide {
        enter(cpu, flat(base.wrapping_add(16) | 3, CODE64, 3), ss, 3, rcx)
    } else {
        enter(cpu, flat(base | 3, CODE32, 3), ss, 3, rcx & 0xffff_ffff)
    };
    if cpu.rflags & rf::TF != 0 {
        // A step ends with SYSRET itself if it loads TF = 1 (SDM vol. 2, SYSRET: "the resulting TF").
        cpu.exception = Exception { vector: vector::DB, error: None, address: dr6::BS };
        return Err(Stop::Trap);
    }
    done
}

/// SYSENTER: #UD in long mode on AMD's processors.
pub(super) fn sysenter(cpu: &mut Cpu, _: &Op) -> Res {
    if cpu.long_mode() {
        return Err(cpu.ud());
    }
    let cs = cpu.msr.sysenter_cs as u16 & !3;
    if !cpu.protected() || cs == 0 {
        return Err(cpu.gp(0));
    }
    let flags = cpu.rflags() & !(rf::IF | rf::VM | rf::RF);
    cpu.set_rflags(flags);
    cpu.rb.gpr[reg::RSP] = cpu.msr.sysenter_esp & 0xffff_ffff;
    let ip = cpu.msr.sysenter_eip & 0xffff_ffff;
    enter(cpu, flat(cs, CODE32, 0), flat(cs.wrapping_add(8), DATA, 0), 0, ip)
}

/// SYSEXIT: #UD in long mode on AMD's processors.
pub(super) fn sysexit(cpu: &mut Cpu, _: &Op) -> Res {
    if cpu.long_mode() {
        return Err(cpu.ud());
    }
    let cs = cpu.msr.sysenter_cs as u16 & !3;
    if !cpu.protected() || cs == 0 || cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let ip = cpu.rb.gpr[reg::RDX] & 0xffff_ffff;
    cpu.rb.gpr[reg::RSP] = cpu.rb.gpr[reg::RCX] & 0xffff_ffff;
    let ss = flat(cs.wrapping_add(24) | 3, DATA, 3);
    enter(cpu, flat(cs.wrapping_add(16) | 3, CODE32, 3), ss, 3, ip)
}
