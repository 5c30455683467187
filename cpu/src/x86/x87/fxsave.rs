// SPDX-License-Identifier: Apache-2.0
//! FXSAVE and FXRSTOR, MXCSR, and the 512-byte legacy area they share with XSAVE (APM vol. 2, 11.4.4 and 11.5.2).

use super::super::access::Access;
use super::super::op::{Op, Res, Stop};
use super::super::state::{Cpu, cr0, cr4, efer, mxcsr, vector};

/// MXCSR bits that may be written (MXCSR_MASK): DAZ is there, and MM.
pub const MXCSR_MASK: u32 = 0xffff | mxcsr::MM;
/// MXCSR after RESET.
pub const MXCSR_RESET: u32 = 0x1f80;

/// Bytes of the legacy area.
const LEGACY_SIZE: usize = 512;
/// Offsets in the legacy area.
pub const MXCSR_AT: usize = 24;
/// The x87 registers, 16 bytes each.
pub const ST_AT: usize = 32;
/// The XMM registers.
pub const XMM_AT: usize = 160;

impl Cpu {
    /// The x87 part of the legacy area but for MXCSR: bytes 0..24. `wide`: 64-bit pointers (REX.W).
    pub(super) fn legacy_head(&self, wide: bool) -> [u8; 24] {
        let rb = &self.rb;
        let mut out = [0; 24];
        out[0..2].copy_from_slice(&rb.fcw.to_le_bytes());
        out[2..4].copy_from_slice(&rb.fsw.to_le_bytes());
        out[4] = self.x87_abridged_tags();
        out[6..8].copy_from_slice(&(rb.fop & 0x7ff).to_le_bytes());
        let pointer = |offset: u64, selector: u16| {
            if wide { offset } else { offset & 0xffff_ffff | u64::from(selector) << 32 }
        };
        out[8..16].copy_from_slice(&pointer(rb.fip, rb.fcs).to_le_bytes());
        out[16..24].copy_from_slice(&pointer(rb.fdp, rb.fds).to_le_bytes());
        out
    }

    /// ST0..ST7, 16 bytes each.
    pub(super) fn legacy_registers(&self) -> [u8; 128] {
        let mut out = [0; 128];
        for (i, bytes) in out.chunks_exact_mut(16).enumerate() {
            bytes.copy_from_slice(&self.st(i).to_bits().to_le_bytes());
        }
        out
    }

    /// How many XMM registers the mode reaches.
    pub(super) fn vector_registers(&self) -> usize {
        if self.code_size == 8 { 16 } else { 8 }
    }

    /// XMM registers (only the first [`Cpu::vector_registers`] count).
    pub(super) fn legacy_vectors(&self) -> [u8; 256] {
        let mut out = [0; 256];
        for (bytes, ymm) in out.chunks_exact_mut(16).zip(&self.rb.ymm) {
            bytes[..8].copy_from_slice(&ymm[0].to_le_bytes());
            bytes[8..].copy_from_slice(&ymm[1].to_le_bytes());
        }
        out
    }

    /// Loads the x87 state from a legacy area of at least 160 bytes.
    pub(super) fn set_legacy_x87(&mut self, area: &[u8], wide: bool) {
        let half = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
        let pointer = |at: usize| {
            let low = u64::from(half(at)) | u64::from(half(at + 2)) << 16;
            let high = u64::from(half(at + 4)) | u64::from(half(at + 6)) << 16;
            if wide { (low | high << 32, 0) } else { (low, high as u16) }
        };
        let (fip, fcs) = pointer(8);
        let (fdp, fds) = pointer(16);
        self.set_fcw(half(0));
        let rb = &mut self.rb;
        rb.fsw = half(2);
        rb.fop = half(6) & 0x7ff;
        (rb.fip, rb.fcs, rb.fdp, rb.fds) = (fip, fcs, fdp, fds);
        for i in 0..8 {
            self.set_st(i, super::moves::from_image(&area[ST_AT + 16 * i..][..10]));
        }
        self.set_x87_abridged_tags(area[4]);
        self.x87_summarize();
    }

    /// Loads the XMM registers that the mode reaches from the 256 bytes of their area.
    pub(super) fn set_legacy_vectors(&mut self, area: &[u8]) {
        let count = self.vector_registers();
        for (bytes, ymm) in area.chunks_exact(16).zip(&mut self.rb.ymm).take(count) {
            let mut image = [0; 16];
            image.copy_from_slice(bytes);
            let v = u128::from_le_bytes(image);
            (ymm[0], ymm[1]) = (v as u64, (v >> 64) as u64);
        }
    }

    /// Linear address of an operand of `size` bytes that is no power of two: segment checks, then #AC(0) unless it is on
    /// `align` bytes, where alignment is checked.
    pub(super) fn aligned_operand(
        &mut self,
        op: &Op,
        size: usize,
        align: u64,
        access: Access,
    ) -> Result<u64, Stop> {
        let linear = self.lin(op, size, access)?;
        if self.mmu == 3 && linear & (align - 1) != 0 {
            return Err(self.fault(vector::AC, Some(0)));
        }
        Ok(linear)
    }

    /// Linear address of a save area of `size` bytes: #GP(0) unless it is on `align` bytes, then segment checks. Where
    /// alignment is checked, processors raise #AC(0) for one that isn't even on 4.
    pub(super) fn save_area(
        &mut self,
        op: &Op,
        size: usize,
        align: u64,
        access: Access,
    ) -> Result<u64, Stop> {
        let place = self.ea(op).wrapping_add(self.seg[op.seg as usize % 6].base);
        if place & (align - 1) != 0 && (self.mmu != 3 || place & 3 == 0) {
            return Err(self.gp(0));
        }
        self.aligned_operand(op, size, 4, access)
    }

    /// Whether FXSAVE and FXRSTOR leave the XMM registers out (EFER.FFXSR, 64-bit mode, CPL 0).
    fn fast_fxsave(&self) -> bool {
        self.efer & efer::FFXSR != 0 && self.cpl == 0 && self.code_size == 8
    }
}

/// FXSAVE; `WIDE` is FXSAVE64. Bytes that hold no register are left as they are.
pub fn fxsave<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_available()?;
    let linear = cpu.save_area(op, LEGACY_SIZE, 16, Access::Write)?;
    // The last byte is looked at first, although nothing is written there.
    cpu.probe_write(op.seg, linear.wrapping_add(LEGACY_SIZE as u64 - 1), 1)?;
    let mut area = [0; XMM_AT + 256];
    area[..24].copy_from_slice(&cpu.legacy_head(WIDE));
    area[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&cpu.rb.mxcsr.to_le_bytes());
    area[MXCSR_AT + 4..MXCSR_AT + 8].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    area[ST_AT..XMM_AT].copy_from_slice(&cpu.legacy_registers());
    area[XMM_AT..].copy_from_slice(&cpu.legacy_vectors());
    let vectors = if cpu.fast_fxsave() { 0 } else { cpu.vector_registers() };
    cpu.write_bytes(cpu.mmu, op.seg, linear, &area[..XMM_AT + 16 * vectors])
}

/// FXRSTOR; `WIDE` is FXRSTOR64. #GP(0) for reserved bits of MXCSR.
pub fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_available()?;
    let linear = cpu.save_area(op, LEGACY_SIZE, 16, Access::Read)?;
    cpu.read_bytes(cpu.mmu, op.seg, linear.wrapping_add(LEGACY_SIZE as u64 - 1), &mut [0])?;
    let mut area = [0; XMM_AT + 256];
    cpu.read_bytes(cpu.mmu, op.seg, linear, &mut area)?;
    let mxcsr = mxcsr_of(&area);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.set_legacy_x87(&area, WIDE);
    cpu.rb.mxcsr = mxcsr;
    if !cpu.fast_fxsave() {
        cpu.set_legacy_vectors(&area[XMM_AT..]);
    }
    Ok(())
}

/// The MXCSR field of a legacy area.
pub fn mxcsr_of(area: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&area[MXCSR_AT..MXCSR_AT + 4]);
    u32::from_le_bytes(bytes)
}

fn sse_available(cpu: &mut Cpu) -> Res {
    if cpu.cr0 & cr0::EM != 0 || cpu.cr4 & cr4::OSFXSR == 0 {
        return Err(cpu.ud());
    }
    if cpu.cr0 & cr0::TS != 0 {
        return Err(cpu.nm());
    }
    Ok(())
}

/// LDMXCSR.
pub fn ldmxcsr(cpu: &mut Cpu, op: &Op) -> Res {
    sse_available(cpu)?;
    let v = cpu.load::<u32>(op)?;
    if v & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.rb.mxcsr = v;
    Ok(())
}

/// STMXCSR.
pub fn stmxcsr(cpu: &mut Cpu, op: &Op) -> Res {
    sse_available(cpu)?;
    cpu.store(op, cpu.rb.mxcsr)
}
