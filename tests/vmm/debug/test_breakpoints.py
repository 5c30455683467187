# SPDX-License-Identifier: Apache-2.0
"""INT3s in memory and what KVM_SET_GUEST_DEBUG is told (APM vol. 2, 13.1.1)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from softkvm import abi
from softkvm.vmm.debug.breakpoints import BreakpointError, Breakpoints, Kind, Point
from softkvm.vmm.debug.paging import MemoryFault, walk
from softkvm.vmm.memory import GuestMemory


class FlatVcpu:
    """A vCPU without paging."""

    def translate(self, linear_address: int) -> abi.kvm_translation:
        return abi.kvm_translation(linear_address=linear_address, physical_address=linear_address, valid=1)


VCPU: FlatVcpu = FlatVcpu()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(8 << 20)
    yield made
    made.close()


def software(address: int) -> Point:
    return Point(Kind.SOFTWARE, address, 1)


def test_int3s_come_and_go_with_the_machine(memory: GuestMemory) -> None:
    points = Breakpoints(memory, standing=True)
    memory.write(0x1000, b"abc")
    points.add(software(0x1001), VCPU)  # type: ignore[arg-type]
    assert memory.read(0x1000, 3) == b"abc"
    points.resume()
    assert memory.read(0x1000, 3) == b"a\xccc"
    assert points.hide(0x1000, memory.read(0x1000, 3)) == b"abc"
    memory.write(0x1000, points.keep(0x1000, b"xyz"))
    assert memory.read(0x1000, 3) == b"x\xccz"
    points.pause()
    points.pause()
    assert memory.read(0x1000, 3) == b"xyz"
    points.resume()
    memory.write(0x1001, b"q")  # the guest's own
    points.pause()
    assert memory.read(0x1000, 3) == b"xqz"
    points.resume()
    points.clear()
    assert memory.read(0x1000, 3) == b"xqz"


def test_two_addresses_of_one_byte_are_one_int3(memory: GuestMemory) -> None:
    class Aliased(FlatVcpu):
        def translate(self, linear_address: int) -> abi.kvm_translation:
            return super().translate(linear_address & 0xFFFF)

    points = Breakpoints(memory)
    memory.write(0x1000, b"a")
    for address in (0x1000, 0x71000):
        points.add(software(address), Aliased())  # type: ignore[arg-type]
    points.remove(software(0x1000))
    assert memory.read(0x1000, 1) == b"\xcc"
    points.remove(software(0x71000))
    assert memory.read(0x1000, 1) == b"a"


def test_debug_registers_are_as_the_manual_has_them(memory: GuestMemory) -> None:
    points = Breakpoints(memory)
    assert points.debug(step=False, block_interrupts=True).control == 0
    points.add(Point(Kind.EXECUTE, 0x1000, 1), VCPU)  # type: ignore[arg-type]
    points.add(Point(Kind.WRITE, 0x2002, 6), VCPU)  # type: ignore[arg-type]
    points.add(Point(Kind.ACCESS, 0x3000, 8), VCPU)  # type: ignore[arg-type]
    debug = points.debug(step=True, block_interrupts=False)
    assert debug.control == abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP | abi.KVM_GUESTDBG_SINGLESTEP
    assert list(debug.arch.debugreg[:4]) == [0x1000, 0x2002, 0x2004, 0x3000]
    # G0..G3; R/W and LEN: execute of 1, write of 2 (LEN 1), write of 4 (LEN 3), access of 8 (LEN 2)
    assert debug.arch.debugreg[7] & 0xFFFF00FF == 0xBD500000 | 0xAA
    assert points.hits(0b0110) == [Point(Kind.WRITE, 0x2002, 6)]
    with pytest.raises(BreakpointError):
        points.add(Point(Kind.WRITE, 0x4000, 1), VCPU)  # type: ignore[arg-type]


def _sregs(cr0: int, cr3: int, cr4: int, efer: int = 0) -> abi.kvm_sregs:
    return abi.kvm_sregs(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer)


def test_legacy_tables_are_walked(memory: GuestMemory) -> None:
    paging, pse, pae = 1 << 31 | 1, 1 << 4, 1 << 5
    assert walk(memory, _sregs(1, 0, 0), 0x1_0000_1234) == 0x1234, "no paging"
    memory.write(0x1000 + 4 * 3, (0x2000 | 3).to_bytes(4, "little"))
    memory.write(0x1000 + 4 * 4, (0x40_0000 | 5 << 13 | 0x83).to_bytes(4, "little"))
    memory.write(0x2000 + 4 * 7, (0x9000 | 1).to_bytes(4, "little"))
    assert walk(memory, _sregs(paging, 0x1000, 0), 3 << 22 | 7 << 12 | 0x123) == 0x9123
    assert walk(memory, _sregs(paging, 0x1000, pse), 4 << 22 | 0x12345) == 5 << 32 | 0x412345
    with pytest.raises(MemoryFault, match="not mapped"):
        walk(memory, _sregs(paging, 0x1000, 0), 0)
    memory.write(0x4000 + 8, (0x5000 | 1).to_bytes(8, "little"))
    memory.write(0x5000, (0x60_0000 | 0x81).to_bytes(8, "little"))
    memory.write(0x5000 + 8, (0x6000 | 1).to_bytes(8, "little"))
    memory.write(0x6000 + 8 * 2, (1 << 63 | 0x7000 | 1).to_bytes(8, "little"))
    assert walk(memory, _sregs(paging, 0x4000, pae), 1 << 30 | 0x54321) == 0x654321
    assert walk(memory, _sregs(paging, 0x4000, pae), 1 << 30 | 1 << 21 | 2 << 12 | 0xFF) == 0x70FF
    with pytest.raises(MemoryFault, match="out of RAM"):
        walk(memory, _sregs(paging, 0x7FFF000, pae), 0)
