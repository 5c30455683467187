// SPDX-License-Identifier: Apache-2.0
//! Processors that softcpu has been compared with, and how strictly a test compares it with the one at hand.
//!
//! softcpu is an AMD processor (APM). On a processor whose peculiarities are known, a difference is a failure. On any
//! other it is printed, past the test harness's capture, and the test goes on; with `SOFTCPU_DIFF_STRICT=1`, which
//! `make differential` sets, it is a failure everywhere.
#![allow(dead_code, reason = "each user takes its part")]

use std::io::Write as _;
use std::sync::OnceLock;

/// A known line of processors. CPUID Fn0000_0001_EAX tells the family (APM vol. 3, appendix E.3.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Processor {
    /// AMD, family 19h (compared with model 11h, Zen 4).
    Amd19h,
    /// AMD, family 1Ah (Zen 5).
    Amd1Ah,
    /// Intel, family 6 (compared with a Xeon that has the SHA extensions).
    Intel6,
}

impl Processor {
    /// All of them.
    pub const ALL: [Processor; 3] = [Processor::Amd19h, Processor::Amd1Ah, Processor::Intel6];

    /// The folder of its golden vectors.
    pub fn folder(self) -> &'static str {
        match self {
            Processor::Amd19h => "amd-family-19h",
            Processor::Amd1Ah => "amd-family-1ah",
            Processor::Intel6 => "intel-family-6",
        }
    }
}

/// Vendor and family of the host's processor.
#[cfg(target_arch = "x86_64")]
pub fn identity() -> (String, u32) {
    use core::arch::x86_64::__cpuid;
    // Before Rust 1.94, `__cpuid` is unsafe.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has CPUID.
    let (zero, one) = unsafe { (__cpuid(0), __cpuid(1)) };
    let name: Vec<u8> = [zero.ebx, zero.edx, zero.ecx].iter().flat_map(|v| v.to_le_bytes()).collect();
    let base = one.eax >> 8 & 0xf;
    let family = if base == 0xf { base + (one.eax >> 20 & 0xff) } else { base };
    (String::from_utf8_lossy(&name).into_owned(), family)
}

/// The host's processor, if it is a known one.
#[cfg(target_arch = "x86_64")]
pub fn host() -> Option<Processor> {
    static HOST: OnceLock<Option<Processor>> = OnceLock::new();
    *HOST.get_or_init(|| match (identity().0.as_str(), identity().1) {
        ("AuthenticAMD", 0x19) => Some(Processor::Amd19h),
        ("AuthenticAMD", 0x1a) => Some(Processor::Amd1Ah),
        ("GenuineIntel", 6) => Some(Processor::Intel6),
        _ => None,
    })
}

/// What follows from `failed` differences out of `count` with the host's processor, for a comparison that has been made
/// with `compared`: nothing, a failed test, or a note on the terminal that says how to record them (`record`).
#[cfg(target_arch = "x86_64")]
pub fn judge(what: &str, failed: usize, count: usize, compared: &[Processor], record: &str) {
    if failed == 0 {
        return;
    }
    let strict = std::env::var_os("SOFTCPU_DIFF_STRICT").is_some_and(|v| v != "0");
    let known = host().is_some_and(|h| compared.contains(&h));
    assert!(!strict && !known, "{what}: {failed} of {count} differ from this processor");
    let (vendor, family) = identity();
    let mut terminal = std::io::stderr();
    let _ = writeln!(
        terminal,
        "note: {what}: {failed} of {count} differ from this processor ({vendor}, family {family:x}h), which softcpu \
         has not been compared with before.\n  `make differential` shows them; to record them: {record}"
    );
}
