// SPDX-License-Identifier: Apache-2.0
//! General-purpose integer instructions (APM vol. 3).
//!
//! One module per topic. Handlers are instances of generic functions over operand size, address form and condition, so
//! that what is known at translation isn't asked again at execution.

pub mod alu;
pub mod bcd;
pub mod bits;
pub mod bmi;
pub mod branch;
pub mod flagops;
pub mod fuse;
pub mod mov;
pub mod mul_div;
pub mod operand;
pub mod shift;
pub mod stack;
pub mod string;

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
        .or_else(|| bits::translate(i, op))
        .or_else(|| mul_div::translate(i, op))
        .or_else(|| string::translate(i, op))
        .or_else(|| flagops::translate(i, op))
        .or_else(|| bmi::translate(i, op, cx))
        .or_else(|| bcd::translate(i, op))
}
