// SPDX-License-Identifier: Apache-2.0
//! The ops of a block: iced-x86's instructions, translated one by one, the last two together where they go together.

use iced_x86::{DecoderError, FlowControl, Instruction};

use super::decode::{amend, decoder};
use super::families::translate;
use super::int::fuse;
use super::op::{Op, Res, handler_registers};
use super::pmu::event::repeats;
use super::state::Cpu;
use super::translate::Context;
use crate::engine::architecture::Architecture;
use crate::engine::draft::Draft;
use crate::engine::processor;

/// Makes the ops of one block.
pub struct BlockDecoder {
    code_size: u8,
    counted: bool,
    now: Instruction,
    before: Instruction,
}

/// #GP(0) for an instruction longer than 15 bytes.
fn too_long(cpu: &mut Cpu, _: &Op) -> Res {
    Err(cpu.gp(0))
}

impl processor::Decoder<Cpu> for BlockDecoder {
    fn new(mode: u8, counted: bool) -> BlockDecoder {
        BlockDecoder { code_size: mode, counted, now: Instruction::default(), before: Instruction::default() }
    }

    fn decode(&mut self, bytes: &[u8], draft: &mut Draft<Cpu>) -> bool {
        // Positions count from the block's start.
        let start = draft.at();
        let bitness = self.code_size as u32 * 8;
        let mut d = decoder(bitness, &bytes[start..], start as u64);
        while draft.open() {
            d.decode_out(&mut self.now);
            amend(&mut self.now, &bytes[draft.at()..]);
            let i = &self.now;
            let repeated = self.counted && repeats(i);
            if repeated && draft.count() > 0 {
                break;
            }
            let cx = Context { code_size: self.code_size, offset: draft.at() as u16 };
            let mut op = translate(i, &cx);
            if i.is_invalid() && d.last_error() == DecoderError::NoMoreBytes {
                if bytes.len() - draft.at() < Cpu::MAX_INSTRUCTION {
                    return true;
                }
                op.f = handler_registers(too_long);
                op.len = 1;
                op.next = cx.offset + 1;
            }
            let ends = repeated || i.is_invalid() || i.flow_control() != FlowControl::Next;
            if let (true, false, Some(first)) = (ends, repeated, draft.last_mut()) {
                if let Some(f) = fuse::fuse(&self.before, first, i) {
                    first.f = f;
                }
            }
            draft.push(op);
            if ends {
                break;
            }
            core::mem::swap(&mut self.now, &mut self.before);
        }
        false
    }
}
