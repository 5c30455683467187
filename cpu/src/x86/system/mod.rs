// SPDX-License-Identifier: Apache-2.0
//! To be written.

use iced_x86::Instruction;

use super::op::{Handler, Op};
use super::translate::Context;

/// Translates this family's instructions.
pub fn translate(_: &Instruction, _: &mut Op, _: &Context) -> Option<Handler> {
    None
}
