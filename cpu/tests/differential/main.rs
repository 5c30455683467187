// SPDX-License-Identifier: Apache-2.0
//! softcpu against the host's processor, and against what a host's processor once did (golden vectors).
//!
//! Random user-mode programs (see `generate`) run natively in a forked child and on softcpu; registers, defined flags,
//! x87 and SSE state, memory and the fault must agree. Bounded by default; a longer run:
//!
//! ```text
//! SOFTCPU_DIFF_CASES=1000000 [SOFTCPU_DIFF_SEED=1] [SOFTCPU_DIFF_FAMILY=integer|integer32|integer16|simd|x87|all] \
//!     [SOFTCPU_DIFF_SAVE=found.txt] cargo test --release -p softcpu --test differential -- --nocapture
//! ```
//!
//! `SOFTCPU_DIFF_SAVE` appends what the host's processor does with each case that differs, as a golden vector; put it
//! into `tests/vectors/` once softcpu is right. `encodings` goes through all encodings, one instruction each.

mod case;
#[path = "../common/flat.rs"]
mod common;
mod known;
mod probe;
#[path = "../common/processor.rs"]
mod processor;
mod soft;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod encodings;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod generate;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod native;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod prober;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod select;

use case::from_text;
use known::located;
use processor::Processor;
use soft::Soft;

/// Runs the vectors of a file; (failed, count).
fn run_vectors(soft: &mut Soft, processor: Processor, path: &std::path::Path) -> (usize, usize) {
    let text = std::fs::read_to_string(path).unwrap();
    let (mut failed, mut count) = (0, 0);
    let mut name = "";
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(comment) = line.strip_prefix("# ") {
            name = comment;
        } else if line.starts_with("case") {
            let input = lines.next().unwrap_or("");
            let output = lines.next().unwrap_or("");
            let Some((case, undefined, expected)) = from_text([line, input, output]) else {
                panic!("{}: bad vector: {name}\n{line}", path.display());
            };
            let mut found = soft.run(&case);
            let found = known::compare(Some(processor), &located(&case), &mut found, &expected, undefined);
            if !found.is_empty() {
                println!(
                    "{}: {name}\n{line}\n{input}\nsoftcpu and the vector:\n  {}",
                    path.display(),
                    found.join("\n  ")
                );
                failed += 1;
            }
            count += 1;
        }
    }
    (failed, count)
}

#[test]
fn golden_vectors_come_out_as_on_real_processors() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors");
    let mut soft = Soft::new();
    let (mut failed, mut count) = (0, 0);
    for processor in Processor::ALL {
        let Ok(files) = std::fs::read_dir(format!("{directory}/{}", processor.folder())) else { continue };
        let mut files: Vec<_> = files.map(|e| e.unwrap().path()).collect();
        files.sort();
        for path in files.iter().filter(|p| p.extension().is_some_and(|e| e == "txt")) {
            let (f, n) = run_vectors(&mut soft, processor, path);
            (failed, count) = (failed + f, count + n);
        }
    }
    assert!(failed == 0, "{failed} of {count} vectors differ");
    assert!(count > 8000, "only {count} vectors in {directory}");
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod random {
    use super::case::{Case, Outcome, State, differences, from_text, origin, to_text};
    use super::generate::Program;
    use super::known;
    use super::native::{BATCH, Native, has_16_bit_segments, native};
    use super::processor::{Processor, host, judge};
    use super::select::Family;
    use super::soft::{HALTED, Soft};
    use std::io::Write as _;

    /// How to record differences as golden vectors.
    const RECORD: &str = "SOFTCPU_DIFF_SAVE=$PWD/found.txt make differential";

    fn variable(name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn natively(native: &mut Native, case: &Case) -> Box<Outcome> {
        native.run(std::slice::from_ref(case)).unwrap_or_else(|_| panic!("the child died")).remove(0)
    }

    /// What differs between softcpu and the host, with what the host did and the flags that are undefined.
    fn check(soft: &mut Soft, program: &Program, expected: &Outcome) -> Vec<String> {
        let mut found = soft.run(&program.case());
        let undefined = program.undefined(expected.state.rip);
        known::compare(host(), &program.located(), &mut found, expected, undefined)
    }

    /// Whether softcpu and the host still differ.
    fn differs(soft: &mut Soft, native: &mut Native, program: &Program) -> bool {
        native.run(&[program.case()]).is_ok_and(|expected| !check(soft, program, &expected[0]).is_empty())
    }

    /// Leaves out what the difference doesn't need: instructions, then registers.
    fn minimize(soft: &mut Soft, native: &mut Native, mut program: Program) -> Program {
        let mut attempt = |program: &mut Program, change: &dyn Fn(&mut Program)| {
            let mut simpler = program.clone();
            change(&mut simpler);
            let better = differs(soft, native, &simpler);
            if better {
                *program = simpler;
            }
            better
        };
        let mut k = 0;
        while k < program.groups.len() && program.groups.len() > 1 {
            if !attempt(&mut program, &|p| drop(p.groups.remove(k))) {
                k += 1;
            }
        }
        for i in 0..16 {
            attempt(&mut program, &|p| p.state.xmm[i] = [0; 2]);
            attempt(&mut program, &|p| p.state.gpr[i] = State::ZERO.gpr[i]);
        }
        attempt(&mut program, &|p| {
            (p.state.fsw, p.state.tags, p.state.st) = (State::ZERO.fsw, State::ZERO.tags, State::ZERO.st)
        });
        attempt(&mut program, &|p| p.state.fcw = State::ZERO.fcw);
        attempt(&mut program, &|p| p.state.mxcsr = State::ZERO.mxcsr);
        attempt(&mut program, &|p| p.state.rflags = State::ZERO.rflags);
        for i in 0..8 {
            attempt(&mut program, &|p| p.state.st[i] = [0; 2]);
        }
        program
    }

    fn describe(program: &Program) -> String {
        let codes: Vec<_> = program.groups.iter().map(|g| format!("{:?}", g.instruction.code())).collect();
        codes.join(", ")
    }

    /// Runs `count` programs; returns how many differ.
    fn compare(family: Family, seed: u64, count: usize) -> usize {
        let mut soft = Soft::new();
        let mut native = native();
        let mut failed = 0;
        let mut done = 0;
        while done < count {
            let n = BATCH.min(count - done);
            let programs: Vec<_> = (0..n)
                .map(|k| {
                    Program::random(seed.wrapping_mul(0x9e37_79b9).wrapping_add((done + k) as u64), family)
                })
                .collect();
            let cases: Vec<_> = programs.iter().map(Program::case).collect();
            let expected = match native.run(&cases) {
                Ok(expected) => expected,
                Err(k) => panic!(
                    "case {k} killed the child: {}\n{}",
                    describe(&programs[k]),
                    to_text("", &cases[k], 0, &Outcome::EMPTY)
                ),
            };
            for (program, expected) in programs.into_iter().zip(&expected) {
                if check(&mut soft, &program, expected).is_empty() {
                    continue;
                }
                failed += 1;
                if failed > 40 {
                    continue;
                }
                let program = minimize(&mut soft, &mut native, program);
                let case = program.case();
                let expected = natively(&mut native, &case);
                let undefined = program.undefined(expected.state.rip);
                let found = check(&mut soft, &program, &expected);
                let name = describe(&program);
                let text = to_text(&name, &case, undefined, &expected);
                println!("{text}softcpu and this processor:\n  {}\n", found.join("\n  "));
                if let Some(path) = variable("SOFTCPU_DIFF_SAVE") {
                    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
                    file.write_all(text.as_bytes()).unwrap();
                }
            }
            done += n;
        }
        failed
    }

    fn run(family: Family, default: usize) {
        let wanted = variable("SOFTCPU_DIFF_FAMILY");
        if wanted.is_some_and(|w| w != format!("{family:?}").to_lowercase()) {
            return;
        }
        let count = variable("SOFTCPU_DIFF_CASES").map_or(default, |v| v.parse().expect("a number"));
        let seed = variable("SOFTCPU_DIFF_SEED").map_or(1, |v| v.parse().expect("a number"));
        let failed = compare(family, seed, count);
        judge(&format!("{family:?} programs"), failed, count, &Processor::ALL, RECORD);
    }

    /// Keeps of the state what a program of one instruction uses.
    fn reduce(program: &mut Program) {
        let mut factory = iced_x86::InstructionInfoFactory::new();
        let used: Vec<_> = (program.groups.iter())
            .flat_map(|g| factory.info(&g.instruction).used_registers().to_vec())
            .map(|u| u.register().full_register())
            .collect();
        let vector = |i: usize| used.iter().any(|r| r.is_vector_register() && r.number() == i);
        let s = &mut program.state;
        for i in 0..16 {
            if !used.iter().any(|r| r.is_gpr() && r.number() == i) {
                s.gpr[i] = 0;
            }
            if !vector(i) {
                s.xmm[i] = [0; 2];
            }
        }
        let x87 = program.groups.iter().any(|g| {
            let f = g.instruction.cpuid_features();
            f.iter().any(|f| format!("{f:?}").starts_with("FPU") || *f == iced_x86::CpuidFeature::MMX)
        });
        if !x87 {
            (s.fcw, s.fsw, s.tags, s.st) =
                (State::ZERO.fcw, State::ZERO.fsw, State::ZERO.tags, State::ZERO.st);
        }
    }

    /// Writes golden vectors of single instructions: `SOFTCPU_DIFF_RECORD=FILE`, with `SOFTCPU_DIFF_FAMILY`,
    /// `SOFTCPU_DIFF_SEED`, and `SOFTCPU_DIFF_CASES` programs to choose from.
    #[test]
    #[ignore = "writes a file"]
    fn record_vectors() {
        let path = variable("SOFTCPU_DIFF_RECORD").expect("SOFTCPU_DIFF_RECORD=FILE");
        let family = match variable("SOFTCPU_DIFF_FAMILY").as_deref() {
            Some("simd") => Family::Simd,
            Some("x87") => Family::X87,
            Some("all") => Family::All,
            Some("integer32") => Family::Integer32,
            Some("integer16") => {
                assert!(has_16_bit_segments(), "this kernel has no modify_ldt");
                Family::Integer16
            }
            _ => Family::Integer,
        };
        let seed: u64 = variable("SOFTCPU_DIFF_SEED").map_or(1, |v| v.parse().expect("a number"));
        let count: u64 = variable("SOFTCPU_DIFF_CASES").map_or(200_000, |v| v.parse().expect("a number"));
        let mut native = native();
        // Of each encoding: two that end well, and one that faults.
        let mut kept = std::collections::BTreeMap::<(String, bool), Vec<String>>::new();
        for k in 0..count {
            let mut program = Program::random(seed.wrapping_mul(0x9e37_79b9).wrapping_add(k), family);
            program.groups.truncate(1);
            let Some(group) = program.groups.first() else { continue };
            let name = format!("{:?}", group.instruction.code());
            if [false, true].iter().all(|f| kept.get(&(name.clone(), *f)).is_some_and(|v| v.len() > 1)) {
                continue;
            }
            reduce(&mut program);
            let case = program.case();
            let expected = natively(&mut native, &case);
            let rip = expected.state.rip;
            let faulted = rip != origin(case.bits) + case.length as u64;
            let most = if faulted { 1 } else { 2 };
            let vectors = kept.entry((name.clone(), faulted)).or_default();
            if vectors.len() < most {
                vectors.push(to_text(&name, &case, program.undefined(rip), &expected));
            }
        }
        let text: String = kept.into_values().flatten().collect();
        std::fs::write(path, format!("# SPDX-License-Identifier: Apache-2.0\n{text}")).unwrap();
    }

    #[test]
    fn integer_programs_do_what_this_processor_does() {
        run(Family::Integer, 4000);
    }

    #[test]
    fn integer32_programs_do_what_this_processor_does() {
        run(Family::Integer32, 4000);
    }

    #[test]
    fn integer16_programs_do_what_this_processor_does() {
        if has_16_bit_segments() {
            run(Family::Integer16, 4000);
        } else {
            println!("this kernel has no modify_ldt: 16-bit code cannot run natively");
        }
    }

    /// Protected mode natively, real mode on softcpu: as long as nothing faults they do the same.
    #[test]
    fn integer16_programs_do_in_real_mode_what_this_processor_does_in_protected_mode() {
        if !has_16_bit_segments() {
            println!("this kernel has no modify_ldt: 16-bit code cannot run natively");
            return;
        }
        const COUNT: u64 = 4000;
        let (mut soft, mut native) = (Soft::new(), native());
        let programs: Vec<_> = (0..COUNT).map(|k| Program::random(k, Family::Integer16)).collect();
        let programs: Vec<_> = programs.into_iter().filter(Program::runs_in_real_mode).collect();
        let (mut compared, mut failed) = (0, 0);
        for batch in programs.chunks(BATCH) {
            let cases: Vec<_> = batch.iter().map(Program::case).collect();
            let outcomes =
                native.run(&cases).unwrap_or_else(|k| panic!("{} killed the child", describe(&batch[k])));
            for ((program, case), expected) in batch.iter().zip(&cases).zip(&outcomes) {
                let rip = expected.state.rip;
                if rip != origin(case.bits) + case.length as u64 {
                    continue;
                }
                compared += 1;
                let mut found = soft.run_real(case);
                assert_eq!(found.vector, HALTED, "{}", describe(program));
                found.vector = expected.vector;
                let found = differences(&found, expected, program.undefined(rip));
                if !found.is_empty() {
                    failed += 1;
                    println!("{}:\n  {}", describe(program), found.join("\n  "));
                }
            }
        }
        judge("16-bit programs in real mode", failed, compared, &Processor::ALL, RECORD);
        assert!(compared as u64 > COUNT / 4, "only {compared} of {COUNT} came to their end");
    }

    #[test]
    fn simd_programs_do_what_this_processor_does() {
        run(Family::Simd, 4000);
    }

    #[test]
    fn x87_programs_do_what_this_processor_does() {
        run(Family::X87, 4000);
    }

    #[test]
    fn mixed_programs_do_what_this_processor_does() {
        run(Family::All, 4000);
    }

    #[test]
    fn vectors_survive_their_text_form() {
        let program = Program::random(5, Family::All);
        let case = program.case();
        let out = Soft::new().run(&case);
        let text = to_text("x", &case, 0, &out);
        let lines: Vec<_> = text.lines().collect();
        let (again, _, expected) = from_text([lines[1], lines[2], lines[3]]).unwrap();
        assert_eq!(again.code(), case.code());
        assert_eq!(again.state, case.state);
        assert!(differences(&out, &expected, 0).is_empty());
    }
}
