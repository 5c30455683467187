// SPDX-License-Identifier: Apache-2.0
//! The x86 processor as the engine runs it.

use super::access::Access;
use super::block::BlockDecoder;
use super::op::{Operands, Stop};
use super::paging::{Space, TableRights, fetch_bank};
use super::state::{Cpu, sreg};
use crate::engine::architecture::Architecture;
use crate::engine::processor::{Code, Exited, Processor};
use crate::engine::state::Engine;

impl Architecture for Cpu {
    type Operands = Operands;
    type Space = Space;
    type Rights = TableRights;
    // APM vol. 3, 1.1.
    const MAX_INSTRUCTION: usize = 15;
    // PAE and long mode; a table of legacy paging has 4 MiB.
    const TABLE_SHIFT: u32 = 21;
}

impl Processor for Cpu {
    type Decoder = BlockDecoder;

    #[inline(always)]
    fn engine(&self) -> &Engine<Cpu> {
        &self.engine
    }
    #[inline(always)]
    fn engine_mut(&mut self) -> &mut Engine<Cpu> {
        &mut self.engine
    }

    #[inline(always)]
    fn pc(&self) -> u64 {
        self.rip
    }
    #[inline(always)]
    fn set_pc(&mut self, pc: u64) {
        self.rip = self.mask_ip(pc);
    }
    #[inline(always)]
    fn block_pc(&self) -> u64 {
        self.rb.gpr[17]
    }
    #[inline(always)]
    fn begin_block(&mut self) {
        self.rb.gpr[17] = self.rip;
    }

    #[inline(always)]
    fn mode(&self) -> u8 {
        self.code_size
    }
    #[inline(always)]
    fn flat_code(&self) -> bool {
        self.code_size == 8
    }
    #[inline(always)]
    fn fetch_bank(&self) -> usize {
        fetch_bank(self.cpl)
    }
    #[inline(always)]
    fn privilege(&self) -> u64 {
        self.cpl as u64
    }
    /// Checks the limit of legacy modes.
    #[inline(always)]
    fn code(&mut self) -> Result<Code, Stop> {
        if self.code_size == 8 {
            return Ok(Code { linear: self.rip, left: u64::MAX });
        }
        let cs = &self.seg[sreg::CS];
        let left = (cs.limit as u64).wrapping_add(1).wrapping_sub(self.rip);
        if self.rip > cs.limit as u64 {
            return Err(self.gp(0));
        }
        Ok(Code { linear: (cs.base as u32).wrapping_add(self.rip as u32) as u64, left })
    }
    fn code_limit(&mut self) -> Stop {
        self.gp(0)
    }
    #[inline(always)]
    fn wrap(&self, linear: u64) -> u64 {
        if self.long_mode() { linear } else { linear as u32 as u64 }
    }
    fn translate_fetch(&mut self, linear: u64) -> Result<usize, Stop> {
        self.translate(self.fetch_bank(), sreg::CS as u8, linear, 1, Access::Fetch)
    }

    fn attend(&mut self, pending: u32) -> Result<(), Exited> {
        self.take_events(pending)
    }
    fn step(&mut self) -> Result<(), Exited> {
        self.step_one()
    }
    fn stopped(&mut self, stop: Stop) -> Result<(), Exited> {
        self.take_stop(stop)
    }
}
