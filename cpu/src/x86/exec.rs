// SPDX-License-Identifier: Apache-2.0
//! The run loop: from one block to the next until #VMEXIT, with events taken at instruction boundaries only.

use std::sync::atomic::Ordering;

use super::flags::rf;
use super::op::{Op, Stop};
use super::state::{Cpu, Exception, Exit, LINK_NONE, attention, pending, vector};
use super::system::exitcode;
use crate::engine::block::{Block, CHAIN};

/// DR6 bit: single step.
const DR6_BS: u64 = 1 << 14;

impl Cpu {
    /// Runs until #VMEXIT; the reason is in `self.exit`.
    pub(super) fn run(&mut self) {
        let mut prev: *mut Block = core::ptr::null_mut();
        loop {
            if self.needs_attention() {
                if self.attend().is_err() {
                    return;
                }
                prev = core::ptr::null_mut();
                if self.single {
                    if self.step().is_err() {
                        return;
                    }
                    continue;
                }
            }
            let stop = match self.next_block(prev) {
                Ok(b) => self.enter(b),
                Err(stop) => {
                    self.stop_op = core::ptr::null();
                    stop
                }
            };
            prev = core::ptr::null_mut();
            match stop {
                Stop::EndBlock => {
                    if self.link != LINK_NONE {
                        prev = self.block;
                    }
                }
                Stop::SelfModify => {
                    if self.step().is_err() {
                        return;
                    }
                }
                other => {
                    if self.stopped(other).is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Runs a block and those chained to it to a stop; counts what retired and leaves `rip` at the instruction to go on with.
    #[inline(always)]
    fn enter(&mut self, b: *mut Block) -> Stop {
        self.block = b;
        self.rb.gpr[17] = self.rip;
        self.chain_limit = if self.single { 0 } else { self.instructions + CHAIN };
        // SAFETY: `b` is a live block; its ops end with one that stops.
        let stop = unsafe {
            let first = Block::first(b);
            ((*first).f)(self, first)
        };
        // SAFETY: the op at which the run stopped belongs to the block that ran last.
        let (index, op) =
            unsafe { (self.stop_op.offset_from(Block::first(self.block)) as u64, &*self.stop_op) };
        match stop {
            Stop::EndBlock | Stop::Exit0 | Stop::Exit1 | Stop::Return | Stop::Trap | Stop::ExitAfter => {
                self.instructions += index + (op.len != 0) as u64
            }
            Stop::Fault | Stop::Exit | Stop::Restart | Stop::SelfModify | Stop::Slow => {
                self.instructions += index;
                let ip = self.this_ip(op);
                self.rip = self.mask_ip(ip);
            }
        }
        stop
    }

    /// Acts on a stop other than the end of a block. Err: #VMEXIT.
    #[cold]
    fn stopped(&mut self, stop: Stop) -> Result<(), ()> {
        match stop {
            Stop::Exit | Stop::ExitAfter => Err(()),
            Stop::Fault | Stop::Trap => {
                let exception = self.exception;
                self.deliver_exception(exception)
            }
            _ => Ok(()),
        }
    }

    fn deliver_exception(&mut self, exception: Exception) -> Result<(), ()> {
        match self.raise(exception) {
            Ok(()) => {
                self.shadow = false;
                self.update_attention();
                Ok(())
            }
            Err(_) => Err(()),
        }
    }

    /// Looks at everything that may come between two instructions. Err: #VMEXIT.
    #[cold]
    #[inline(never)]
    fn attend(&mut self) -> Result<(), ()> {
        self.single = false;
        let p = self.shared.pending.load(Ordering::SeqCst);
        if p & pending::TLB_SYNC != 0 {
            self.catch_up();
        }
        if p & pending::CODE_CHANGED != 0 {
            self.shared.pending.fetch_and(!pending::CODE_CHANGED, Ordering::SeqCst);
            self.stamp = self.stamp.wrapping_add(1);
        }
        if p & pending::NMI != 0 {
            self.shared.pending.fetch_and(!pending::NMI, Ordering::SeqCst);
            return self.leave(exitcode::NMI);
        }
        if p & pending::INTR != 0 {
            self.shared.pending.fetch_and(!pending::INTR, Ordering::SeqCst);
            return self.leave(exitcode::INTR);
        }
        if self.attention & attention::VIRQ != 0 && !self.shadow && self.rflags & rf::IF != 0 {
            let c = self.ctl;
            if c.v_ign_tpr || c.v_intr_prio > c.v_tpr {
                if self.intercepted(3, 4) {
                    return self.leave(exitcode::VINTR);
                }
                self.ctl.v_irq = false;
                if self.external_interrupt(c.v_intr_vector).is_err() {
                    return Err(());
                }
                self.update_attention();
            }
        }
        if self.attention & (attention::SHADOW | attention::STEP | attention::DEBUG) != 0 {
            self.single = true;
        }
        Ok(())
    }

    fn leave(&mut self, code: u64) -> Result<(), ()> {
        self.exit = Exit { code, info1: 0, info2: 0 };
        self.stop_op = core::ptr::null();
        Err(())
    }

    /// Catches up with the machine: no translation from before may be used for writes or for removed regions.
    pub(super) fn catch_up(&mut self) {
        self.shared.pending.fetch_and(!pending::TLB_SYNC, Ordering::SeqCst);
        let generation = self.machine.generation();
        let regions = self.machine.regions();
        if !std::sync::Arc::ptr_eq(&regions, &self.regions) {
            self.regions = regions;
            self.tlb.flush_all();
            self.drop_blocks();
        } else {
            self.tlb.protect_all();
        }
        self.shared.synced.store(generation, Ordering::SeqCst);
    }

    /// Runs one instruction by itself: interrupt shadow, single step, breakpoints, a write into its own block.
    #[cold]
    #[inline(never)]
    fn step(&mut self) -> Result<(), ()> {
        self.single = true;
        let done = self.step_inner();
        self.single = false;
        self.update_attention();
        done
    }

    fn step_inner(&mut self) -> Result<(), ()> {
        let shadow = core::mem::take(&mut self.shadow);
        let stepping = self.rflags & rf::TF != 0;
        let resume = self.rflags & rf::RF;
        // AMD's processors take an instruction breakpoint behind MOV SS, too.
        if self.attention & attention::DEBUG != 0 && resume == 0 {
            let hits = self.instruction_breakpoints();
            if hits != 0 {
                return self.deliver_exception(Exception { vector: vector::DB, error: None, address: hits });
            }
        }
        self.rflags &= !rf::RF;
        self.debug_hits = 0;
        self.sys.no_step = false;
        let deferred = self.sys.deferred_hits;
        let stop = match self.lookup(true) {
            Ok(b) => self.enter(b),
            Err(stop) => {
                self.stop_op = core::ptr::null();
                stop
            }
        };
        match stop {
            Stop::Exit | Stop::Restart | Stop::SelfModify | Stop::Fault => {
                // Not retired: what held for it holds still (the delivery of a fault ends it).
                self.rflags |= resume;
                self.shadow |= shadow;
            }
            _ => {}
        }
        // Traps come after every iteration of a repeated instruction too.
        if !matches!(stop, Stop::EndBlock | Stop::Restart) {
            if matches!(stop, Stop::Trap | Stop::Fault) {
                self.sys.deferred_hits = 0;
                if self.exception.vector == vector::DB {
                    self.exception.address |= deferred;
                }
            }
            return self.stopped(stop);
        }
        let mut hits = self.debug_hits;
        if self.shadow && self.sys.no_step {
            // MOV SS: its own data breakpoints wait for the end of the next instruction, too.
            self.sys.deferred_hits |= hits;
            return Ok(());
        }
        if stop == Stop::EndBlock {
            hits |= core::mem::take(&mut self.sys.deferred_hits);
        }
        if stepping && !self.sys.no_step {
            hits |= DR6_BS;
        }
        if hits != 0 {
            return self.deliver_exception(Exception { vector: vector::DB, error: None, address: hits });
        }
        Ok(())
    }

    /// Called for each data access while breakpoints are armed.
    #[cold]
    pub(super) fn note_data_access(&mut self, linear: u64, size: usize, write: bool) {
        self.debug_hits |= self.data_breakpoints(linear, size, write);
    }

    /// RIP after the instruction at which the run stopped, if it stopped at one.
    pub(super) fn stopped_next_ip(&self) -> Option<u64> {
        if self.stop_op.is_null() {
            return None;
        }
        // SAFETY: set by the run that just stopped; its block is alive.
        let op: &Op = unsafe { &*self.stop_op };
        Some(self.mask_ip(self.next_ip(op)))
    }
}
