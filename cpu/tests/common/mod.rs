// SPDX-License-Identifier: Apache-2.0
//! A tiny machine for tests of the silicon: memory, nested tables, guest tables, descriptor tables and a VMCB, with
//! one or more processors. Guests start right in the mode that a test is about.
//!
//! Guest memory is mapped one to one, 4 KiB pages on both levels, so that every page-table bit can be looked at.
//! Every interrupt vector leads to a stub that executes VMMCALL: the test finds the vector from RIP and the frame at
//! RSP.
#![allow(dead_code)]

pub mod flat;

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;
use softcpu::int::Int;
use softcpu::mem::Machine;
use softcpu::x86::state::Cpu;
use softcpu::x86::system::exitcode;
use softcpu::x86::vmcb::{Vmcb, control, save};

/// Guest memory in bytes.
pub const RAM: usize = 4 << 20;
const PAGES: usize = RAM / 4096;

// Guest-physical (and linear) layout.
pub const PML4: u64 = 0x1000;
pub const PDPT: u64 = 0x2000;
pub const PD: u64 = 0x3000;
pub const PT: u64 = 0x4000; // two pages
pub const GDT: u64 = 0x6000;
pub const IDT: u64 = 0x7000;
pub const TSS: u64 = 0x8000;
pub const TSS_LIMIT: u32 = 0x68 + 0x2000;
pub const LDT: u64 = 0xB000;
/// Tops of the stacks: the code's own, RSP0's, IST1's.
pub const STACK: u64 = 0x1_4000;
pub const STACK0: u64 = 0x1_6000;
pub const IST1: u64 = 0x1_8000;
/// Stubs of the interrupt handlers, 16 bytes each.
pub const HANDLERS: u64 = 0x1_A000;
pub const CODE: u64 = 0x2_0000;
/// Free for the tests' data.
pub const DATA: u64 = 0x10_0000;

// Selectors.
pub const CODE64: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE32: u16 = 0x18;
pub const USER_CODE32: u16 = 0x23;
pub const USER_DATA: u16 = 0x2B;
pub const USER_CODE64: u16 = 0x33;
pub const TSS_SEL: u16 = 0x38;
pub const LDT_SEL: u16 = 0x48;
/// A data segment that is not present.
pub const ABSENT: u16 = 0x58;
/// A data segment of 4 KiB at DATA.
pub const SMALL: u16 = 0x60;
pub const CONFORMING: u16 = 0x68;
pub const CODE16: u16 = 0x70;
pub const DATA16: u16 = 0x78;
/// The first free selector; two 16-byte descriptors fit.
pub const FREE: u16 = 0x80;

/// Page-table entry bits.
pub mod pte {
    pub const P: u64 = 1;
    pub const W: u64 = 2;
    pub const U: u64 = 4;
    pub const A: u64 = 0x20;
    pub const D: u64 = 0x40;
    pub const G: u64 = 0x100;
    pub const NX: u64 = 1 << 63;
}

/// Memory shared by the processors of a test.
#[derive(Clone)]
pub struct Memory {
    pub machine: Arc<Machine>,
    /// Host address of guest-physical 0.
    pub ram: usize,
    /// Host address of the nested tables: PML4, PDPT, PD, then page tables.
    pub nested: usize,
    pub iopm: usize,
    pub msrpm: usize,
}

impl Memory {
    pub fn new() -> Memory {
        let machine = Machine::new();
        let ram = flat::map(RAM, 4096, 0);
        let tables = 3 + PAGES.div_ceil(512);
        let host = flat::map(Memory::host_size(), 4096, 0);
        // SAFETY: both stay mapped.
        unsafe {
            machine.add_region(ram, RAM).unwrap();
            machine.add_region(host, Memory::host_size()).unwrap();
        }
        let m = Memory {
            machine,
            ram,
            nested: host,
            iopm: host + tables * 4096,
            msrpm: host + (tables + 3) * 4096,
        };
        m.put_host(host, (host + 0x1000) as u64 | 7);
        m.put_host(host + 0x1000, (host + 0x2000) as u64 | 7);
        for i in 0..PAGES.div_ceil(512) {
            m.put_host(host + 0x2000 + 8 * i, (host + 0x3000 + i * 4096) as u64 | 7);
        }
        for i in 0..PAGES {
            m.put_host(host + 0x3000 + 8 * i, (ram + i * 4096) as u64 | 7);
        }
        m.guest_tables();
        m
    }

    /// Gives the host memory back; the guests of this memory must not run any more.
    pub fn release(&self) {
        // SAFETY: the mappings of `new`; the tests' values read from them are copies.
        unsafe {
            libc::munmap(self.ram as *mut libc::c_void, RAM);
            libc::munmap(self.nested as *mut libc::c_void, Memory::host_size());
        }
    }

    fn host_size() -> usize {
        (3 + PAGES.div_ceil(512) + 5) * 4096
    }

    fn guest_tables(&self) {
        self.write::<u64>(PML4, PDPT | 7);
        self.write::<u64>(PDPT, PD | 7);
        for i in 0..2 {
            self.write::<u64>(PD + 8 * i, (PT + i * 0x1000) | 7);
        }
        for i in 0..1024u64 {
            self.write::<u64>(PT + 8 * i, i << 12 | 7);
        }
        let d = |n: u64, v: u64| self.write::<u64>(GDT + n, v);
        d(0x08, 0x00af_9b00_0000_ffff);
        d(0x10, 0x00cf_9300_0000_ffff);
        d(0x18, 0x00cf_9b00_0000_ffff);
        d(0x20, 0x00cf_fb00_0000_ffff);
        d(0x28, 0x00cf_f300_0000_ffff);
        d(0x30, 0x00af_fb00_0000_ffff);
        d(0x38, system_descriptor(TSS, TSS_LIMIT as u64, 0x89));
        d(0x48, system_descriptor(LDT, 0xfff, 0x82));
        d(0x58, 0x00cf_1300_0000_ffff);
        d(0x60, 0x0040_9310_0000_0fff);
        d(0x68, 0x00af_9f00_0000_ffff);
        d(0x70, 0x0000_9b00_0000_ffff);
        d(0x78, 0x0000_9300_0000_ffff);
        for v in 0..256u64 {
            self.write_bytes(HANDLERS + 16 * v, &[0x0f, 0x01, 0xd9, 0xf4]);
        }
        self.write::<u64>(TSS + 4, STACK0);
        self.write::<u64>(TSS + 36, IST1);
        self.write::<u16>(TSS + 0x66, 0x68);
        for n in 0..0x2000 {
            self.write::<u8>(TSS + 0x68 + n, 0xff);
        }
    }

    pub fn put_host(&self, address: usize, v: u64) {
        // SAFETY: callers pass addresses in the mappings above.
        unsafe { (address as *mut u64).write_volatile(v) }
    }

    pub fn get_host(&self, address: usize) -> u64 {
        // SAFETY: as above.
        unsafe { (address as *const u64).read_volatile() }
    }

    /// Reads guest memory.
    pub fn read<T: Copy>(&self, gpa: u64) -> T {
        assert!(gpa as usize + size_of::<T>() <= RAM);
        // SAFETY: in guest memory.
        unsafe { ((self.ram + gpa as usize) as *const T).read_unaligned() }
    }

    /// Writes guest memory, without telling the processors.
    pub fn write<T: Copy>(&self, gpa: u64, v: T) {
        assert!(gpa as usize + size_of::<T>() <= RAM);
        // SAFETY: in guest memory.
        unsafe { ((self.ram + gpa as usize) as *mut T).write_unaligned(v) }
    }

    pub fn write_bytes(&self, gpa: u64, bytes: &[u8]) {
        for (n, b) in bytes.iter().enumerate() {
            self.write::<u8>(gpa + n as u64, *b);
        }
    }

    /// Address of the guest's page-table entry of a linear address.
    pub fn leaf(&self, linear: u64) -> u64 {
        PT + (linear >> 12) * 8
    }

    /// Changes bits of the guest's leaf for `linear`, and of the tables above it when `set` has U.
    pub fn change_leaf(&self, linear: u64, set: u64, clear: u64) {
        let at = self.leaf(linear);
        self.write::<u64>(at, (self.read::<u64>(at) | set) & !clear);
    }

    /// Host address of the nested leaf of a guest-physical address.
    pub fn nested_leaf(&self, gpa: u64) -> usize {
        self.nested + 0x3000 + (gpa >> 12) as usize * 8
    }
}

/// A system descriptor (first half) with base, byte limit and the access byte.
pub fn system_descriptor(base: u64, limit: u64, access: u64) -> u64 {
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 15) << 48
        | (base >> 24 & 0xff) << 56
}

/// A gate's first half.
pub fn gate(selector: u16, offset: u64, ist: u64, access: u64) -> u64 {
    (offset & 0xffff) | (selector as u64) << 16 | ist << 32 | access << 40 | (offset >> 16 & 0xffff) << 48
}

/// A processor with its VMCB, about to run code at CODE.
pub struct Guest {
    pub memory: Memory,
    pub cpu: Box<Cpu>,
    pub vmcb: Vmcb,
    pub page: usize,
}

// SAFETY: the VMCB behind the pointer is this guest's own.
unsafe impl Send for Guest {}

impl Guest {
    /// In 64-bit mode at CPL 0.
    pub fn long(code: impl FnOnce(&mut CodeAssembler)) -> Guest {
        let mut g = Guest::bare(Memory::new(), 0);
        g.assemble(64, CODE, code);
        g
    }

    /// In 64-bit mode at CPL 3.
    pub fn user(code: impl FnOnce(&mut CodeAssembler)) -> Guest {
        let mut g = Guest::long(code);
        g.segment(1, USER_CODE64, 0xafb, 0, u32::MAX);
        for n in [0, 2, 3, 4, 5] {
            g.segment(n, USER_DATA, 0xcf3, 0, u32::MAX);
        }
        g.set(save::CPL, 3u8);
        g
    }

    /// In 32-bit protected mode at CPL 0, no paging.
    pub fn protected(code: impl FnOnce(&mut CodeAssembler)) -> Guest {
        let mut g = Guest::bare(Memory::new(), 0);
        g.segment(1, CODE32, 0xc9b, 0, u32::MAX);
        g.set(save::CR0, 0x11u64);
        g.set(save::CR4, 0u64);
        g.set(save::EFER, 0x1000u64);
        g.idt32();
        g.memory.write::<u32>(TSS + 4, STACK0 as u32);
        g.memory.write::<u32>(TSS + 8, DATA0 as u32);
        g.assemble(32, CODE, code);
        g
    }

    /// In 32-bit protected mode at CPL 3, no paging.
    pub fn protected_user(code: impl FnOnce(&mut CodeAssembler)) -> Guest {
        let mut g = Guest::protected(code);
        g.segment(1, USER_CODE32, 0xcfb, 0, u32::MAX);
        for n in [0, 2, 3, 4, 5] {
            g.segment(n, USER_DATA, 0xcf3, 0, u32::MAX);
        }
        g.set(save::CPL, 3u8);
        g
    }

    /// In real mode, CS:IP = 1000h:0, SS:SP = 1000h:4000h; vectors lead to stubs in segment 1A00h.
    pub fn real(code: impl FnOnce(&mut CodeAssembler)) -> Guest {
        let mut g = Guest::bare(Memory::new(), 0);
        g.real_mode();
        g.assemble(16, 0x1_0000, code);
        g
    }

    /// In virtual-8086 mode at 1000h:0 with the given IOPL.
    pub fn v86(iopl: u64, code: impl FnOnce(&mut CodeAssembler)) -> Guest {
        let mut g = Guest::protected(|_| {});
        for n in 0..6 {
            g.segment(n, 0x1000, 0xf3, 0x1_0000, 0xffff);
        }
        g.set(save::CPL, 3u8);
        g.set(save::RFLAGS, 0x2_0002u64 | iopl << 12);
        g.set(save::RIP, 0u64);
        g.set(save::RSP, 0x4000u64);
        g.assemble(16, 0x1_0000, code);
        g
    }

    fn real_mode(&mut self) {
        for n in 0..6 {
            self.segment(n, 0x1000, 0x93, 0x1_0000, 0xffff);
        }
        self.segment(1, 0x1000, 0x9b, 0x1_0000, 0xffff);
        self.set(save::CR0, 0x10u64);
        self.set(save::CR4, 0u64);
        self.set(save::EFER, 0x1000u64);
        self.table(save::IDTR, 0, 0x3ff);
        self.set(save::RIP, 0u64);
        self.set(save::RSP, 0x4000u64);
        for v in 0..256u64 {
            self.memory.write::<u16>(4 * v, 16 * v as u16);
            self.memory.write::<u16>(4 * v + 2, (HANDLERS >> 4) as u16);
        }
    }

    /// A processor in 64-bit mode with nothing loaded at CODE.
    pub fn bare(memory: Memory, index: u32) -> Guest {
        let page = flat::map(4096, 4096, 0);
        // SAFETY: stays mapped; the VMCB is this guest's alone.
        unsafe { memory.machine.add_region(page, 4096).unwrap() };
        // SAFETY: as above.
        let vmcb = unsafe { Vmcb::new(page) };
        let cpu = Cpu::new(memory.machine.clone(), index);
        let mut g = Guest { memory, cpu, vmcb, page };
        flat::long_mode(vmcb, g.memory.nested, PML4);
        g.intercept(exitcode::VMMCALL);
        g.set(control::IOPM_BASE, g.memory.iopm as u64);
        g.set(control::MSRPM_BASE, g.memory.msrpm as u64);
        g.table(save::GDTR, GDT, 0xfff);
        g.system(save::TR, TSS_SEL, 0x8b, TSS, TSS_LIMIT);
        g.system(save::LDTR, LDT_SEL, 0x82, LDT, 0xfff);
        g.set(save::DR6, 0xffff_0ff0u64);
        g.set(save::DR7, 0x400u64);
        g.set(save::G_PAT, 0x0007_0406_0007_0406u64);
        g.set(save::RIP, CODE);
        g.set(save::RSP, STACK);
        g.idt64();
        g
    }

    fn idt64(&mut self) {
        self.table(save::IDTR, IDT, 0xfff);
        for v in 0..256u64 {
            self.memory.write::<u64>(IDT + 16 * v, gate(CODE64, HANDLERS + 16 * v, 0, 0x8e));
            self.memory.write::<u64>(IDT + 16 * v + 8, 0);
        }
    }

    fn idt32(&mut self) {
        self.table(save::IDTR, IDT, 0x7ff);
        for v in 0..256u64 {
            self.memory.write::<u64>(IDT + 8 * v, gate(CODE32, HANDLERS + 16 * v, 0, 0x8e));
        }
    }

    /// Puts assembled code into guest memory.
    pub fn assemble(&mut self, bitness: u32, at: u64, code: impl FnOnce(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(bitness).unwrap();
        code(&mut a);
        if a.instructions().is_empty() {
            return;
        }
        let ip = if bitness == 16 { at & 0xffff } else { at };
        let bytes = a.assemble(ip).unwrap();
        self.memory.write_bytes(at, &bytes);
    }

    pub fn get<T: Int>(&self, offset: usize) -> T {
        self.vmcb.get(offset)
    }
    pub fn set<T: Int>(&mut self, offset: usize, v: T) {
        self.vmcb.set(offset, v)
    }
    pub fn segment(&mut self, n: usize, selector: u16, attrib: u16, base: u64, limit: u32) {
        flat::put_segment(self.vmcb, n, selector, attrib, base, limit);
    }
    pub fn system(&mut self, at: usize, selector: u16, attrib: u16, base: u64, limit: u32) {
        self.segment((at - save::ES) / 16, selector, attrib, base, limit);
    }
    pub fn table(&mut self, at: usize, base: u64, limit: u32) {
        self.set(at + 4, limit);
        self.set(at + 8, base);
    }

    /// Sets the intercept bit of an exit code.
    pub fn intercept(&mut self, code: u64) {
        let (word, bit) = exitcode::position(code).unwrap();
        let at = control::INTERCEPTS + 4 * word;
        self.set(at, self.get::<u32>(at) | 1 << bit);
    }
    pub fn unintercept(&mut self, code: u64) {
        let (word, bit) = exitcode::position(code).unwrap();
        let at = control::INTERCEPTS + 4 * word;
        self.set(at, self.get::<u32>(at) & !(1 << bit));
    }

    /// VMRUN until #VMEXIT.
    pub fn run(&mut self) -> u64 {
        self.cpu.vmrun(self.page).unwrap_or_else(|_| panic!("VMCB refused"))
    }
    pub fn info1(&self) -> u64 {
        self.get(control::EXITINFO1)
    }
    pub fn info2(&self) -> u64 {
        self.get(control::EXITINFO2)
    }
    pub fn intinfo(&self) -> u64 {
        self.get(control::EXITINTINFO)
    }
    pub fn rip(&self) -> u64 {
        self.get(save::RIP)
    }
    pub fn rsp(&self) -> u64 {
        self.get(save::RSP)
    }
    pub fn rax(&self) -> u64 {
        self.get(save::RAX)
    }
    pub fn rflags(&self) -> u64 {
        self.get(save::RFLAGS)
    }
    pub fn cpl(&self) -> u8 {
        self.get(save::CPL)
    }
    pub fn selector(&self, n: usize) -> u16 {
        self.get(save::ES + 16 * n)
    }

    /// Runs to the VMMCALL of a handler's stub; returns its vector.
    #[track_caller]
    pub fn run_to_handler(&mut self) -> u8 {
        let code = self.run();
        assert_eq!(
            code,
            exitcode::VMMCALL,
            "{} info {:#x} {:#x} rip {:#x}",
            exitcode::name(code),
            self.info1(),
            self.info2(),
            self.rip()
        );
        let cs: u64 = self.get(save::ES + 16 + 8);
        let at = (self.rip() + cs).wrapping_sub(HANDLERS);
        assert!(at < 16 * 256 && at % 16 == 0, "VMMCALL at {:#x} is no handler", self.rip());
        (at / 16) as u8
    }

    /// The 64-bit frame at RSP: with `error`, the error code first, then RIP, CS, RFLAGS, RSP, SS.
    pub fn frame(&self, error: bool) -> (Option<u64>, [u64; 5]) {
        let mut at = self.rsp();
        let code = error.then(|| {
            at += 8;
            self.memory.read::<u64>(at - 8)
        });
        (code, core::array::from_fn(|n| self.memory.read::<u64>(at + 8 * n as u64)))
    }

    /// Runs to a handler of `vector` entered with `error`, from the instruction at `ip` (64-bit mode).
    #[track_caller]
    pub fn expect(&mut self, vector: u8, error: Option<u32>, ip: u64) {
        assert_eq!(self.run_to_handler(), vector, "vector");
        let (code, frame) = self.frame(error.is_some());
        assert_eq!(code, error.map(u64::from), "error code");
        assert_eq!(frame[0], ip, "return address {:#x}, expected {ip:#x}", frame[0]);
    }

    /// Runs and expects this exit code.
    #[track_caller]
    pub fn expect_exit(&mut self, code: u64) {
        let got = self.run();
        assert_eq!(
            got,
            code,
            "{} (info {:#x} {:#x}) for {}",
            exitcode::name(got),
            self.info1(),
            self.info2(),
            exitcode::name(code)
        );
    }
}
