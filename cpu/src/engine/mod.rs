// SPDX-License-Identifier: Apache-2.0
//! What runs decoded instructions, whatever the architecture: ops and how they are chained, the cache of blocks, the
//! TLB, return prediction, the run loop.
//!
//! An architecture has a processor that holds an [`Engine`](state::Engine), says what types it is made of
//! ([`Architecture`](architecture::Architecture)) and does the rest ([`Processor`](processor::Processor)). Everything is
//! generic over it and compiled for it: no call goes through a table but a handler's to the next one.

pub mod architecture;
pub mod block;
pub mod chain;
mod code;
pub mod count;
mod decode;
pub mod draft;
mod fetch;
pub mod fill;
pub mod op;
pub mod processor;
mod returns;
pub mod run;
pub mod state;
pub mod thread;
pub mod tlb;
mod zeroed;
