// SPDX-License-Identifier: Apache-2.0
//! What the host's instruction accesses at which a thread was interrupted. It is the host's that is decoded here, of
//! whatever architecture the guest is.

use std::ffi::c_void;

/// Has the decoder make its tables, for which it allocates.
pub fn prepare() {
    #[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
    {
        use iced_x86::{Decoder, DecoderOptions};
        std::hint::black_box(Decoder::new(64, &[0x90], DecoderOptions::NONE).decode());
    }
}

/// The most operands in memory that [`accessed`] looks for.
const OPERANDS: usize = 2;

/// Address and size of what the host's instruction that was interrupted, or is about to run, accesses; sizes of 0 are
/// none. Async-signal-safe behind [`prepare`].
///
/// # Safety
/// `context` is the handler's.
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
pub unsafe fn accessed(context: *mut c_void) -> [(usize, usize); OPERANDS] {
    use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic};
    const PAGE: usize = 4096;
    // SAFETY: given.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as usize;
    let decode = |length: usize| -> Instruction {
        // SAFETY: code that is being executed: its page, or as much of the next one as it goes on there.
        let bytes = unsafe { std::slice::from_raw_parts(at as *const u8, length) };
        Decoder::with_ip(64, bytes, at as u64, DecoderOptions::NONE).decode()
    };
    let in_page = (PAGE - at % PAGE).min(LONGEST);
    let mut instruction = decode(in_page);
    if instruction.is_invalid() && in_page < LONGEST {
        instruction = decode(LONGEST);
    }
    let mut found = [(0, 0); OPERANDS];
    let size = instruction.memory_size().size();
    let touches = instruction.code() != Code::INVALID
        && !matches!(
            instruction.mnemonic(),
            Mnemonic::Lea
                | Mnemonic::Nop
                | Mnemonic::Prefetchnta
                | Mnemonic::Prefetcht0
                | Mnemonic::Prefetcht1
                | Mnemonic::Prefetcht2
                | Mnemonic::Prefetchw
        );
    if !touches || size == 0 {
        return found;
    }
    let memory = (0..instruction.op_count()).filter(|&n| is_memory(instruction.op_kind(n)));
    for (n, slot) in memory.zip(&mut found) {
        if let Some(address) = instruction.virtual_address(n, 0, |register, _, _| value(registers, register))
        {
            *slot = (address as usize, size);
        }
    }
    found
}

/// The most bytes that an instruction has.
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
const LONGEST: usize = 15;

#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
fn is_memory(kind: iced_x86::OpKind) -> bool {
    use iced_x86::OpKind;
    matches!(kind, OpKind::Memory | OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI)
}

/// What an address is made of. The bases of FS and GS nobody knows here: what they lead to is never a guest's.
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
fn value(registers: &[i64], register: iced_x86::Register) -> Option<u64> {
    use iced_x86::Register;
    let number = match register.full_register() {
        Register::RAX => libc::REG_RAX,
        Register::RBX => libc::REG_RBX,
        Register::RCX => libc::REG_RCX,
        Register::RDX => libc::REG_RDX,
        Register::RSI => libc::REG_RSI,
        Register::RDI => libc::REG_RDI,
        Register::RBP => libc::REG_RBP,
        Register::RSP => libc::REG_RSP,
        Register::R8 => libc::REG_R8,
        Register::R9 => libc::REG_R9,
        Register::R10 => libc::REG_R10,
        Register::R11 => libc::REG_R11,
        Register::R12 => libc::REG_R12,
        Register::R13 => libc::REG_R13,
        Register::R14 => libc::REG_R14,
        Register::R15 => libc::REG_R15,
        Register::CS | Register::DS | Register::ES | Register::SS => return Some(0),
        _ => return None,
    };
    let all = registers[number as usize] as u64;
    Some(if register.size() == 8 { all } else { all & 0xffff_ffff })
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
pub unsafe fn accessed(_: *mut c_void) -> [(usize, usize); OPERANDS] {
    [(0, 0); OPERANDS]
}
