# SPDX-License-Identifier: Apache-2.0
"""``struct kvm_run`` as memory views see it: where each field is, in elements of the view that its name ends with.

Both sides look at the page that they share through views of bytes (``_B``), words (``_W``), doublewords (``_D``)
and quadwords (``_Q``): an access through a structure of :mod:`ctypes` takes several times as long. The places are
computed from the structures of :mod:`softkvm.abi`.
"""

from __future__ import annotations

from ctypes import Structure, sizeof
from typing import Any, Final

from softkvm.abi.memory import KVM_PIO_PAGE_OFFSET
from softkvm.abi.run import (
    kvm_run_emulation_failure,
    kvm_run_eoi,
    kvm_run_fail_entry,
    kvm_run_hypercall,
    kvm_run_internal,
    kvm_run_io,
    kvm_run_memory_fault,
    kvm_run_mmio,
    kvm_run_page,
)


def index(structure: type[Structure], field: str, size: int, base: int = 0) -> int:
    """Return where a field is, in elements of ``size`` bytes; the structure lies at ``base``.

    Raises ValueError for a place that no element begins at.
    """
    descriptor: Any = getattr(structure, field)
    at = base + descriptor.offset
    if at % size:
        raise ValueError(f"{structure.__name__}.{field} at {at} is not aligned to {size}")
    return int(at // size)


#: Where the union of the exits begins.
EXIT: Final = sizeof(kvm_run_page)

REQUEST_INTERRUPT_WINDOW_B: Final = index(kvm_run_page, "request_interrupt_window", 1)
IMMEDIATE_EXIT_B: Final = index(kvm_run_page, "immediate_exit", 1)
EXIT_REASON_D: Final = index(kvm_run_page, "exit_reason", 4)
#: ready_for_interrupt_injection, with if_flag in the upper byte.
READY_FOR_INTERRUPT_INJECTION_W: Final = index(kvm_run_page, "ready_for_interrupt_injection", 2)
FLAGS_W: Final = index(kvm_run_page, "flags", 2)
CR8_Q: Final = index(kvm_run_page, "cr8", 8)
APIC_BASE_Q: Final = index(kvm_run_page, "apic_base", 8)

#: kvm_run.io: direction (8 bits), size (8), port (16) and count (32) in one element; then the data's offset.
IO_Q: Final = index(kvm_run_io, "direction", 8, EXIT)
IO_DATA_OFFSET_Q: Final = index(kvm_run_io, "data_offset", 8, EXIT)
#: The same in smaller elements: direction, size and port; count; the lower half of the data's offset.
IO_DATA_OFFSET_D: Final = index(kvm_run_io, "data_offset", 4, EXIT)

#: kvm_run.mmio; len (32 bits) and is_write (8) in one element.
MMIO_PHYS_ADDR_Q: Final = index(kvm_run_mmio, "phys_addr", 8, EXIT)
MMIO_DATA_B: Final = index(kvm_run_mmio, "data", 1, EXIT)
MMIO_DATA_Q: Final = index(kvm_run_mmio, "data", 8, EXIT)
MMIO_LEN_Q: Final = index(kvm_run_mmio, "len", 8, EXIT)
MMIO_LEN_D: Final = index(kvm_run_mmio, "len", 4, EXIT)
MMIO_IS_WRITE_B: Final = index(kvm_run_mmio, "is_write", 1, EXIT)

FAIL_ENTRY_REASON_Q: Final = index(kvm_run_fail_entry, "hardware_entry_failure_reason", 8, EXIT)
FAIL_ENTRY_CPU_D: Final = index(kvm_run_fail_entry, "cpu", 4, EXIT)

INTERNAL_SUBERROR_D: Final = index(kvm_run_internal, "suberror", 4, EXIT)
INTERNAL_NDATA_D: Final = index(kvm_run_internal, "ndata", 4, EXIT)
INTERNAL_DATA_Q: Final = index(kvm_run_internal, "data", 8, EXIT)
EMULATION_FAILURE_FLAGS_Q: Final = index(kvm_run_emulation_failure, "flags", 8, EXIT)
EMULATION_FAILURE_INSN_SIZE_B: Final = index(kvm_run_emulation_failure, "insn_size", 1, EXIT)
EMULATION_FAILURE_INSN_BYTES_B: Final = index(kvm_run_emulation_failure, "insn_bytes", 1, EXIT)

HYPERCALL_NR_Q: Final = index(kvm_run_hypercall, "nr", 8, EXIT)
HYPERCALL_ARGS_Q: Final = index(kvm_run_hypercall, "args", 8, EXIT)
HYPERCALL_RET_Q: Final = index(kvm_run_hypercall, "ret", 8, EXIT)
HYPERCALL_LONGMODE_D: Final = index(kvm_run_hypercall, "longmode", 4, EXIT)

MEMORY_FAULT_FLAGS_Q: Final = index(kvm_run_memory_fault, "flags", 8, EXIT)
MEMORY_FAULT_GPA_Q: Final = index(kvm_run_memory_fault, "gpa", 8, EXIT)
MEMORY_FAULT_SIZE_Q: Final = index(kvm_run_memory_fault, "size", 8, EXIT)

EOI_VECTOR_B: Final = index(kvm_run_eoi, "vector", 1, EXIT)

#: The page of port data, behind the run page.
PIO_DATA_OFFSET: Final = KVM_PIO_PAGE_OFFSET * 4096
PIO_PAGE_SIZE: Final = 4096
