// SPDX-License-Identifier: Apache-2.0
//! Random programs: structured random bytes, kept when the decoder knows them as an instruction of the user-mode
//! subset, with the registers of their memory operands set up to hit the data, its edges, or nothing.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};
use softcpu::x86::decode::{amend, decoder};

use crate::case::{
    CODE, CODE_SIZE, Case, DATA, DATA_SIZE, END, SEGMENT16, State, WRITABLE, interesting, next, origin,
};
use crate::known::{Located, is_prefix};
use crate::select::{Family, displacement_size, flags, may_keep_flags, relative, truncated, wanted};

/// A program in pieces that can be left out one by one.
#[derive(Clone)]
pub struct Program {
    pub state: State,
    pub bits: u32,
    pub seed: u64,
    pub groups: Vec<Group>,
}

/// One instruction with what prepares its registers.
#[derive(Clone)]
pub struct Group {
    pub bytes: Vec<u8>,
    pub instruction: Instruction,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        next(&mut self.0)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// `mov r64, imm64` or `mov r32, imm32`
fn load_register(bits: u32, register: Register, value: u64) -> Vec<u8> {
    let n = register.full_register().number() as u8;
    match bits {
        64 => [&[0x48 | n >> 3, 0xb8 | n & 7][..], &value.to_le_bytes()].concat(),
        32 => [&[0xb8 | n & 7][..], &(value as u32).to_le_bytes()].concat(),
        _ => [&[0x66, 0xb8 | n & 7][..], &(value as u32).to_le_bytes()].concat(),
    }
}

/// `mov r16, imm16` in 16-bit code
fn load_half(register: Register, value: u64) -> Vec<u8> {
    [&[0xb8 | register.full_register().number() as u8 & 7][..], &(value as u16).to_le_bytes()].concat()
}

impl Program {
    /// A random program.
    pub fn random(seed: u64, family: Family) -> Program {
        let mut r = Random(seed);
        let mut program =
            Program { state: random_state(&mut r), bits: family.bits(), seed: r.next(), groups: Vec::new() };
        program.state.rip = origin(program.bits);
        if program.bits != 64 {
            program.state.gpr.iter_mut().for_each(|g| *g &= 0xffff_ffff);
        }
        if program.bits == 16 {
            program.state.gpr[4] -= SEGMENT16;
        }
        let count = match r.below(4) {
            0 => 1,
            1 => 2,
            _ => 1 + r.below(10),
        };
        let mut offset = 0;
        let mut skipping: Option<u64> = None;
        let mut undefined = 0;
        while program.groups.len() < count as usize {
            let Some(group) = random_group(&mut r, family, offset, undefined) else { continue };
            if offset + group.bytes.len() + 1 >= CODE_SIZE {
                break;
            }
            let before = undefined;
            undefined = after(undefined, &group.instruction);
            if let Some(at_branch) = skipping.take() {
                undefined |= at_branch;
                patch_skip(&mut program.groups, group.bytes.len());
            }
            if relative(&group.instruction) && r.one_in(2) {
                skipping = Some(before);
            }
            offset += group.bytes.len();
            program.groups.push(group);
        }
        program
    }

    /// Whether every instruction of 16-bit code exists in real mode too.
    pub fn runs_in_real_mode(&self) -> bool {
        self.groups.iter().all(|g| {
            let code = g.instruction.code();
            code.encoding() == EncodingKind::Legacy && g.instruction.mnemonic() != Mnemonic::Arpl
        })
    }

    /// As a case to run.
    pub fn case(&self) -> Case {
        let mut case =
            Case { state: self.state, bits: self.bits, seed: self.seed, length: 0, code: [END; CODE_SIZE] };
        for g in &self.groups {
            case.code[case.length..case.length + g.bytes.len()].copy_from_slice(&g.bytes);
            case.length += g.bytes.len();
        }
        case
    }

    /// Its instructions where they stand, without those that prepare registers.
    pub fn located(&self) -> Vec<Located> {
        let mut end = origin(self.bits);
        let locate = |g: &'_ Group| {
            end += g.bytes.len() as u64;
            let length = g.instruction.len();
            let bytes = g.bytes[g.bytes.len() - length..].to_vec();
            Located { ip: end - length as u64, bytes, instruction: g.instruction }
        };
        self.groups.iter().map(locate).collect()
    }

    /// Flags that are undefined when it stops at `rip`.
    pub fn undefined(&self, rip: u64) -> u64 {
        let mut at = origin(self.bits);
        let mut undefined = 0;
        for g in &self.groups {
            let next = at + g.bytes.len() as u64;
            if (at..next).contains(&rip) {
                // Both ways around a skipped group.
                return undefined;
            }
            let kept = undefined;
            undefined = after(undefined, &g.instruction);
            if relative(&g.instruction) {
                undefined |= kept;
            }
            // A branch before may have skipped this one.
            undefined |= kept & self.skipped_undefined(at);
            at = next;
        }
        if rip == at { undefined } else { self.all_undefined() }
    }

    fn skipped_undefined(&self, at: u64) -> u64 {
        let mut start = origin(self.bits);
        for g in &self.groups {
            let next = start + g.bytes.len() as u64;
            if next == at && relative(&g.instruction) {
                return u64::MAX;
            }
            start = next;
        }
        0
    }

    fn all_undefined(&self) -> u64 {
        self.groups.iter().fold(0, |u, g| u | flags(g.instruction.rflags_undefined()))
    }
}

fn after(undefined: u64, i: &Instruction) -> u64 {
    let own = flags(i.rflags_undefined());
    let defined = flags(i.rflags_written() | i.rflags_cleared() | i.rflags_set());
    if may_keep_flags(i) { undefined | own } else { undefined & !defined | own }
}

/// Makes the last group's branch jump over `length` bytes.
fn patch_skip(groups: &mut [Group], length: usize) {
    let Some(group) = groups.last_mut() else { return };
    let n = group.bytes.len();
    let size = displacement_size(&group.instruction);
    group.bytes[n - size..].copy_from_slice(&(length as u32).to_le_bytes()[..size]);
}

fn random_f80(r: &mut Random) -> [u64; 2] {
    let significand = interesting(&mut r.0);
    let sign = (r.next() & 1) << 15;
    let exponent = match r.below(8) {
        0 => 0,
        1 => 0x7fff,
        2 => 0x3fff,
        3 => r.below(0x8000),
        _ => 0x3fff - 70 + r.below(140),
    };
    // Mostly normal numbers; pseudo-denormals, unnormals and the like now and then.
    let significand = if exponent != 0 && !r.one_in(12) { significand | 1 << 63 } else { significand };
    [significand, sign | exponent]
}

fn random_state(r: &mut Random) -> State {
    let mut s = State::ZERO;
    for g in &mut s.gpr {
        *g = interesting(&mut r.0);
    }
    s.gpr[4] = DATA + 8 * (16 + r.below(WRITABLE as u64 / 8 - 32));
    s.rflags = 0x202 | r.next() & 0x8d5 | if r.one_in(4) { 0x400 } else { 0 };
    if r.one_in(2) {
        s.fcw = 0x40 | (r.next() & 0xc00) as u16 | r.pick(&[0, 0x200, 0x300]) | 0x3f;
        if r.one_in(6) {
            s.fcw &= !(r.next() as u16 & 0x3f);
        }
    }
    let top = r.below(8) as u16;
    s.fsw = top << 11 | (r.next() & 0x4700) as u16;
    if r.one_in(4) {
        // Sticky exceptions, of the masked ones.
        s.fsw |= r.next() as u16 & 0x3f & s.fcw;
    }
    s.tags = match r.below(4) {
        0 => 0xff,
        1 => 0,
        _ => r.next() as u16 & 0xff,
    };
    for st in &mut s.st {
        *st = random_f80(r);
    }
    for i in 0..8 {
        if s.tags >> ((top as usize + i) & 7) & 1 == 0 {
            s.st[i] = [0; 2];
        }
    }
    if r.one_in(2) {
        s.mxcsr = 0x1f80 | (r.next() & 0xe040) as u32;
        if r.one_in(4) {
            s.mxcsr |= r.next() as u32 & 0x3f;
        }
        if r.one_in(6) {
            s.mxcsr &= !(r.next() as u32 & 0x1f80);
        }
    }
    for x in &mut s.xmm {
        *x = [interesting(&mut r.0), interesting(&mut r.0)];
    }
    s
}

/// An address for a memory operand.
fn target(r: &mut Random) -> u64 {
    match r.below(24) {
        0 => DATA + 0x1000 - r.below(20),
        1 => DATA + WRITABLE as u64 - r.below(20),
        2 => DATA + DATA_SIZE as u64 - r.below(20),
        3 => DATA - r.below(12),
        4 => DATA + WRITABLE as u64 + r.below(0xf00),
        5 if r.one_in(2) => CODE + r.below(0x1000),
        5 => interesting(&mut r.0) | 0x8000_0000_0000,
        6..=11 => DATA + r.below(WRITABLE as u64 - 64),
        _ => DATA + 16 * r.below(WRITABLE as u64 / 16 - 8),
    }
}

/// Structured random bytes of one instruction.
fn random_bytes(r: &mut Random, family: Family) -> Vec<u8> {
    let mut b = Vec::with_capacity(24);
    let other_address_size = if family.bits() == 16 { 6 } else { 24 };
    for (prefix, odds) in
        [(0x66, 5), (0xf2, 9), (0xf3, 9), (0x67, other_address_size), (0xf0, 24), (0x3e, 60), (0x36, 60)]
    {
        if r.one_in(odds) {
            b.push(prefix);
        }
    }
    let kind = match family {
        Family::X87 => 4 + r.below(2) * 2,
        Family::Simd => 1 + r.below(3),
        Family::Integer | Family::Integer32 | Family::Integer16 => r.pick(&[0, 0, 0, 0, 1, 1, 1, 2, 5]),
        Family::All => r.below(6),
    };
    if kind != 5 && family.bits() == 64 && r.one_in(2) {
        b.push(0x40 | r.below(16) as u8);
    }
    let opcode = r.next() as u8;
    match kind {
        1 => b.extend([0x0f, opcode]),
        2 => b.extend([0x0f, 0x38, opcode]),
        3 => b.extend([0x0f, 0x3a, opcode]),
        4 | 6 => b.push(0xd8 | opcode & 7),
        5 => {
            // VEX, the corner of the map where BMI is.
            let map = r.pick(&[2, 2, 2, 3]);
            b.extend([0xc4, 0xe0 & r.next() as u8 | 0x60 | map, r.next() as u8 & 0xfb]);
            b.push(if map == 3 { 0xf0 } else { 0xf2 + r.below(6) as u8 });
        }
        _ => b.push(opcode),
    }
    // ModRM: registers and memory; then SIB, displacement and immediate, whatever comes.
    for _ in 0..12 {
        b.push(r.next() as u8);
    }
    b
}

fn decode(bytes: &[u8], bits: u32, ip: u64) -> (Instruction, iced_x86::ConstantOffsets) {
    let mut d = decoder(bits, bytes, ip);
    let mut i = d.decode();
    let offsets = d.get_constant_offsets(&i);
    amend(&mut i, bytes);
    (i, offsets)
}

fn random_group(r: &mut Random, family: Family, offset: usize, undefined: u64) -> Option<Group> {
    let bits = family.bits();
    let mut bytes = random_bytes(r, family);
    let (mut i, mut offsets) = decode(&bytes, bits, 0);
    if i.is_invalid() {
        return None;
    }
    if !wanted(&i, family) || flags(i.rflags_read()) & undefined != 0 {
        return None;
    }
    bytes.truncate(i.len());
    let n = bytes.len();
    if relative(&i) {
        // To the next instruction; `patch_skip` may make it jump further.
        bytes[n - displacement_size(&i)..].fill(0);
        (i, offsets) = decode(&bytes, bits, 0);
        if !relative(&i) || i.len() != n {
            return None;
        }
    }
    let mut before = Vec::new();
    // In 16-bit code the halves above what the instruction uses stay as they are.
    let half = bits == 16 && !bytes[..n - 1].iter().take_while(|b| is_prefix(**b)).any(|b| *b == 0x67);
    let segment = if bits == 16 { SEGMENT16 } else { 0 };
    let target = |r: &mut Random| target(r).wrapping_sub(segment);
    let mut set = |register: Register, value: u64| {
        if register.is_gpr64() || register.is_gpr32() || register.is_gpr16() {
            before.extend(if half {
                load_half(register, value)
            } else {
                load_register(bits, register, value)
            });
        }
    };
    let mut fix = None;
    if (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory) {
        let address = target(r);
        let (base, index) = (i.memory_base(), i.memory_index());
        let displacement = i.memory_displacement64();
        if i.mnemonic() == Mnemonic::Xlatb {
            set(Register::RBX, address.wrapping_sub(128));
        } else if base == Register::RIP || base == Register::EIP {
            fix = Some(address);
        } else if base == Register::None && index == Register::None {
            let wide = address.to_le_bytes();
            let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
            bytes[at..at + size].copy_from_slice(&wide[..size]);
        } else if base == Register::None {
            set(index, address.wrapping_sub(displacement) >> i.memory_index_scale().trailing_zeros());
        } else if index == Register::None || index == base {
            set(base, address.wrapping_sub(displacement));
        } else {
            let scaled = r.below(512);
            // Bit offsets in registers and the like may stay as they are.
            set(index, scaled);
            let scaled = scaled * i.memory_index_scale() as u64;
            set(base, address.wrapping_sub(displacement).wrapping_sub(scaled));
        }
        if matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
            && i.op1_kind() == OpKind::Register
            && !r.one_in(8)
        {
            let bit = i.op1_register().full_register();
            if bit != base.full_register() && bit != index.full_register() {
                set(bit, (r.below(1 << 14) as i64 - (1 << 13)) as u64);
            }
        }
    }
    for k in 0..i.op_count() {
        match i.op_kind(k) {
            OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI => {
                set(Register::RSI, target(r));
            }
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => set(Register::RDI, target(r)),
            // MASKMOVQ, MASKMOVDQU: whether a zero mask accesses memory is up to the processor.
            OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI => {
                set(Register::RDI, DATA - segment + r.below(WRITABLE as u64 - 16));
            }
            _ => {}
        }
    }
    if i.is_string_instruction() && r.one_in(4) {
        // Overlapping ones, and ones that compare equal.
        let at = DATA - segment + r.below(0xf00);
        set(Register::RSI, at);
        set(Register::RDI, at.wrapping_add(r.below(40)).wrapping_sub(20));
    }
    if i.is_string_instruction() && truncated(&i) {
        // Processors may clear the upper halves although the instruction faults.
        for register in [Register::RSI, Register::RDI] {
            let at = DATA - segment + r.below(WRITABLE as u64);
            set(register, at);
        }
    }
    if i.is_string_instruction() && !r.one_in(16) {
        let most = r.pick(&[4, 16, 64, 700]);
        set(Register::RCX, r.below(most));
    }
    if i.is_stack_instruction() && r.one_in(3) {
        set(Register::RSP, target(r));
        match i.mnemonic() {
            Mnemonic::Leave => set(Register::RBP, target(r)),
            // Frame pointers to copy and their copies don't overlap: processors' order differs from the manual's.
            Mnemonic::Enter => {
                let low = DATA - segment + 0x200 + 2 * r.below(0x80);
                set(Register::RBP, low);
                set(Register::RSP, low + 0x800 + 2 * r.below(0x800));
            }
            _ => {}
        }
    }
    if matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && !r.one_in(4) {
        // Dividends that fit.
        let v = interesting(&mut r.0);
        set(Register::RAX, v);
        set(Register::RDX, if i.mnemonic() == Mnemonic::Idiv { (v as i64 >> 63) as u64 } else { r.below(4) });
    }
    if (i.is_jmp_near_indirect() || i.is_call_near_indirect()) && i.op0_kind() == OpKind::Register {
        let load = load_register(bits, i.op0_register(), 0).len();
        let here = origin(bits) + (offset + before.len() + load + bytes.len()) as u64;
        let value = if r.one_in(6) && i.is_jmp_near_indirect() { interesting(&mut r.0) } else { here };
        before.extend(load_register(bits, i.op0_register(), value));
    }
    if let Some(address) = fix {
        let next = CODE + (offset + before.len() + bytes.len()) as u64;
        let displacement = (address.wrapping_sub(next) as u32).to_le_bytes();
        let at = offsets.displacement_offset();
        bytes[at..at + 4].copy_from_slice(&displacement);
    }
    let (again, _) = decode(&bytes, bits, origin(bits) + (offset + before.len()) as u64);
    if again.code() != i.code() || again.len() != bytes.len() {
        return None;
    }
    before.extend(&bytes);
    Some(Group { bytes: before, instruction: again })
}
