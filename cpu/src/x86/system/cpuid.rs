// SPDX-License-Identifier: Apache-2.0
//! CPUID: what this silicon is (APM vol. 3, appendices D and E).
//!
//! A hypervisor starts from these leaves; topology, APIC and paravirtual leaves are its own affair.

use crate::x86::x87::xsave::{PKRU_AT, PKRU_SIZE};
use crate::x86::x87::{SUPPORTED_XCR0, compacted_size, xsave_size};

/// Highest standard and extended leaf.
const MAX_STANDARD: u32 = 0xD;
const MAX_EXTENDED: u32 = 0x8000_0022;
/// Family 17h, model 31h, stepping 0.
const SIGNATURE: u32 = 0x0083_0F10;
const BRAND: &[u8; 48] = b"softkvm software CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

const fn bits(list: &[u32]) -> u32 {
    let mut v = 0;
    let mut n = 0;
    while n < list.len() {
        v |= 1 << list[n];
        n += 1;
    }
    v
}

/// Fn0000_0001_ECX: SSE3 PCLMULQDQ MONITOR SSSE3 CX16 PCID SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE RDRAND.
const LEAF1_ECX: u32 = bits(&[0, 1, 3, 9, 13, 17, 19, 20, 22, 23, 25, 26, 30]);
/// FPU VME DE PSE TSC MSR PAE MCE CX8 APIC MTRR PGE MCA CMOV PAT PSE36 MMX FXSR: in both EDX words.
const COMMON_EDX: u32 = bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24]);
/// Fn0000_0001_EDX: those and SEP CLFSH SSE SSE2.
const LEAF1_EDX: u32 = COMMON_EDX | bits(&[11, 19, 25, 26]);
/// Fn0000_0007_EBX_x0: FSGSBASE BMI1 SMEP BMI2 ERMS INVPCID RDSEED ADX SMAP CLFLUSHOPT CLWB SHA.
const LEAF7_EBX: u32 = bits(&[0, 3, 7, 8, 9, 10, 18, 19, 20, 23, 24, 29]);
/// Fn0000_0007_ECX_x0: UMIP PKU RDPID.
const LEAF7_ECX: u32 = bits(&[2, 3, 22]);
/// Fn0000_0007_EDX_x0: FSRM.
const LEAF7_EDX: u32 = bits(&[4]);
/// Fn8000_0001_ECX: LAHF SVM AltMovCr8 ABM MisAlignSse 3DNowPrefetch PerfCtrExtCore.
const EXT1_ECX: u32 = bits(&[0, 2, 4, 5, 7, 8, 23]);
/// Fn8000_0001_EDX: the common ones and SYSCALL NX MmxExt Page1GB RDTSCP LM.
const EXT1_EDX: u32 = COMMON_EDX | bits(&[11, 20, 22, 26, 27, 29]);
/// Fn8000_0008_EBX: RstrFpErrPtrs WBNOINVD.
const EXT8_EBX: u32 = bits(&[2, 9]);
/// Fn8000_000A_EDX: NP NRIPS TscRateMsr FlushByAsid DecodeAssists PauseFilter PauseFilterThreshold AVIC x2AVIC
/// BusLockThreshold IdleHltIntercept.
const SVM_EDX: u32 = bits(&[0, 3, 4, 6, 7, 10, 12, 13, 18, 29, 30]);
/// Fn8000_0021_EAX: NoNestedDataBp LFenceAlwaysSerializing NullSelectClearsBase.
const EXT21_EAX: u32 = bits(&[0, 2, 6]);
/// ASIDs.
const ASIDS: u32 = 0x8000;

fn brand(part: usize) -> [u32; 4] {
    core::array::from_fn(|n| {
        let at = part * 16 + n * 4;
        u32::from_le_bytes([BRAND[at], BRAND[at + 1], BRAND[at + 2], BRAND[at + 3]])
    })
}

/// EAX, EBX, ECX, EDX of a leaf. What depends on a processor's state (OSXSAVE, the APIC ID, the XSAVE area's size in
/// force) is as after reset.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    const VENDOR: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
    match leaf {
        0 => [MAX_STANDARD, VENDOR[0], VENDOR[1], VENDOR[2]],
        // CLFLUSH line of 8 quadwords, one logical processor.
        1 => [SIGNATURE, 0x0001_0800, LEAF1_ECX, LEAF1_EDX],
        // Monitor lines of 64 bytes; extensions enumerated, interrupts break.
        5 => [64, 64, 3, 0x11],
        // ARAT.
        6 => [4, 0, 0, 0],
        7 if subleaf == 0 => [0, LEAF7_EBX, LEAF7_ECX, LEAF7_EDX],
        0xD => match subleaf {
            0 => [SUPPORTED_XCR0 as u32, xsave_size(1) as u32, xsave_size(SUPPORTED_XCR0) as u32, 0],
            // XSAVEOPT XSAVEC XGETBV(1) XSAVES.
            1 => [0xf, compacted_size(1) as u32, 0, 0],
            9 => [PKRU_SIZE as u32, PKRU_AT as u32, 0, 0],
            _ => [0; 4],
        },
        0x8000_0000 => [MAX_EXTENDED, VENDOR[0], VENDOR[1], VENDOR[2]],
        0x8000_0001 => [SIGNATURE, 0, EXT1_ECX, EXT1_EDX],
        0x8000_0002..=0x8000_0004 => brand((leaf - 0x8000_0002) as usize),
        // 32 KiB, 8 ways, one line per tag, 64 bytes; second level 512 KiB.
        0x8000_0005 => [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140],
        0x8000_0006 => [0, 0, 0x0200_6140, 0],
        // Invariant TSC.
        0x8000_0007 => [0, 0, 0, 1 << 8],
        // 48-bit physical, 48-bit linear addresses.
        0x8000_0008 => [0x3030, EXT8_EBX, 0, 0],
        0x8000_000A => [1, ASIDS, 0, SVM_EDX],
        0x8000_0021 => [EXT21_EAX, 0, 0, 0],
        // PerfMonV2, six core counters.
        0x8000_0022 => [1, 6, 0, 0],
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vendor_and_brand_read_as_text() {
        let [_, b, c, d] = cpuid(0, 0);
        let text: Vec<u8> = [b, d, c].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(&text, b"AuthenticAMD");
        let text: Vec<u8> =
            (2..5).flat_map(|n| cpuid(0x8000_0000 + n, 0)).flat_map(|v| v.to_le_bytes()).collect();
        assert!(text.starts_with(b"softkvm software CPU\0"));
    }

    #[test]
    fn protection_keys_and_their_component_are_reported_as_on_amd_processors() {
        assert_eq!(cpuid(7, 0)[2] >> 3 & 1, 1);
        assert_eq!(cpuid(0xD, 0), [0x203, 0x240, 0x988, 0]);
        assert_eq!(cpuid(0xD, 1), [0xf, 0x240, 0, 0]);
        assert_eq!(cpuid(0xD, 9), [8, 0x980, 0, 0]);
    }

    #[test]
    fn unknown_leaves_are_zero() {
        assert_eq!(cpuid(0x4000_0000, 0), [0; 4]);
        assert_eq!(cpuid(7, 1), [0; 4]);
    }
}
