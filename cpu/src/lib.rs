// SPDX-License-Identifier: Apache-2.0
//! A software CPU: logical processors that implement the architecture's manual, including its virtualization
//! extension, and nothing of any hypervisor. Physical addresses are addresses of this process.

pub mod clock;
pub mod engine;
pub mod float;
pub mod int;
pub mod mem;
pub mod x86;

#[cfg(target_endian = "big")]
compile_error!("softcpu keeps guest registers and memory in host byte order and needs a little-endian host");
