// SPDX-License-Identifier: Apache-2.0
//! The x87 register stack, its status, and when an instruction may run at all.

use super::super::op::{Op, Res, Stop};
use super::super::state::{Cpu, cr0, sreg, vector};
use super::super::system::exitcode;
use crate::float::{ALL, Env, F80, IE, PRE};

/// Status word bits (APM vol. 1, 6.2.2).
pub mod sw {
    #![allow(missing_docs)]
    pub const SF: u16 = 1 << 6;
    pub const ES: u16 = 1 << 7;
    pub const C0: u16 = 1 << 8;
    pub const C1: u16 = 1 << 9;
    pub const C2: u16 = 1 << 10;
    pub const TOP: u16 = 7 << 11;
    pub const C3: u16 = 1 << 14;
    pub const B: u16 = 1 << 15;
    pub const CONDITIONS: u16 = C0 | C1 | C2 | C3;
}

/// Control word after FNINIT.
pub const FCW_RESET: u16 = 0x37f;
/// Control word bits that software can set; bit 6 always reads one.
const FCW_WRITABLE: u16 = 0x1f3f;
const FCW_FIXED: u16 = 0x40;
/// Tag of an empty register.
pub const EMPTY: u16 = 3;

impl Cpu {
    // ---- may it run? -------------------------------------------------------------------------------------------

    /// Start of a non-waiting x87 instruction: #NM while CR0.EM or CR0.TS is set (APM vol. 2, 3.1.1).
    #[inline(always)]
    pub(super) fn x87_available(&mut self) -> Res {
        if self.cr0 & (cr0::EM | cr0::TS) != 0 {
            return Err(self.nm());
        }
        Ok(())
    }

    /// Start of a waiting x87 instruction: also delivers a pending unmasked exception.
    #[inline(always)]
    pub(super) fn x87_enter(&mut self) -> Res {
        if self.cr0 & (cr0::EM | cr0::TS) != 0 {
            return Err(self.nm());
        }
        if self.rb.fsw & sw::ES != 0 {
            return Err(self.x87_pending());
        }
        Ok(())
    }

    /// A waiting instruction found an unmasked exception pending: #MF, or with CR0.NE clear the FERR# way, where the
    /// processor freezes until an interrupt arrives (APM vol. 2, 15.12.3, "FERR_FREEZE").
    #[cold]
    pub fn x87_pending(&mut self) -> Stop {
        if self.cr0 & cr0::NE != 0 {
            return self.fault(vector::MF, None);
        }
        if self.intercepted(exitcode::FERR_FREEZE) {
            return self.vmexit(exitcode::FERR_FREEZE, 0, 0);
        }
        Stop::Restart
    }

    // ---- registers ---------------------------------------------------------------------------------------------

    #[inline(always)]
    pub(super) fn st_top(&self) -> usize {
        (self.rb.fsw >> 11 & 7) as usize
    }

    #[inline(always)]
    pub(super) fn set_st_top(&mut self, top: usize) {
        self.rb.fsw = self.rb.fsw & !sw::TOP | ((top & 7) as u16) << 11;
    }

    /// Physical number of ST(i).
    #[inline(always)]
    fn physical(&self, i: usize) -> usize {
        (self.st_top() + i) & 7
    }

    /// ST(i), whatever its tag.
    #[inline(always)]
    pub(super) fn st(&self, i: usize) -> F80 {
        let [mant, se] = self.rb.st[self.physical(i)];
        F80 { mant, se: se as u16 }
    }

    /// Writes ST(i) and tags it valid.
    #[inline(always)]
    pub(super) fn set_st(&mut self, i: usize, v: F80) {
        let p = self.physical(i);
        self.rb.st[p] = [v.mant, v.se.into()];
        self.rb.ftw &= !(3 << (2 * p));
    }

    #[inline(always)]
    pub(super) fn st_empty(&self, i: usize) -> bool {
        self.rb.ftw >> (2 * self.physical(i)) & 3 == EMPTY
    }

    #[inline(always)]
    pub(super) fn free_st(&mut self, i: usize) {
        self.rb.ftw |= EMPTY << (2 * self.physical(i));
    }

    #[inline(always)]
    pub(super) fn pop_st(&mut self) {
        self.free_st(0);
        self.set_st_top(self.st_top() + 1);
    }

    /// Pushes without looking at what was there.
    #[inline(always)]
    pub(super) fn push_st(&mut self, v: F80) {
        self.set_st_top(self.st_top().wrapping_sub(1));
        self.set_st(0, v);
    }

    // ---- status ------------------------------------------------------------------------------------------------

    /// The environment of the next operation.
    #[inline(always)]
    pub(super) fn x87_env(&self) -> Env {
        Env::x87(self.rb.fcw)
    }

    #[inline(always)]
    pub(super) fn set_conditions(&mut self, clear: u16, set: u16) {
        self.rb.fsw = self.rb.fsw & !clear | set;
    }

    /// Records where the instruction is: FIP and FCS.
    #[inline(always)]
    pub(super) fn x87_note(&mut self, op: &Op) {
        self.rb.fip = self.this_ip(op);
        self.rb.fcs = self.seg[sreg::CS].selector;
    }

    /// The same, and where its memory operand is: FDP and FDS.
    #[inline(always)]
    pub(super) fn x87_note_data(&mut self, op: &Op) {
        self.x87_note(op);
        self.rb.fdp = self.ea(op);
        self.rb.fds = self.seg[op.seg as usize % 6].selector;
    }

    /// Adds the flags and C1 of an operation to the status word. False: an unmasked pre-computation exception keeps
    /// the result from being written.
    #[inline(always)]
    pub(super) fn x87_commit(&mut self, op: &Op, env: &Env) -> bool {
        self.rb.fsw = self.rb.fsw & !sw::C1 | u16::from(env.flags) | if env.c1 { sw::C1 } else { 0 };
        if !env.unmasked() {
            return true;
        }
        self.x87_summarize();
        self.rb.fop = self.x87_opcode(op);
        env.flags & !env.masks & PRE == 0
    }

    /// A stack fault: IE, SF, and C1 for the direction. True: masked, so the indefinite value is to be delivered.
    #[cold]
    pub(super) fn stack_fault(&mut self, op: &Op, overflow: bool) -> bool {
        self.rb.fsw |= sw::SF;
        let env = Env { flags: IE, c1: overflow, ..self.x87_env() };
        self.x87_commit(op, &env)
    }

    /// Recomputes ES and B from flags and masks.
    pub(super) fn x87_summarize(&mut self) {
        let unmasked = self.rb.fsw & !self.rb.fcw & u16::from(ALL) != 0;
        self.set_conditions(sw::ES | sw::B, if unmasked { sw::ES | sw::B } else { 0 });
    }

    /// Writes the control word.
    pub(super) fn set_fcw(&mut self, v: u16) {
        self.rb.fcw = v & FCW_WRITABLE | FCW_FIXED;
    }

    /// FNINIT.
    pub(super) fn x87_reset(&mut self) {
        let rb = &mut self.rb;
        (rb.fcw, rb.fsw, rb.ftw, rb.fop) = (FCW_RESET, 0, 0xffff, 0);
        (rb.fip, rb.fdp, rb.fcs, rb.fds) = (0, 0, 0, 0);
    }

    /// The 11 bits of FOP for the instruction `op`, read from memory: only an unmasked exception records them (as
    /// processors without the compatibility mode do), so nobody pays for keeping them with every op.
    #[cold]
    fn x87_opcode(&mut self, op: &Op) -> u16 {
        let mut code = [0u8; 15];
        let length = usize::from(op.len).min(code.len());
        let ip = self.this_ip(op);
        let ip = self.mask_ip(ip);
        let base = if self.code_size == 8 { 0 } else { self.seg[sreg::CS].base };
        let mmu = if self.mmu == 3 { 2 } else { self.mmu };
        let saved = self.exception;
        let read = self.read_bytes(mmu, sreg::CS as u8, base.wrapping_add(ip), &mut code[..length]);
        if read.is_err() {
            self.exception = saved;
            return 0;
        }
        // The first byte in D8..DF is the opcode: prefixes lie elsewhere.
        let Some(at) = code[..length].iter().position(|b| b & 0xf8 == 0xd8) else { return 0 };
        u16::from(code[at] & 7) << 8 | code.get(at + 1).map_or(0, |&modrm| u16::from(modrm))
    }
}
