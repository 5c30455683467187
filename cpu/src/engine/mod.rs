// SPDX-License-Identifier: Apache-2.0
//! What runs decoded instructions: ops and how they are chained, the cache of blocks, the TLB, return prediction.

pub mod block;
mod code;
pub mod fetch;
pub mod op;
pub mod returns;
pub mod tlb;
