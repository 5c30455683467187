// SPDX-License-Identifier: Apache-2.0
//! A block in the making.

use core::mem::MaybeUninit;

use super::architecture::{Architecture, Operands};
use super::op::Op;

/// Most ops in one block.
pub const MAX_OPS: usize = 64;

/// The ops of a block while it is decoded.
pub struct Draft<P: Architecture> {
    ops: [MaybeUninit<Op<P>>; MAX_OPS + 1],
    count: usize,
    most: usize,
    at: usize,
    limit: usize,
}

impl<P: Architecture> Draft<P> {
    /// An empty one, for at most `most` (up to [`MAX_OPS`]) instructions that begin in the first `limit` bytes.
    pub(super) fn new(most: usize, limit: usize) -> Self {
        debug_assert!(most <= MAX_OPS);
        Draft { ops: [const { MaybeUninit::uninit() }; MAX_OPS + 1], count: 0, most, at: 0, limit }
    }

    /// Whether one more instruction may be added.
    #[inline(always)]
    pub fn open(&self) -> bool {
        self.count < self.most && self.at < self.limit
    }

    /// Offset of the next instruction from the block's start.
    #[inline(always)]
    pub fn at(&self) -> usize {
        self.at
    }

    /// Ops in it.
    #[inline(always)]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The newest op.
    #[inline(always)]
    pub fn last_mut(&mut self) -> Option<&mut Op<P>> {
        // SAFETY: the first `count` ops have been written.
        self.count.checked_sub(1).map(|n| unsafe { self.ops[n].assume_init_mut() })
    }

    /// Adds an op of an open draft; its length is how far the next instruction is behind.
    #[inline(always)]
    pub fn push(&mut self, op: Op<P>) {
        debug_assert!(self.open());
        self.at += op.length() as usize;
        self.ops[self.count].write(op);
        self.count += 1;
    }

    /// The ops, with `end` behind the last.
    pub(super) fn finish(&mut self, end: Op<P>) -> &[Op<P>] {
        let ops = self.ops.as_mut_ptr().cast::<Op<P>>();
        // SAFETY: `count` is at most MAX_OPS, so there is room for one more; then `count` + 1 ops have been written.
        unsafe {
            ops.add(self.count).write(end);
            core::slice::from_raw_parts(ops, self.count + 1)
        }
    }
}
