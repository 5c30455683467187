# SPDX-License-Identifier: Apache-2.0
"""Port I/O and MMIO: in-kernel devices first, then KVM_EXIT_IO and KVM_EXIT_MMIO (KVM API section 5).

The shared page is written through memory views (:mod:`softkvm.abi.run_page`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi import X86_EFLAGS_RF, X86_EFLAGS_TF
from softkvm.abi.run_page import (
    EXIT_REASON_D,
    IO_DATA_OFFSET_Q,
    IO_Q,
    MMIO_DATA_Q,
    MMIO_LEN_Q,
    MMIO_PHYS_ADDR_Q,
    PIO_DATA_OFFSET,
)
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm.svm import STEP_FLAGS
from softkvm.kvm.x86.svm.vmcb import EXIT_INFO_1, EXIT_INFO_2, INT_STATE_B, IOIO_STR, RFLAGS, RIP

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

KVM_EXIT_IO: Final = abi.KVM_EXIT_IO
KVM_EXIT_MMIO: Final = abi.KVM_EXIT_MMIO
_PORT_7E: Final = 0x7E
_SIZE_MASKS: Final = (0, 0xFF, 0xFFFF, 0, 0xFFFF_FFFF)


# --- port I/O ----------------------------------------------------------------------------------


def exit_io(vcpu: Vcpu, direction: int, size: int, port: int, count: int) -> None:
    """Describe a KVM_EXIT_IO; the data lie in the PIO page."""
    run_q = vcpu.run_q
    vcpu.run_d[EXIT_REASON_D] = KVM_EXIT_IO
    run_q[IO_Q] = direction | size << 8 | port << 16 | count << 32
    run_q[IO_DATA_OFFSET_Q] = PIO_DATA_OFFSET


def io_interception(vcpu: Vcpu) -> int:
    """IN, OUT, INS, OUTS (APM vol. 2, 15.10.2). Returns 1 to go on, 0 to leave for userspace."""
    info = vcpu.q[EXIT_INFO_1]
    if info & IOIO_STR:
        return vcpu.emulator.emulate()
    port = info >> 16
    size = info >> 4 & 7
    bus = vcpu.pio_bus
    table = bus.table
    devices = table.memo.get(port << 8 | size)
    if devices is None:
        devices = table.devices(port, size)
    if info & 1:
        if devices:
            value = bus.read(port, size)
            if value is not None:
                _load_accumulator(vcpu, size, value)
                return _skip(vcpu)
        vcpu.pio_size = size
        vcpu.complete_userspace_io = complete_fast_pio_in
    else:
        value = vcpu.gpr[0] & _SIZE_MASKS[size]
        if devices and bus.write(port, size, value):
            return _skip(vcpu)
        if size == 1:
            vcpu.run_b[PIO_DATA_OFFSET] = value
        else:
            vcpu.run_b[PIO_DATA_OFFSET : PIO_DATA_OFFSET + size] = value.to_bytes(size, "little")
        if port == _PORT_7E and vcpu.vm.has_quirk(abi.KVM_X86_QUIRK_OUT_7E_INC_RIP):
            _skip(vcpu)  # before the exit: firmware reads its RIP there
        else:
            vcpu.complete_userspace_io = complete_fast_pio_out
    vcpu.pio_rip = vcpu.q[RIP]
    run_q = vcpu.run_q
    vcpu.run_d[EXIT_REASON_D] = KVM_EXIT_IO
    # direction, size, port and count are neighbours: KVM_EXIT_IO_OUT is 1, the intercept's IN bit its opposite
    run_q[IO_Q] = (~info & 1) | size << 8 | port << 16 | 1 << 32
    run_q[IO_DATA_OFFSET_Q] = PIO_DATA_OFFSET
    return 0


def _skip(vcpu: Vcpu) -> int:
    """Skip an IN or OUT. The exit has the next RIP in EXITINFO2 (APM vol. 2, 15.10.2); no NRIP feature needed."""
    q = vcpu.q
    q[RIP] = q[EXIT_INFO_2]
    vcpu.b[INT_STATE_B] = 0
    flags = q[RFLAGS]
    if flags & STEP_FLAGS:
        q[RFLAGS] = flags & ~X86_EFLAGS_RF
        if flags & X86_EFLAGS_TF:
            return svm.do_singlestep(vcpu)
    return 1


def complete_fast_pio_out(vcpu: Vcpu) -> int:
    """After KVM_EXIT_IO for OUT: skip it, unless userspace moved RIP."""
    return _skip(vcpu) if vcpu.q[RIP] == vcpu.pio_rip else 1


def _load_accumulator(vcpu: Vcpu, size: int, value: int) -> None:
    """Put what IN read into AL, AX or EAX (the upper half cleared in the last case)."""
    if size == 1:
        vcpu.rb[0] = value
    elif size == 2:
        vcpu.rw[0] = value
    else:
        vcpu.gpr[0] = value


def complete_fast_pio_in(vcpu: Vcpu) -> int:
    """After KVM_EXIT_IO for IN: take the data, unless userspace moved RIP."""
    size = vcpu.pio_size
    if size == 1:
        value = vcpu.run_b[PIO_DATA_OFFSET]
    else:
        value = int.from_bytes(vcpu.run_b[PIO_DATA_OFFSET : PIO_DATA_OFFSET + size], "little")
    if vcpu.q[RIP] != vcpu.pio_rip:
        return 1
    _load_accumulator(vcpu, size, value)
    return _skip(vcpu)


# --- MMIO --------------------------------------------------------------------------------------


def kernel_mmio_read(vcpu: Vcpu, gpa: int, size: int) -> int | None:
    """Read from the local APIC's page or a device on the MMIO bus; None if nobody is there."""
    apic = vcpu.apic
    if apic is not None and gpa & ~0xFFF == apic.base_address and apic.mmio_in_range(gpa):
        return apic.mmio_read(gpa & 0xFFF, size)
    return vcpu.mmio_bus.read(gpa, size) if vcpu.mmio_bus.table.ranges else None


def kernel_mmio_write(vcpu: Vcpu, gpa: int, size: int, value: int) -> bool:
    """Write to the local APIC's page or a device on the MMIO bus; False if nobody is there."""
    apic = vcpu.apic
    if apic is not None and gpa & ~0xFFF == apic.base_address and apic.mmio_in_range(gpa):
        apic.mmio_write(gpa & 0xFFF, size, value)
        return True
    return vcpu.mmio_bus.write(gpa, size, value) if vcpu.mmio_bus.table.ranges else False


def exit_mmio(vcpu: Vcpu, gpa: int, size: int, value: int, is_write: int) -> None:
    """Describe a KVM_EXIT_MMIO of up to 8 bytes."""
    run_q = vcpu.run_q
    vcpu.run_d[EXIT_REASON_D] = KVM_EXIT_MMIO
    run_q[MMIO_PHYS_ADDR_Q] = gpa
    run_q[MMIO_DATA_Q] = value
    run_q[MMIO_LEN_Q] = size | is_write << 32


def advance(vcpu: Vcpu, length: int, at: int = -1) -> int:
    """Advance RIP by the decoded ``length`` of an emulated instruction (at ``at``) and end its interrupt shadow."""
    q = vcpu.q
    rip = (q[RIP] if at < 0 else at) + length
    if rip >> 32 and not vcpu.is_64bit_code():
        rip &= 0xFFFF_FFFF
    q[RIP] = rip
    vcpu.b[INT_STATE_B] = 0
    flags = q[RFLAGS]
    if flags & STEP_FLAGS:
        q[RFLAGS] = flags & ~X86_EFLAGS_RF
        if flags & X86_EFLAGS_TF:
            return svm.do_singlestep(vcpu)
    return 1
