# SPDX-License-Identifier: Apache-2.0
"""Port I/O and MMIO: in-kernel devices first, then KVM_EXIT_IO and KVM_EXIT_MMIO (KVM API section 5).

The shared page is written through memory views with the offsets of ``struct kvm_run``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86 import svm
from softkvm.kvm.x86 import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.vcpu_state import VcpuState as Vcpu

PIO_DATA_OFFSET: Final = abi.KVM_PIO_PAGE_OFFSET * 4096
PIO_PAGE_SIZE: Final = 4096

# struct kvm_run: byte offsets, as indexes of the view their comment names
RUN_REQUEST_INTERRUPT_WINDOW: Final = 0  # b
RUN_IMMEDIATE_EXIT: Final = 1  # b
RUN_EXIT_REASON: Final = 8 // 4  # d
RUN_READY_FOR_INJECTION: Final = 12  # b
RUN_IF_FLAG: Final = 13  # b
RUN_FLAGS: Final = 14 // 2  # w
RUN_CR8: Final = 16 // 8  # q
RUN_APIC_BASE: Final = 24 // 8  # q
RUN_IO_DIRECTION: Final = 32  # b
RUN_IO_SIZE: Final = 33  # b
RUN_IO_PORT: Final = 34 // 2  # w
RUN_IO_COUNT: Final = 36 // 4  # d
RUN_IO_DATA_OFFSET: Final = 40 // 8  # q
RUN_MMIO_PHYS_ADDR: Final = 32 // 8  # q
RUN_MMIO_DATA: Final = 40  # b, 8 bytes
RUN_MMIO_DATA_Q: Final = 40 // 8  # q
RUN_MMIO_LEN: Final = 48 // 4  # d
RUN_MMIO_IS_WRITE: Final = 52  # b


# --- port I/O ----------------------------------------------------------------------------------


def exit_io(vcpu: Vcpu, direction: int, size: int, port: int, count: int) -> None:
    """Describe a KVM_EXIT_IO; the data lie in the PIO page."""
    vcpu.run_d[RUN_EXIT_REASON] = abi.KVM_EXIT_IO
    vcpu.run_b[RUN_IO_DIRECTION] = direction
    vcpu.run_b[RUN_IO_SIZE] = size
    vcpu.run_w[RUN_IO_PORT] = port
    vcpu.run_d[RUN_IO_COUNT] = count
    vcpu.run_q[RUN_IO_DATA_OFFSET] = PIO_DATA_OFFSET


def fast_pio(vcpu: Vcpu, port: int, size: int, is_in: int) -> int:
    """IN or OUT with the accumulator; returns 1 to go on, 0 to leave for userspace."""
    bus = vcpu.pio_bus
    if is_in:
        value = bus.read(port, size)
        if value is not None:
            _load_accumulator(vcpu, size, value)
            return svm.skip_emulated_instruction(vcpu)
        vcpu.pio_size = size
        vcpu.complete_userspace_io = complete_fast_pio_in
    else:
        value = vcpu.gpr[0] & (1 << size * 8) - 1
        if bus.write(port, size, value):
            return svm.skip_emulated_instruction(vcpu)
        if size == 1:
            vcpu.run_b[PIO_DATA_OFFSET] = value
        else:
            vcpu.run_b[PIO_DATA_OFFSET : PIO_DATA_OFFSET + size] = value.to_bytes(size, "little")
        vcpu.complete_userspace_io = complete_fast_pio_out
    vcpu.pio_linear_rip = svm.linear_rip(vcpu)
    exit_io(vcpu, abi.KVM_EXIT_IO_IN if is_in else abi.KVM_EXIT_IO_OUT, size, port, 1)
    return 0


def _load_accumulator(vcpu: Vcpu, size: int, value: int) -> None:
    """Put what IN read into AL, AX or EAX (the upper half cleared in the last case)."""
    if size == 4:
        vcpu.gpr[0] = value
    elif size == 1:
        vcpu.gpr[0] = vcpu.gpr[0] & ~0xFF | value
    else:
        vcpu.gpr[0] = vcpu.gpr[0] & ~0xFFFF | value


def complete_fast_pio_in(vcpu: Vcpu) -> int:
    """After KVM_EXIT_IO for IN: take the data, unless userspace moved RIP."""
    size = vcpu.pio_size
    if size == 1:
        value = vcpu.run_b[PIO_DATA_OFFSET]
    else:
        value = int.from_bytes(vcpu.run_b[PIO_DATA_OFFSET : PIO_DATA_OFFSET + size], "little")
    if svm.linear_rip(vcpu) != vcpu.pio_linear_rip:
        return 1
    _load_accumulator(vcpu, size, value)
    return svm.skip_emulated_instruction(vcpu)


def complete_fast_pio_out(vcpu: Vcpu) -> int:
    """After KVM_EXIT_IO for OUT: skip the instruction, unless userspace moved RIP."""
    if svm.linear_rip(vcpu) != vcpu.pio_linear_rip:
        return 1
    return svm.skip_emulated_instruction(vcpu)


# --- MMIO --------------------------------------------------------------------------------------


def kernel_mmio_read(vcpu: Vcpu, gpa: int, size: int) -> int | None:
    """Read from the local APIC's page or a device on the MMIO bus; None if nobody is there."""
    apic = vcpu.apic
    if apic is not None and gpa & ~0xFFF == apic.base_address and apic.mmio_in_range(gpa):
        return apic.mmio_read(gpa & 0xFFF, size)
    return vcpu.mmio_bus.read(gpa, size)


def kernel_mmio_write(vcpu: Vcpu, gpa: int, size: int, value: int) -> bool:
    """Write to the local APIC's page or a device on the MMIO bus; False if nobody is there."""
    apic = vcpu.apic
    if apic is not None and gpa & ~0xFFF == apic.base_address and apic.mmio_in_range(gpa):
        apic.mmio_write(gpa & 0xFFF, size, value)
        return True
    return vcpu.mmio_bus.write(gpa, size, value)


def exit_mmio(vcpu: Vcpu, gpa: int, size: int, value: int, is_write: int) -> None:
    """Describe a KVM_EXIT_MMIO of up to 8 bytes."""
    vcpu.run_d[RUN_EXIT_REASON] = abi.KVM_EXIT_MMIO
    vcpu.run_q[RUN_MMIO_PHYS_ADDR] = gpa
    vcpu.run_q[RUN_MMIO_DATA_Q] = value
    vcpu.run_d[RUN_MMIO_LEN] = size
    vcpu.run_b[RUN_MMIO_IS_WRITE] = is_write


def advance(vcpu: Vcpu, length: int) -> int:
    """Advance RIP by the decoded ``length`` of an emulated instruction and end its interrupt shadow."""
    rip = vcpu.q[V.RIP] + length
    vcpu.q[V.RIP] = rip if vcpu.is_64bit_code() else rip & 0xFFFF_FFFF
    vcpu.b[V.INT_STATE_B] = 0
    if vcpu.q[V.RFLAGS] & (svm.RFLAGS_TF | svm.RFLAGS_RF):
        vcpu.q[V.RFLAGS] &= ~svm.RFLAGS_RF
        if vcpu.q[V.RFLAGS] & svm.RFLAGS_TF:
            return svm.do_singlestep(vcpu)
    return 1
