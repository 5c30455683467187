// SPDX-License-Identifier: Apache-2.0
//! The families of instructions. Each has its own `translate`, tried in turn.

use iced_x86::Instruction;

use super::op::{Handler, Op};
use super::translate::{Context, common};
use super::{int, simd, system, x87};

/// A family's translator: fills in the op's operands and returns the handler, or None for "not mine".
pub type Family = fn(&Instruction, &mut Op, &Context) -> Option<Handler>;

/// The families, most frequent first.
const FAMILIES: &[Family] = &[int::translate, simd::translate, system::translate, x87::translate];

/// Translates one instruction. What no family knows raises #UD when it runs.
pub fn translate(i: &Instruction, cx: &Context) -> Op {
    let mut op = common(i, cx);
    if i.is_invalid() {
        return op;
    }
    for family in FAMILIES {
        if let Some(f) = family(i, &mut op, cx) {
            op.f = f;
            return op;
        }
    }
    op
}
