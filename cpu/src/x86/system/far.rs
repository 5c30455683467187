// SPDX-License-Identifier: Apache-2.0
//! Far transfers: JMP, CALL and RET between segments, call gates, IRET (APM vol. 2, 4.11 and 8.7; vol. 3).

use super::descriptor::{Descriptor, attrib, error_selector, is_null, kind, null_segment};
use super::exitcode;
use super::segment::{memory_pointer, unreachable_from};
use super::stack::{merge_sp, null_stack};
use super::task::Reason;
use crate::x86::flags::rf;
use crate::x86::op::{Op, Res, Stop};
use crate::x86::state::{Cpu, Segment, cr4, reg, sreg, vector};

/// The operand of far JMP and CALL: direct (`op.imm`, `op.disp`), or in memory when `op.aux` is set.
fn pointer(cpu: &mut Cpu, op: &Op) -> Result<(u16, u64), Stop> {
    if op.aux != 0 { memory_pointer(cpu, op) } else { Ok((op.disp as u16, op.imm)) }
}

impl Cpu {
    /// Whether a descriptor is code that this mode can run: not L and D together in long mode.
    pub(super) fn runnable(&self, d: Descriptor) -> bool {
        let both = attrib::L | attrib::DB;
        d.is_code() && !(self.long_mode() && d.attrib() & both == both)
    }

    /// #GP(error) when `ip` lies outside the code segment (limit, or canonical for 64-bit code).
    pub(super) fn check_target(&mut self, d: Descriptor, ip: u64, error: u32) -> Res {
        let good = if self.long_mode() && d.attrib() & attrib::L != 0 {
            self.canonical(ip)
        } else {
            ip <= d.limit() as u64
        };
        if good { Ok(()) } else { Err(self.gp(error)) }
    }

    /// Loads CS at privilege level `cpl` and goes on at `ip`.
    pub(super) fn enter_code(&mut self, selector: u16, d: Descriptor, cpl: u8, ip: u64) {
        self.seg[sreg::CS] = d.segment(selector & !3 | cpl as u16);
        self.cpl = cpl;
        self.update_mode();
        self.rip = ip;
    }

    /// Loads CS in real or virtual-8086 mode and goes on at `ip`.
    pub(super) fn enter_real_code(&mut self, selector: u16, ip: u64) {
        let base = (selector as u64) << 4;
        let old = self.seg[sreg::CS];
        self.seg[sreg::CS] = if self.v86() {
            Segment { selector, base, limit: 0xffff, attrib: attrib::V86 }
        } else {
            Segment { selector, base, ..old }
        };
        self.update_mode();
        self.rip = ip;
    }
}

/// Far JMP.
pub(super) fn jmp_far(cpu: &mut Cpu, op: &Op) -> Res {
    transfer(cpu, op, false)
}

/// Far CALL.
pub(super) fn call_far(cpu: &mut Cpu, op: &Op) -> Res {
    transfer(cpu, op, true)
}

fn transfer(cpu: &mut Cpu, op: &Op, call: bool) -> Res {
    let (selector, ip) = pointer(cpu, op)?;
    let next = cpu.mask_ip(cpu.next_ip(op));
    let return_cs = cpu.seg[sreg::CS].selector as u64;
    let width = op.osize() as u64;
    if cpu.real_or_v86() {
        if ip > cpu.seg[sreg::CS].limit as u64 {
            return Err(cpu.gp(0));
        }
        if call {
            let stack = cpu.current_stack(0);
            let sp = cpu.push_frame(&stack, &[return_cs, next], width)?;
            cpu.rb.gpr[reg::RSP] = sp;
        }
        cpu.enter_real_code(selector, ip);
        return Err(Stop::EndBlock);
    }
    if is_null(selector) {
        return Err(cpu.gp(0));
    }
    let error = error_selector(selector);
    let d = cpu.descriptor(selector, vector::GP, 0)?;
    if !d.is_segment() {
        return transfer_system(cpu, op, selector, d, call);
    }
    let rpl = selector as u8 & 3;
    let reachable = if d.is_conforming() { d.dpl() <= cpu.cpl } else { rpl <= cpu.cpl && d.dpl() == cpu.cpl };
    if !cpu.runnable(d) || !reachable {
        return Err(cpu.gp(error));
    }
    if !d.present() {
        return Err(cpu.fault(vector::NP, Some(error)));
    }
    cpu.check_target(d, ip, 0)?;
    cpu.mark_accessed(selector, d)?;
    if call {
        let stack = cpu.current_stack(0);
        let sp = cpu.push_frame(&stack, &[return_cs, next], width)?;
        cpu.rb.gpr[reg::RSP] = sp;
    }
    let cpl = cpu.cpl;
    cpu.enter_code(selector, d, cpl, ip);
    Err(Stop::EndBlock)
}

/// Through a call gate, a task gate or a TSS.
fn transfer_system(cpu: &mut Cpu, op: &Op, selector: u16, d: Descriptor, call: bool) -> Res {
    let error = error_selector(selector);
    let gate = match (cpu.long_mode(), d.kind()) {
        (_, kind::CALL) | (false, kind::CALL16) => true,
        (false, kind::TASK_GATE | kind::TSS | kind::TSS16) => false,
        _ => return Err(cpu.gp(error)),
    };
    if d.dpl() < cpu.cpl || d.dpl() < selector as u8 & 3 {
        return Err(cpu.gp(error));
    }
    if gate {
        return call_gate(cpu, op, selector, d, call);
    }
    if !d.present() {
        return Err(cpu.fault(vector::NP, Some(error)));
    }
    let tss = if d.kind() == kind::TASK_GATE { d.gate_selector() } else { selector };
    let reason = if call { Reason::Call } else { Reason::Jump };
    let next = cpu.mask_ip(cpu.next_ip(op));
    cpu.task_switch(tss, reason, None, next)?;
    Err(Stop::EndBlock)
}

fn call_gate(cpu: &mut Cpu, op: &Op, selector: u16, gate: Descriptor, call: bool) -> Res {
    let long = cpu.long_mode();
    if !gate.present() {
        return Err(cpu.fault(vector::NP, Some(error_selector(selector))));
    }
    let mut ip = gate.gate_offset();
    if long {
        ip |= cpu.descriptor_high(selector, 0)? << 32;
    }
    let target = gate.gate_selector();
    if is_null(target) {
        return Err(cpu.gp(0));
    }
    let error = error_selector(target);
    let d = cpu.descriptor(target, vector::GP, 0)?;
    let code64 = d.attrib() & (attrib::L | attrib::DB) == attrib::L;
    let reachable = d.dpl() <= cpu.cpl && (call || d.is_conforming() || d.dpl() == cpu.cpl);
    if !d.is_code() || (long && !code64) || !reachable {
        return Err(cpu.gp(error));
    }
    if !d.present() {
        return Err(cpu.fault(vector::NP, Some(error)));
    }
    let cpl = if call && !d.is_conforming() { d.dpl() } else { cpu.cpl };
    cpu.check_target(d, ip, 0)?;
    let width = match gate.kind() {
        _ if long => 8,
        kind::CALL => 4,
        _ => 2,
    };
    let next = cpu.mask_ip(cpu.next_ip(op));
    let return_cs = cpu.seg[sreg::CS].selector as u64;
    if !call {
        cpu.mark_accessed(target, d)?;
    } else if cpl == cpu.cpl {
        let mut stack = cpu.current_stack(0);
        if long {
            stack.size = 8;
        }
        cpu.mark_accessed(target, d)?;
        let sp = cpu.push_frame(&stack, &[return_cs, next], width)?;
        cpu.rb.gpr[reg::RSP] = sp;
    } else {
        let stack = cpu.inner_stack(cpl, 0)?;
        let mut items = [0u64; 35];
        items[0] = cpu.seg[sreg::SS].selector as u64;
        items[1] = cpu.rb.gpr[reg::RSP];
        let parameters = if long { 0 } else { (gate.0 >> 32 & 31) as usize };
        for n in 0..parameters {
            items[1 + parameters - n] = cpu.peek_item(n as u64 * width, width as u32)?;
        }
        items[2 + parameters] = return_cs;
        items[3 + parameters] = next;
        cpu.mark_accessed(target, d)?;
        let sp = cpu.push_frame(&stack, &items[..4 + parameters], width)?;
        cpu.seg[sreg::SS] = stack.ss;
        cpu.rb.gpr[reg::RSP] = merge_sp(cpu.rb.gpr[reg::RSP], sp, stack.size);
    }
    cpu.enter_code(target, d, cpl, ip);
    Err(Stop::EndBlock)
}

/// Far RET; `op.imm` bytes of parameters are released.
pub(super) fn ret_far(cpu: &mut Cpu, op: &Op) -> Res {
    let width = op.osize();
    let ip = cpu.peek_item(0, width)?;
    let cs = cpu.peek_item(width as u64, width)? as u16;
    if cpu.real_or_v86() {
        if ip > cpu.seg[sreg::CS].limit as u64 {
            return Err(cpu.gp(0));
        }
        let sp = cpu.rb.gpr[reg::RSP].wrapping_add(2 * width as u64 + op.imm);
        cpu.set_sp(sp);
        cpu.enter_real_code(cs, ip);
        return Err(Stop::EndBlock);
    }
    far_return(cpu, Frame { ip, cs, flags: None, width, items: 2, release: op.imm })
}

/// What a far return or IRET popped.
struct Frame {
    ip: u64,
    cs: u16,
    /// IRET: the new RFLAGS.
    flags: Option<u64>,
    width: u32,
    /// Items popped so far; SP and SS come next, after `release` bytes.
    items: u64,
    release: u64,
}

/// Returns in protected mode, to the same or an outer privilege level. All of the frame is read before any of it is
/// looked at (APM vol. 3, RETF and IRET).
fn far_return(cpu: &mut Cpu, f: Frame) -> Res {
    let error = error_selector(f.cs);
    let rpl = f.cs as u8 & 3;
    let outer = rpl != cpu.cpl;
    let width = f.width as u64;
    let outer_stack = if outer || (f.flags.is_some() && cpu.code_size == 8) {
        let ss = cpu.peek_item((f.items + 1) * width + f.release, f.width)? as u16;
        Some((cpu.peek_item(f.items * width + f.release, f.width)?, ss))
    } else {
        None
    };
    if is_null(f.cs) {
        return Err(cpu.gp(0));
    }
    let d = cpu.descriptor(f.cs, vector::GP, 0)?;
    let level = if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    if rpl < cpu.cpl || !cpu.runnable(d) || !level {
        return Err(cpu.gp(error));
    }
    if !d.present() {
        return Err(cpu.fault(vector::NP, Some(error)));
    }
    let mut stack = None;
    if let Some((sp, ss)) = outer_stack {
        let to64 = cpu.long_mode() && d.attrib() & attrib::L != 0;
        let segment = if is_null(ss) && to64 && rpl != 3 && ss as u8 & 3 == rpl {
            null_stack(rpl)
        } else {
            cpu.stack_descriptor(ss, rpl, vector::GP, 0)?
        };
        stack = Some((
            sp,
            segment,
            if to64 {
                8
            } else if segment.db() {
                4
            } else {
                2
            },
        ));
    }
    cpu.check_target(d, f.ip, 0)?;
    cpu.mark_accessed(f.cs, d)?;

    let old_sp = cpu.rb.gpr[reg::RSP];
    match stack {
        Some((sp, segment, size)) => {
            cpu.seg[sreg::SS] = segment;
            let sp = if outer { sp.wrapping_add(f.release) } else { sp };
            cpu.rb.gpr[reg::RSP] = merge_sp(old_sp, sp, size);
        }
        None => cpu.set_sp(old_sp.wrapping_add(f.items * width + f.release)),
    }
    if let Some(flags) = f.flags {
        cpu.set_rflags(flags);
    }
    if outer {
        for n in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            if unreachable_from(&cpu.seg[n], rpl) {
                // Only the selector and the present bit go: FS and GS keep their bases in 64-bit mode.
                let base = cpu.seg[n].base;
                cpu.seg[n] = Segment { base, ..null_segment(0) };
            }
        }
    }
    cpu.enter_code(f.cs, d, rpl, f.ip);
    Err(Stop::EndBlock)
}

/// The RFLAGS bits that IRET and POPF write at this privilege level with this operand size (VM and the virtual
/// interrupt flags are IRET's own affair).
pub(super) fn writable_flags(cpu: &Cpu, osize: u32) -> u64 {
    let mut mask = rf::ARITH | rf::TF | rf::DF | rf::NT;
    if osize > 2 {
        mask |= rf::RF | rf::AC | rf::ID;
    }
    let iopl = (cpu.rflags >> 12 & 3) as u8;
    if cpu.cpl == 0 {
        mask |= rf::IOPL;
    }
    if cpu.cpl <= iopl {
        mask |= rf::IF;
    }
    mask
}

/// IRET, IRETD, IRETQ.
pub(super) fn iret(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.intercept(exitcode::IRET)?;
    if !cpu.real_or_v86() && cpu.rflags & rf::NT != 0 {
        if cpu.long_mode() {
            return Err(cpu.gp(0));
        }
        let link = cpu.load_system::<u16>(cpu.system_linear(cpu.tr.base))?;
        let next = cpu.mask_ip(cpu.next_ip(op));
        cpu.task_switch(link, Reason::Return, None, next)?;
        cpu.nmi_blocked = false;
        return Err(Stop::EndBlock);
    }
    let width = op.osize();
    let ip = cpu.peek_item(0, width)?;
    let cs = cpu.peek_item(width as u64, width)? as u16;
    let image = cpu.peek_item(2 * width as u64, width)?;
    let done = if cpu.v86() {
        iret_v86(cpu, ip, cs, image, width)
    } else if !cpu.protected() {
        let mask = writable_flags(cpu, width);
        iret_real(cpu, ip, cs, image, mask, width)
    } else if width == 4 && !cpu.long_mode() && cpu.cpl == 0 && image & rf::VM != 0 {
        iret_to_v86(cpu, ip, cs, image)
    } else {
        let mut mask = writable_flags(cpu, width);
        if width > 2 && cpu.cpl == 0 {
            mask |= rf::VIF | rf::VIP;
        }
        let flags = (cpu.rflags() & !mask) | (image & mask);
        far_return(cpu, Frame { ip, cs, flags: Some(flags), width, items: 3, release: 0 })
    };
    if done == Err(Stop::EndBlock) {
        cpu.nmi_blocked = false;
    }
    done
}

fn iret_real(cpu: &mut Cpu, ip: u64, cs: u16, image: u64, mask: u64, width: u32) -> Res {
    if ip > cpu.seg[sreg::CS].limit as u64 {
        return Err(cpu.gp(0));
    }
    let sp = cpu.rb.gpr[reg::RSP].wrapping_add(3 * width as u64);
    cpu.set_sp(sp);
    let flags = (cpu.rflags() & !mask) | (image & mask);
    cpu.set_rflags(flags);
    cpu.enter_real_code(cs, ip);
    Err(Stop::EndBlock)
}

fn iret_v86(cpu: &mut Cpu, ip: u64, cs: u16, image: u64, width: u32) -> Res {
    let mut mask = rf::ARITH | rf::TF | rf::DF | rf::NT;
    if width > 2 {
        mask |= rf::RF | rf::AC | rf::ID;
    }
    let mut image = image;
    if cpu.rflags & rf::IOPL == rf::IOPL {
        mask |= rf::IF;
    } else {
        // With VME a 16-bit IRET works on VIF in place of IF (APM vol. 2, 8.11).
        let pending = image & rf::IF != 0 && cpu.rflags & rf::VIP != 0;
        if cpu.cr4 & cr4::VME == 0 || width != 2 || pending || image & rf::TF != 0 {
            return Err(cpu.gp(0));
        }
        image = (image & !rf::VIF) | if image & rf::IF != 0 { rf::VIF } else { 0 };
        mask |= rf::VIF;
    }
    iret_real(cpu, ip, cs, image, mask, width)
}

fn iret_to_v86(cpu: &mut Cpu, ip: u64, cs: u16, image: u64) -> Res {
    let mut words = [0u64; 6];
    for (n, word) in words.iter_mut().enumerate() {
        *word = cpu.peek_item(12 + 4 * n as u64, 4)?;
    }
    if ip > 0xffff {
        return Err(cpu.gp(0));
    }
    cpu.set_rflags(image);
    cpu.cpl = 3;
    let [sp, ss, es, ds, fs, gs] = words;
    cpu.rb.gpr[reg::RSP] = sp;
    for (n, selector) in [(sreg::SS, ss), (sreg::ES, es), (sreg::DS, ds), (sreg::FS, fs), (sreg::GS, gs)] {
        cpu.seg[n] = cpu.real_segment(n, selector as u16);
    }
    cpu.enter_real_code(cs, ip);
    Err(Stop::EndBlock)
}
