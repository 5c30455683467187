// SPDX-License-Identifier: Apache-2.0
//! MMX and SSE to SSE4.2, AES, PCLMULQDQ and SHA instructions (APM vol. 4 and 5).
//!
//! `vector` has the type and its lanes; `integer`, `shuffle`, … are pure functions on it, one per instruction; `form`
//! turns them into handlers for each operand form; `table`, `moves`, … say which instruction is which. A legacy SSE
//! instruction leaves the upper half of the YMM register alone; VEX forms, when they come, are other adaptors on the
//! same functions.

pub mod aes;
pub mod convert;
pub mod crypto;
pub mod float;
pub mod form;
pub mod integer;
pub mod moves;
pub mod native;
pub mod quick;
pub mod sha;
pub mod shuffle;
pub mod strings;
pub mod table;
pub mod vector;

use iced_x86::{EncodingKind, Instruction};

use super::op::{Handler, Op};
use super::translate::Context;

/// Translates this family's instructions.
pub fn translate(i: &Instruction, op: &mut Op, _: &Context) -> Option<Handler> {
    if i.code().encoding() != EncodingKind::Legacy {
        return None;
    }
    let mut own = *op;
    let form = form::Form::of(i, &mut own);
    let f = moves::translate(i, &mut own, form)
        .or_else(|| native::translate(i, form))
        .or_else(|| table::translate(i, form))
        .or_else(|| float::translate(i, form))
        .or_else(|| convert::translate(i, form))
        .or_else(|| crypto::translate(i, form))
        .or_else(|| strings::translate(i, form))?;
    *op = own;
    Some(f)
}
