// SPDX-License-Identifier: Apache-2.0
//! Runs a case on softcpu: 64-, 32- or 16-bit code at CPL 3 in long mode, flat paging, every exception intercepted.

use softcpu::x86::state::Cpu;
use softcpu::x86::vmcb::{Vmcb, control, save};

use crate::case::{
    CODE, Case, DATA, DATA_SIZE, END, LIMIT16, OFFSET16, Outcome, SEGMENT16, State, WRITABLE, fill,
};
use crate::common::{Flat, put_segment};
use crate::probe::{Answer, Probe, digest, template};

/// Guest-physical pages: four of tables, one of code, the data.
const TABLES: usize = 0x4000;
const CODE_PAGE: usize = 0x8000;
const DATA_PAGES: usize = 0x9000;
const RAM: usize = 2 << 20;
/// Bits of a page-table entry.
const PRESENT_USER: u64 = 5;
const WRITE: u64 = 2;
const NX: u64 = 1 << 63;

/// #VMEXIT codes of exceptions start here.
const EXCP0: u64 = 0x40;
/// [`Outcome::vector`] after #VMEXIT HLT.
pub const HALTED: u64 = 0x78 - EXCP0;

/// Selector, attributes, base, limit.
type Segment = (u16, u16, u64, u32);

/// Flat user data.
const FLAT: Segment = (0x2b, 0xcf3, 0, u32::MAX);

#[derive(Clone, Copy)]
struct Mode {
    cr0: u64,
    cr4: u64,
    efer: u64,
    cpl: u8,
}

/// Long mode at CPL 3.
const PAGED: Mode = Mode { cr0: 0x8005_0033, cr4: 0x6a0, efer: 0x1d01, cpl: 3 };
/// Real mode.
const REAL: Mode = Mode { cr0: 0x32, cr4: 0x600, efer: 0x1000, cpl: 0 };

pub struct Soft {
    cpu: Box<Cpu>,
    ram: usize,
    vmcb: usize,
    /// The memory is set up for [`Soft::probe`].
    probing: bool,
    /// The mode of probes.
    probed: Mode,
}

impl Soft {
    pub fn new() -> Soft {
        let Flat { cpu, ram, page: vmcb, .. } = Flat::new(RAM);
        let put = |address: usize, value: u64| {
            // SAFETY: inside guest memory.
            unsafe { (address as *mut u64).write(value) }
        };
        // The guest's tables: all of the addresses used share one table of 2 MiB.
        let index = |level: u64| ((CODE >> (12 + 9 * level)) & 511) as usize;
        for level in 0..3 {
            let entry = (TABLES + 0x1000 * (level + 1)) as u64 | PRESENT_USER | WRITE;
            put(ram + TABLES + 0x1000 * level + 8 * index(3 - level as u64), entry);
        }
        let last = ram + TABLES + 0x3000;
        put(last + 8 * index(0), CODE_PAGE as u64 | PRESENT_USER);
        for page in 0..DATA_SIZE >> 12 {
            let at = ((DATA >> 12) & 511) as usize + page;
            let writable = if page < WRITABLE >> 12 { WRITE } else { 0 };
            put(last + 8 * at, (DATA_PAGES + (page << 12)) as u64 | PRESENT_USER | writable | NX);
        }
        // SAFETY: a mapped page.
        let v = unsafe { Vmcb::new(vmcb) };
        v.set(control::INTERCEPTS + 8, u32::MAX); // all exceptions
        v.set(save::CR3, TABLES as u64);
        for n in [4, 5] {
            put_segment(v, n, FLAT.0, FLAT.1, FLAT.2, FLAT.3);
        }
        Soft { cpu, ram, vmcb, probing: false, probed: PAGED }
    }

    pub fn run(&mut self, case: &Case) -> Box<Outcome> {
        let (code_segment, data_segment) = segments(case.bits);
        self.run_in(case, PAGED, code_segment, data_segment)
    }

    /// Runs 16-bit code in real mode, where HLT ends it with #VMEXIT HLT. The segments have the same limits, and lead to
    /// the same memory; nothing of it is read-only or missing.
    pub fn run_real(&mut self, case: &Case) -> Box<Outcome> {
        let code_segment = (0, 0x9b, CODE_PAGE as u64 - OFFSET16, LIMIT16);
        let data_segment = (0, 0x93, DATA_PAGES as u64 - (DATA - SEGMENT16), LIMIT16);
        self.run_in(case, REAL, code_segment, data_segment)
    }

    fn run_in(
        &mut self,
        case: &Case,
        mode: Mode,
        code_segment: Segment,
        data_segment: Segment,
    ) -> Box<Outcome> {
        // SAFETY: inside the mapping; nothing else refers to it while no processor runs.
        let (code, data) = unsafe { self.memory() };
        self.probing = false;
        code.fill(END);
        code[..case.length].copy_from_slice(case.code());
        fill(case.seed, data);
        let mut out = Box::new(Outcome::EMPTY);
        (out.vector, out.error, out.address) =
            self.execute(&case.state, &mut out.state, mode, code_segment, data_segment);
        out.data.copy_from_slice(data);
        out.state.settle();
        out
    }

    /// Sets bits of CR4 for probes.
    pub fn enable(&mut self, cr4: u64) {
        self.probed.cr4 |= cr4;
    }

    /// Runs one instruction at the end of the code page.
    pub fn probe(&mut self, probe: &Probe) -> Answer {
        // SAFETY: as in `run_in`.
        let (code, data) = unsafe { self.memory() };
        if !self.probing {
            self.probing = true;
            code.fill(END);
            data.copy_from_slice(template());
        }
        probe.place(code);
        let (code_segment, data_segment) = segments(probe.bits);
        let mut answer = Answer::EMPTY;
        (answer.vector, answer.error, answer.address) =
            self.execute(&probe.state(), &mut answer.state, self.probed, code_segment, data_segment);
        answer.memory = digest(data);
        answer.settled()
    }

    /// The code page and the data.
    ///
    /// # Safety
    /// No processor may run while they are used.
    unsafe fn memory(&self) -> (&'static mut [u8; 4096], &'static mut [u8; DATA_SIZE]) {
        // SAFETY: inside the mapping, which stays.
        unsafe { (&mut *((self.ram + CODE_PAGE) as *mut _), &mut *((self.ram + DATA_PAGES) as *mut _)) }
    }

    /// Runs to the exception that ends it; vector, error code and CR2.
    fn execute(
        &mut self,
        from: &State,
        s: &mut State,
        mode: Mode,
        code_segment: Segment,
        data_segment: Segment,
    ) -> (u64, u64, u64) {
        // SAFETY: a mapped page.
        let v = unsafe { Vmcb::new(self.vmcb) };
        v.set(save::CR0, mode.cr0);
        v.set(save::CR4, mode.cr4);
        v.set(save::EFER, mode.efer);
        v.set(save::CPL, mode.cpl);
        let (selector, attrib, base, limit) = code_segment;
        put_segment(v, 1, selector, attrib, base, limit);
        let (selector, attrib, base, limit) = data_segment;
        for n in [0, 2, 3] {
            put_segment(v, n, selector, attrib, base, limit);
        }
        v.set(save::RIP, from.rip);
        v.set(save::RFLAGS, from.rflags);
        v.set(save::RSP, from.gpr[4]);
        v.set(save::RAX, from.gpr[0]);
        let rb = &mut self.cpu.rb;
        rb.gpr[..16].copy_from_slice(&from.gpr);
        rb.fcw = from.fcw;
        rb.fsw = from.fsw;
        rb.mxcsr = from.mxcsr;
        let top = (from.fsw >> 11 & 7) as usize;
        rb.ftw = 0;
        for i in 0..8 {
            let physical = (top + i) & 7;
            let [mantissa, se] = from.st[i];
            rb.st[physical] = [mantissa, se];
            let tag = if from.tags >> physical & 1 == 0 {
                3
            } else if mantissa == 0 && se & 0x7fff == 0 {
                1
            } else if se & 0x7fff == 0 || se & 0x7fff == 0x7fff || mantissa >> 63 == 0 {
                2
            } else {
                0
            };
            rb.ftw |= tag << (2 * physical);
        }
        for i in 0..16 {
            rb.ymm[i][..2].copy_from_slice(&from.xmm[i]);
        }
        let exit = self.cpu.vmrun(self.vmcb).expect("a good VMCB");
        let vector = exit.wrapping_sub(EXCP0);
        let error = if matches!(vector, 8 | 10..=14 | 17) { v.get(control::EXITINFO1) } else { 0 };
        let address = if vector == 14 { v.get(control::EXITINFO2) } else { 0 };
        let rb = &self.cpu.rb;
        s.gpr.copy_from_slice(&rb.gpr[..16]);
        s.gpr[4] = v.get(save::RSP);
        s.gpr[0] = v.get(save::RAX);
        s.rip = v.get(save::RIP);
        s.rflags = v.get(save::RFLAGS);
        (s.fcw, s.fsw, s.mxcsr) = (rb.fcw, rb.fsw, rb.mxcsr);
        let top = (s.fsw >> 11 & 7) as usize;
        s.tags = (0..8).filter(|i| rb.ftw >> (2 * i) & 3 != 3).fold(0, |t, i| t | 1 << i);
        for i in 0..8 {
            let [mantissa, se] = rb.st[(top + i) & 7];
            s.st[i] = [mantissa, se & 0xffff];
        }
        for i in 0..16 {
            s.xmm[i].copy_from_slice(&rb.ymm[i][..2]);
        }
        (vector, error, address)
    }
}

/// Code and data segments of 64, 32 or 16-bit code.
fn segments(bits: u32) -> (Segment, Segment) {
    match bits {
        64 => ((0x33, 0xafb, 0, u32::MAX), FLAT),
        32 => ((0x23, 0xcfb, 0, u32::MAX), FLAT),
        _ => ((7, 0xfb, CODE - OFFSET16, LIMIT16), (0xf, 0xf3, SEGMENT16, LIMIT16)),
    }
}
