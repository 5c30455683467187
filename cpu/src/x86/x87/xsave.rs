// SPDX-License-Identifier: Apache-2.0
//! XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS and the rules of XCR0 (APM vol. 2, 11.5; SDM vol. 1, chapter 13).
//!
//! There are no supervisor components: XSS is zero, and XSAVES and XRSTORS do what their user forms do, at CPL 0.

use super::super::access::Access;
use super::super::op::{Op, Res, Stop};
use super::super::state::{Cpu, cr0, cr4, reg};
use super::fxsave::{MXCSR_AT, MXCSR_MASK, MXCSR_RESET, ST_AT, XMM_AT, mxcsr_of};
use super::stack::FCW_RESET;

/// State components, as bits of XCR0 and XSTATE_BV.
pub mod component {
    #![allow(missing_docs)]
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    /// Upper halves of the YMM registers.
    pub const AVX: u64 = 1 << 2;
    /// PKRU.
    pub const PKRU: u64 = 1 << 9;
}

/// The components that XCR0 may enable.
pub const SUPPORTED_XCR0: u64 = component::X87 | component::SSE | component::PKRU;

/// Offset of the XSAVE header.
const HEADER: usize = 512;
/// Offset of the extended region; the AVX component is its first one in either format.
const EXTENDED: usize = 576;
/// Size of the AVX component.
const AVX_SIZE: usize = 256;
/// Offset of PKRU in the standard format, where AMD's processors have it (Intel's leave room for MPX: A80h).
pub const PKRU_AT: usize = 0x980;
/// Size of the PKRU component, of which the first four bytes are the register.
pub const PKRU_SIZE: usize = 8;
/// XCOMP_BV bit of the compacted format.
const COMPACTED: u64 = 1 << 63;

/// Whether XSETBV may write `value` to XCR0: only supported components, always x87, AVX not without SSE.
pub const fn validate_xcr0(value: u64) -> bool {
    value & !SUPPORTED_XCR0 == 0
        && value & component::X87 != 0
        && (value & component::AVX == 0 || value & component::SSE != 0)
}

/// Size in bytes of the XSAVE area in the standard format for the components in `mask` (CPUID leaf 0xD).
pub const fn xsave_size(mask: u64) -> usize {
    if mask & component::PKRU != 0 {
        PKRU_AT + PKRU_SIZE
    } else if mask & component::AVX != 0 {
        EXTENDED + AVX_SIZE
    } else {
        EXTENDED
    }
}

/// The same in the compacted format; no component asks for alignment.
pub const fn compacted_size(mask: u64) -> usize {
    compacted_pkru(mask) + if mask & component::PKRU != 0 { PKRU_SIZE } else { 0 }
}

/// Offset of PKRU in the compacted format with the components in `layout`.
const fn compacted_pkru(layout: u64) -> usize {
    EXTENDED + if layout & component::AVX != 0 { AVX_SIZE } else { 0 }
}

impl Cpu {
    /// XINUSE: the components that are not in their initial state.
    pub fn xinuse(&self) -> u64 {
        let rb = &self.rb;
        let pointers = rb.fop | rb.fcs | rb.fds;
        let x87 = rb.fcw != FCW_RESET
            || rb.fsw != 0
            || rb.ftw != 0xffff
            || u64::from(pointers) | rb.fip | rb.fdp != 0
            || rb.st.iter().any(|v| v[0] | v[1] & 0xffff != 0);
        let vectors = self.vector_registers();
        let sse = rb.ymm[..vectors].iter().any(|v| v[0] | v[1] != 0);
        let avx = rb.ymm[..vectors].iter().any(|v| v[2] | v[3] != 0);
        u64::from(x87) | u64::from(sse) << 1 | u64::from(avx) << 2 | u64::from(rb.pkru != 0) << 9
    }

    /// #UD, #NM, #GP(0) for the supervisor's forms elsewhere, and the mask of requested components: EDX:EAX and XCR0.
    fn xsave_enter(&mut self, supervisor: bool) -> Result<u64, Stop> {
        if self.cr4 & cr4::OSXSAVE == 0 {
            return Err(self.ud());
        }
        if supervisor {
            self.privileged()?;
        }
        if self.cr0 & cr0::TS != 0 {
            return Err(self.nm());
        }
        let gpr = &self.rb.gpr;
        Ok((gpr[reg::RAX] & 0xffff_ffff | gpr[reg::RDX] << 32) & self.rb.xcr0)
    }

    fn write_part(&mut self, op: &Op, linear: u64, at: usize, bytes: &[u8]) -> Res {
        self.write_bytes(self.mmu, op.seg, linear.wrapping_add(at as u64), bytes)
    }

    /// Writes the components of `mask`, PKRU at `pkru_at`, and MXCSR with its mask if `mxcsr`.
    fn write_components(
        &mut self,
        op: &Op,
        linear: u64,
        mask: u64,
        pkru_at: usize,
        mxcsr: bool,
        wide: bool,
    ) -> Res {
        if mask & component::X87 != 0 {
            let head = self.legacy_head(wide);
            self.write_part(op, linear, 0, &head)?;
            let registers = self.legacy_registers();
            self.write_part(op, linear, ST_AT, &registers)?;
        }
        if mxcsr {
            let both = u64::from(self.rb.mxcsr) | u64::from(MXCSR_MASK) << 32;
            self.write_part(op, linear, MXCSR_AT, &both.to_le_bytes())?;
        }
        if mask & component::SSE != 0 {
            let vectors = self.legacy_vectors();
            let size = 16 * self.vector_registers();
            self.write_part(op, linear, XMM_AT, &vectors[..size])?;
        }
        if mask & component::AVX != 0 {
            let mut upper = [0; AVX_SIZE];
            for (bytes, ymm) in upper.chunks_exact_mut(16).zip(&self.rb.ymm) {
                bytes[..8].copy_from_slice(&ymm[2].to_le_bytes());
                bytes[8..].copy_from_slice(&ymm[3].to_le_bytes());
            }
            let size = 16 * self.vector_registers();
            self.write_part(op, linear, EXTENDED, &upper[..size])?;
        }
        if mask & component::PKRU != 0 {
            let both = u64::from(self.rb.pkru);
            self.write_part(op, linear, pkru_at, &both.to_le_bytes())?;
        }
        Ok(())
    }

    fn reset_x87_registers(&mut self) {
        self.x87_reset();
        self.rb.st = [[0; 2]; 8];
    }
}

/// XSAVE, and XSAVEOPT (`OPT`), which leaves out components in their initial state. `WIDE`: the form with REX.W.
pub fn xsave<const WIDE: bool, const OPT: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    let mask = cpu.xsave_enter(false)?;
    let size = xsave_size(mask);
    let linear = cpu.save_area(op, size, 64, Access::Write)?;
    let mut old = [0; 8];
    let in_use = cpu.xinuse();
    let written = if OPT { mask & in_use } else { mask };
    cpu.probe_write(op.seg, linear, xsave_size(written))?;
    cpu.read_bytes(cpu.mmu, op.seg, linear.wrapping_add(HEADER as u64), &mut old)?;
    let mxcsr = mask & (component::SSE | component::AVX) != 0;
    cpu.write_components(op, linear, written, PKRU_AT, mxcsr, WIDE)?;
    let header = u64::from_le_bytes(old) & !mask | in_use & mask;
    cpu.write_part(op, linear, HEADER, &header.to_le_bytes())
}

/// XSAVEC and XSAVES (`SUPERVISOR`): the compacted format. `WIDE`: the form with REX.W.
pub fn xsavec<const WIDE: bool, const SUPERVISOR: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    let mask = cpu.xsave_enter(SUPERVISOR)?;
    let size = compacted_size(mask);
    let linear = cpu.save_area(op, size, 64, Access::Write)?;
    cpu.probe_write(op.seg, linear, size)?;
    let mut in_use = cpu.xinuse();
    if cpu.rb.mxcsr != MXCSR_RESET {
        in_use |= component::SSE;
    }
    let written = mask & in_use;
    let mxcsr = written & component::SSE != 0;
    cpu.write_components(op, linear, written, compacted_pkru(mask), mxcsr, WIDE)?;
    let header = u128::from(written) | u128::from(mask | COMPACTED) << 64;
    cpu.write_part(op, linear, HEADER, &header.to_le_bytes())
}

/// XRSTOR in both formats, XRSTORS (`SUPERVISOR`) in the compacted one, with the header checks that raise #GP(0).
/// `WIDE`: the form with REX.W.
pub fn xrstor<const WIDE: bool, const SUPERVISOR: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    let mask = cpu.xsave_enter(SUPERVISOR)?;
    let linear = cpu.save_area(op, EXTENDED, 64, Access::Read)?;
    let mut area = [0; EXTENDED + AVX_SIZE];
    cpu.read_bytes(cpu.mmu, op.seg, linear, &mut area[..EXTENDED])?;
    let word = |i: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&area[HEADER + 8 * i..][..8]);
        u64::from_le_bytes(bytes)
    };
    let (state, layout) = (word(0), word(1));
    let compacted = layout & COMPACTED != 0;
    let valid = if compacted {
        let components = layout & !COMPACTED;
        components & !cpu.rb.xcr0 == 0 && state & !components == 0 && (2..8).all(|i| word(i) == 0)
    } else {
        !SUPERVISOR && state & !cpu.rb.xcr0 == 0 && layout == 0 && word(2) == 0
    };
    let mxcsr = mxcsr_of(&area);
    // The standard format loads MXCSR whenever SSE or AVX is asked for, the compacted one as part of SSE.
    let load_mxcsr = if compacted {
        mask & state & component::SSE != 0
    } else {
        mask & (component::SSE | component::AVX) != 0
    };
    if !valid || (load_mxcsr && mxcsr & !MXCSR_MASK != 0) {
        return Err(cpu.gp(0));
    }
    let load = mask & state;
    if load & component::AVX != 0 {
        let upper = &mut area[EXTENDED..];
        cpu.lin(op, EXTENDED + AVX_SIZE, Access::Read)?;
        cpu.read_bytes(cpu.mmu, op.seg, linear.wrapping_add(EXTENDED as u64), upper)?;
    }
    let mut pkru = [0; 4];
    if load & component::PKRU != 0 {
        let at = if compacted { compacted_pkru(layout) } else { PKRU_AT };
        cpu.lin(op, at + PKRU_SIZE, Access::Read)?;
        cpu.read_bytes(cpu.mmu, op.seg, linear.wrapping_add(at as u64), &mut pkru)?;
    }
    if load & component::X87 != 0 {
        cpu.set_legacy_x87(&area, WIDE);
    } else if mask & component::X87 != 0 {
        cpu.reset_x87_registers();
    }
    if load_mxcsr {
        cpu.rb.mxcsr = mxcsr;
    } else if mask & component::SSE != 0 {
        cpu.rb.mxcsr = MXCSR_RESET;
    }
    if load & component::SSE != 0 {
        cpu.set_legacy_vectors(&area[XMM_AT..XMM_AT + 256]);
    } else if mask & component::SSE != 0 {
        cpu.set_legacy_vectors(&[0; 256]);
    }
    if mask & component::AVX != 0 {
        let count = cpu.vector_registers();
        for (i, ymm) in cpu.rb.ymm.iter_mut().enumerate().take(count) {
            let mut bytes = [0; 16];
            if load & component::AVX != 0 {
                bytes.copy_from_slice(&area[EXTENDED + 16 * i..][..16]);
            }
            let v = u128::from_le_bytes(bytes);
            (ymm[2], ymm[3]) = (v as u64, (v >> 64) as u64);
        }
    }
    // Whatever CR4.PKE says (SDM vol. 1, 13.5.7).
    if mask & component::PKRU != 0 && cpu.write_pkru(u32::from_le_bytes(pkru)) {
        return Err(cpu.end_block(op));
    }
    Ok(())
}
