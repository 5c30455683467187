// SPDX-License-Identifier: Apache-2.0
//! The cache of decoded blocks.

/// A decoded block.
pub struct Block {
    /// Ops.
    pub first: *const super::op::Op,
}
/// All blocks of one processor.
#[derive(Default)]
pub struct BlockCache {}
