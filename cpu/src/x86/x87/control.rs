// SPDX-License-Identifier: Apache-2.0
//! x87 control: control and status words, environment and state images (APM vol. 2, 11.4.1; APM vol. 5).

use super::super::access::Access;
use super::super::op::{Op, Res};
use super::super::state::{Cpu, cr0, reg};
use super::moves::{from_image, image};
use super::stack::{EMPTY, sw};
use crate::float::{Class, F80, f80_class};

/// WAIT: #NM only with both CR0.MP and CR0.TS, then a pending exception.
pub fn wait(cpu: &mut Cpu, _: &Op) -> Res {
    if cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return Err(cpu.nm());
    }
    if cpu.rb.fsw & sw::ES != 0 {
        return Err(cpu.x87_pending());
    }
    Ok(())
}

/// FNOP.
pub fn no_operation(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    Ok(())
}

/// FNENI, FNDISI, FNSETPM: nothing since the 387.
pub fn obsolete(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.x87_available()
}

/// FNINIT.
pub fn initialize(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.x87_available()?;
    cpu.x87_reset();
    Ok(())
}

/// FNCLEX.
pub fn clear_exceptions(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.x87_available()?;
    cpu.rb.fsw &= !(sw::B | sw::ES | sw::SF | 0x3f);
    Ok(())
}

/// FLDCW.
pub fn load_control(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    let v = cpu.load::<u16>(op)?;
    cpu.set_fcw(v);
    cpu.x87_summarize();
    Ok(())
}

/// FNSTCW.
pub fn store_control(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_available()?;
    cpu.store(op, cpu.rb.fcw)
}

/// FNSTSW m16.
pub fn store_status(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_available()?;
    cpu.store(op, cpu.rb.fsw)
}

/// FNSTSW AX.
pub fn store_status_ax(cpu: &mut Cpu, _: &Op) -> Res {
    cpu.x87_available()?;
    let v = cpu.rb.fsw;
    cpu.set_reg::<u16>(reg::RAX as u8 * 8, v);
    Ok(())
}

impl Cpu {
    /// The tag word with the contents of the registers classified, as FNSTENV writes it.
    pub fn x87_full_tags(&self) -> u16 {
        (0..8).fold(0, |tags, i| {
            let tag = if self.rb.ftw >> (2 * i) & 3 == EMPTY {
                EMPTY
            } else {
                let [mant, se] = self.rb.st[i];
                match f80_class(F80 { mant, se: se as u16 }) {
                    Class::Normal => 0,
                    Class::Zero => 1,
                    _ => 2,
                }
            };
            tags | tag << (2 * i)
        })
    }

    /// The tag word of FXSAVE: one bit per physical register, set if it isn't empty.
    pub fn x87_abridged_tags(&self) -> u8 {
        (0..8).fold(0, |tags, i| tags | u8::from(self.rb.ftw >> (2 * i) & 3 != EMPTY) << i)
    }

    /// Sets the tags from FXSAVE's abridged form.
    pub fn set_x87_abridged_tags(&mut self, tags: u8) {
        self.rb.ftw = (0..8).fold(0, |full, i| full | if tags >> i & 1 == 0 { EMPTY << (2 * i) } else { 0 });
    }

    /// The environment as `WIDE` (28 bytes) or narrow (14 bytes) image.
    fn x87_environment(&self, wide: bool) -> [u8; 28] {
        let rb = &self.rb;
        let linear = |selector: u16, offset: u64| (u32::from(selector) << 4).wrapping_add(offset as u32);
        let real = self.real_or_v86();
        let (ip, dp) = if real {
            (linear(rb.fcs, rb.fip), linear(rb.fds, rb.fdp))
        } else {
            (rb.fip as u32, rb.fdp as u32)
        };
        let fop = rb.fop & 0x7ff;
        let mut out = [0; 28];
        if wide {
            let high = 0xffff_0000;
            let words = if real {
                [ip & 0xffff | high, (ip >> 16) << 12 | u32::from(fop), dp & 0xffff | high, (dp >> 16) << 12]
            } else {
                [ip, u32::from(rb.fcs) | u32::from(fop) << 16, dp, u32::from(rb.fds) | high]
            };
            let head = [rb.fcw, rb.fsw, self.x87_full_tags()].map(|v| u32::from(v) | high);
            for (bytes, word) in out.chunks_exact_mut(4).zip(head.into_iter().chain(words)) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        } else {
            let words = if real {
                [ip as u16, (ip >> 16 << 12) as u16 | fop, dp as u16, (dp >> 16 << 12) as u16]
            } else {
                [ip as u16, rb.fcs, dp as u16, rb.fds]
            };
            let head = [rb.fcw, rb.fsw, self.x87_full_tags()];
            for (bytes, word) in out.chunks_exact_mut(2).zip(head.into_iter().chain(words)) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
        out
    }

    fn set_x87_environment(&mut self, bytes: &[u8], wide: bool) {
        let step = if wide { 4 } else { 2 };
        let mut words = [0u32; 7];
        for (word, b) in words.iter_mut().zip(bytes.chunks_exact(step)) {
            let low = u32::from(u16::from_le_bytes([b[0], b[1]]));
            let high = if wide { u32::from(u16::from_le_bytes([b[2], b[3]])) } else { 0 };
            *word = low | high << 16;
        }
        let real = self.real_or_v86();
        self.set_fcw(words[0] as u16);
        let rb = &mut self.rb;
        rb.fsw = words[1] as u16;
        rb.ftw = words[2] as u16;
        if real {
            // The linear address is kept as an offset; that gives the same image back.
            rb.fip = u64::from(words[3] & 0xffff | (words[4] >> 12) << 16);
            rb.fdp = u64::from(words[5] & 0xffff | (words[6] >> 12) << 16);
            (rb.fcs, rb.fds) = (0, 0);
            rb.fop = words[4] as u16 & 0x7ff;
        } else {
            (rb.fip, rb.fcs) = (words[3].into(), words[4] as u16);
            (rb.fdp, rb.fds) = (words[5].into(), words[6] as u16);
            rb.fop = if wide { (words[4] >> 16) as u16 & 0x7ff } else { 0 };
        }
        self.x87_summarize();
    }
}

const fn environment_size(wide: bool) -> usize {
    if wide { 28 } else { 14 }
}

/// Alignment of the images that start with an environment (SDM vol. 3, interrupt 17).
const fn environment_align(wide: bool) -> u64 {
    if wide { 4 } else { 2 }
}

/// FNSTENV; masks all exceptions afterwards.
pub fn store_environment<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_available()?;
    let bytes = cpu.x87_environment(WIDE);
    let size = environment_size(WIDE);
    let linear = cpu.aligned_operand(op, size, environment_align(WIDE), Access::Write)?;
    cpu.write_bytes(cpu.mmu, op.seg, linear, &bytes[..size])?;
    cpu.rb.fcw |= 0x3f;
    cpu.x87_summarize();
    Ok(())
}

/// FLDENV.
pub fn load_environment<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    let size = environment_size(WIDE);
    let linear = cpu.aligned_operand(op, size, environment_align(WIDE), Access::Read)?;
    let mut bytes = [0; 28];
    cpu.read_bytes(cpu.mmu, op.seg, linear, &mut bytes[..size])?;
    cpu.set_x87_environment(&bytes[..size], WIDE);
    Ok(())
}

/// FNSAVE: environment and registers, then FNINIT.
pub fn save<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_available()?;
    let head = environment_size(WIDE);
    let mut bytes = [0; 108];
    bytes[..head].copy_from_slice(&cpu.x87_environment(WIDE)[..head]);
    for (i, out) in bytes[head..].chunks_exact_mut(10).take(8).enumerate() {
        out.copy_from_slice(&image(cpu.st(i)));
    }
    let linear = cpu.aligned_operand(op, head + 80, environment_align(WIDE), Access::Write)?;
    cpu.write_bytes(cpu.mmu, op.seg, linear, &bytes[..head + 80])?;
    cpu.x87_reset();
    Ok(())
}

/// FRSTOR.
pub fn restore<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    let head = environment_size(WIDE);
    let linear = cpu.aligned_operand(op, head + 80, environment_align(WIDE), Access::Read)?;
    let mut bytes = [0; 108];
    cpu.read_bytes(cpu.mmu, op.seg, linear, &mut bytes[..head + 80])?;
    cpu.set_x87_environment(&bytes[..head], WIDE);
    let tags = cpu.rb.ftw;
    for (i, b) in bytes[head..head + 80].chunks_exact(10).enumerate() {
        cpu.set_st(i, from_image(b));
    }
    cpu.rb.ftw = tags;
    Ok(())
}
