// SPDX-License-Identifier: Apache-2.0
//! What an architecture's processor does for the engine.

use super::architecture::Architecture;
use super::draft::Draft;
use super::op::Stop;
use super::state::Engine;

/// The guest was left: nothing more runs before it is entered again. Why is the architecture's own.
#[derive(Debug, PartialEq, Eq)]
pub struct Exited;

/// Where instructions are fetched.
#[derive(Clone, Copy)]
pub struct Code {
    /// Linear address.
    pub linear: u64,
    /// Bytes from there that may be fetched (a segment's limit).
    pub left: u64,
}

/// A logical processor that the engine runs.
///
/// Everything here is called on the processor's own thread, and what handlers call is in the hot path: such methods are
/// `#[inline(always)]`.
pub trait Processor: Architecture {
    /// Makes ops of instructions.
    type Decoder: Decoder<Self>;

    /// The engine's part of the processor.
    fn engine(&self) -> &Engine<Self>;
    /// The same, to change it.
    fn engine_mut(&mut self) -> &mut Engine<Self>;

    // ---- program counter ---------------------------------------------------------------------------------------

    /// Address of the next instruction, as software sees it; valid between blocks.
    fn pc(&self) -> u64;
    /// Sets it, cut to the width that is in force.
    fn set_pc(&mut self, pc: u64);
    /// Address of the running block's first instruction.
    fn block_pc(&self) -> u64;
    /// Makes the next instruction the running block's first.
    fn begin_block(&mut self);

    // ---- instruction fetch -------------------------------------------------------------------------------------

    /// What decoding depends on beside the bytes: any number below [`super::block::COUNTED`].
    fn mode(&self) -> u8;
    /// Whether code is fetched at [`Processor::pc`] as it is, without a limit. Other code is looked up block by block.
    fn flat_code(&self) -> bool;
    /// The TLB's bank for fetches.
    fn fetch_bank(&self) -> usize;
    /// The privilege that fetches have, 0 to 3.
    fn privilege(&self) -> u64;
    /// Where the next instruction is fetched, or the fault of doing so.
    fn code(&mut self) -> Result<Code, Stop>;
    /// The fault of an instruction that [`Code::left`] cuts off.
    fn code_limit(&mut self) -> Stop;
    /// A linear address cut to the width that is in force.
    fn wrap(&self, linear: u64) -> u64;
    /// Translates a linear address for a fetch, when the TLB doesn't know it, to a host address, or the fault.
    fn translate_fetch(&mut self, linear: u64) -> Result<usize, Stop>;

    // ---- events ------------------------------------------------------------------------------------------------

    /// Between two instructions, when something is pending ([`crate::mem::pending`]; the engine has taken its own) or
    /// [`Engine::attention`] isn't 0: takes events, and sets [`Engine::single`] to have the next instruction run by
    /// [`Processor::step`].
    fn attend(&mut self, pending: u32) -> Result<(), Exited>;
    /// Runs one instruction ([`super::run::run_one`]) and takes what it raises.
    fn step(&mut self) -> Result<(), Exited>;
    /// Acts on a stop that is the architecture's: a fault, a trap, an exit.
    fn stopped(&mut self, stop: Stop) -> Result<(), Exited>;
}

/// Makes the ops of one block.
pub trait Decoder<P: Architecture> {
    /// For code of a mode ([`Processor::mode`]). `counted`: what runs is told from which ops have retired, so what does a
    /// thing as often as a register says has a block of its own ([`super::count`]).
    fn new(mode: u8, counted: bool) -> Self;

    /// Adds ops to the draft as long as it is open and no instruction ends the block. `bytes` are the block's from its
    /// start. Returns true if they end within an instruction, of which nothing was added then; not if
    /// [`Architecture::MAX_INSTRUCTION`] were there. Bytes that are no instruction make an op that raises the fault.
    fn decode(&mut self, bytes: &[u8], draft: &mut Draft<P>) -> bool;
}
