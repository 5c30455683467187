// SPDX-License-Identifier: Apache-2.0
//! Ops as the instructions' modules see them.

pub use crate::engine::op::*;
