// SPDX-License-Identifier: Apache-2.0
//! System-level behaviour of the silicon, shown by small guests. Expected values are the APM's.

#[path = "../common/mod.rs"]
mod common;

mod avic;
mod canonical;
mod exceptions;
mod flush;
mod fused;
mod fuzz;
mod intercepts;
mod lost;
mod paging;
mod pmu;
mod returns;
mod stepping;
mod threads;
mod transfers;
mod tsc;
mod waitpkg;
