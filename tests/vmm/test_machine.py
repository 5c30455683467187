# SPDX-License-Identifier: Apache-2.0
"""Whole machines with a few bytes of real-mode code, on every KVM there is."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tests.support.machines import KVMS, open_soft

from softkvm import abi, api
from softkvm.vmm.errors import ConfigError, ImageError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import GIB, MIB
from softkvm.vmm.outcome import End, Outcome

SPIN = bytes.fromhex("ebfe")  # jmp $
HALT = bytes.fromhex("fa f4 ebfc")  # cli; hlt; jmp
IDLE = bytes.fromhex("fb f4 ebfc")  # sti; hlt; jmp


def out(port: int, value: int, size: int = 1) -> bytes:
    """Return code that writes *value* to *port*."""
    load_port = b"\xba" + port.to_bytes(2, "little")
    return (
        load_port
        + {
            1: b"\xb0" + bytes([value & 0xFF]) + b"\xee",
            2: b"\xb8" + (value & 0xFFFF).to_bytes(2, "little") + b"\xef",
            4: b"\x66\xb8" + (value & 0xFFFFFFFF).to_bytes(4, "little") + b"\x66\xef",
        }[size]
    )


POWER_OFF = out(0x604, 5 << 10 | 1 << 13, 2)
MakeMachine = Callable[..., Machine]


@pytest.fixture(params=sorted(KVMS))
def make(request: pytest.FixtureRequest) -> Iterator[MakeMachine]:
    kvm: api.Kvm = KVMS[request.param]()
    machines: list[Machine] = []

    def make_machine(code: bytes, vcpus: int = 1, memory: int = 32 * MIB, **kwargs: object) -> Machine:
        machine = Machine(kvm, Config(memory, vcpus), **kwargs)  # type: ignore[arg-type]
        machines.append(machine)
        machine.load(code, raw=True)
        return machine

    yield make_machine
    for machine in machines:
        machine.close()
    kvm.close()


@pytest.mark.parametrize(
    ("code", "end"),
    [
        pytest.param(POWER_OFF, End.POWER_OFF, id="ACPI S5"),
        pytest.param(out(0x604, 0x2000, 2), End.POWER_OFF, id="S5 of a PIIX4"),
        pytest.param(out(0x605, 0x20), End.POWER_OFF, id="S5 of a PIIX4 by bytes"),
        pytest.param(out(0xB004, 0x2000, 2), End.POWER_OFF, id="its old place"),
        pytest.param(b"".join(out(0x8900, byte) for byte in b"Shutdown"), End.POWER_OFF, id="Shutdown"),
        pytest.param(out(0x64, 0xFE), End.RESET, id="keyboard controller"),
        pytest.param(out(0xCF9, 0x06), End.RESET, id="reset register"),
        pytest.param(out(0x92, 0x03), End.RESET, id="port 0x92"),
        pytest.param(out(0x505, 1), End.PANIC, id="pvpanic"),
        pytest.param(out(0xF4, 0x10, 4), End.DEBUG_EXIT, id="debug exit"),
        # lidt of an empty table, mov eax,cr0; or al,1; mov cr0,eax; mov ds,0x1000 in protected mode
        pytest.param(
            bytes.fromhex("fa 31c0 8ed8 0f011e0005 0f20c0 0c01 0f22c0 b80010 8ed8"), End.TRIPLE_FAULT, id="triple fault"
        ),
    ],
)
def test_every_end_has_its_outcome(make: MakeMachine, code: bytes, end: End) -> None:
    machine = make(code + HALT)
    outcome = machine.run(20)
    assert outcome.end is end, outcome
    if end is End.DEBUG_EXIT:
        assert outcome.status == 0x21


def test_timeout_ends_a_guest_that_spins(make: MakeMachine) -> None:
    machine = make(SPIN)
    started = time.monotonic()
    assert machine.run(0.2).end is End.TIMEOUT
    assert time.monotonic() - started < 10


def test_timeout_ends_a_guest_that_sleeps(make: MakeMachine) -> None:
    assert make(IDLE, vcpus=4).run(0.2).end is End.TIMEOUT


@pytest.mark.parametrize("vcpus", [1, 3])
def test_guest_that_halted_for_good_ends(make: MakeMachine, vcpus: int) -> None:
    """Nothing can wake it: interrupts are disabled, and the other vCPUs were never started."""
    outcome = make(HALT, vcpus=vcpus).run(60)
    assert outcome.end is End.HALTED, outcome


def test_guest_that_waits_for_an_interrupt_goes_on(make: MakeMachine) -> None:
    """The watch stops it again and again, and finds it awake or able to wake."""
    machine = make(IDLE)
    machine.start()
    assert not machine.ended.wait(2.5)
    machine.end(Outcome(End.STOPPED))
    assert machine.wait().end is End.STOPPED


def test_halted_guest_lives_on_where_that_is_asked_for() -> None:
    with open_soft() as kvm, Machine(kvm, Config(32 * MIB, end_when_halted=False)) as machine:
        machine.load(HALT, raw=True)
        assert machine.run(1.5).end is End.TIMEOUT


def test_first_end_counts(make: MakeMachine) -> None:
    machine = make(SPIN)
    machine.start()
    machine.end(Outcome(End.STOPPED, "first"))
    machine.end(Outcome(End.RESET, "second"))
    assert machine.wait() == Outcome(End.STOPPED, "first")


def test_a_handler_of_a_signal_may_end_a_machine_that_is_just_being_ended(make: MakeMachine) -> None:
    machine = make(SPIN)
    machine.start()
    kick = machine.vcpus[0].vcpu.kick

    def interrupted() -> None:  # in the middle of end(), on its thread: as a handler would
        machine.vcpus[0].vcpu.kick = kick  # type: ignore[method-assign]
        machine.end(Outcome(End.STOPPED))
        kick()

    machine.vcpus[0].vcpu.kick = interrupted  # type: ignore[method-assign]
    ender = threading.Thread(target=machine.end, args=(Outcome(End.RESET),), daemon=True)
    ender.start()
    ender.join(20)
    assert not ender.is_alive()
    assert machine.wait().end is End.RESET


def test_closing_a_running_machine_stops_it(make: MakeMachine) -> None:
    machine = make(SPIN, vcpus=2)
    machine.start()
    machine.close()
    machine.close()
    assert not any(vcpu.thread.is_alive() for vcpu in machine.vcpus)


def test_console_output_and_input(make: MakeMachine) -> None:
    output = bytearray()
    arrived = threading.Event()

    def console(data: bytes) -> None:
        output.extend(data)
        if b"?" in output:
            arrived.set()

    # print '?'; wait until LSR says that there is input; read it, add 1, print it; power off
    echo = out(0x3F8, ord("?")) + bytes.fromhex("bafd03 ec a801 74fb baf803 ec fec0 ee")
    machine = make(echo + POWER_OFF + HALT, console=console)
    machine.start()
    assert arrived.wait(20)
    machine.board.serial.feed(b"A")
    assert machine.wait(20).end is End.POWER_OFF
    assert bytes(output) == b"?B"


def test_repeated_string_io_reaches_the_device_byte_by_byte(make: MakeMachine) -> None:
    output = bytearray()
    # cld; mov si,text; mov cx,5; mov dx,0x3f8; rep outsb, with DS = CS
    body = bytes.fromhex("fc be0000 b90500 baf803 f36e") + POWER_OFF + HALT
    text_at = len(body)
    body = body.replace(b"\xbe\x00\x00", b"\xbe" + text_at.to_bytes(2, "little"), 1) + b"hello"
    machine = make(body, console=output.extend)
    assert machine.run(20).end is End.POWER_OFF
    assert bytes(output) == b"hello"


def test_port_61_gates_and_shows_counter_2(make: MakeMachine) -> None:
    # Linux calibrates its TSC so (pit_calibrate_tsc). Counter 2, mode 0, started with its gate closed: OUT is low and
    # stays; with the gate open OUT rises after 256 input clocks.
    start = out(0x61, 0) + out(0x43, 0xB0) + out(0x42, 0) + out(0x42, 1)
    store = bytes.fromhex("e461 b90020 8ed9 a20000")  # in al,0x61; ds = 0x2000; [0] = al
    wait = out(0x61, 1) + bytes.fromhex("e461 a820 74fa a20100")  # until bit 5; [1] = al
    machine = make(start + store + wait + POWER_OFF + HALT)
    assert machine.run(20).end is End.POWER_OFF
    closed, opened = machine.memory.read(0x20000, 2)
    assert closed & 0x23 == 0
    assert opened & 0x23 == 0x21


def test_word_to_the_clocks_ports_is_index_and_data(make: MakeMachine) -> None:
    # out 0x70, 0x5a50 as a word: byte 0x50 of the CMOS becomes 0x5a; in al,0x71 afterwards reads it
    code = out(0x70, 0x5A50, 2) + bytes.fromhex("e471 b90020 8ed9 a20000") + POWER_OFF + HALT
    machine = make(code)
    assert machine.run(20).end is End.POWER_OFF
    assert machine.memory.read(0x20000, 1) == b"\x5a"


def test_ports_without_device_read_ones(make: MakeMachine) -> None:
    # in eax,0x5658; out to 0x80 is lost; store the value at 0x2000:0 and stop
    code = bytes.fromhex("ba5856 66ed b90020 8ed9 66a30000") + POWER_OFF + HALT
    machine = make(code)
    assert machine.run(20).end is End.POWER_OFF
    assert machine.memory.read(0x20000, 4) == b"\xff" * 4


class Latch:
    """A memory-mapped register that inverts what is written to it."""

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        return ~self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


def test_mmio_reaches_a_device_on_the_memory_bus(make: MakeMachine) -> None:
    # mov ax,0xb000; mov ds,ax; mov dword [0x10],0x12345678; mov eax,[0x10]; mov cx,0x2000; mov ds,cx; mov [0],eax
    code = bytes.fromhex("b800b0 8ed8 66c706100078563412 66a11000 b90020 8ed9 66a30000") + POWER_OFF + HALT
    machine = make(code, memory=32 * MIB)
    # below 1 MiB there is RAM everywhere; shrink slot 0 so that 0xB0000 is nobody's
    region = abi.kvm_userspace_memory_region(slot=0)
    machine.vm.set_user_memory_region(region)
    region.memory_size = 0xA0000
    region.userspace_addr = machine.memory.ranges[0].hva
    machine.vm.set_user_memory_region(region)
    machine.mmio.add(0xB0000, 0x1000, Latch(), "latch")
    assert machine.run(20).end is End.POWER_OFF
    assert machine.memory.read(0x20000, 4) == (0xFFFFFFFF ^ 0x12345678).to_bytes(4, "little")


class Broken:
    """A device with a fault of ours."""

    def read(self, offset: int, size: int) -> int:
        raise ZeroDivisionError("device fault")

    def write(self, offset: int, size: int, value: int) -> None:
        raise ZeroDivisionError("device fault")


def test_exception_in_a_device_ends_the_machine_with_the_reason(make: MakeMachine) -> None:
    machine = make(out(0x1234, 1) + SPIN)
    machine.pio.add(0x1234, 1, Broken(), "broken")
    outcome = machine.run(20)
    assert outcome.end is End.ERROR
    assert "ZeroDivisionError: device fault" in outcome.detail
    assert isinstance(machine.failure, ZeroDivisionError)


def test_statistics_count_exits_by_reason(make: MakeMachine) -> None:
    machine = make(out(0x80, 1) * 10 + POWER_OFF + HALT)
    machine.run(20)
    stats = machine.stats()
    assert stats["vcpus"][0]["exits"]["KVM_EXIT_IO"]["count"] == 11
    assert stats["vcpus"][0]["exits"]["KVM_EXIT_IO"]["handler_ns"] > 0
    assert stats["wall_ns"] > 0


@pytest.mark.parametrize(
    ("memory", "vcpus", "message"),
    [
        (31 * MIB, 1, "memory of 31 MiB: expected 32 MiB to"),
        (1 << 41, 1, "memory of 2097152 MiB"),
        (256 * MIB, 0, "0 vCPUs: expected 1 to 16"),
        (256 * MIB, 17, "17 vCPUs: expected 1 to 16"),
    ],
)
def test_impossible_machines_are_refused(memory: int, vcpus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(memory, vcpus)


def test_biggest_machine_can_be_built(make: MakeMachine) -> None:
    machine = make(POWER_OFF + HALT, vcpus=16, memory=6 * GIB)
    assert machine.run(30).end is End.POWER_OFF


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "kernel is empty"),
        (b"#!/bin/sh\n", "unknown format"),
        (bytes(56) + b"ARM\x64" + bytes(100), "arm64 Image"),
        (b"\x1f\x8b" + bytes(100), "gzip"),
    ],
)
def test_files_that_are_no_kernel_are_named(make: MakeMachine, image: bytes, message: str) -> None:
    machine = make(SPIN)
    with pytest.raises(ImageError, match=message):
        machine.load(image)


def test_nul_in_the_command_line_is_refused(make: MakeMachine) -> None:
    with pytest.raises(ImageError, match="NUL"):
        make(SPIN).load(b"\x7fELF", None, "a\0b")
