# SPDX-License-Identifier: Apache-2.0
"""A vCPU's thread: which device an exit goes to, also while ranges come and go."""

from __future__ import annotations

import softkvm
from softkvm.abi.run_page import EXIT
from softkvm.vmm.bus import Bus
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB

GPA, PORT = 0xD000_0000, 0x1234


class Register:
    """A device of 8 bytes that notes what it is asked."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return self.value >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def mmio(machine: Machine, gpa: int, size: int, data: int = 0, *, write: bool = False) -> int:
    """Have vCPU 0's thread handle a KVM_EXIT_MMIO; return the data afterwards."""
    shared = machine.vcpus[0].vcpu.shared
    shared[EXIT : EXIT + 8] = gpa.to_bytes(8, "little")
    shared[EXIT + 8 : EXIT + 16] = data.to_bytes(8, "little")
    shared[EXIT + 16 : EXIT + 21] = size.to_bytes(4, "little") + bytes([write])
    machine.vcpus[0]._mmio()
    return int.from_bytes(shared[EXIT + 8 : EXIT + 16], "little")


def pio_in(machine: Machine, port: int) -> int:
    """Have vCPU 0's thread handle a KVM_EXIT_IO, one byte in; return it."""
    shared = machine.vcpus[0].vcpu.shared
    shared[EXIT : EXIT + 8] = bytes([0, 1]) + port.to_bytes(2, "little") + (1).to_bytes(4, "little")
    shared[EXIT + 8 : EXIT + 16] = (4096).to_bytes(8, "little")
    machine.vcpus[0]._io()
    return shared[4096]


def leave_behind_first_look(bus: Bus, start: int) -> None:
    """Let the range at *start* go right behind the next look-up, as another vCPU's thread may do it."""
    for name in ("find", "whole"):
        look = getattr(bus, name)

        def once(*args: int, look: object = look) -> object:
            for taken in ("find", "whole"):
                bus.__dict__.pop(taken, None)
            found = look(*args)  # type: ignore[operator]
            bus.remove(start)
            return found

        bus.__dict__[name] = once


def machine() -> Machine:
    return Machine(softkvm.open(), Config(memory_size=32 * MIB))


def test_an_access_to_memory_goes_to_the_device_whose_range_holds_all_of_it() -> None:
    with machine() as built:
        device = Register(0x1122_3344_5566_7788)
        built.mmio.add(GPA, 8, device, "register")
        for _ in range(2):  # looked up, and known
            assert mmio(built, GPA, 4) == 0x5566_7788
            assert mmio(built, GPA + 6, 2) == 0x1122
            assert mmio(built, GPA + 6, 4) == 0xFFFF_FFFF  # beyond its end
            assert mmio(built, GPA + 8, 8) == (1 << 64) - 1
            mmio(built, GPA + 4, 2, 0xABCD_1234, write=True)
        assert device.writes == [(4, 2, 0x1234)] * 2


def test_a_device_that_comes_or_goes_is_found_or_not_found_by_the_next_access() -> None:
    with machine() as built:
        assert mmio(built, GPA, 4) == 0xFFFF_FFFF
        built.mmio.add(GPA, 8, Register(7), "register")
        assert mmio(built, GPA, 4) == 7
        built.mmio.remove(GPA)
        assert mmio(built, GPA, 4) == 0xFFFF_FFFF


def test_a_device_that_goes_while_it_is_looked_up_is_not_kept() -> None:
    with machine() as built:
        built.mmio.add(GPA, 8, Register(7), "register")
        leave_behind_first_look(built.mmio, GPA)
        assert mmio(built, GPA, 4) == 7
        assert mmio(built, GPA, 4) == 0xFFFF_FFFF
        built.pio.add(PORT, 8, Register(7), "register")
        leave_behind_first_look(built.pio, PORT)
        pio_in(built, PORT)
        assert pio_in(built, PORT) == 0xFF
