// SPDX-License-Identifier: Apache-2.0
//! System instructions and events: everything that privilege, protection, interrupts and virtualization are made of.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::op::{Handler, Op, Res, SLOT_ZERO, flag, handler};
use super::state::{Cpu, sreg};
use super::translate::{Context, gpr, segment as segment_number};

pub mod control;
pub mod cpuid;
pub mod debug;
pub mod descriptor;
pub mod exitcode;
pub mod far;
pub mod flagops;
pub mod idle;
pub mod interrupt;
pub mod io;
pub mod msr;
pub mod segment;
mod software;
mod stack;
pub mod syscall;
pub mod task;
pub mod waitpkg;

impl Cpu {
    /// #VMEXIT `code` with no further information, if its intercept bit is set.
    #[inline(always)]
    pub fn intercept(&mut self, code: u64) -> Res {
        if self.intercepted(code) { Err(self.vmexit(code, 0, 0)) } else { Ok(()) }
    }
}

/// Sets the effective operand size.
fn set_osize(op: &mut Op, bytes: usize) {
    let code = match bytes {
        2 => 0,
        4 => 1,
        _ => 2,
    };
    op.flags = (op.flags & !(3 << flag::OSIZE_SHIFT)) | code << flag::OSIZE_SHIFT;
}

/// Whether operand `n` is the memory operand.
fn is_memory(i: &Instruction, n: u32) -> bool {
    i.op_kind(n) == OpKind::Memory
}

/// `op.aux` = memory, `op.src` = register: a source of operand `n`.
fn source(i: &Instruction, op: &mut Op, n: u32) {
    op.aux = is_memory(i, n) as u8;
    if op.aux == 0 {
        op.src = gpr(i.op_register(n));
    }
}

/// `op.aux` = memory, `op.dst` = register with its size: a destination of operand `n`.
fn destination(i: &Instruction, op: &mut Op, n: u32) {
    op.aux = is_memory(i, n) as u8;
    if op.aux == 0 {
        register_destination(i, op, n);
    }
}

/// `op.dst` = register operand `n`, operand size = its size.
fn register_destination(i: &Instruction, op: &mut Op, n: u32) {
    op.dst = gpr(i.op_register(n));
    set_osize(op, i.op_register(n).size());
}

/// MOV to and from segment, control and debug registers.
fn mov(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let register = |n| if i.op_kind(n) == OpKind::Register { i.op_register(n) } else { Register::None };
    let (to, from) = (register(0), register(1));
    if to.is_segment_register() {
        if to == Register::CS {
            return None;
        }
        source(i, op, 1);
        op.dst = segment_number(to);
        return Some(handler(segment::mov_to_sreg));
    }
    if from.is_segment_register() {
        destination(i, op, 0);
        op.src = segment_number(from);
        return Some(handler(segment::mov_from_sreg));
    }
    let exists = |r: Register| matches!(r.number(), 0 | 2 | 3 | 4 | 8);
    if to.is_cr() && exists(to) {
        op.src = gpr(from);
        op.aux = to.number() as u8;
        return Some(handler(control::mov_to_cr));
    }
    if from.is_cr() && exists(from) {
        op.dst = gpr(to);
        op.aux = from.number() as u8;
        return Some(handler(control::mov_from_cr));
    }
    if to.is_dr() {
        op.src = gpr(from);
        op.aux = to.number() as u8;
        return Some(handler(control::mov_to_dr));
    }
    if from.is_dr() {
        op.dst = gpr(to);
        op.aux = from.number() as u8;
        return Some(handler(control::mov_from_dr));
    }
    None
}

/// PUSH and POP of a segment register.
fn push_pop(i: &Instruction, op: &mut Op) -> Option<Handler> {
    if i.op_kind(0) != OpKind::Register || !i.op_register(0).is_segment_register() {
        return None;
    }
    let n = segment_number(i.op_register(0));
    set_osize(op, i.stack_pointer_increment().unsigned_abs() as usize);
    if i.mnemonic() == Mnemonic::Push {
        op.src = n;
        Some(handler(segment::push_sreg))
    } else if n as usize != sreg::CS {
        op.dst = n;
        Some(handler(segment::pop_sreg))
    } else {
        None
    }
}

/// Far JMP and CALL.
fn far_transfer(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let size = match i.code() {
        Code::Jmp_ptr1616 | Code::Jmp_m1616 | Code::Call_ptr1616 | Code::Call_m1616 => 2,
        Code::Jmp_ptr1632 | Code::Jmp_m1632 | Code::Call_ptr1632 | Code::Call_m1632 => 4,
        Code::Jmp_m1664 | Code::Call_m1664 => 8,
        _ => return None,
    };
    set_osize(op, size);
    op.aux = is_memory(i, 0) as u8;
    if op.aux == 0 {
        op.disp = i.far_branch_selector() as i32;
        op.imm = if size == 2 { i.far_branch16() as u64 } else { i.far_branch32() as u64 };
    }
    Some(if i.mnemonic() == Mnemonic::Jmp { handler(far::jmp_far) } else { handler(far::call_far) })
}

/// Operand size of the far returns and the flag pushes and pops.
fn sized_code(code: Code) -> usize {
    match code {
        Code::Retfw | Code::Retfw_imm16 | Code::Iretw | Code::Pushfw | Code::Popfw => 2,
        Code::Retfd | Code::Retfd_imm16 | Code::Iretd | Code::Pushfd | Code::Popfd => 4,
        _ => 8,
    }
}

/// IN and OUT: `op.aux` = size, the port in `op.imm` unless `op.src` names DX.
fn port(i: &Instruction, op: &mut Op, data: u32, port: u32) {
    op.aux = i.op_register(data).size() as u8;
    if i.op_kind(port) == OpKind::Register {
        op.src = gpr(Register::DX);
    } else {
        op.src = SLOT_ZERO;
        op.imm = i.immediate8() as u64;
    }
}

/// INS and OUTS: size, address size and segment.
fn port_string(i: &Instruction, op: &mut Op, memory: u32) {
    op.aux = i.memory_size().size() as u8;
    op.asize = match i.op_kind(memory) {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 2,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 4,
        _ => 8,
    };
    op.seg = segment_number(i.memory_segment());
}

/// MONITOR: address size and segment of the implicit operand.
fn monitored(i: &Instruction, op: &mut Op) {
    op.asize = match i.code() {
        Code::Monitorw | Code::Monitorxw => 2,
        Code::Monitord | Code::Monitorxd => 4,
        _ => 8,
    };
    op.seg = segment_number(i.segment_prefix());
}

/// Translates this family's instructions.
pub fn translate(i: &Instruction, op: &mut Op, _: &Context) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Mov => return mov(i, op),
        Mnemonic::Push | Mnemonic::Pop => return push_pop(i, op),
        Mnemonic::Jmp | Mnemonic::Call => return far_transfer(i, op),
        Mnemonic::Retf => {
            set_osize(op, sized_code(i.code()));
            op.imm = if i.op_count() > 0 { i.immediate16() as u64 } else { 0 };
            handler(far::ret_far)
        }
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => {
            set_osize(op, sized_code(i.code()));
            handler(far::iret)
        }
        Mnemonic::Les | Mnemonic::Lds | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs => {
            register_destination(i, op, 0);
            op.aux = match i.mnemonic() {
                Mnemonic::Les => sreg::ES,
                Mnemonic::Lds => sreg::DS,
                Mnemonic::Lss => sreg::SS,
                Mnemonic::Lfs => sreg::FS,
                _ => sreg::GS,
            } as u8;
            handler(segment::load_far_pointer)
        }

        // Interrupts.
        Mnemonic::Int => {
            op.imm = i.immediate8() as u64;
            handler(software::int_n)
        }
        Mnemonic::Int3 => handler(software::int3),
        Mnemonic::Into => handler(software::into),
        Mnemonic::Int1 => handler(software::int1),
        Mnemonic::Bound => {
            register_destination(i, op, 0);
            handler(software::bound)
        }

        // System calls and bases.
        Mnemonic::Syscall => handler(syscall::syscall),
        Mnemonic::Sysret | Mnemonic::Sysretq => {
            set_osize(op, if i.code() == Code::Sysretq { 8 } else { 4 });
            handler(syscall::sysret)
        }
        Mnemonic::Sysenter => handler(syscall::sysenter),
        Mnemonic::Sysexit | Mnemonic::Sysexitq => handler(syscall::sysexit),
        Mnemonic::Swapgs => handler(segment::swapgs),
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase => {
            register_destination(i, op, 0);
            op.aux = if i.mnemonic() == Mnemonic::Rdfsbase { sreg::FS } else { sreg::GS } as u8;
            handler(segment::read_base)
        }
        Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            register_destination(i, op, 0);
            op.src = op.dst;
            op.aux = if i.mnemonic() == Mnemonic::Wrfsbase { sreg::FS } else { sreg::GS } as u8;
            handler(segment::write_base)
        }

        // Descriptor tables and selectors.
        Mnemonic::Lgdt | Mnemonic::Lidt => {
            let short = matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
            set_osize(op, if short { 2 } else { 4 });
            if i.mnemonic() == Mnemonic::Lgdt {
                handler(segment::load_table::<false>)
            } else {
                handler(segment::load_table::<true>)
            }
        }
        Mnemonic::Sgdt => handler(segment::store_table::<false>),
        Mnemonic::Sidt => handler(segment::store_table::<true>),
        Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Smsw => {
            destination(i, op, 0);
            match i.mnemonic() {
                Mnemonic::Sldt => handler(segment::store_system_register::<false>),
                Mnemonic::Str => handler(segment::store_system_register::<true>),
                _ => handler(control::smsw),
            }
        }
        Mnemonic::Lldt | Mnemonic::Ltr | Mnemonic::Lmsw | Mnemonic::Verr | Mnemonic::Verw => {
            source(i, op, 0);
            match i.mnemonic() {
                Mnemonic::Lldt => handler(segment::lldt),
                Mnemonic::Ltr => handler(segment::ltr),
                Mnemonic::Lmsw => handler(control::lmsw),
                Mnemonic::Verr => handler(segment::verify::<false>),
                _ => handler(segment::verify::<true>),
            }
        }
        Mnemonic::Lar | Mnemonic::Lsl => {
            register_destination(i, op, 0);
            source(i, op, 1);
            if i.mnemonic() == Mnemonic::Lar { handler(segment::lar) } else { handler(segment::lsl) }
        }
        Mnemonic::Arpl => {
            destination(i, op, 0);
            op.src = gpr(i.op_register(1));
            handler(segment::arpl)
        }

        // Control registers, MSRs, translations.
        Mnemonic::Clts => handler(control::clts),
        Mnemonic::Rdmsr => handler(msr::rdmsr),
        Mnemonic::Wrmsr => handler(msr::wrmsr),
        Mnemonic::Rdtsc => handler(msr::rdtsc),
        Mnemonic::Rdtscp => handler(msr::rdtscp),
        Mnemonic::Rdpmc => handler(msr::rdpmc),
        Mnemonic::Rdpid => {
            op.dst = gpr(i.op_register(0));
            handler(msr::rdpid)
        }
        Mnemonic::Xgetbv => handler(control::xgetbv),
        Mnemonic::Xsetbv => handler(control::xsetbv),
        Mnemonic::Rdpkru => handler(control::rdpkru),
        Mnemonic::Wrpkru => handler(control::wrpkru),
        Mnemonic::Invlpg => handler(control::invlpg),
        Mnemonic::Invpcid => {
            op.dst = gpr(i.op_register(0));
            handler(control::invpcid)
        }

        // Flags.
        Mnemonic::Cli => handler(flagops::cli),
        Mnemonic::Sti => handler(flagops::sti),
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => {
            set_osize(op, sized_code(i.code()));
            handler(flagops::pushf)
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            set_osize(op, sized_code(i.code()));
            handler(flagops::popf)
        }
        Mnemonic::Clac => handler(flagops::set_ac::<false>),
        Mnemonic::Stac => handler(flagops::set_ac::<true>),

        // Ports.
        Mnemonic::In => {
            port(i, op, 0, 1);
            handler(io::input)
        }
        Mnemonic::Out => {
            port(i, op, 1, 0);
            handler(io::output)
        }
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => {
            port_string(i, op, 0);
            handler(io::string::<true>)
        }
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
            port_string(i, op, 1);
            handler(io::string::<false>)
        }

        // Waiting, caches, identification.
        Mnemonic::Cpuid => handler(idle::cpuid),
        Mnemonic::Hlt => handler(idle::hlt),
        Mnemonic::Pause => handler(idle::pause),
        Mnemonic::Monitor | Mnemonic::Monitorx => {
            monitored(i, op);
            handler(idle::monitor)
        }
        Mnemonic::Mwait | Mnemonic::Mwaitx => handler(idle::mwait),
        Mnemonic::Umonitor => {
            op.src = gpr(i.op_register(0));
            op.asize = i.op_register(0).size() as u8;
            op.seg = segment_number(i.segment_prefix());
            handler(waitpkg::umonitor)
        }
        Mnemonic::Umwait | Mnemonic::Tpause => {
            op.src = gpr(i.op_register(0));
            if i.mnemonic() == Mnemonic::Umwait { handler(waitpkg::umwait) } else { handler(waitpkg::tpause) }
        }
        Mnemonic::Invd => handler(idle::invd),
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => handler(idle::wbinvd),

        // AMD-V.
        Mnemonic::Vmmcall => handler(idle::vmmcall),
        Mnemonic::Rsm => handler(idle::rsm),
        Mnemonic::Rdpru => handler(idle::rdpru),
        Mnemonic::Vmrun
        | Mnemonic::Vmload
        | Mnemonic::Vmsave
        | Mnemonic::Stgi
        | Mnemonic::Clgi
        | Mnemonic::Skinit
        | Mnemonic::Invlpga => {
            op.imm = match i.mnemonic() {
                Mnemonic::Vmrun => exitcode::VMRUN,
                Mnemonic::Vmload => exitcode::VMLOAD,
                Mnemonic::Vmsave => exitcode::VMSAVE,
                Mnemonic::Stgi => exitcode::STGI,
                Mnemonic::Clgi => exitcode::CLGI,
                Mnemonic::Skinit => exitcode::SKINIT,
                _ => exitcode::INVLPGA,
            };
            handler(idle::svm)
        }
        _ => return None,
    })
}
