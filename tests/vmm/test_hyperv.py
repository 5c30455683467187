# SPDX-License-Identifier: Apache-2.0
"""A machine as a partition of Hyper-V's: leaves, and hypercalls that KVM leaves to userspace (TLFS 2.4, 11.10)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.machines import open_soft

from softkvm import abi
from softkvm.vmm.errors import MachineError
from softkvm.vmm.hyperv import Hyperv, enable, hyperv_cpuid
from softkvm.vmm.memory import MIB, GuestMemory

SIMP, SIEFP, INPUT = 0x1000, 0x2000, 0x3000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Some RAM."""
    ram = GuestMemory(2 * MIB)
    yield ram
    ram.close()


def leaves(*, keep_kvm: bool = False) -> dict[int, abi.kvm_cpuid_entry2]:
    """The table of a machine's vCPU, by leaf."""
    with open_soft() as kvm:
        table = hyperv_cpuid(kvm.get_supported_cpuid(), kvm.get_supported_hv_cpuid(), keep_kvm=keep_kvm)
    assert len({(entry.function, entry.index) for entry in table}) == len(table), "no leaf is there twice"
    return {entry.function: entry for entry in table}


def text(*registers: int) -> bytes:
    return b"".join(register.to_bytes(4, "little") for register in registers)


def test_a_guest_finds_the_vendor_that_it_looks_for() -> None:
    table = leaves()
    first = table[0x40000000]
    assert text(first.ebx, first.ecx, first.edx) == b"Microsoft Hv"
    assert first.eax == 0x40000005, "the highest leaf that there is"
    assert text(table[0x40000001].eax) == b"Hv#1"
    assert 0x40000100 not in table


def test_kvms_leaves_may_stay_behind() -> None:
    table = leaves(keep_kvm=True)
    own = table[0x40000100]
    assert text(own.ebx, own.ecx, own.edx) == b"KVMKVMKVM\0\0\0"
    assert own.eax == 0x40000101
    assert table[0x40000101].eax & 1 << abi.KVM_FEATURE_CLOCKSOURCE2
    assert text(table[0x40000001].eax) == b"Hv#1"


def test_a_guest_gets_no_debugger_and_keeps_to_the_page_for_its_clock() -> None:
    features = leaves()[0x40000003]
    assert features.eax & abi.HV_MSR_REFERENCE_TSC_AVAILABLE
    assert not features.eax & abi.HV_ACCESS_TSC_INVARIANT
    assert not features.ebx & abi.HV_DEBUGGING
    assert not features.edx & abi.HV_FEATURE_DEBUG_MSRS_AVAILABLE


def test_a_kvm_without_the_interfaces_is_named() -> None:
    class Lacking:
        def check_extension(self, cap: int) -> int:
            return 0

    with pytest.raises(MachineError, match=r"this KVM has no Hyper-V interfaces \(KVM_CAP_HYPERV_CPUID\)"):
        enable(None, Lacking())  # type: ignore[arg-type]


def synic(control: int, evt_page: int, msg_page: int) -> abi.kvm_hyperv_exit:
    exit = abi.kvm_hyperv_exit(type=abi.KVM_EXIT_HYPERV_SYNIC)
    exit.u.synic = abi.kvm_hyperv_exit_synic(control=control, evt_page=evt_page, msg_page=msg_page)
    return exit


def test_pages_are_those_that_are_enabled(memory: GuestMemory) -> None:
    hyperv = Hyperv(memory)
    assert (hyperv.pages(1).messages, hyperv.pages(1).events) == (0, 0)
    hyperv.handle(1, synic(1, SIEFP | 1, SIMP | 1))
    assert (hyperv.pages(1).messages, hyperv.pages(1).events) == (SIMP, SIEFP)
    hyperv.handle(1, synic(1, SIEFP, SIMP | 1))
    assert (hyperv.pages(1).messages, hyperv.pages(1).events) == (SIMP, 0)
    hyperv.handle(1, synic(0, SIEFP | 1, SIMP | 1))
    assert (hyperv.pages(1).messages, hyperv.pages(1).events) == (0, 0)


def call(hyperv: Hyperv, control: int, parameter: int) -> int:
    """The result of a hypercall that KVM leaves to the machine."""
    exit = abi.kvm_hyperv_exit(type=abi.KVM_EXIT_HYPERV_HCALL)
    exit.u.hcall.input, exit.u.hcall.params[0] = control, parameter
    hyperv.handle(0, exit)
    return int(exit.u.hcall.result)


def test_a_message_goes_to_its_port(memory: GuestMemory) -> None:
    hyperv = Hyperv(memory)
    got: list[tuple[int, bytes]] = []

    def take(message: abi.hv_post_message) -> int:
        got.append((message.message_type, bytes(message.payload)[: message.payload_size]))
        return abi.HV_STATUS_SUCCESS

    hyperv.message_ports[7] = take
    message = abi.hv_post_message(connection_id=7, message_type=3, payload_size=4)
    message.payload[0] = 0x44332211
    memory.write(INPUT, bytes(message))
    post = abi.HVCALL_POST_MESSAGE
    assert call(hyperv, post, INPUT) == abi.HV_STATUS_SUCCESS
    assert got == [(3, b"\x11\x22\x33\x44")]
    assert call(hyperv, post | abi.HV_HYPERCALL_FAST_BIT, 7) == abi.HV_STATUS_INVALID_HYPERCALL_INPUT
    assert call(hyperv, post, INPUT + 4) == abi.HV_STATUS_INVALID_ALIGNMENT
    assert call(hyperv, post, 1 << 40) == abi.HV_STATUS_INSUFFICIENT_MEMORY
    memory.write(INPUT, (8).to_bytes(4, "little"))
    assert call(hyperv, post, INPUT) == abi.HV_STATUS_INVALID_CONNECTION_ID
    memory.write(INPUT + 12, (241).to_bytes(4, "little"))
    assert call(hyperv, post, INPUT) == abi.HV_STATUS_INVALID_HYPERCALL_INPUT


def test_an_event_goes_to_its_port(memory: GuestMemory) -> None:
    hyperv = Hyperv(memory)
    hyperv.event_ports[5] = lambda: abi.HV_STATUS_INSUFFICIENT_BUFFERS
    assert call(hyperv, abi.HVCALL_SIGNAL_EVENT, 5) == abi.HV_STATUS_INSUFFICIENT_BUFFERS
    assert call(hyperv, abi.HVCALL_SIGNAL_EVENT, 6) == abi.HV_STATUS_INVALID_CONNECTION_ID
    assert call(hyperv, abi.HV_EXT_CALL_QUERY_CAPABILITIES, 0) == abi.HV_STATUS_INVALID_HYPERCALL_CODE
