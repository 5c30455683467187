// SPDX-License-Identifier: Apache-2.0
//! Whether a program of the classic BPF is one that seccomp(2) takes (the kernel's Documentation/networking/filter.rst,
//! Documentation/userspace-api/seccomp_filter.rst).

use libc::{
    BPF_A, BPF_ABS, BPF_ADD, BPF_ALU, BPF_AND, BPF_DIV, BPF_IMM, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP,
    BPF_JSET, BPF_K, BPF_LD, BPF_LDX, BPF_LEN, BPF_LSH, BPF_MEM, BPF_MISC, BPF_MUL, BPF_NEG, BPF_OR, BPF_RET,
    BPF_RSH, BPF_ST, BPF_STX, BPF_SUB, BPF_TAX, BPF_TXA, BPF_W, BPF_X, BPF_XOR, sock_filter,
};

use crate::kernel::Call;

/// Instructions of a program (`BPF_MAXINSNS`).
pub const MOST: usize = 4096;
/// Words of its memory (`BPF_MEMWORDS`).
const WORDS: u32 = 16;
/// What it looks at (`struct seccomp_data`).
const DATA_SIZE: u32 = 64;

const OPERATIONS: [u32; 8] = [BPF_ADD, BPF_SUB, BPF_MUL, BPF_AND, BPF_OR, BPF_XOR, BPF_LSH, BPF_RSH];
const COMPARISONS: [u32; 4] = [BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JSET];

/// What there is to know of an instruction.
#[derive(PartialEq)]
enum Kind {
    Plain,
    /// Reads or writes a word of its memory.
    Load(u32),
    Store(u32),
    /// Goes on so many instructions behind the next one, or to one of two.
    Jump(usize),
    Branch(usize, usize),
    Return,
}

/// None for one that is no filter's.
fn kind_of(instruction: &sock_filter) -> Option<Kind> {
    let (code, k) = (u32::from(instruction.code), instruction.k);
    let word = |kind: fn(u32) -> Kind| (k < WORDS).then(|| kind(k));
    const LD_ABS: u32 = BPF_LD | BPF_W | BPF_ABS;
    const LD_LEN: u32 = BPF_LD | BPF_W | BPF_LEN;
    const LDX_LEN: u32 = BPF_LDX | BPF_W | BPF_LEN;
    const LD_IMM: u32 = BPF_LD | BPF_IMM;
    const LDX_IMM: u32 = BPF_LDX | BPF_IMM;
    const LD_MEM: u32 = BPF_LD | BPF_MEM;
    const LDX_MEM: u32 = BPF_LDX | BPF_MEM;
    const RET_K: u32 = BPF_RET | BPF_K;
    const RET_A: u32 = BPF_RET | BPF_A;
    const TAX: u32 = BPF_MISC | BPF_TAX;
    const TXA: u32 = BPF_MISC | BPF_TXA;
    const NEG: u32 = BPF_ALU | BPF_NEG;
    const JA: u32 = BPF_JMP | BPF_JA;
    const DIV_K: u32 = BPF_ALU | BPF_DIV | BPF_K;
    const DIV_X: u32 = BPF_ALU | BPF_DIV | BPF_X;
    match code {
        LD_ABS => (k < DATA_SIZE && k % 4 == 0).then_some(Kind::Plain),
        LD_LEN | LDX_LEN | LD_IMM | LDX_IMM | TAX | TXA | NEG | DIV_X => Some(Kind::Plain),
        LD_MEM | LDX_MEM => word(Kind::Load),
        BPF_ST | BPF_STX => word(Kind::Store),
        RET_K | RET_A => Some(Kind::Return),
        DIV_K => (k != 0).then_some(Kind::Plain),
        JA => Some(Kind::Jump(k as usize)),
        _ => {
            let (class, operation, source) = (code & 0x07, code & 0xF0, code & 0x08);
            let known = code & !0xFF == 0;
            if known && class == BPF_ALU && OPERATIONS.contains(&operation) {
                let shifts = matches!(operation, BPF_LSH | BPF_RSH);
                (!shifts || source == BPF_X || k < 32).then_some(Kind::Plain)
            } else if known && class == BPF_JMP && COMPARISONS.contains(&operation) {
                Some(Kind::Branch(instruction.jt.into(), instruction.jf.into()))
            } else {
                None
            }
        }
    }
}

/// Whether a program is a filter: of such instructions alone, all of whose ways stay within it, end by its last one at the
/// latest, and read no word that has not been written.
pub fn is_filter(length: usize, instruction: impl Fn(usize) -> sock_filter, call: Call) -> bool {
    if kind_of(&instruction(length - 1)) != Some(Kind::Return) {
        return false;
    }
    let mut has_memory = false;
    for at in 0..length {
        let room = length - at - 1;
        let within = match kind_of(&instruction(at)) {
            Some(Kind::Jump(by)) => by < room,
            Some(Kind::Branch(yes, no)) => yes < room && no < room,
            Some(Kind::Load(_)) => {
                has_memory = true;
                true
            }
            Some(_) => true,
            None => false,
        };
        if !within {
            return false;
        }
    }
    !has_memory || reads_what_is_written(length, instruction, call)
}

/// Which words every way to an instruction has written: all jumps lead on, so one pass finds it out.
fn reads_what_is_written(length: usize, instruction: impl Fn(usize) -> sock_filter, call: Call) -> bool {
    let size = MOST * size_of::<u16>();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let room = call(
        libc::SYS_mmap,
        [0, size, (libc::PROT_READ | libc::PROT_WRITE) as usize, flags as usize, usize::MAX, 0],
    );
    if room < 0 {
        return true;
    }
    // SAFETY: new memory of that size, which is given back below.
    let written = unsafe { core::slice::from_raw_parts_mut(room as *mut u16, MOST) };
    written.fill(u16::MAX);
    let mut here = 0;
    let mut holds = true;
    for at in 0..length {
        here &= written[at];
        match kind_of(&instruction(at)) {
            Some(Kind::Store(word)) => here |= 1 << word,
            Some(Kind::Load(word)) => holds &= here >> word & 1 != 0,
            Some(Kind::Jump(by)) => {
                written[at + 1 + by] &= here;
                here = u16::MAX;
            }
            Some(Kind::Branch(yes, no)) => {
                written[at + 1 + yes] &= here;
                written[at + 1 + no] &= here;
                here = u16::MAX;
            }
            _ => {}
        }
    }
    call(libc::SYS_munmap, [room as usize, size, 0, 0, 0, 0]);
    holds
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(number: core::ffi::c_long, [a, b, c, d, e, f]: [usize; 6]) -> isize {
        // SAFETY: mmap() and munmap() of what it has given.
        unsafe { libc::syscall(number, a, b, c, d, e, f) as isize }
    }

    const fn op(code: u32, k: u32) -> sock_filter {
        sock_filter { code: code as u16, jt: 0, jf: 0, k }
    }

    const fn branch(jt: u8, jf: u8) -> sock_filter {
        sock_filter { code: (BPF_JMP | BPF_JEQ | BPF_K) as u16, jt, jf, k: 0 }
    }

    const END: sock_filter = op(BPF_RET | BPF_K, 0x7FFF_0000);
    const STORE: sock_filter = op(BPF_ST, 3);
    const LOAD: sock_filter = op(BPF_LD | BPF_MEM, 3);

    /// What the host's kernel says of a program, on a thread that ends.
    fn kernels(program: &[sock_filter]) -> bool {
        let mut program = program.to_vec();
        let thread = std::thread::spawn(move || {
            let argument = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
            // SAFETY: valid pointers; all of these let everything pass.
            unsafe {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &argument) == 0
            }
        });
        thread.join().unwrap_or(false)
    }

    #[test]
    fn says_what_the_kernel_says() {
        let alone: Vec<u32> = (0..0x140).collect();
        let mut programs: Vec<Vec<sock_filter>> = vec![
            vec![END],
            vec![STORE, LOAD, END],
            vec![LOAD, END],
            // One of two ways has not written it.
            vec![branch(0, 1), STORE, LOAD, END],
            vec![branch(0, 2), STORE, op(BPF_JMP | BPF_JA, 1), STORE, LOAD, END],
            vec![STORE, branch(0, 1), op(BPF_LD | BPF_IMM, 1), LOAD, END],
            vec![branch(0, 1), END],
            vec![branch(1, 0), END],
            vec![op(BPF_JMP | BPF_JA, 0), END],
            vec![op(BPF_JMP | BPF_JA, 1), END],
            vec![op(BPF_JMP | BPF_JA, u32::MAX), END],
            vec![END, op(BPF_LD | BPF_IMM, 0)],
            vec![op(BPF_RET | BPF_A, 0)],
            vec![op(BPF_RET | BPF_X, 0)],
        ];
        // Every instruction, with an argument of each kind, before the end.
        for code in alone {
            programs.extend(
                [0, 1, 4, 15, 16, 31, 32, 60, 64].map(|k| vec![STORE, op(BPF_ST, 0), op(code, k), END, END]),
            );
        }
        if !kernels(&[END]) {
            return; // a kernel without filters
        }
        for program in programs {
            // Those that would end the thread, or have it fail, are left out: a RET ahead of the end.
            let early = program.len() > 3
                && program[..program.len() - 2].iter().any(|i| u32::from(i.code) & 7 == BPF_RET);
            if early {
                continue;
            }
            let ours = is_filter(program.len(), |at| program[at], call);
            let text: Vec<_> = program.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect();
            assert_eq!(ours, kernels(&program), "{text:x?}");
        }
    }
}
