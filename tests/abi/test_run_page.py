# SPDX-License-Identifier: Apache-2.0
"""The run page's places are those of the kernel's structure (numbers of <linux/kvm.h>, Linux 6.1)."""

from __future__ import annotations

import pytest

from softkvm import abi
from softkvm.abi import run_page
from softkvm.abi.x86 import run_page as x86_run_page

BYTES = {"B": 1, "W": 2, "D": 4, "Q": 8}

OFFSETS = {
    "REQUEST_INTERRUPT_WINDOW_B": 0, "IMMEDIATE_EXIT_B": 1, "EXIT_REASON_D": 8, "READY_FOR_INTERRUPT_INJECTION_W": 12,
    "FLAGS_W": 14, "CR8_Q": 16, "APIC_BASE_Q": 24, "IO_Q": 32, "IO_DATA_OFFSET_Q": 40,
    "MMIO_PHYS_ADDR_Q": 32, "MMIO_DATA_B": 40, "MMIO_DATA_Q": 40, "MMIO_LEN_Q": 48,
    "MMIO_LEN_D": 48, "MMIO_IS_WRITE_B": 52, "IO_DATA_OFFSET_D": 40,
    "FAIL_ENTRY_REASON_Q": 32,
    "FAIL_ENTRY_CPU_D": 40, "INTERNAL_SUBERROR_D": 32, "INTERNAL_NDATA_D": 36, "INTERNAL_DATA_Q": 40,
    "EMULATION_FAILURE_FLAGS_Q": 40, "EMULATION_FAILURE_INSN_SIZE_B": 48, "EMULATION_FAILURE_INSN_BYTES_B": 49,
    "EOI_VECTOR_B": 32,
    "HYPERCALL_NR_Q": 32, "HYPERCALL_ARGS_Q": 40, "HYPERCALL_RET_Q": 88, "HYPERCALL_LONGMODE_D": 96,
    "MEMORY_FAULT_FLAGS_Q": 32, "MEMORY_FAULT_GPA_Q": 40, "MEMORY_FAULT_SIZE_Q": 48,
}  # fmt: skip
X86_OFFSETS = {
    "MSR_ERROR_Q": 32, "MSR_ERROR_B": 32, "MSR_REASON_D": 40, "MSR_INDEX_D": 44, "MSR_DATA_Q": 48,
    "DEBUG_EXCEPTION_D": 32, "DEBUG_PC_Q": 40, "DEBUG_DR6_Q": 48, "DEBUG_DR7_Q": 56,
    "HYPERV_TYPE_D": 32, "HYPERV_HCALL_INPUT_Q": 40, "HYPERV_HCALL_RESULT_Q": 48, "HYPERV_HCALL_PARAMS_Q": 56,
    "HYPERV_SYNDBG_MSR_D": 40, "HYPERV_SYNDBG_STATUS_Q": 56, "SYSTEM_EVENT_TYPE_D": 32, "SYSTEM_EVENT_NDATA_D": 36,
    "XEN_TYPE_D": 32, "XEN_HCALL_LONGMODE_D": 40, "XEN_HCALL_CPL_D": 44, "XEN_HCALL_INPUT_Q": 48,
    "XEN_HCALL_RESULT_Q": 56, "XEN_HCALL_PARAMS_Q": 64,
    "TPR_RIP_Q": 32, "TPR_IS_WRITE_D": 40, "KVM_VALID_REGS_Q": 288, "KVM_DIRTY_REGS_Q": 296,
}  # fmt: skip


@pytest.mark.parametrize(("module", "offsets"), [(run_page, OFFSETS), (x86_run_page, X86_OFFSETS)])
def test_every_place_is_the_kernels(module: object, offsets: dict[str, int]) -> None:
    names = {name for name in vars(module) if name[-2:] in ("_B", "_W", "_D", "_Q")}
    assert names == set(offsets)
    assert {name: getattr(module, name) * BYTES[name[-1]] for name in names} == offsets


def test_a_place_that_no_element_begins_at_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kvm_run_page.immediate_exit at 1 is not aligned to 2"):
        run_page.index(abi.kvm_run_page, "immediate_exit", 2)
