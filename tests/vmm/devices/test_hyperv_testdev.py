# SPDX-License-Identifier: Apache-2.0
"""The Hyper-V test device: commands as kvm-unit-tests' x86/hyperv.c gives them, on a KVM with two vCPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.support.machines import open_soft

from softkvm import abi
from softkvm.vmm.devices.hyperv_testdev import CONTROL_SIZE, HypervTestDevice
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.routing import pc_routing
from softkvm.vmm.sint_routes import FIRST_GSI, SintRoutes

SINT, VECTOR, CONNECTION = 8, 0xB0, 0x11
CREATE_SINT, DESTROY_SINT, SET_SINT, CREATE_MESSAGE, DESTROY_MESSAGE, CREATE_EVENT, DESTROY_EVENT = range(1, 8)
MESSAGES, EVENTS = 0x10_0000, 0x10_1000
SLOT = MESSAGES + SINT * 256


class Platform:
    """A machine that is not started, with the device; vCPU 1 has a SynIC with both pages."""

    def __init__(self, stack: ExitStack) -> None:
        kvm = stack.enter_context(open_soft())
        self.machine = stack.enter_context(Machine(kvm, Config(32 * MIB, 2, hyperv=True)))
        self.memory = self.machine.memory
        routes = SintRoutes(self.machine.vm, pc_routing())
        self.device = HypervTestDevice(self.machine.hyperv, self.memory, routes)
        stack.callback(self.device.close)
        self.vcpu = self.machine.vcpus[1].vcpu
        lapic = self.vcpu.get_lapic()
        lapic.regs[0xF0:0xF2] = [0xFF, 1]
        self.vcpu.set_lapic(lapic)
        self.vcpu.set_msrs({abi.HV_X64_MSR_SINT0 + SINT: VECTOR})
        exit = abi.kvm_hyperv_exit(type=abi.KVM_EXIT_HYPERV_SYNIC)
        exit.u.synic = abi.kvm_hyperv_exit_synic(control=1, evt_page=EVENTS | 1, msg_page=MESSAGES | 1)
        self.machine.hyperv.handle(1, exit)

    def command(self, command: int, vp_index: int = 1, sint: int = SINT, connection: int = 0) -> None:
        """One write to the port."""
        self.device.write(0, CONTROL_SIZE, connection << 24 | command << 16 | vp_index << 8 | sint)

    def requested(self) -> bool:
        """Whether the source's vector is requested; takes it back."""
        lapic = self.vcpu.get_lapic()
        at = 0x200 + VECTOR // 32 * 16
        there = bool(lapic.regs[at + VECTOR % 32 // 8] >> VECTOR % 8 & 1)
        lapic.regs[at : at + 4] = [0] * 4
        self.vcpu.set_lapic(lapic)
        return there

    def post(self, payload: int) -> int:
        """A message to the connection."""
        message = abi.hv_post_message(connection_id=CONNECTION, message_type=0x12345678, payload_size=8)
        message.payload[0] = payload
        return self.machine.hyperv.message_ports[CONNECTION](message)

    def message(self) -> abi.hv_message:
        """What is in the slot."""
        return abi.hv_message.from_buffer_copy(self.memory.read(SLOT, 256))


@pytest.fixture
def platform() -> Iterator[Platform]:
    """The machine."""
    with ExitStack() as stack:
        yield Platform(stack)


def test_a_route_raises_its_source_as_long_as_it_is_there(platform: Platform) -> None:
    platform.command(SET_SINT)
    assert not platform.requested()
    platform.command(CREATE_SINT)
    platform.command(SET_SINT)
    assert platform.requested()
    platform.command(DESTROY_SINT)
    platform.command(SET_SINT)
    assert not platform.requested()
    platform.command(DESTROY_SINT)
    platform.command(0x55)


def test_a_message_is_put_into_an_empty_slot(platform: Platform) -> None:
    platform.command(CREATE_MESSAGE, connection=CONNECTION)
    assert platform.post(0x1001) == abi.HV_STATUS_SUCCESS
    got = platform.message()
    assert (got.message_type, got.payload_size, got.payload[0], got.message_flags) == (0x12345678, 8, 0x1001, 0)
    assert platform.requested()


def test_a_message_waits_for_a_full_slot_until_the_guest_tells(platform: Platform) -> None:
    platform.command(CREATE_MESSAGE, connection=CONNECTION)
    platform.post(1)
    platform.requested()
    assert platform.post(2) == abi.HV_STATUS_SUCCESS
    assert (platform.message().payload[0], platform.message().message_flags) == (1, abi.HV_MESSAGE_FLAG_PENDING)
    assert platform.post(3) == abi.HV_STATUS_INSUFFICIENT_BUFFERS
    platform.memory.write(SLOT, bytes(4))
    platform.vcpu.set_msrs({abi.HV_X64_MSR_EOM: 0})
    deadline = time.monotonic() + 10
    while not platform.message().message_type and time.monotonic() < deadline:
        time.sleep(0.001)
    assert platform.message().payload[0] == 2
    while not platform.requested():
        assert time.monotonic() < deadline


def test_an_event_is_a_flag_and_one_interrupt(platform: Platform) -> None:
    platform.command(CREATE_EVENT, connection=CONNECTION)
    signal = platform.machine.hyperv.event_ports[CONNECTION]
    flags = EVENTS + SINT * 256
    for interrupts in (True, False):
        assert signal() == abi.HV_STATUS_SUCCESS
        assert platform.memory.read(flags, 4) == bytes([0, 0, 1 << CONNECTION - 16, 0])
        assert platform.requested() is interrupts
    platform.memory.write(flags, bytes(4))
    signal()
    assert platform.requested()


def test_ports_go_with_their_connection(platform: Platform) -> None:
    hyperv = platform.machine.hyperv
    platform.command(CREATE_MESSAGE, connection=CONNECTION)
    platform.command(CREATE_EVENT, connection=CONNECTION)  # taken
    platform.command(CREATE_EVENT, sint=16, connection=2)  # there is no such source
    assert (list(hyperv.message_ports), list(hyperv.event_ports)) == ([CONNECTION], [])
    platform.command(DESTROY_MESSAGE, connection=CONNECTION)
    platform.command(CREATE_EVENT, connection=CONNECTION)
    assert (list(hyperv.message_ports), list(hyperv.event_ports)) == ([], [CONNECTION])
    platform.command(DESTROY_EVENT, connection=CONNECTION)
    assert not hyperv.event_ports


def test_without_a_page_nothing_is_delivered(platform: Platform) -> None:
    platform.command(CREATE_MESSAGE, vp_index=0, connection=CONNECTION)
    platform.command(CREATE_EVENT, vp_index=0, connection=CONNECTION + 1)
    before = platform.memory.read(0, 0x1000)
    assert platform.post(1) == abi.HV_STATUS_SUCCESS
    assert platform.post(2) == abi.HV_STATUS_INSUFFICIENT_BUFFERS
    event = platform.machine.hyperv.event_ports[CONNECTION + 1]
    assert event() == abi.HV_STATUS_INVALID_HYPERCALL_INPUT
    assert platform.memory.read(0, 0x1000) == before


def test_gsis_are_used_again() -> None:
    with open_soft() as kvm, Machine(kvm, Config(32 * MIB, 1, hyperv=True)) as machine:
        routes = SintRoutes(machine.vm, pc_routing())
        first, second = routes.create(0, 1), routes.create(0, 2)
        assert (first.gsi, second.gsi) == (FIRST_GSI, FIRST_GSI + 1)
        routes.destroy(first)
        assert routes.create(0, 3).gsi == FIRST_GSI
        acknowledged = threading.Event()
        second.on_ack = acknowledged.set
        machine.vcpus[0].vcpu.set_msrs({abi.HV_X64_MSR_EOM: 0})
        assert acknowledged.wait(10)
        routes.close()
