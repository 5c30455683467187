// SPDX-License-Identifier: Apache-2.0
//! All encodings on softcpu and on the host's processor: opcode maps, prefixes, forms of ModRM, in 64, 32 and 16-bit code.
//! Length, #UD or another exception, and what one instruction does to registers and memory must agree.
//!
//! `make test` takes a sample, the same every time; `SOFTCPU_DIFF_ENCODINGS=all` (of `make differential`) runs them all.

use std::collections::BTreeMap;

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};
use softcpu::x86::decode::decode;

use crate::case::{CODE, Outcome, next};
use crate::known::{self, Located};
use crate::native::has_16_bit_segments;
use crate::probe::{Answer, LONGEST, Probe};
use crate::prober::{BATCH, prober};
use crate::processor::{Processor, host, judge};
use crate::select::flags;
use crate::soft::Soft;

/// One of so many is in the sample.
const SAMPLE: u64 = 96;

/// Legacy prefixes before an opcode.
const PREFIXES: &[&[u8]] = &[
    &[],
    &[0x66],
    &[0xf2],
    &[0xf3],
    &[0x67],
    &[0xf0],
    &[0x66, 0xf2],
    &[0x66, 0xf3],
    &[0xf3, 0x66],
    &[0xf2, 0xf3],
    &[0xf3, 0xf2],
    &[0x66, 0x67],
    &[0x67, 0xf3],
    &[0xf0, 0x66],
    &[0xf0, 0xf2],
    &[0xf3, 0xf0],
    &[0x2e],
    &[0x3e],
    &[0x26, 0x36],
];
/// The REX prefixes that follow some of them, in 64-bit code.
const REX: [u8; 6] = [0x40, 0x41, 0x42, 0x44, 0x48, 0x4f];
/// And a REX prefix that doesn't count, because another prefix follows.
const LOST_REX: &[&[u8]] = &[&[0x48, 0x66], &[0x4f, 0xf3], &[0x48, 0x48]];

/// Opcode maps.
const MAPS: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];

/// What comes behind opcode and ModRM: displacement and immediate.
const TAIL: [u8; 12] = [0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x08, 0x11, 0x21, 0x31, 0x41];
/// SIB bytes: a base alone, base and index, displacement alone.
const SIBS: [u8; 3] = [0x23, 0x8b, 0x25];

/// ModRM bytes: every register and register operand; every register with the interesting forms of memory.
fn modrms() -> Vec<u8> {
    let memory = (0u8..3).flat_map(|m| (0..8).flat_map(move |r| [0, 4, 5, 6].map(|rm| m << 6 | r << 3 | rm)));
    memory.chain(0xc0..=0xff).collect()
}

/// Calls `f` with every encoding of a mode.
fn all(bits: u32, f: &mut dyn FnMut(&[u8])) {
    let mut prefixes: Vec<Vec<u8>> = PREFIXES.iter().map(|p| p.to_vec()).collect();
    if bits == 64 {
        for legacy in &PREFIXES[..16] {
            prefixes.extend(REX.iter().map(|rex| [legacy, &[*rex][..]].concat()));
        }
        prefixes.extend(LOST_REX.iter().map(|p| p.to_vec()));
    }
    let modrms = modrms();
    let mut bytes = Vec::with_capacity(32);
    for prefix in &prefixes {
        for map in MAPS {
            for opcode in 0..=0xffu8 {
                for (n, modrm) in modrms.iter().enumerate() {
                    bytes.clear();
                    bytes.extend_from_slice(prefix);
                    bytes.extend_from_slice(map);
                    bytes.push(opcode);
                    let operands = bytes.len();
                    bytes.push(*modrm);
                    if modrm & 7 == 4 && modrm >> 6 != 3 {
                        bytes.push(SIBS[n % 3]);
                    }
                    bytes.extend_from_slice(&TAIL);
                    bytes.truncate(LONGEST);
                    // Prefixes and escapes are no opcodes; an instruction without ModRM needs one variant.
                    if map.is_empty() && known::is_prefix(opcode)
                        || map.is_empty() && (opcode == 0x0f || bits == 64 && opcode & 0xf0 == 0x40)
                        || map == [0x0f] && matches!(opcode, 0x38 | 0x3a)
                    {
                        break;
                    }
                    f(&bytes);
                    let i = decode(bits, &bytes, 0);
                    if !i.is_invalid() && n == 0 && !has_modrm(&i, &bytes, operands) {
                        break;
                    }
                }
            }
        }
    }
    // VEX, in the corner of the maps where BMI is; and the rest of them once each.
    let long = bits == 64;
    for (map, opcode) in (1..4u8).flat_map(|m| (0..=0xffu8).map(move |o| (m, o))) {
        let bmi = opcode >= 0xf0 && map > 1;
        for n in 0..if bmi { 64 } else { 4u8 } {
            // W, vvvv, L, pp; R, X and B.
            for vvvv in [0x78, 0x40, 0x00] {
                let third = (n & 1) << 7 | vvvv | (n >> 1 & 1) << 2 | n >> 2 & 3;
                let second = map | if long && n >> 4 & 1 != 0 { 0 } else { 0xe0 };
                for modrm in [0xc1, 0xca, 0xd3, 0xdc, 0xe5, 0xee, 0xf7, 0xf8, 0x00, 0x49, 0x92, 0x1b, 0x26] {
                    for prefix in [&[][..], &[0x66], &[0xf3], &[0x48], &[0xf0], &[0x67]] {
                        if prefix == [0x48] && !long || !prefix.is_empty() && !bmi {
                            continue;
                        }
                        bytes.clear();
                        bytes.extend_from_slice(prefix);
                        bytes.extend_from_slice(&[0xc4, second, third, opcode, modrm]);
                        bytes.extend_from_slice(&TAIL);
                        bytes.truncate(LONGEST);
                        f(&bytes);
                    }
                }
            }
        }
    }
}

/// Whether an instruction, decoded with the ModRM byte at `at`, has one: another one there changes something.
fn has_modrm(i: &Instruction, bytes: &[u8], at: usize) -> bool {
    let mut other = bytes.to_vec();
    other[at] = 0xc7;
    let j = decode(if i.code_size() == iced_x86::CodeSize::Code64 { 64 } else { 32 }, &other, 0);
    i.code().op_code().op_count() > 0 && (0..i.op_count()).any(|n| matches!(i.op_kind(n), OpKind::Memory))
        || j.code() != i.code()
}

/// Features that softcpu doesn't have: such an instruction is #UD there, whatever the host makes of it.
fn missing(probe: &Probe, i: &Instruction) -> bool {
    use CpuidFeature::*;
    let opcode = &probe.bytes[prefixes(probe.bits, &probe.bytes)..];
    if i.is_invalid() {
        // VEX: AVX and AVX-512, also with operands that the decoder rejects.
        return matches!(opcode[0], 0xc4 | 0xc5);
    }
    if i.code().encoding() != EncodingKind::Legacy {
        return !i.cpuid_features().iter().all(|f| matches!(f, BMI1 | BMI2));
    }
    i.cpuid_features().iter().any(|f| {
        matches!(
            f,
            SSE4A
                | MONITORX
                | CLZERO
                | RDPRU
                | MCOMMIT
                | GFNI
                | SEV_SNP
                | SEV_ES
                | RMPQUERY
                | INVLPGB
                | CET_SS
                | MOVDIRI
                | MOVDIR64B
        )
    })
}

/// Why an instruction isn't run natively, or None.
fn excluded(i: &Instruction) -> Option<&'static str> {
    use Mnemonic::*;
    Some(match i.mnemonic() {
        Syscall | Sysenter => "a system call",
        Sysexit | Sysexitq => "a hypervisor may emulate it",
        Int3 | Int1 | Into => "softcpu stops before it, the host's kernel behind it",
        Vmmcall | Vmcall => "a hypervisor answers",
        Vmrun | Vmload | Vmsave | Stgi | Clgi | Skinit | Invlpga => "EFER.SVME is set on softcpu alone",
        Sgdt | Sidt | Smsw | Sldt | Str => "the host's kernel may emulate it (UMIP)",
        Rdsspd | Rdsspq | Incsspd | Incsspq => "depends on the host's shadow stacks",
        Wrfsbase | Wrgsbase => "the child would lose its thread pointer",
        _ => return None,
    })
}

/// VMCALL and VMMCALL with prefixes that make something else of them, or nothing: a hypervisor answers all the same.
fn hypercall(bits: u32, bytes: &[u8]) -> bool {
    let opcode = &bytes[prefixes(bits, bytes)..];
    opcode.starts_with(&[0x0f, 0x01]) && matches!(opcode[2], 0xc1 | 0xd9)
}

/// How many bytes of prefixes there are.
fn prefixes(bits: u32, bytes: &[u8]) -> usize {
    bytes.iter().take_while(|b| known::is_prefix(**b) || bits == 64 && **b & 0xf0 == 0x40).count()
}

/// What isn't compared of a retired instruction: (registers, x87, SSE, memory).
fn own_results(i: &Instruction) -> (bool, bool, bool, bool) {
    use Mnemonic::*;
    let transcendental =
        matches!(i.mnemonic(), Fsin | Fcos | Fsincos | Fptan | Fpatan | F2xm1 | Fyl2x | Fyl2xp1);
    let registers = matches!(
        i.mnemonic(),
        Rdtsc | Rdtscp | Rdpid | Rdrand | Rdseed | Cpuid | Rdpmc | Xgetbv | Rdfsbase | Rdgsbase | Lar | Lsl
    ) || (0..i.op_count())
        .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register());
    let approximate = matches!(i.mnemonic(), Rcpps | Rcpss | Rsqrtps | Rsqrtss);
    let image = matches!(
        i.mnemonic(),
        Fnstenv | Fnsave | Fxsave | Fxsave64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64
    ) || matches!(i.mnemonic(), Mov | Push)
        && (0..i.op_count())
            .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register());
    (registers, transcendental, approximate, image)
}

/// #PF of a fetch behind the code page.
fn ends_early(a: &Answer) -> bool {
    (a.vector, a.error, a.address) == (14, 0x14, CODE + 0x1000)
}

/// The answers as outcomes, for the table of differences; memory is its digest.
fn outcome(a: &Answer) -> Box<Outcome> {
    let mut out = Box::new(Outcome::EMPTY);
    (out.state, out.vector, out.error, out.address) = (a.state, a.vector, a.error, a.address);
    out.data[..8].copy_from_slice(&a.memory.to_le_bytes());
    out
}

/// What differs between softcpu's answer and the processor's, and is not named in the table of differences.
fn differences(probe: &Probe, i: &Instruction, soft: &Answer, theirs: &Answer) -> Option<String> {
    const UNDEFINED: u64 = 6;
    if soft.vector == UNDEFINED && theirs.vector != UNDEFINED && missing(probe, i) {
        return None;
    }
    // How many of its bytes must be there for an instruction to be undefined is up to the processor.
    if ends_early(soft) && theirs.vector == UNDEFINED || ends_early(theirs) && soft.vector == UNDEFINED {
        return None;
    }
    let (mut a, mut b) = (*soft, *theirs);
    let (registers, x87, sse, memory) = own_results(i);
    if registers {
        (a.state.gpr, a.state.rflags) = (b.state.gpr, b.state.rflags);
    }
    if x87 {
        (a.state.st, a.state.fsw, a.state.tags) = (b.state.st, b.state.fsw, b.state.tags);
    }
    if sse {
        a.state.xmm = b.state.xmm;
    }
    if memory {
        a.memory = b.memory;
    }
    // RF as in `case::differences`.
    let undefined = 1 << 16 | flags(i.rflags_undefined());
    a.state.rflags &= !undefined;
    b.state.rflags &= !undefined;
    if a == b {
        return None;
    }
    let located = Located { ip: probe.ip(), bytes: probe.bytes[..probe.room].to_vec(), instruction: *i };
    let found = known::compare(host(), &[located], &mut outcome(&a), &outcome(&b), undefined);
    (!found.is_empty()).then(|| found.join("; "))
}

/// What a difference is grouped by: mode, mandatory and other prefixes' effect aside, the opcode.
fn group(probe: &Probe, i: &Instruction, what: &str) -> String {
    let bytes = &probe.bytes;
    let n = prefixes(probe.bits, bytes);
    let opcode = match bytes[n..] {
        [0x0f, 0x38 | 0x3a, ..] => &bytes[n..(n + 3).min(LONGEST)],
        [0x0f, ..] => &bytes[n..n + 2],
        _ => &bytes[n..n + 1],
    };
    // Without addresses and values.
    let kind: String =
        what.chars().filter(|c| !c.is_ascii_hexdigit() || c.is_ascii_alphabetic()).take(24).collect();
    format!("{:02x?} {:?} {}", opcode, i.code(), if what.starts_with("fault") { "fault" } else { &kind })
}

struct Run {
    soft: Soft,
    probes: Vec<Probe>,
    count: usize,
    failed: usize,
    groups: BTreeMap<String, (usize, String)>,
}

impl Run {
    fn flush(&mut self) {
        let answers = prober().run(&self.probes);
        for (probe, theirs) in self.probes.drain(..).zip(answers) {
            self.count += 1;
            let i = decode(probe.bits, &probe.bytes, 0);
            let what = match theirs {
                None => Some("the child died".to_string()),
                Some(theirs) => differences(&probe, &i, &self.soft.probe(&probe), &theirs),
            };
            if let Some(what) = what {
                self.failed += 1;
                let key = group(&probe, &i, &what);
                let entry = self.groups.entry(key).or_insert_with(|| {
                    let n = probe.room;
                    (0, format!("{}-bit {:02x?}: {what}", probe.bits, &probe.bytes[..n]))
                });
                entry.0 += 1;
            }
        }
    }

    fn probe(&mut self, bits: u32, bytes: &[u8], room: usize) {
        let mut probe = Probe { bits, room, bytes: [0; LONGEST] };
        probe.bytes[..bytes.len()].copy_from_slice(bytes);
        self.probes.push(probe);
        if self.probes.len() == BATCH {
            self.flush();
        }
    }
}

/// CR4's bits that the host's kernel may have set: FSGSBASE, OSXSAVE, PKE.
fn host_cr4() -> u64 {
    const HWCAP2_FSGSBASE: u64 = 2;
    // SAFETY: a plain call; CPUID is there.
    let (fsgsbase, leaf1, leaf7) = unsafe {
        (
            libc::getauxval(libc::AT_HWCAP2) & HWCAP2_FSGSBASE != 0,
            core::arch::x86_64::__cpuid(1),
            core::arch::x86_64::__cpuid_count(7, 0),
        )
    };
    (fsgsbase as u64) << 16 | u64::from(leaf1.ecx >> 27 & 1) << 18 | u64::from(leaf7.ecx >> 4 & 1) << 22
}

#[test]
fn every_encoding_is_what_this_processor_makes_of_it() {
    let everything = std::env::var("SOFTCPU_DIFF_ENCODINGS").is_ok_and(|v| v == "all");
    let mut soft = Soft::new();
    soft.enable(host_cr4());
    let mut run = Run { soft, probes: Vec::new(), count: 0, failed: 0, groups: BTreeMap::new() };
    for bits in [64, 32, 16] {
        if bits == 16 && !has_16_bit_segments() {
            println!("this kernel has no modify_ldt: 16-bit code cannot run natively");
            continue;
        }
        let mut seed = u64::from(bits);
        all(bits, &mut |bytes| {
            let sampled = next(&mut seed) % SAMPLE == 0;
            if !everything && !sampled {
                return;
            }
            let i = decode(bits, bytes, 0);
            if excluded(&i).is_some() || hypercall(bits, bytes) {
                return;
            }
            if i.is_invalid() {
                run.probe(bits, bytes, bytes.len());
                return;
            }
            let n = i.len();
            run.probe(bits, bytes, n);
            if n > 1 && (everything || next(&mut seed) % 4 == 0) {
                run.probe(bits, bytes, n - 1);
            }
        });
    }
    run.flush();
    for (key, (count, example)) in run.groups.iter().take(200) {
        println!("{count:6} {key}: {example}");
    }
    let record = "SOFTCPU_DIFF_ENCODINGS=all make differential";
    judge("encodings", run.failed, run.count, &[Processor::Amd19h], record);
    assert!(run.count > 100_000, "only {}", run.count);
}
