// SPDX-License-Identifier: Apache-2.0
//! `decode` and `Instruction`: the crate's decoder, for KVM's emulator.

use iced_x86::{
    DecoderError, Formatter, Instruction, InstructionInfoFactory, Mnemonic, NasmFormatter, OpAccess, OpKind,
    Register,
};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use softcpu::x86::decode::{amend, decoder};

/// One decoded instruction.
#[pyclass(frozen, name = "Instruction", module = "softkvm._softcpu")]
pub struct PyInstruction {
    i: Instruction,
    address_size: u32,
}

/// Address size in bytes (APM vol. 3, 1.2.3): that of the mode, or the other one with a 67 prefix. For instructions that
/// have no operand in memory, as LOOP, the decoder doesn't say.
fn address_size(code: &[u8], bitness: u32) -> u32 {
    let prefix = |b: &u8| match b {
        0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3 => true,
        _ => bitness == 64 && b & 0xf0 == 0x40,
    };
    let other = code.iter().take_while(|b| prefix(b)).any(|&b| b == 0x67);
    match (bitness, other) {
        (64, false) => 8,
        (64, true) | (32, false) | (16, true) => 4,
        _ => 2,
    }
}

/// Decodes the instruction at the start of `code`.
#[pyfunction]
pub fn decode(code: &[u8], bitness: u32, ip: u64) -> PyResult<PyInstruction> {
    if !matches!(bitness, 16 | 32 | 64) {
        return Err(PyValueError::new_err(format!("bitness {bitness}: expected 16, 32 or 64")));
    }
    let code = &code[..code.len().min(15)];
    let mut d = decoder(bitness, code, ip);
    let mut i = d.decode();
    amend(&mut i, code);
    if i.is_invalid() {
        let why = match d.last_error() {
            DecoderError::NoMoreBytes => "truncated",
            _ => "not an instruction",
        };
        return Err(PyValueError::new_err(format!("{why}: {} bytes at ip {ip:#x}", code.len())));
    }
    Ok(PyInstruction { i, address_size: address_size(code, bitness) })
}

fn name(r: Register) -> Option<String> {
    (r != Register::None).then(|| format!("{r:?}").to_lowercase())
}

impl PyInstruction {
    fn check(&self, n: u32) -> PyResult<u32> {
        if n < self.i.op_count() {
            Ok(n)
        } else {
            Err(PyIndexError::new_err(format!("operand {n} of {}", self.i.op_count())))
        }
    }
}

#[pymethods]
impl PyInstruction {
    #[getter]
    fn length(&self) -> usize {
        self.i.len()
    }

    #[getter]
    fn mnemonic(&self) -> String {
        let m: Mnemonic = self.i.mnemonic();
        format!("{m:?}").to_lowercase()
    }

    /// iced's name of the exact encoding, e.g. `Mov_rm32_r32`.
    #[getter]
    fn code(&self) -> String {
        format!("{:?}", self.i.code())
    }

    #[getter]
    fn op_count(&self) -> u32 {
        self.i.op_count()
    }

    fn op_kind(&self, n: u32) -> PyResult<&'static str> {
        Ok(match self.i.op_kind(self.check(n)?) {
            OpKind::Register => "register",
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => "near_branch",
            OpKind::FarBranch16 | OpKind::FarBranch32 => "far_branch",
            OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI => "memory_si",
            OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI => "memory_seg_di",
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => "memory_di",
            OpKind::Memory => "memory",
            _ => "immediate",
        })
    }

    fn op_register(&self, n: u32) -> PyResult<Option<String>> {
        Ok(name(self.i.op_register(self.check(n)?)))
    }

    /// Size of the operand in bytes (immediates: of the value they are extended to).
    fn op_size(&self, n: u32) -> PyResult<usize> {
        let n = self.check(n)?;
        Ok(match self.i.op_kind(n) {
            OpKind::Register => self.i.op_register(n).size(),
            OpKind::Immediate8 | OpKind::Immediate8_2nd => 1,
            OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
            OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
            OpKind::Immediate64 | OpKind::Immediate8to64 | OpKind::Immediate32to64 => 8,
            OpKind::NearBranch16 => 2,
            OpKind::NearBranch32 => 4,
            OpKind::NearBranch64 => 8,
            OpKind::FarBranch16 => 4,
            OpKind::FarBranch32 => 6,
            _ => self.i.memory_size().size(),
        })
    }

    /// "read", "write", "read_write", "cond_read", "cond_write", "none" ...: what the instruction does to the operand.
    fn op_access(&self, n: u32) -> PyResult<&'static str> {
        let n = self.check(n)?;
        let mut factory = InstructionInfoFactory::new();
        Ok(match factory.info(&self.i).op_access(n) {
            OpAccess::Read => "read",
            OpAccess::CondRead => "cond_read",
            OpAccess::Write => "write",
            OpAccess::CondWrite => "cond_write",
            OpAccess::ReadWrite => "read_write",
            OpAccess::ReadCondWrite => "read_cond_write",
            _ => "none",
        })
    }

    /// Immediate operand, sign-extended to 64 bits as an unsigned number.
    fn immediate(&self, n: u32) -> PyResult<u64> {
        self.i.try_immediate(self.check(n)?).map_err(|e| PyValueError::new_err(e.to_string()))
    }

    #[getter]
    fn near_branch_target(&self) -> u64 {
        self.i.near_branch_target()
    }

    /// Selector of a far pointer in the instruction.
    #[getter]
    fn far_branch_selector(&self) -> Option<u16> {
        match self.i.op0_kind() {
            OpKind::FarBranch16 | OpKind::FarBranch32 => Some(self.i.far_branch_selector()),
            _ => None,
        }
    }

    /// Offset of a far pointer in the instruction, 0 without one.
    #[getter]
    fn far_branch_offset(&self) -> u32 {
        match self.i.op0_kind() {
            OpKind::FarBranch16 => self.i.far_branch16().into(),
            OpKind::FarBranch32 => self.i.far_branch32(),
            _ => 0,
        }
    }

    #[getter]
    fn memory_base(&self) -> Option<String> {
        name(self.i.memory_base())
    }

    #[getter]
    fn memory_index(&self) -> Option<String> {
        name(self.i.memory_index())
    }

    #[getter]
    fn memory_scale(&self) -> u32 {
        self.i.memory_index_scale()
    }

    /// Displacement; for RIP-relative operands the absolute address.
    #[getter]
    fn memory_displacement(&self) -> u64 {
        self.i.memory_displacement64()
    }

    /// Effective segment, override or default.
    #[getter]
    fn memory_segment(&self) -> Option<String> {
        name(self.i.memory_segment())
    }

    #[getter]
    fn memory_size(&self) -> usize {
        self.i.memory_size().size()
    }

    /// Whether it reads or writes memory, an implicit operand's among it; not descriptor tables and the like.
    #[getter]
    fn accesses_memory(&self) -> bool {
        !InstructionInfoFactory::new().info(&self.i).used_memory().is_empty()
    }

    /// Names of the CPUID features that it belongs to.
    #[getter]
    fn cpuid_features(&self) -> Vec<String> {
        self.i.cpuid_features().iter().map(|f| format!("{f:?}")).collect()
    }

    #[getter]
    fn has_rep(&self) -> bool {
        self.i.has_rep_prefix()
    }

    #[getter]
    fn has_repne(&self) -> bool {
        self.i.has_repne_prefix()
    }

    #[getter]
    fn has_lock(&self) -> bool {
        self.i.has_lock_prefix()
    }

    #[getter]
    fn is_string(&self) -> bool {
        self.i.is_string_instruction()
    }

    /// Address size in bytes.
    #[getter]
    fn address_size(&self) -> u32 {
        self.address_size
    }

    fn __str__(&self) -> String {
        let mut out = String::new();
        NasmFormatter::new().format(&self.i, &mut out);
        out
    }

    fn __repr__(&self) -> String {
        format!("<Instruction {}>", self.__str__())
    }
}
