// SPDX-License-Identifier: Apache-2.0
//! System instructions and events: everything that privilege, protection, interrupts and virtualization are made of.

use iced_x86::Instruction;

use super::op::{Handler, Op, Res};
use super::state::Cpu;
use super::translate::Context;

pub mod control;
pub mod cpuid;
pub mod debug;
pub mod exitcode;
pub mod interrupt;

impl Cpu {
    /// #VMEXIT `code` with no further information, if its intercept bit is set.
    #[inline(always)]
    pub fn intercept(&mut self, code: u64) -> Res {
        match exitcode::position(code) {
            Some((word, bit)) if self.intercepted(word, bit) => Err(self.vmexit(code, 0, 0)),
            _ => Ok(()),
        }
    }
}

/// Translates this family's instructions.
pub fn translate(_: &Instruction, _: &mut Op, _: &Context) -> Option<Handler> {
    None
}
