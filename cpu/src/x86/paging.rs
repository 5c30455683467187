// SPDX-License-Identifier: Apache-2.0
//! Paging.
use super::access::Access;
use super::op::{Res, Stop};
use super::state::Cpu;

impl Cpu {
    /// Translates.
    pub fn translate(
        &mut self,
        _mmu: usize,
        _seg: u8,
        _linear: u64,
        _size: usize,
        _access: Access,
    ) -> Result<usize, Stop> {
        Err(Stop::Fault)
    }
    /// Before a write of `size` bytes at a host address: [`Stop::SelfModify`] if it hits the running block.
    pub fn before_code_write(&mut self, _host: usize, _size: usize) -> Res {
        Ok(())
    }
    /// After a write.
    pub fn after_code_write(&mut self, _host: usize, _size: usize) {}
}
