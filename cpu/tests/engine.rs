// SPDX-License-Identifier: Apache-2.0
//! The engine with an architecture of four instructions, whose decoder another processor overtakes at will: what can come
//! between the reading of code and the decision that it is still there comes there each time, not once in a while.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use softcpu::engine::architecture::{Architecture, OPERANDS_BYTES, Operands, Space};
use softcpu::engine::draft::Draft;
use softcpu::engine::op::{Op, Res, Stop};
use softcpu::engine::processor::{Code, Decoder, Exited, Processor};
use softcpu::engine::run;
use softcpu::engine::state::Engine;
use softcpu::engine::thread::handler;
use softcpu::mem::{Machine, Shared, pending};

/// What another processor does while code is decoded; the number of the decoding, from 1.
type Overtake = fn(&Other, u32);

/// The processor as others see it while it runs.
struct Other {
    memory: usize,
    machine: Arc<Machine>,
    shared: Arc<Shared>,
    /// Whether a decoding found the machine's processors caught up with it.
    caught_up: Cell<bool>,
}

thread_local! {
    static RUNNING: RefCell<Option<(Rc<Other>, Overtake)>> = const { RefCell::new(None) };
    static DECODED: Cell<u32> = const { Cell::new(0) };
}

/// A processor with an accumulator. An instruction is a code and a constant, a byte each.
struct Toy {
    engine: Engine<Toy>,
    other: Rc<Other>,
    pc: u64,
    block_pc: u64,
    sum: u64,
}

/// Adds the constant.
const ADD: u8 = 1;
/// Leaves when the sum is at least the constant.
const LEAVE: u8 = 2;
/// Goes to the first instruction.
const AGAIN: u8 = 3;

/// An op is half a cache line, whatever of that its operands need.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Constant {
    next: u16,
    length: u8,
    value: u8,
    _room: [u8; OPERANDS_BYTES - 4],
}

impl Constant {
    fn new(next: usize, length: u8, value: u8) -> Constant {
        Constant { next: next as u16, length, value, _room: [0; OPERANDS_BYTES - 4] }
    }
}

impl Operands for Constant {
    fn end(offset: u16) -> Self {
        Constant::new(offset as usize, 0, 0)
    }
    fn next(&self) -> u16 {
        self.next
    }
    fn length(&self) -> u8 {
        self.length
    }
}

/// There is one address space.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Nowhere;

impl Space for Nowhere {
    fn guest(&self) -> u32 {
        0
    }
}

impl Architecture for Toy {
    type Operands = Constant;
    type Space = Nowhere;
    type Rights = ();
    const MAX_INSTRUCTION: usize = 2;
    const TABLE_SHIFT: u32 = 21;
}

fn add(cpu: &mut Toy, op: &Op<Toy>) -> Res {
    cpu.sum += op.value as u64;
    Ok(())
}

fn leave(cpu: &mut Toy, op: &Op<Toy>) -> Res {
    if cpu.sum >= op.value as u64 { Err(Stop::Exit) } else { Ok(()) }
}

fn again(cpu: &mut Toy, _: &Op<Toy>) -> Res {
    cpu.pc = 0;
    Err(Stop::Exit0)
}

struct ToyDecoder;

impl Decoder<Toy> for ToyDecoder {
    fn new(_: u8, _: bool) -> Self {
        ToyDecoder
    }

    fn decode(&mut self, bytes: &[u8], draft: &mut Draft<Toy>) -> bool {
        while draft.open() {
            let at = draft.at();
            let &[code, value, ..] = &bytes[at..] else { return true };
            let f = match code {
                ADD => handler(add),
                LEAVE => handler(leave),
                _ => handler(again),
            };
            draft.push(Op::new(f, Constant::new(at + 2, 2, value)));
            if code == AGAIN {
                break;
            }
        }
        // The bytes have been read, and are yet to be compared.
        DECODED.set(DECODED.get() + 1);
        RUNNING.with_borrow(|running| {
            if let Some((other, overtake)) = running {
                overtake(other, DECODED.get());
            }
        });
        false
    }
}

impl Processor for Toy {
    type Decoder = ToyDecoder;

    fn engine(&self) -> &Engine<Self> {
        &self.engine
    }
    fn engine_mut(&mut self) -> &mut Engine<Self> {
        &mut self.engine
    }
    fn pc(&self) -> u64 {
        self.pc
    }
    fn set_pc(&mut self, pc: u64) {
        self.pc = pc;
    }
    fn block_pc(&self) -> u64 {
        self.block_pc
    }
    fn begin_block(&mut self) {
        self.block_pc = self.pc;
    }
    fn mode(&self) -> u8 {
        0
    }
    fn flat_code(&self) -> bool {
        true
    }
    fn fetch_bank(&self) -> usize {
        0
    }
    fn privilege(&self) -> u64 {
        0
    }
    fn code(&mut self) -> Result<Code, Stop> {
        Ok(Code { linear: self.pc, left: u64::MAX })
    }
    fn code_limit(&mut self) -> Stop {
        Stop::Fault
    }
    fn wrap(&self, linear: u64) -> u64 {
        linear
    }
    fn translate_fetch(&mut self, linear: u64) -> Result<usize, Stop> {
        Ok(self.other.memory + linear as usize)
    }
    fn attend(&mut self, pending: u32) -> Result<(), Exited> {
        if pending & pending::KICK != 0 { Err(Exited) } else { Ok(()) }
    }
    fn step(&mut self) -> Result<(), Exited> {
        let stop = run::run_one(self);
        self.stopped(stop)
    }
    fn stopped(&mut self, stop: Stop) -> Result<(), Exited> {
        if stop == Stop::Exit { Err(Exited) } else { Ok(()) }
    }
}

impl Other {
    fn put(&self, at: usize, byte: u8) {
        // SAFETY: the processor's page.
        unsafe { ((self.memory + at) as *mut u8).write_volatile(byte) }
    }

    fn get(&self, at: usize) -> u8 {
        // SAFETY: the processor's page.
        unsafe { ((self.memory + at) as *const u8).read_volatile() }
    }
}

impl Toy {
    fn new(code: &[u8]) -> Box<Toy> {
        let machine = Machine::new();
        let memory = machine.alloc_pages(1).unwrap();
        let engine = Engine::new(machine.clone());
        let shared = engine.shared().clone();
        let other = Rc::new(Other { memory, machine, shared, caught_up: Cell::new(false) });
        // Zeros behind it, which go on, are never come to.
        code.iter().enumerate().for_each(|(n, byte)| other.put(n, *byte));
        Box::new(Toy { engine, other, pc: 0, block_pc: 0, sum: 0 })
    }

    /// Runs from the first instruction until it leaves, and returns how often code was decoded.
    fn run(&mut self, overtake: Overtake) -> u32 {
        (self.pc, self.sum) = (0, 0);
        DECODED.set(0);
        RUNNING.set(Some((self.other.clone(), overtake)));
        run::in_guest(self, |cpu| {
            run::begin(cpu);
            run::run(cpu);
        });
        RUNNING.set(None);
        DECODED.get()
    }
}

/// Decodings that are overtaken at most: enough to tell, and to let a stack be.
const OFTEN: u32 = if cfg!(miri) { 10 } else { 50 };

fn always(cpu: &Other, decoding: u32) {
    if decoding <= OFTEN {
        cpu.put(1, cpu.get(1) + 1);
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes minutes there")]
fn code_is_decoded_once_for_each_time_it_is_entered_however_often_it_changes_meanwhile() {
    let mut cpu = Toy::new(&[ADD, 1, LEAVE, 1]);
    for round in 1..10 {
        assert_eq!(cpu.run(always), 1);
        assert_eq!(cpu.sum, round, "what had been read is what runs, once");
    }
    assert_eq!(cpu.run(|_, _| ()), 1);
    assert_eq!(cpu.run(|_, _| ()), 0, "what agrees with memory stays");
    assert_eq!(cpu.sum, 10);
}

#[test]
fn bytes_that_were_overtaken_run_once_and_not_again() {
    let mut cpu = Toy::new(&[ADD, 1, LEAVE, 6, AGAIN, 0]);
    let decoded = cpu.run(|cpu, decoding| {
        if decoding == 1 {
            cpu.put(1, 5);
        }
    });
    assert_eq!((decoded, cpu.sum), (2, 6), "1 by the bytes from before, 5 by those after");
}

#[test]
fn a_kick_ends_code_that_is_always_overtaken() {
    let mut cpu = Toy::new(&[ADD, 1, LEAVE, 255, AGAIN, 0]);
    let decoded = cpu.run(|cpu, decoding| {
        always(cpu, decoding);
        if decoding == 7 {
            cpu.shared.kick();
        }
    });
    assert_eq!(decoded, 7);
    assert_eq!(cpu.sum, (1..=7).sum::<u64>());
}

/// Has code decoded once more, behind the first mark of its page.
fn look_behind_the_first_mark(cpu: &Other, decoding: u32) {
    if decoding == 1 {
        cpu.put(1, 5);
    } else {
        cpu.caught_up.set(cpu.machine.caught_up(cpu.machine.generation(), None));
    }
}

#[test]
fn a_processor_need_not_catch_up_with_its_own_first_mark_of_a_page() {
    let mut cpu = Toy::new(&[ADD, 1, LEAVE, 6, AGAIN, 0]);
    let before = cpu.other.machine.generation();
    assert_eq!(cpu.run(look_behind_the_first_mark), 2);
    assert_eq!(cpu.other.machine.generation(), before + 1, "others have to");
    assert!(cpu.other.caught_up.get());
}

#[test]
fn a_processors_own_mark_does_not_hide_what_else_it_has_to_catch_up_with() {
    let mut cpu = Toy::new(&[ADD, 1, LEAVE, 6, AGAIN, 0]);
    let before = cpu.other.machine.generation();
    let decoded = cpu.run(|cpu, decoding| {
        if decoding == 1 {
            // Not signalled: else it would catch up before its next block.
            cpu.machine.advance(Some(&cpu.shared));
        }
        look_behind_the_first_mark(cpu, decoding);
    });
    assert_eq!((decoded, cpu.other.machine.generation()), (2, before + 2));
    assert!(!cpu.other.caught_up.get());
}
