// SPDX-License-Identifier: Apache-2.0
//! Software IEEE 754 arithmetic as an x86 processor does it: f32 and f64 for SSE, 80-bit extended for the x87.
//!
//! Pure functions of bit patterns and an [`Env`]; nothing here knows the processor's state. Results and flags are the
//! same on every host: the fast paths use the host's binary32/binary64 operations in round-to-nearest only, where
//! IEEE 754 leaves no choice, and everything else is integer arithmetic.
//!
//! Exceptions follow the architecture's order: operations raise flags in [`Env::flags`] and return the *masked*
//! response; [`Env::commit_sse`] and the x87 layer decide what an unmasked one does.

#![forbid(unsafe_code)]

mod arith;
mod bcd;
mod convert;
mod env;
mod number;
mod sse;
mod transcendental;
mod wide;
mod x87;

pub use bcd::{f80_from_bcd, f80_to_bcd};
pub use convert::*;
pub use env::{ALL, DE, Env, IE, OE, PE, PRE, Precision, Rounding, UE, ZE};
pub use number::F80;
pub use sse::*;
pub use transcendental::*;
pub use x87::*;
