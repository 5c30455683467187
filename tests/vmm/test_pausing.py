# SPDX-License-Identifier: Apache-2.0
"""A machine that is paused changes nothing, and goes on where it was; on every KVM there is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tests.support.machines import KVMS

from softkvm import api
from softkvm.vmm.boot.acpi import FACS_ADDRESS, FACS_WAKING_VECTOR
from softkvm.vmm.errors import StateError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End, Outcome

COUNTER = 0x10100
COUNT = bytes.fromhex("66 ff06 0001 ebf9")  # inc dword [0x100]; jmp $-5
HALT = bytes.fromhex("fa f4 ebfd")  # cli; hlt; jmp
READ_PORT = bytes.fromhex("ba0050 ec a20001 ebf9")  # mov dx,0x5000; in al,dx; mov [0x100],al; jmp to the in
AT_IN, BEHIND_IN = 3, 4
ENTER_S3 = bytes.fromhex("ba0406 b80024 ef ebfe")  # mov dx,0x604; mov ax,0x2400; out dx,ax; jmp $
BEHIND_OUT = 7
FAR_S = 30

MakeMachine = Callable[..., Machine]


@pytest.fixture(params=sorted(KVMS))
def make(request: pytest.FixtureRequest) -> Iterator[MakeMachine]:
    kvm: api.Kvm = KVMS[request.param]()
    machines: list[Machine] = []

    def make_machine(code: bytes, **config: object) -> Machine:
        machine = Machine(kvm, Config(32 * MIB, **config))  # type: ignore[arg-type]
        machines.append(machine)
        machine.load(code, raw=True)
        return machine

    yield make_machine
    for machine in machines:
        machine.close()
    kvm.close()


class Port:
    """A device at port 0x5000 whose reads wait for :attr:`go`, and answer 0x42."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go = threading.Event()
        self.on_read: Callable[[], object] = lambda: None

    def read(self, offset: int, size: int) -> int:
        self.on_read()
        self.asked.set()
        assert self.go.wait(FAR_S)
        return 0x42

    def write(self, offset: int, size: int, value: int) -> None: ...


class Part:
    """Notes whether it rests, and whether the vCPU stood when it came to that."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.calls: list[tuple[str, int]] = []

    def pause(self) -> None:
        self.calls.append(("pause", self.machine.standstill.held))

    def resume(self) -> None:
        self.calls.append(("resume", self.machine.standstill.held))


def counter(machine: Machine) -> int:
    return int.from_bytes(machine.memory.read(COUNTER, 4), "little")


def wait_for_change(machine: Machine) -> None:
    before, deadline = counter(machine), time.monotonic() + FAR_S
    while counter(machine) == before:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stop(machine: Machine) -> Outcome:
    machine.end(Outcome(End.STOPPED))
    return machine.wait(FAR_S)


@pytest.mark.parametrize("config", [{}, {"cpu_quota": 20}, {"cpu_time_limit_s": 1000}], ids=["plain", "quota", "limit"])
def test_a_paused_guest_changes_nothing_and_goes_on(make: MakeMachine, config: dict[str, object]) -> None:
    machine = make(COUNT, vcpus=2, **config)
    machine.start()
    for _ in range(3):
        wait_for_change(machine)
        assert not machine.paused
        machine.pause()
        assert machine.paused
        assert "paused" in repr(machine)
        before, regs = counter(machine), bytes(machine.vcpus[0].vcpu.get_regs())
        time.sleep(0.03)
        assert counter(machine) == before
        assert bytes(machine.vcpus[0].vcpu.get_regs()) == regs
        machine.resume()
    wait_for_change(machine)
    assert stop(machine).end is End.STOPPED


def test_pausing_twice_is_pausing_once(make: MakeMachine) -> None:
    machine = make(COUNT)
    machine.start()
    machine.pause()
    machine.pause()
    machine.resume()
    machine.resume()
    assert not machine.paused
    wait_for_change(machine)


def test_pauses_of_others_overlap_with_the_users(make: MakeMachine) -> None:
    machine = make(COUNT)
    machine.start()
    with machine.pausing.still():
        assert not machine.paused
        machine.pause()
        with machine.pausing.still():
            machine.resume()
            before = counter(machine)
            time.sleep(0.02)
            assert counter(machine) == before
            machine.pause()
    assert machine.paused
    before = counter(machine)
    time.sleep(0.02)
    assert counter(machine) == before
    machine.resume()
    wait_for_change(machine)


def test_a_machine_that_was_paused_before_its_start_starts_paused(make: MakeMachine) -> None:
    machine = make(COUNT)
    machine.pause()
    machine.start()
    time.sleep(0.05)
    assert counter(machine) == 0
    assert machine.vcpus[0].vcpu.get_regs().rip == 0
    machine.resume()
    wait_for_change(machine)


def test_the_last_exit_is_complete(make: MakeMachine) -> None:
    """The device asks for the pause in the middle of the read: the guest has its value and no instruction more."""
    port, paused = Port(), threading.Event()
    machine = make(READ_PORT, devices=lambda machine: machine.pio.add(0x5000, 1, port, "port"))
    machine.memory.write(COUNTER, b"\x07")
    port.on_read = lambda: machine.pausing.pause_soon(paused.set)
    port.go.set()
    machine.start()
    assert paused.wait(FAR_S)
    assert machine.paused
    regs = machine.vcpus[0].vcpu.get_regs()
    assert regs.rip == BEHIND_IN
    assert regs.rax & 0xFF == 0x42
    assert machine.memory.read(COUNTER, 1) == b"\x07"
    port.on_read = lambda: None
    machine.resume()
    deadline = time.monotonic() + FAR_S
    while machine.memory.read(COUNTER, 1) != b"\x42":
        assert time.monotonic() < deadline


def test_a_vcpu_that_is_busy_elsewhere_cannot_be_paused_and_goes_on(make: MakeMachine) -> None:
    port = Port()
    machine = make(READ_PORT, devices=lambda machine: machine.pio.add(0x5000, 1, port, "port"))
    part = Part(machine)
    machine.pausing.parts.append(part)
    machine.start()
    assert port.asked.wait(FAR_S)
    with pytest.raises(StateError, match=r"^a vCPU is busy outside of the guest for longer than 0\.05 s$"):
        machine.pause(0.05)
    assert not machine.paused
    assert not machine.standstill.held
    assert part.calls == []
    port.go.set()
    machine.pause()
    assert machine.paused


def test_a_vcpus_thread_cannot_wait_for_itself(make: MakeMachine) -> None:
    port = Port()
    refused: list[str] = []

    def pause() -> None:
        try:
            machine.pause()
        except StateError as error:
            refused.append(str(error))

    machine = make(READ_PORT, devices=lambda machine: machine.pio.add(0x5000, 1, port, "port"))
    port.on_read = pause
    machine.start()
    assert port.asked.wait(FAR_S)
    assert refused == ["a vCPU's thread cannot wait until it stands itself: expected another, or pause_soon()"]
    port.on_read = lambda: None
    port.go.set()


def test_parts_rest_behind_the_vcpus_and_begin_before_them(make: MakeMachine) -> None:
    machine = make(COUNT)
    part = Part(machine)
    machine.pausing.parts.append(part)
    machine.start()
    machine.pause()
    with machine.pausing.still():
        pass
    machine.resume()
    assert part.calls == [("pause", 1), ("resume", 1)]


def test_a_part_that_fails_leaves_the_machine_running(make: MakeMachine) -> None:
    class Broken(Part):
        def pause(self) -> None:
            super().pause()
            raise OSError(5, "no")

    machine = make(COUNT)
    parts = [Part(machine), Broken(machine)]
    machine.pausing.parts += parts
    machine.start()
    with pytest.raises(OSError, match="no"):
        machine.pause()
    assert [[call for call, _ in part.calls] for part in parts] == [["pause", "resume"], ["pause", "resume"]]
    assert not machine.paused
    wait_for_change(machine)


def test_the_end_comes_to_a_paused_machine(make: MakeMachine) -> None:
    machine = make(COUNT)
    part = Part(machine)
    machine.pausing.parts.append(part)
    machine.start()
    machine.pause()
    assert stop(machine).end is End.STOPPED
    assert not machine.paused
    assert [call for call, _ in part.calls] == ["pause", "resume"]  # what it holds back it can finish
    machine.resume()
    with pytest.raises(StateError, match=r"^the machine has ended \(stopped\): expected one that runs$"):
        machine.pause()
    machine.close()
    with pytest.raises(StateError, match=r"^the machine is closed: expected an open one$"):
        machine.pause()


def test_a_machine_that_ends_meanwhile_is_not_paused(make: MakeMachine) -> None:
    port = Port()
    machine = make(READ_PORT, devices=lambda machine: machine.pio.add(0x5000, 1, port, "port"))
    machine.start()
    assert port.asked.wait(FAR_S)
    threading.Timer(0.05, lambda: machine.end(Outcome(End.STOPPED))).start()
    with pytest.raises(StateError, match=r"^the machine has ended"):
        machine.pause(FAR_S)
    port.go.set()


def test_a_timeout_counts_pauses(make: MakeMachine) -> None:
    machine = make(COUNT)
    machine.start()
    machine.pause()
    assert machine.wait(0.1).end is End.TIMEOUT


def test_a_paused_machine_has_not_halted_for_good(make: MakeMachine) -> None:
    machine = make(HALT)
    machine.start()
    machine.pause()
    assert not machine.ended.wait(1.3)
    machine.resume()
    assert machine.wait(FAR_S).end is End.HALTED


def test_closing_a_paused_machine_ends_it(make: MakeMachine) -> None:
    machine = make(COUNT, vcpus=3)
    machine.start()
    machine.pause()
    machine.close()
    assert not machine.paused
    assert not any(vcpu.thread.is_alive() for vcpu in machine.vcpus)


def test_many_threads_pause_and_resume(make: MakeMachine) -> None:
    machine = make(COUNT, vcpus=2)
    machine.start()

    def work() -> None:
        for _ in range(20):
            machine.pause()
            with machine.pausing.still():
                machine.resume()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FAR_S)
        assert not thread.is_alive()
    assert not machine.standstill.held
    wait_for_change(machine)


@pytest.fixture
def asleep(make: MakeMachine) -> Machine:
    """A machine in S3, whose waking vector is a loop that counts."""
    machine = make(ENTER_S3)
    machine.memory.write(0x20000, bytes.fromhex("b80010 8ed8") + COUNT)  # mov ax,0x1000; mov ds,ax
    machine.memory.write(FACS_ADDRESS + FACS_WAKING_VECTOR, (0x20000).to_bytes(4, "little"))
    machine.start()
    deadline = time.monotonic() + FAR_S
    while not machine.standstill.wait(machine.vcpus, 0.1) or not machine.standstill.held:
        assert time.monotonic() < deadline
    return machine


def test_the_vcpu_that_enters_s3_has_completed_its_exit(asleep: Machine) -> None:
    assert asleep.vcpus[0].vcpu.get_regs().rip == BEHIND_OUT


def test_a_machine_paused_asleep_wakes_up_when_it_goes_on(asleep: Machine) -> None:
    asleep.pause()
    asleep.board.acpi_pm.press_power_button()
    time.sleep(0.3)
    assert asleep.vcpus[0].vcpu.get_regs().rip == BEHIND_OUT
    assert counter(asleep) == 0
    asleep.resume()
    wait_for_change(asleep)


def test_a_machine_asleep_wakes_up_and_can_be_paused(asleep: Machine) -> None:
    asleep.board.acpi_pm.press_power_button()
    wait_for_change(asleep)
    asleep.pause()
    before = counter(asleep)
    time.sleep(0.02)
    assert counter(asleep) == before


def test_a_sleeping_machine_ends(asleep: Machine) -> None:
    assert stop(asleep).end is End.STOPPED


def test_a_wake_up_that_fails_ends_the_machine(asleep: Machine) -> None:
    class Broken:
        def restore(self, *args: object) -> None:
            raise OSError(22, "no such state")

    asleep.board._reset_state = Broken()  # type: ignore[assignment]
    asleep.board.acpi_pm.press_power_button()
    outcome = asleep.wait(FAR_S)
    assert outcome.end is End.ERROR
    assert "wake-up: OSError: [Errno 22] no such state" in outcome.detail
