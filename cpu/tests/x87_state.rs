// SPDX-License-Identifier: Apache-2.0
//! When x87 instructions may run, and the images of FNSTENV, FXSAVE and XSAVE (APM vol. 2, 11.4 and 11.5).
#![cfg(all(target_pointer_width = "64", target_os = "linux"))]

mod x87_guest;

use softcpu::x86::vmcb::{control, save};
use softcpu::x86::x87::{compacted_size, validate_xcr0, xsave_size};
use x87_guest::{CODE, DATA_SIZE, Guest};

const EXIT_NM: u64 = 0x47;
const EXIT_GP: u64 = 0x4d;
const EXIT_UD: u64 = 0x46;
const EXIT_MF: u64 = 0x50;
const EXIT_HLT: u64 = 0x78;
const EXIT_FERR_FREEZE: u64 = 0x7e;

const CR0: u64 = 0x8000_0033;
const MP: u64 = 1 << 1;
const EM: u64 = 1 << 2;
const TS: u64 = 1 << 3;
const NE: u64 = 1 << 5;

const FNINIT: [u8; 2] = [0xdb, 0xe3];
const FLD1: [u8; 2] = [0xd9, 0xe8];
const FLDZ: [u8; 2] = [0xd9, 0xee];
const WAIT: [u8; 1] = [0x9b];
const HLT: [u8; 1] = [0xf4];

/// Runs the pieces of code under `cr0`; exit code, offset reached, data page.
fn run(cr0: u64, data: [u8; DATA_SIZE], pieces: &[&[u8]]) -> (u64, usize, [u8; DATA_SIZE], Guest) {
    let mut guest = Guest::new();
    guest.vmcb().set(save::CR0, cr0);
    // FERR_FREEZE beside what the guest intercepts anyway.
    let word = guest.vmcb().get::<u32>(control::INTERCEPTS + 12);
    guest.vmcb().set(control::INTERCEPTS + 12, word | 1 << 30);
    let mut data = data;
    let stop = guest.run(&pieces.concat(), &mut data);
    (guest.exit(), stop, data, guest)
}

/// FLDCW of 0x0340 at data offset 0 (everything unmasked), then 1/0.
fn divide_by_zero() -> (Vec<u8>, [u8; DATA_SIZE]) {
    let mut data = [0; DATA_SIZE];
    data[..2].copy_from_slice(&0x340u16.to_le_bytes());
    let code = [&FNINIT[..], &[0xd9, 0x2f], &FLD1, &FLDZ, &[0xde, 0xf9]].concat();
    (code, data)
}

#[test]
fn an_unmasked_exception_is_delivered_by_the_next_waiting_instruction() {
    let (code, data) = divide_by_zero();
    let status = [0xdd, 0x7f, 0x08]; // fnstsw [rdi + 8] doesn't wait
    let (exit, stop, data, _) = run(CR0, data, &[&code, &status, &WAIT, &HLT]);
    assert_eq!((exit, stop), (EXIT_MF, code.len() + 3));
    assert_eq!(u16::from_le_bytes([data[8], data[9]]) & 0x80ff, 0x8084, "ES, B and ZE");
    let (exit, stop, ..) = run(CR0, data, &[&code, &FLD1, &HLT]);
    assert_eq!((exit, stop), (EXIT_MF, code.len()));
    let (exit, ..) = run(CR0, data, &[&code, &[0xdb, 0xe2], &FLD1, &HLT]); // fnclex
    assert_eq!(exit, EXIT_HLT);
}

#[test]
fn without_cr0_ne_a_pending_exception_freezes_the_processor() {
    let (code, data) = divide_by_zero();
    let (exit, stop, ..) = run(CR0 & !NE, data, &[&code, &WAIT, &HLT]);
    assert_eq!((exit, stop), (EXIT_FERR_FREEZE, code.len()));
}

#[test]
fn ts_and_em_make_the_unit_unavailable() {
    let data = [0; DATA_SIZE];
    for (cr0, instruction, exit) in [
        (CR0 | TS, &FLD1[..], EXIT_NM),
        (CR0 | EM, &FLD1, EXIT_NM),
        (CR0 | TS, &FNINIT, EXIT_NM),
        (CR0 | TS | MP, &WAIT, EXIT_NM),
        ((CR0 | TS) & !MP, &WAIT, EXIT_HLT),
        (CR0 | EM, &WAIT, EXIT_HLT),
        (CR0 | TS, &[0x0f, 0xae, 0x07], EXIT_NM), // fxsave [rdi]
        (CR0 | TS, &[0x0f, 0xae, 0x1f], EXIT_NM), // stmxcsr [rdi]
        (CR0 | EM, &[0x0f, 0xae, 0x1f], EXIT_UD),
        (CR0 | TS, &[0x0f, 0xae, 0x27], EXIT_NM), // xsave [rdi]
    ] {
        assert_eq!(run(cr0, data, &[instruction, &HLT]).0, exit, "cr0 {cr0:x} {instruction:02x?}");
    }
}

#[test]
fn reserved_bits_of_mxcsr_raise_gp() {
    let mut data = [0; DATA_SIZE];
    data[..4].copy_from_slice(&0x1_1f80u32.to_le_bytes());
    assert_eq!(run(CR0, data, &[&[0x0f, 0xae, 0x17], &HLT]).0, EXIT_GP); // ldmxcsr [rdi]
    data[24..28].copy_from_slice(&0x8000_1f80u32.to_le_bytes());
    assert_eq!(run(CR0, data, &[&[0x0f, 0xae, 0x0f], &HLT]).0, EXIT_GP); // fxrstor [rdi]
    assert_eq!(run(CR0, data, &[&[0x0f, 0xae, 0x47, 0x08], &HLT]).0, EXIT_GP, "fxsave off its alignment");
}

/// mov eax, 3; xor edx, edx
const ALL_COMPONENTS: [u8; 7] = [0xb8, 3, 0, 0, 0, 0x31, 0xd2];
const XSAVE: [u8; 3] = [0x0f, 0xae, 0x27];
const XSAVEC: [u8; 3] = [0x0f, 0xc7, 0x27];
const XRSTOR: [u8; 3] = [0x0f, 0xae, 0x2f];

fn word(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(data[at..at + 8].try_into().unwrap())
}

#[test]
fn xsave_writes_what_is_in_use_into_the_header() {
    let mut data = [0; DATA_SIZE];
    data[512] = 0xfc; // foreign components stay
    let (exit, _, after, _) = run(CR0, data, &[&ALL_COMPONENTS, &XSAVE, &HLT]);
    assert_eq!(exit, EXIT_HLT);
    assert_eq!(word(&after, 512), 0xfc, "everything is in its initial state");
    assert_eq!(u16::from_le_bytes([after[0], after[1]]), 0x37f);
    assert_eq!(word(&after, 24), 0x2_ffff_0000_1f80, "MXCSR and its mask");
    let (_, _, after, _) = run(CR0, data, &[&FLD1, &ALL_COMPONENTS, &XSAVE, &HLT]);
    assert_eq!(word(&after, 512), 0xfd);
    assert_eq!((after[4], word(&after, 32)), (0x80, 1 << 63), "R7 holds 1.0");
    let (_, _, after, _) = run(CR0, data, &[&FLD1, &ALL_COMPONENTS, &XSAVEC, &HLT]);
    assert_eq!((word(&after, 512), word(&after, 520)), (1, 1 << 63 | 3));
}

#[test]
fn xrstor_initializes_what_the_header_leaves_out() {
    let data = [0; DATA_SIZE];
    let (exit, _, _, guest) = run(
        CR0,
        {
            let mut d = data;
            d[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
            d
        },
        &[&FLD1, &ALL_COMPONENTS, &XRSTOR, &HLT],
    );
    assert_eq!(exit, EXIT_HLT);
    let rb = &guest.cpu.rb;
    assert_eq!((rb.fcw, rb.fsw, rb.ftw, rb.st[7][0]), (0x37f, 0, 0xffff, 0));
    assert_eq!(rb.mxcsr, 0x1fa0, "the standard format always loads MXCSR");
}

#[test]
fn bad_xsave_headers_raise_gp() {
    for (at, value) in [(512, 4u64), (520, 1), (528, 1), (520, 1 << 63 | 4), (520, 1 << 62)] {
        let mut data = [0; DATA_SIZE];
        data[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let exit = run(CR0, data, &[&ALL_COMPONENTS, &XRSTOR, &HLT]).0;
        assert_eq!(exit, EXIT_GP, "{value:#x} at {at}");
    }
    let mut data = [0; DATA_SIZE];
    data[512] = 2; // a component that the compacted layout lacks
    data[520..528].copy_from_slice(&(1u64 << 63 | 1).to_le_bytes());
    assert_eq!(run(CR0, data, &[&ALL_COMPONENTS, &XRSTOR, &HLT]).0, EXIT_GP);
}

#[test]
fn xcr0_needs_x87_and_only_supported_components() {
    assert!(validate_xcr0(1) && validate_xcr0(3) && validate_xcr0(0x201) && validate_xcr0(0x203));
    assert!(!validate_xcr0(0) && !validate_xcr0(2) && !validate_xcr0(0x200) && !validate_xcr0(1 << 10 | 3));
    assert_eq!([3, 7, 0x203, 0x207].map(xsave_size), [576, 832, 0x988, 0x988]);
    assert_eq!([3, 7, 0x203, 0x207].map(compacted_size), [576, 832, 584, 840]);
}

/// Runs the instruction with PKRU among the enabled and the requested components.
fn run_with_pkru(pkru: u32, data: [u8; DATA_SIZE], instruction: &[u8]) -> (u64, [u8; DATA_SIZE], u32) {
    let mut guest = Guest::new();
    guest.cpu.rb.xcr0 = 0x203;
    guest.cpu.rb.pkru = pkru;
    let mut data = data;
    // mov eax, 0x203; xor edx, edx
    guest.run(&[&[0xb8, 3, 2, 0, 0, 0x31, 0xd2], instruction, &HLT].concat(), &mut data);
    (guest.exit(), data, guest.cpu.rb.pkru)
}

#[test]
fn pkru_is_component_nine_in_both_formats() {
    let foreign = [0x55; DATA_SIZE];
    let mut data = foreign;
    data[512..576].fill(0);
    let filler = 0x5555_5555_5555_5555;
    let (exit, after, _) = run_with_pkru(0x1234_5678, data, &XSAVE);
    assert_eq!((exit, word(&after, 512), word(&after, 0x980)), (EXIT_HLT, 0x200, 0x1234_5678));
    let (_, after, _) = run_with_pkru(0, data, &XSAVE);
    assert_eq!((word(&after, 512), word(&after, 0x980)), (0, 0), "the initial state, written all the same");
    let (_, after, _) = run_with_pkru(0, data, &[0x0f, 0xae, 0x37]);
    assert_eq!((word(&after, 512), word(&after, 0x980)), (0, filler), "XSAVEOPT leaves it out");
    let (_, after, _) = run_with_pkru(0x1234_5678, data, &XSAVEC);
    assert_eq!((word(&after, 512), word(&after, 520)), (0x200, 1 << 63 | 0x203));
    assert_eq!((word(&after, 576), word(&after, 0x980)), (0x1234_5678, filler));
}

#[test]
fn xrstor_loads_pkru_or_its_initial_state() {
    let mut data = [0; DATA_SIZE];
    data[576..580].copy_from_slice(&0x1111_1111u32.to_le_bytes());
    data[0x980..0x984].copy_from_slice(&0x2222_2222u32.to_le_bytes());
    for (state, layout, expected) in [
        (0x200u64, 0, 0x2222_2222),
        (0x200, 1 << 63 | 0x200, 0x1111_1111),
        (0, 0, 0),
        (0, 1 << 63 | 0x200, 0),
        (0, 1 << 63 | 3, 0),
    ] {
        data[512..520].copy_from_slice(&state.to_le_bytes());
        data[520..528].copy_from_slice(&u64::to_le_bytes(layout));
        let (exit, _, pkru) = run_with_pkru(0x3333_3333, data, &XRSTOR);
        assert_eq!((exit, pkru), (EXIT_HLT, expected), "XSTATE_BV {state:x} XCOMP_BV {layout:x}");
    }
    // Not asked for: left alone.
    let keep = [&ALL_COMPONENTS[..], &XRSTOR].concat();
    assert_eq!(run_with_pkru(0x3333_3333, data, &keep).2, 0x3333_3333);
}

/// XSAVES [rdi], XRSTORS [rdi]
const XSAVES: [u8; 3] = [0x0f, 0xc7, 0x2f];
const XRSTORS: [u8; 3] = [0x0f, 0xc7, 0x1f];

#[test]
fn xsaves_is_xsavec_and_xrstors_takes_that_format_only() {
    let mut data = [0; DATA_SIZE];
    let (exit, by_s, _) = run_with_pkru(0x1234_5678, data, &XSAVES);
    let (_, by_c, _) = run_with_pkru(0x1234_5678, data, &XSAVEC);
    assert_eq!((exit, by_s), (EXIT_HLT, by_c));
    assert_eq!(word(&by_s, 520), 1 << 63 | 0x203);
    let (exit, _, pkru) = run_with_pkru(0, by_s, &XRSTORS);
    assert_eq!((exit, pkru), (EXIT_HLT, 0x1234_5678));
    // The standard format, components outside of the layout, layouts outside of XCR0, bytes that have to be 0.
    for (state, layout, rest) in [
        (0x200u64, 0u64, 0u64),
        (3, 1 << 63 | 1, 0),
        (0, 1 << 63 | 4, 0),
        (0, 1 << 63 | 1 << 11, 0),
        (0, 1 << 63, 1),
    ] {
        data[512..520].copy_from_slice(&state.to_le_bytes());
        data[520..528].copy_from_slice(&layout.to_le_bytes());
        data[528..536].copy_from_slice(&rest.to_le_bytes());
        assert_eq!(run_with_pkru(0, data, &XRSTORS).0, EXIT_GP, "{state:x} {layout:x} {rest:x}");
    }
}

#[test]
fn the_supervisors_forms_are_for_cpl_0_where_xsave_is_on() {
    for instruction in [XSAVES, XRSTORS] {
        let mut data = [0; DATA_SIZE];
        data[520..528].copy_from_slice(&(1u64 << 63).to_le_bytes());
        assert_eq!(run(CR0 | TS, data, &[&instruction, &HLT]).0, EXIT_NM);
        for (cr4, cpl, exit) in [(0, 0, EXIT_UD), (1u64 << 18, 3, EXIT_GP), (1 << 18, 0, EXIT_HLT)] {
            let mut guest = Guest::new();
            guest.cpu.rb.xcr0 = 3;
            let v = guest.vmcb();
            let old: u64 = v.get(save::CR4);
            v.set(save::CR4, old & !(1 << 18) | cr4);
            v.set(save::CPL, cpl as u8);
            let mut room = data;
            guest.run(&[&instruction[..], &HLT].concat(), &mut room);
            assert_eq!(guest.exit(), exit, "{instruction:02x?} CR4.OSXSAVE {cr4:x} CPL {cpl}");
        }
    }
}

#[test]
fn xgetbv_1_tells_what_is_in_use() {
    let data = [0; DATA_SIZE];
    let xgetbv = [0xb9, 1, 0, 0, 0, 0x0f, 0x01, 0xd0]; // mov ecx, 1; xgetbv
    let (exit, _, _, guest) = run(CR0, data, &[&xgetbv, &HLT]);
    assert_eq!((exit, guest.cpu.rb.gpr[0], guest.cpu.rb.gpr[2]), (EXIT_HLT, 0, 0));
    let (_, _, _, guest) = run(CR0, data, &[&FLD1, &xgetbv, &HLT]);
    assert_eq!(guest.cpu.rb.gpr[0], 1);
    let (exit, ..) = run(CR0, data, &[&[0xb9, 2, 0, 0, 0, 0x0f, 0x01, 0xd0], &HLT]);
    assert_eq!(exit, EXIT_GP);
}

#[test]
fn fnstenv_has_the_format_of_mode_and_operand_size() {
    let data = [0; DATA_SIZE];
    // fld1; fnstenv [rdi]; then in the 16-bit format: 66 fnstenv [rdi + 64]
    let (_, _, after, _) = run(CR0, data, &[&FLD1, &[0xd9, 0x37], &[0x66, 0xd9, 0x77, 0x40], &HLT]);
    assert_eq!(word(&after, 0), 0xffff_3800_ffff_037f);
    assert_eq!(word(&after, 8), (CODE as u64) << 32 | 0xffff_3fff, "tag word and FIP");
    let half = |at: usize| u16::from_le_bytes([after[at], after[at + 1]]);
    assert_eq!([64, 66, 68, 70, 72].map(half), [0x37f, 0x3800, 0x3fff, CODE as u16, 8]);
}

#[test]
fn fnstenv_in_real_mode_writes_linear_addresses() {
    let mut guest = Guest::new();
    let v = guest.vmcb();
    v.set(save::CR0, 0x30u64);
    v.set(save::CR4, 0u64);
    v.set(save::EFER, 0x1000u64);
    for n in 0..6 {
        v.set(save::ES + 16 * n, 0u16);
        v.set(save::ES + 16 * n + 2, 0x93u16);
        v.set(save::ES + 16 * n + 4, 0xffffu32);
        v.set(save::ES + 16 * n + 8, 0u64);
    }
    // CS so that the code at CODE is at offset 0x4560, and DS at the data page.
    let selector = (CODE >> 4) as u16 - 0x456;
    v.set(save::ES + 16, selector);
    v.set(save::ES + 18, 0x9bu16);
    v.set(save::ES + 24, u64::from(selector) << 4);
    v.set(save::ES + 56, x87_guest::DATA as u64);
    let mut data = [0; DATA_SIZE];
    // fld1; fnstenv [0]; o32 fnstenv [32]; hlt
    let code = [0xd9, 0xe8, 0xd9, 0x36, 0, 0, 0x66, 0xd9, 0x36, 32, 0, 0xf4];
    guest.run_at(0x4560, &code, &mut data);
    assert_eq!(guest.exit(), EXIT_HLT);
    let half = |at: usize| u16::from_le_bytes([data[at], data[at + 1]]);
    assert_eq!([6, 8].map(half), [CODE as u16, ((CODE >> 16) << 12) as u16]);
    assert_eq!(
        [32 + 12, 32 + 16, 32 + 18].map(half),
        [CODE as u16, ((CODE >> 16) << 12) as u16, (CODE >> 20) as u16]
    );
}
