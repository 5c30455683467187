// SPDX-License-Identifier: Apache-2.0
//! #VMEXIT codes and where their intercept bits stand in the VMCB (APM vol. 2, appendices B and C).
//!
//! The intercept vectors are six 32-bit words at VMCB offsets 0x000..0x014. The codes 0x00..0xBF run through their bits
//! in order, so one number is both: word = code / 32, bit = code % 32. Codes from 0x400 on have no bit.

/// Whether the VMCB has an intercept bit for `code`, and where: (word, bit).
pub const fn position(code: u64) -> Option<(usize, u32)> {
    if code < 0xC0 { Some(((code >> 5) as usize, (code & 31) as u32)) } else { None }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:expr;)*) => {
        $($(#[$doc])* pub const $name: u64 = $code;)*
        /// Every named code with its name, in the order of the manual's table.
        pub const NAMES: &[(u64, &str)] = &[$(($name, stringify!($name)),)*];
    };
}

codes! {
    /// Read of CR0; CR1..CR15 follow.
    CR0_READ = 0x00;
    /// Write of CR0; CR1..CR15 follow.
    CR0_WRITE = 0x10;
    /// Read of DR0; DR1..DR15 follow.
    DR0_READ = 0x20;
    /// Write of DR0; DR1..DR15 follow.
    DR0_WRITE = 0x30;
    /// Exception vector 0; vectors 1..31 follow.
    EXCP0 = 0x40;
    /// Physical maskable interrupt.
    INTR = 0x60;
    /// Physical NMI.
    NMI = 0x61;
    /// Physical SMI.
    SMI = 0x62;
    /// Physical INIT.
    INIT = 0x63;
    /// The guest is ready for a virtual interrupt.
    VINTR = 0x64;
    /// Write of CR0 that changes bits other than TS and MP.
    CR0_SEL_WRITE = 0x65;
    /// SIDT.
    IDTR_READ = 0x66;
    /// SGDT.
    GDTR_READ = 0x67;
    /// SLDT.
    LDTR_READ = 0x68;
    /// STR.
    TR_READ = 0x69;
    /// LIDT.
    IDTR_WRITE = 0x6A;
    /// LGDT.
    GDTR_WRITE = 0x6B;
    /// LLDT.
    LDTR_WRITE = 0x6C;
    /// LTR.
    TR_WRITE = 0x6D;
    /// RDTSC.
    RDTSC = 0x6E;
    /// RDPMC.
    RDPMC = 0x6F;
    /// PUSHF.
    PUSHF = 0x70;
    /// POPF.
    POPF = 0x71;
    /// CPUID.
    CPUID = 0x72;
    /// RSM.
    RSM = 0x73;
    /// IRET.
    IRET = 0x74;
    /// INT n.
    SWINT = 0x75;
    /// INVD.
    INVD = 0x76;
    /// PAUSE.
    PAUSE = 0x77;
    /// HLT.
    HLT = 0x78;
    /// INVLPG.
    INVLPG = 0x79;
    /// INVLPGA.
    INVLPGA = 0x7A;
    /// IN, OUT, INS, OUTS to a port marked in the IOPM.
    IOIO = 0x7B;
    /// RDMSR or WRMSR of a register marked in the MSRPM.
    MSR = 0x7C;
    /// Task switch.
    TASK_SWITCH = 0x7D;
    /// Frozen by a legacy x87 error.
    FERR_FREEZE = 0x7E;
    /// Shutdown (triple fault).
    SHUTDOWN = 0x7F;
    /// VMRUN.
    VMRUN = 0x80;
    /// VMMCALL.
    VMMCALL = 0x81;
    /// VMLOAD.
    VMLOAD = 0x82;
    /// VMSAVE.
    VMSAVE = 0x83;
    /// STGI.
    STGI = 0x84;
    /// CLGI.
    CLGI = 0x85;
    /// SKINIT.
    SKINIT = 0x86;
    /// RDTSCP.
    RDTSCP = 0x87;
    /// ICEBP (INT1).
    ICEBP = 0x88;
    /// WBINVD or WBNOINVD.
    WBINVD = 0x89;
    /// MONITOR or MONITORX.
    MONITOR = 0x8A;
    /// MWAIT or MWAITX, unconditionally.
    MWAIT = 0x8B;
    /// MWAIT or MWAITX, when the monitor is armed.
    MWAIT_CONDITIONAL = 0x8C;
    /// XSETBV.
    XSETBV = 0x8D;
    /// RDPRU.
    RDPRU = 0x8E;
    /// Write of EFER, after it finished.
    EFER_WRITE_TRAP = 0x8F;
    /// Write of CR0, after it finished; CR1..CR15 follow.
    CR0_WRITE_TRAP = 0x90;
    /// INVLPGB.
    INVLPGB = 0xA0;
    /// Illegal INVLPGB.
    INVLPGB_ILLEGAL = 0xA1;
    /// INVPCID.
    INVPCID = 0xA2;
    /// MCOMMIT.
    MCOMMIT = 0xA3;
    /// TLBSYNC.
    TLBSYNC = 0xA4;
    /// Bus lock.
    BUSLOCK = 0xA5;
    /// HLT with no virtual interrupt pending.
    IDLE_HLT = 0xA6;
    /// Nested page fault.
    NPF = 0x400;
    /// AVIC: incomplete inter-processor interrupt.
    AVIC_INCOMPLETE_IPI = 0x401;
    /// AVIC: register access that is not accelerated.
    AVIC_NOACCEL = 0x402;
    /// VMGEXIT.
    VMGEXIT = 0x403;
    /// Invalid guest state in the VMCB.
    INVALID = u64::MAX;
}

/// Whether an exit with this code belongs to an intercepted instruction, so that the VMCB gets the next RIP.
///
/// (A software interrupt's exits during its delivery get it too; see [`super::interrupt`].)
pub const fn is_instruction(code: u64) -> bool {
    matches!(code, 0x00..=0x3F | CR0_SEL_WRITE..=TASK_SWITCH | VMRUN..=RDPRU | INVLPGB..=TLBSYNC | IDLE_HLT)
}

/// The name of a code, for messages and statistics.
pub fn name(code: u64) -> &'static str {
    NAMES.iter().rev().find(|(c, _)| *c <= code && code - *c < 32).map_or("INVALID", |(_, n)| n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_stand_where_the_manual_puts_their_intercept_bits() {
        assert_eq!(position(CR0_WRITE + 3), Some((0, 19)));
        assert_eq!(position(DR0_READ + 7), Some((1, 7)));
        assert_eq!(position(EXCP0 + 14), Some((2, 14)));
        assert_eq!(position(SHUTDOWN), Some((3, 31)));
        assert_eq!(position(XSETBV), Some((4, 13)));
        assert_eq!(position(INVPCID), Some((5, 2)));
        assert_eq!(position(NPF), None);
    }

    #[test]
    fn every_code_has_its_name() {
        for (code, text) in NAMES {
            assert_eq!(name(*code), *text);
        }
        assert_eq!(name(EXCP0 + 13), "EXCP0");
    }
}
