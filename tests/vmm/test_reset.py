# SPDX-License-Identifier: Apache-2.0
"""A machine that is reset begins anew from its image; on every KVM there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.machines import KVMS

from softkvm import abi, api
from softkvm.vmm.boot.image import Image
from softkvm.vmm.devices import hpet, serial
from softkvm.vmm.errors import StateError
from softkvm.vmm.events import Event
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End, Outcome

COUNTER = 0x20000
SPIN = bytes.fromhex("ebfe")
POWER_OFF = bytes.fromhex("ba0406 b80034 ef ebfe")  # mov dx,0x604; mov ax,0x3400; out dx,ax
# mov ax,0x2000; mov ds,ax; inc byte [0]; cmp byte [0],3; jb to what resets; else power off
COUNT_TO_3 = bytes.fromhex("b80020 8ed8 fe060000 803e000003 720a") + POWER_OFF + b"\x90"
WAYS = {
    "keyboard controller": bytes.fromhex("b0fe e664 ebfe"),
    "reset control register": bytes.fromhex("baf90c b006 ee ebfe"),
    "port 0x92": bytes.fromhex("b003 e692 ebfe"),
    # lidt of an empty table, protected mode, and a load of DS that faults
    "triple fault": bytes.fromhex("fa 31c0 8ed8 0f011e0005 0f20c0 0c01 0f22c0 b80010 8ed8"),
}
FAR_S = 30

MakeMachine = Callable[..., Machine]


@pytest.fixture(params=sorted(KVMS))
def make(request: pytest.FixtureRequest) -> Iterator[MakeMachine]:
    kvm: api.Kvm = KVMS[request.param]()
    machines: list[Machine] = []

    def make_machine(code: bytes | Path | Image, **config: object) -> Machine:
        machine = Machine(kvm, Config(32 * MIB, **{"reboot": True, **config}))  # type: ignore[arg-type]
        machines.append(machine)
        machine.load(code, raw=True)
        return machine

    yield make_machine
    for machine in machines:
        machine.close()
    kvm.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + FAR_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vcpus", [1, 3])
def test_every_reset_begins_anew_and_memory_keeps_what_it_has(make: MakeMachine, way: str, vcpus: int) -> None:
    machine = make(COUNT_TO_3 + WAYS[way], vcpus=vcpus)
    told: list[tuple[Event, str]] = []
    machine.events.add(lambda event, more: told.append((event, more.get("by") or more.get("end", ""))))
    outcome = machine.run(FAR_S)
    assert outcome.end is End.POWER_OFF
    assert machine.boots == 3
    assert machine.memory.read(COUNTER, 1) == b"\x03"
    assert [event for event, _ in told] == [Event.RESET, Event.RESET, Event.ENDED]
    assert way in told[0][1]


def test_without_being_asked_for_a_reset_is_the_end(make: MakeMachine) -> None:
    assert make(WAYS["port 0x92"], reboot=False).run(FAR_S).end is End.RESET


def test_processors_and_devices_are_as_built(make: MakeMachine) -> None:
    machine = make(SPIN, vcpus=2)
    machine.start()
    uart, timer = machine.board.serial, machine.board.hpet
    assert timer is not None
    with machine.pausing.still():
        vcpus = [thread.vcpu for thread in machine.vcpus]
        first = vcpus[0]
        initial = machine.board._reset_state.vcpus
        first.set_msrs({abi.MSR_KVM_SYSTEM_TIME_NEW: 0x30001, 0x174: 0x10, 0x277: 0x0606060606060606})
        xcrs = first.get_xcrs()
        xcrs.xcrs[0].value = 3
        first.set_xcrs(xcrs)
        fpu = first.get_fpu()
        fpu.fcw = 0x27F
        first.set_fpu(fpu)
        regs = first.get_debugregs()
        regs.db[0] = 0x1234
        first.set_debugregs(regs)
        vcpus[1].set_mp_state(abi.kvm_mp_state(abi.KVM_MP_STATE_RUNNABLE))
        uart.write(serial.MCR, 1, serial.MCR_RTS | serial.MCR_OUT2)
        uart.write(serial.IER, 1, serial.IER_RDI)
        uart.feed(b"typed")
        timer.write(hpet.CONFIGURATION, 8, hpet.ENABLE | hpet.LEGACY)
        ioapic = machine.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
        ioapic.chip.ioapic.redirtbl[4].bits = 0x31
        machine.vm.set_irqchip(ioapic)
    machine.reset("test")
    wait_until(lambda: machine.boots == 2)
    machine.pause()
    assert first.get_msrs([abi.MSR_KVM_SYSTEM_TIME_NEW, 0x174, 0x277]) == [0, 0, initial[0].msrs[0x277]]
    assert first.get_xcrs().xcrs[0].value == 1
    assert first.get_fpu().fcw == initial[0].fpu.fcw
    assert first.get_debugregs().db[0] == 0
    assert vcpus[1].get_mp_state().mp_state == abi.KVM_MP_STATE_UNINITIALIZED
    assert first.get_sregs().cs.base == 0x10000
    assert uart.read(serial.IER) == 0
    assert uart.pending_input == 5
    assert timer.read(hpet.CONFIGURATION, 8) == 0
    assert machine.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[4].bits & 0xFF == 0
    assert not machine.vm.get_pit2().flags & abi.KVM_PIT_FLAGS_HPET_LEGACY


def test_what_was_added_is_reset_too(make: MakeMachine) -> None:
    machine = make(SPIN)
    calls: list[int] = []
    machine.resets.append(lambda: calls.append(machine.standstill.held))
    machine.start()
    machine.reset("test")
    wait_until(lambda: machine.boots == 2)
    assert calls == [1]


def test_a_paused_machine_begins_anew_when_it_goes_on(make: MakeMachine) -> None:
    machine = make(COUNT_TO_3 + SPIN)
    machine.start()
    wait_until(lambda: machine.memory.read(COUNTER, 1) == b"\x01")
    machine.pause()
    machine.reset("test")
    machine.reset("test")
    time.sleep(0.05)
    assert machine.boots == 1
    machine.resume()
    wait_until(lambda: machine.boots == 2 and machine.memory.read(COUNTER, 1) == b"\x02")
    assert not machine.paused


def test_a_sleeping_machine_is_reset_and_does_not_wake_up_twice(make: MakeMachine) -> None:
    machine = make(bytes.fromhex("ba0406 b80024 ef ebfe"))  # S3
    machine.start()
    wait_until(lambda: machine.standstill.held == 1 and machine.standstill.wait(machine.vcpus, 1))
    machine.reset("test")
    wait_until(lambda: machine.boots == 2)
    wait_until(lambda: machine.standstill.held == 1)  # asleep again
    machine.end(Outcome(End.STOPPED))
    assert machine.wait(FAR_S).end is End.STOPPED


def test_a_machine_that_does_not_run_is_not_reset(make: MakeMachine) -> None:
    machine = make(SPIN)
    with pytest.raises(StateError, match=r"^the machine has not been started"):
        machine.reset("test")
    machine.start()
    machine.end(Outcome(End.STOPPED))
    with pytest.raises(StateError, match=r"^the machine has ended"):
        machine.reset("test")


def test_an_opened_image_is_its_owners(make: MakeMachine, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(COUNT_TO_3 + WAYS["port 0x92"])
    with Image.open(path, "kernel", MIB) as image:
        path.unlink()
        machine = make(image)
        assert machine.run(FAR_S).end is End.POWER_OFF
        assert machine.boots == 3


def test_an_image_that_is_gone_ends_the_machine(make: MakeMachine, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(SPIN)
    machine = make(image)
    machine.start()
    image.unlink()
    machine.reset("test")
    outcome = machine.wait(FAR_S)
    assert outcome.end is End.ERROR
    assert outcome.detail == f"reset: kernel {image}: No such file or directory"
