// SPDX-License-Identifier: Apache-2.0
//! Single instructions, one signal each: the last bytes of the code page hold the instruction, or all of it but the last
//! byte; it runs with TF set, so that it ends in #DB with RIP behind it, or with its own exception. Nothing is mapped
//! behind the page: a fetch beyond it is #PF there, which tells how long the instruction is.

use std::sync::OnceLock;

use crate::case::{DATA, DATA_SIZE, END, SEGMENT16, State, next, origin};

/// Most bytes of an instruction.
pub const LONGEST: usize = 15;
/// RFLAGS.TF.
pub const TF: u64 = 1 << 8;

/// An instruction to run.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Probe {
    pub bits: u32,
    /// How many of the bytes are on the page.
    pub room: usize,
    pub bytes: [u8; LONGEST],
}

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Answer {
    pub state: State,
    pub vector: u64,
    pub error: u64,
    /// CR2, for #PF.
    pub address: u64,
    /// Digest of what has been written, zero for nothing.
    pub memory: u64,
}

impl Answer {
    pub const EMPTY: Answer =
        Answer { state: State::ZERO, vector: u64::MAX, error: 0, address: 0, memory: 0 };
}

impl Answer {
    /// Without the contents of empty x87 registers.
    pub fn settled(mut self) -> Answer {
        self.state.settle();
        self
    }
}

impl Probe {
    /// Where on the page it starts.
    pub fn offset(&self) -> usize {
        4096 - self.room
    }

    /// RIP of its first byte.
    pub fn ip(&self) -> u64 {
        origin(self.bits) + self.offset() as u64
    }

    /// Fills the code page.
    pub fn place(&self, page: &mut [u8]) {
        let at = self.offset();
        // What the one before left is behind HLTs now.
        page[4096 - 2 * LONGEST..].fill(END);
        page[at..].copy_from_slice(&self.bytes[..self.room]);
    }

    /// The registers it starts with: addresses within the data, all different; some numbers in the x87 and SSE registers.
    pub fn state(&self) -> State {
        let data = if self.bits == 16 { DATA - SEGMENT16 } else { DATA };
        let mut s = State { rip: self.ip(), rflags: 0x203 | TF, tags: 0x0f, ..State::ZERO };
        for (i, r) in s.gpr.iter_mut().enumerate() {
            *r = if self.bits != 64 && i > 7 { 0 } else { data + 0x400 + 0x40 * i as u64 };
        }
        s.gpr[4] = data + 0x1800;
        s.st[..4].copy_from_slice(&[
            [0xc000_0000_0000_0000, 0x3fff],
            [0x9000_0000_0000_0000, 0xc000],
            [0x927c_0000_0000_0000, 0x4011],
            [0x8637_bd05_af6c_69b6, 0x3feb],
        ]);
        let mut seed = 1;
        s.xmm = [[0; 2]; 16].map(|_: [u64; 2]| [next(&mut seed), next(&mut seed)]);
        s
    }
}

/// The data's contents: every word a selector beyond the descriptor tables, every quadword a canonical address, no flags
/// image with NT or AC.
pub fn template() -> &'static [u8; DATA_SIZE] {
    static TEMPLATE: OnceLock<Box<[u8; DATA_SIZE]>> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let mut data = Box::new([0; DATA_SIZE]);
        let mut seed = 2;
        for chunk in data.chunks_exact_mut(8) {
            let v = next(&mut seed) & 0x3ffb_3ffb_3ffb | 0x1000_1000_1000;
            chunk.copy_from_slice(&(v & !(1 << 18)).to_le_bytes());
        }
        data
    })
}

/// The digest of what differs from the template; puts the template back.
pub fn digest(data: &mut [u8; DATA_SIZE]) -> u64 {
    let template = template();
    if data == template {
        return 0;
    }
    let mut digest = 0u64;
    for (at, (d, t)) in data.chunks_exact(8).zip(template.chunks_exact(8)).enumerate() {
        if d != t {
            let word = d.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
            digest = (digest.rotate_left(5) ^ word ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
    data.copy_from_slice(template);
    digest | 1
}
