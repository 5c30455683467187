# SPDX-License-Identifier: Apache-2.0
"""Every device: one that was restored goes on as the one that was saved, whatever its guest has done to it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softkvm import abi, api
from softkvm.vmm import devices
from softkvm.vmm.boot import layout
from softkvm.vmm.bus import Bus
from softkvm.vmm.devices.acpi_pm import AcpiPm, ResetRegister
from softkvm.vmm.devices.cmos import Cmos
from softkvm.vmm.devices.debug_exit import DebugExit
from softkvm.vmm.devices.fw_cfg import FwCfg, FwCfgDma, machine_items
from softkvm.vmm.devices.hpet import Hpet
from softkvm.vmm.devices.i6300esb import I6300Esb
from softkvm.vmm.devices.i8042 import I8042, SystemControlPortA
from softkvm.vmm.devices.pci import Function, host_bridge
from softkvm.vmm.devices.pci_config import PciConfig
from softkvm.vmm.devices.pci_msix import Msix
from softkvm.vmm.devices.pvpanic import PvPanic
from softkvm.vmm.devices.serial import Serial
from softkvm.vmm.devices.shutdown_ports import ShutdownPort
from softkvm.vmm.devices.testdev import TestDevice
from softkvm.vmm.devices.vmgenid import VmGenId
from softkvm.vmm.devices.vmport import VmPort
from softkvm.vmm.memory import MIB, GuestMemory
from softkvm.vmm.virtio.device import VirtioDevice

NS = 1_000_000_000
START_NS = 1_000_000_000 * NS


class SavableDevice(Protocol):
    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...
    def save(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class World:
    """What a device sees and does: a clock, and the calls that it makes."""

    def __init__(self) -> None:
        self.now_ns = START_NS
        self.calls: list[tuple[object, ...]] = []

    def clock(self) -> int:
        return self.now_ns

    def note(self, *what: object) -> None:
        self.calls.append(what)


class Registers:
    """The caller of the VMware port: without its magic number."""

    def get_regs(self) -> abi.kvm_regs:
        return abi.kvm_regs()


class TestDeviceOnBus:
    """The test device has a range for each of its parts."""

    __test__ = False

    def __init__(self, world: World) -> None:
        self.device = TestDevice(world.note, world.note, world.note)
        self.pio = Bus("I/O port", 16)
        self.device.attach(self.pio, Bus("memory", 52))
        self.save, self.restore = self.device.save, self.device.restore

    def read(self, offset: int, size: int) -> int:
        return self.pio.read(0xE0 + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.pio.write(0xE0 + offset, size, value)


def pci_config(world: World) -> PciConfig:
    config = PciConfig(ResetRegister(world.note))
    config.add(0, 0, host_bridge())
    return config


def serial(world: World) -> Serial:
    uart = Serial(None, world.note)
    uart.feed(b"some input")
    return uart


class GenerationInMemory:
    """A guest reads the generation ID; that it changes is the machine's doing."""

    def __init__(self, world: World) -> None:
        self.memory = GuestMemory(MIB)
        self.device = VmGenId(self.memory, world.note)
        self.device.change(bytes(16))
        self.save, self.restore = self.device.save, self.device.restore

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.memory.read(layout.VM_GENERATION + offset, size), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.device.change(bytes([value & 0xFF]) * 16)


class MsixVm:
    """Where messages go."""

    def __init__(self, world: World) -> None:
        self.world = world

    def signal_msi(self, msi: abi.kvm_msi) -> int:
        self.world.note(bytes(msi))
        return 1


def msix(world: World) -> Msix:
    device = Msix(Function(0x1AF4, 0x1044, 0), MsixVm(world), 4, 1, 0xE000_0000, "test")
    device.trigger(1)
    return device


MAKERS: dict[type, tuple[int, Callable[[World], Any]]] = {
    AcpiPm: (16, lambda world: AcpiPm(world.note, world.note, world.clock, world.note)),
    ResetRegister: (1, lambda world: ResetRegister(world.note)),
    Cmos: (2, lambda world: Cmos(1 << 28, 0, world.note, world.clock)),
    DebugExit: (4, lambda world: DebugExit(world.note)),
    FwCfgDma: (8, lambda world: FwCfgDma(FwCfg({}), GuestMemory(MIB))),
    FwCfg: (2, lambda world: FwCfg(machine_items(1 << 28, 2, 1))),
    Hpet: (0x160, lambda world: Hpet(world.note, world.clock, world.note)),
    I6300Esb: (0x70, lambda world: I6300Esb(world.note, 0xFE008000, world.clock)),
    Msix: (0x40, msix),
    VmGenId: (16, GenerationInMemory),
    I8042: (5, lambda world: I8042(world.note, world.note)),
    SystemControlPortA: (1, lambda world: SystemControlPortA(world.note)),
    Function: (64, lambda world: host_bridge()),
    PciConfig: (8, pci_config),
    PvPanic: (1, lambda world: PvPanic(world.note)),
    Serial: (8, serial),
    ShutdownPort: (1, lambda world: ShutdownPort(world.note)),
    TestDevice: (16, TestDeviceOnBus),
    VmPort: (4, lambda world: VmPort(lambda: cast(api.Vcpu, Registers()))),
}


def test_no_device_is_forgotten() -> None:
    """Whatever under vmm/devices can be saved is in the table; what is put together of such is tested by its parts.

    Virtio's devices and their parts are not: they are driven by queues, and tested with them.
    """
    found = set()
    for module in pkgutil.iter_modules(devices.__path__, devices.__name__ + "."):
        if module.name.startswith(f"{devices.__name__}.virtio_"):
            continue
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if kind.__module__ == module.name and "save" in vars(kind) and not issubclass(kind, VirtioDevice):
                found.add(kind)
    assert found == set(MAKERS)


@dataclass
class Access:
    """Offsets are taken within the device's range."""

    offset: int
    size: int
    value: int | None
    wait_ns: int


accesses = st.lists(
    st.builds(
        Access,
        st.integers(0, 0x15F),
        st.sampled_from([1, 1, 1, 2, 4, 4, 8]),
        st.one_of(
            st.none(),
            st.sampled_from([0x00, 0x01, 0x06, 0x82, 0xD1, 0xFF, 0x8000_0000]),
            st.integers(0, (1 << 32) - 1),
        ),
        st.sampled_from([0, 0, 1000, NS // 3, 2 * NS]),
    ),
    max_size=25,
)


def drive(device: SavableDevice, world: World, program: list[Access], size: int) -> list[int]:
    """Carry out *program*; what the reads found."""
    found = []
    for access in program:
        world.now_ns += access.wait_ns
        width = min(access.size, size)
        offset = access.offset % size // width * width
        if access.value is None:
            found.append(device.read(offset, width))
        else:
            device.write(offset, width, access.value & (1 << 8 * width) - 1)
    return found


@pytest.mark.parametrize("kind", MAKERS, ids=lambda kind: kind.__name__)
@given(before=accesses, after=accesses)
@settings(max_examples=50)
def test_restored_device_goes_on_as_the_saved_one(kind: type, before: list[Access], after: list[Access]) -> None:
    size, make = MAKERS[kind]
    world, other_world = World(), World()
    device, other = make(world), make(other_world)
    for timed in (device, other):
        if kind in (AcpiPm, Cmos, Hpet, I6300Esb, Serial):
            timed.close()  # no thread: time passes when the program says so
    drive(device, world, before, size)
    other_world.now_ns = world.now_ns
    state = device.save()
    other.restore(state)
    assert other.save() == state
    world.calls.clear()
    other_world.calls.clear()
    assert drive(device, world, after, size) == drive(other, other_world, after, size)
    assert world.calls == other_world.calls
    assert device.save() == other.save()
