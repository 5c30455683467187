// SPDX-License-Identifier: Apache-2.0
//! The AMD-V x86-64 logical processor (AMD64 Architecture Programmer's Manual, "APM").

pub mod access;
pub mod avic;
pub mod block;
pub mod decode;
pub mod events;
pub mod families;
pub mod flags;
pub mod int;
pub mod op;
pub mod paging;
pub mod pmu;
pub mod processor;
pub mod simd;
pub mod state;
pub mod system;
pub mod translate;
pub mod vmcb;
pub mod vmrun;
pub mod x87;
