// SPDX-License-Identifier: Apache-2.0
//! A case: code, the state it starts from, and what came out; with a text form for golden vectors.

use std::fmt::Write as _;

/// Linear address of the code page (readable, executable).
pub const CODE: u64 = 0x2345_0000;
/// Linear address of the data: two writable pages, then a read-only one; nothing is mapped around them.
pub const DATA: u64 = 0x2346_1000;
/// Bytes of data that can be written.
pub const WRITABLE: usize = 0x2000;
/// Bytes of data, with the read-only page.
pub const DATA_SIZE: usize = 0x3000;
/// Offset of the code page in the code segment of 16-bit code: no value that data often has, or returns would loop.
pub const OFFSET16: u64 = 0x5a00;
/// Base of the data and stack segment of 16-bit code.
pub const SEGMENT16: u64 = 0x2346_0000;
/// Limit of both.
pub const LIMIT16: u32 = 0xffff;
/// Most bytes of code.
pub const CODE_SIZE: usize = 1024;
/// HLT: #GP(0) at CPL 3, the end of every case.
pub const END: u8 = 0xf4;

/// Registers, before or after.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct State {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fcw: u16,
    pub fsw: u16,
    /// One bit per physical x87 register: not empty.
    pub tags: u16,
    pub mxcsr: u32,
    /// In stack order: significand, sign and exponent.
    pub st: [[u64; 2]; 8],
    pub xmm: [[u64; 2]; 16],
}

impl State {
    pub const ZERO: State = State {
        gpr: [0; 16],
        rip: CODE,
        rflags: 0x202,
        fcw: 0x37f,
        fsw: 0,
        tags: 0,
        mxcsr: 0x1f80,
        st: [[0; 2]; 8],
        xmm: [[0; 2]; 16],
    };
}

/// What is run.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Case {
    pub state: State,
    /// 64-bit code, or 32-bit or 16-bit code in compatibility mode.
    pub bits: u32,
    /// Seed of the data's contents, see [`fill`].
    pub seed: u64,
    pub length: usize,
    pub code: [u8; CODE_SIZE],
}

/// RIP of the first instruction.
pub fn origin(bits: u32) -> u64 {
    if bits == 16 { OFFSET16 } else { CODE }
}

impl Case {
    pub fn code(&self) -> &[u8] {
        &self.code[..self.length]
    }
}

/// How it ended.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Outcome {
    pub state: State,
    pub vector: u64,
    pub error: u64,
    /// CR2, for #PF.
    pub address: u64,
    pub data: [u8; DATA_SIZE],
}

impl Outcome {
    pub const EMPTY: Outcome =
        Outcome { state: State::ZERO, vector: u64::MAX, error: 0, address: 0, data: [0; DATA_SIZE] };
}

impl State {
    /// Forgets the contents of empty x87 registers.
    pub fn settle(&mut self) {
        for i in 0..8 {
            let physical = ((self.fsw as usize >> 11) + i) & 7;
            if self.tags >> physical & 1 == 0 {
                self.st[i] = [0; 2];
            }
        }
    }
}

/// The random numbers of everything here (splitmix64): the golden vectors depend on it.
pub fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*seed ^ (*seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Values that tend to matter.
pub fn interesting(seed: &mut u64) -> u64 {
    const VALUES: [u64; 24] = [
        0,
        1,
        u64::MAX,
        0x7fff_ffff_ffff_ffff,
        0x8000_0000_0000_0000,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x7f,
        0x80,
        0xff,
        0x8000,
        0x7fff,
        0x3ff0_0000_0000_0000,
        0xbff0_0000_0000_0000,
        0x7ff0_0000_0000_0000,
        0x7ff8_0000_0000_0001,
        0x7ff0_0000_0000_0001,
        0x0010_0000_0000_0000,
        0x000f_ffff_ffff_ffff,
        0x3f80_0000_bf80_0000,
        0x7f80_0000_ff80_0001,
        0x7fc0_0000_0080_0000,
        0x4330_0000_4b00_0000,
    ];
    let r = next(seed);
    match r & 7 {
        0 | 1 => VALUES[(r >> 8) as usize % VALUES.len()],
        2 => next(seed) >> (r >> 8 & 63),
        3 => (next(seed) as i64 >> (r >> 8 & 63)) as u64,
        4 => 1u64.rotate_left(r as u32 >> 8).wrapping_sub(r >> 63),
        _ => next(seed),
    }
}

/// Fills the data from its seed.
pub fn fill(seed: u64, data: &mut [u8]) {
    let mut seed = seed;
    for chunk in data.chunks_exact_mut(8) {
        chunk.copy_from_slice(&interesting(&mut seed).to_le_bytes());
    }
}

// ---- text ------------------------------------------------------------------------------------------------------

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

fn unhex(s: &str) -> Option<Vec<u8>> {
    (0..s.len()).step_by(2).map(|i| u8::from_str_radix(s.get(i..i + 2)?, 16).ok()).collect()
}

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// The fields in which `s` differs from `from`.
pub fn fields(s: &State, from: &State) -> String {
    let mut out = String::new();
    let mut put = |name: &str, a: u128, b: u128| {
        if a != b {
            let _ = write!(out, " {name}={a:x}");
        }
    };
    for (i, name) in NAMES.iter().enumerate() {
        put(name, s.gpr[i] as u128, from.gpr[i] as u128);
    }
    put("rip", s.rip as u128, from.rip as u128);
    put("rflags", s.rflags as u128, from.rflags as u128);
    put("fcw", s.fcw as u128, from.fcw as u128);
    put("fsw", s.fsw as u128, from.fsw as u128);
    put("tags", s.tags as u128, from.tags as u128);
    put("mxcsr", s.mxcsr as u128, from.mxcsr as u128);
    let wide = |v: [u64; 2]| (v[1] as u128) << 64 | v[0] as u128;
    for i in 0..8 {
        put(&format!("st{i}"), wide(s.st[i]), wide(from.st[i]));
    }
    for i in 0..16 {
        put(&format!("xmm{i}"), wide(s.xmm[i]), wide(from.xmm[i]));
    }
    out
}

fn set(s: &mut State, name: &str, v: u128) -> Option<()> {
    let halves = [v as u64, (v >> 64) as u64];
    if let Some(i) = NAMES.iter().position(|n| *n == name) {
        s.gpr[i] = v as u64;
    } else if let Some(i) = name.strip_prefix("st") {
        *s.st.get_mut(i.parse::<usize>().ok()?)? = halves;
    } else if let Some(i) = name.strip_prefix("xmm") {
        *s.xmm.get_mut(i.parse::<usize>().ok()?)? = halves;
    } else {
        match name {
            "rip" => s.rip = v as u64,
            "rflags" => s.rflags = v as u64,
            "fcw" => s.fcw = v as u16,
            "fsw" => s.fsw = v as u16,
            "tags" => s.tags = v as u16,
            "mxcsr" => s.mxcsr = v as u32,
            _ => return None,
        }
    }
    Some(())
}

/// The word that starts a golden vector.
const WORDS: [(&str, u32); 3] = [("case", 64), ("case32", 32), ("case16", 16)];

/// One golden vector: three lines, `case`, `case32` or `case16` (code, undefined flags at its end, data seed), `in` (what
/// differs from the zero state) and `out` (what differs from `in`, the fault, bytes written).
pub fn to_text(name: &str, case: &Case, undefined: u64, out: &Outcome) -> String {
    let mut s = format!(
        "# {name}\n{} {} {undefined:x} {:x}\n",
        WORDS.iter().find(|w| w.1 == case.bits).map_or("", |w| w.0),
        hex(case.code()),
        case.seed
    );
    let _ = writeln!(s, "in{}", fields(&case.state, &State::ZERO));
    let _ = write!(s, "out{}", fields(&out.state, &case.state));
    let _ = write!(s, " fault={:x}:{:x}:{:x}", out.vector, out.error, out.address);
    let mut before = [0; DATA_SIZE];
    fill(case.seed, &mut before);
    let mut i = 0;
    while i < DATA_SIZE {
        let n = (i..DATA_SIZE).take_while(|&k| before[k] != out.data[k]).count();
        if n > 0 {
            let _ = write!(s, " {:x}:{}", i, hex(&out.data[i..i + n]));
        }
        i += n.max(1);
    }
    s + "\n"
}

/// Reads a vector back: the case, the undefined flags, what must come out.
pub fn from_text(lines: [&str; 3]) -> Option<(Case, u64, Box<Outcome>)> {
    let mut words = lines[0].split(' ');
    let word = words.next()?;
    let bits = WORDS.iter().find(|w| w.0 == word)?.1;
    let bytes = unhex(words.next()?)?;
    let undefined = u64::from_str_radix(words.next()?, 16).ok()?;
    let seed = u64::from_str_radix(words.next()?, 16).ok()?;
    let mut case = Case { state: State::ZERO, bits, seed, length: bytes.len(), code: [END; CODE_SIZE] };
    case.code.get_mut(..bytes.len())?.copy_from_slice(&bytes);
    for word in lines[1].strip_prefix("in")?.split_whitespace() {
        let (name, v) = word.split_once('=')?;
        set(&mut case.state, name, u128::from_str_radix(v, 16).ok()?)?;
    }
    let mut out = Box::new(Outcome::EMPTY);
    out.state = case.state;
    fill(seed, &mut out.data);
    for word in lines[2].strip_prefix("out")?.split_whitespace() {
        if let Some(fault) = word.strip_prefix("fault=") {
            let mut n = fault.split(':').map(|v| u64::from_str_radix(v, 16).ok());
            (out.vector, out.error, out.address) = (n.next()??, n.next()??, n.next()??);
        } else if let Some((name, v)) = word.split_once('=') {
            set(&mut out.state, name, u128::from_str_radix(v, 16).ok()?)?;
        } else {
            let (at, v) = word.split_once(':')?;
            let (at, v) = (usize::from_str_radix(at, 16).ok()?, unhex(v)?);
            out.data.get_mut(at..at + v.len())?.copy_from_slice(&v);
        }
    }
    Some((case, undefined, out))
}

/// What differs between two outcomes, but for undefined flags; empty when nothing does.
pub fn differences(a: &Outcome, b: &Outcome, undefined: u64) -> Vec<String> {
    let mut out = Vec::new();
    if (a.vector, a.error, a.address) != (b.vector, b.error, b.address) {
        out.push(format!(
            "fault {}:{:x}:{:x} and {}:{:x}:{:x}",
            a.vector, a.error, a.address, b.vector, b.error, b.address
        ));
    }
    let (mut x, mut y) = (a.state, b.state);
    // RF in the image a fault pushes is the host kernel's affair here.
    let ignored = undefined | 1 << 16;
    x.rflags &= !ignored;
    y.rflags &= !ignored;
    let (l, r) = (fields(&x, &y), fields(&y, &x));
    if !l.is_empty() {
        out.push(format!("{l}  and {r}"));
    }
    for (i, (p, q)) in a.data.iter().zip(&b.data).enumerate() {
        if p != q {
            out.push(format!("byte {:#x}: {p:02x} and {q:02x}", DATA + i as u64));
            if out.len() > 12 {
                break;
            }
        }
    }
    out
}
