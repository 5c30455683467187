// SPDX-License-Identifier: Apache-2.0
//! General-purpose integer instructions (APM vol. 3).
//!
//! One module per topic. Handlers are instances of generic functions over operand size, address form and condition, so
//! that what is known at translation isn't asked again at execution.

pub mod alu;
pub mod branch;
pub mod mov;
pub mod operand;
pub mod shift;
pub mod stack;

use iced_x86::Instruction;

use super::op::{Handler, Op};
use super::translate::Context;

/// Translates this family's instructions.
pub fn translate(i: &Instruction, op: &mut Op, cx: &Context) -> Option<Handler> {
    mov::translate(i, op)
        .or_else(|| alu::translate(i, op))
        .or_else(|| branch::translate(i, op, cx))
        .or_else(|| stack::translate(i, op, cx))
        .or_else(|| shift::translate(i, op))
}
