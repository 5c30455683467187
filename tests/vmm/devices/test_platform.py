# SPDX-License-Identifier: Apache-2.0
"""Test device, fw_cfg, PCI functions, VMware port: the platform of test programs."""

import os
from typing import Any

import pytest

from softkvm import abi
from softkvm.vmm.bus import Bus
from softkvm.vmm.devices import fw_cfg, pci, pci_testdev, testdev, vmport
from softkvm.vmm.devices.pci_config import PciConfig


@pytest.fixture
def buses() -> tuple[Bus, Bus]:
    return Bus("I/O port", 16), Bus("memory", 52)


# -- test device


def test_latch_is_one_at_both_ports(buses: tuple[Bus, Bus]) -> None:
    pio, mmio = buses
    testdev.TestDevice(lambda line, level: None).attach(pio, mmio)
    pio.write(0xE0, 4, 0x12345678)
    assert [pio.read(0xE8 + i, 1) for i in range(4)] == [0x78, 0x56, 0x34, 0x12]
    pio.write(0xE2, 2, 0xABCD)
    assert pio.read(0xE0, 4) == 0xABCD5678


def test_lines_flush_console_and_memory(buses: tuple[Bus, Bus]) -> None:
    pio, mmio = buses
    lines: list[tuple[int, int]] = []
    flushed: list[int] = []
    printed = bytearray()
    device = testdev.TestDevice(lambda line, level: lines.append((line, level)), flushed.append, printed.extend)
    device.attach(pio, mmio)
    pio.write(0x200B, 4, 0x80)  # four bytes on one port: the line is the first
    pio.write(0x2017, 1, 0)
    pio.write(0xE4, 4, 0x401234)
    pio.write(0xF1, 1, ord("x"))
    mmio.write(0xFF00FFF8, 8, 0x1122334455667788)
    assert lines == [(11, 1), (23, 0)]
    assert flushed == [0x401000]
    assert printed == b"x"
    assert mmio.read(0xFF00FFFC, 4) == 0x11223344
    other = testdev.TestDevice(lambda line, level: None)
    other.restore(device.save())
    assert other.save() == device.save()


# -- fw_cfg


def test_items_are_read_byte_by_byte_and_end_in_zeroes() -> None:
    device = fw_cfg.FwCfg(fw_cfg.machine_items(0x1_2345_0000, 3, 2))

    def item(number: int, size: int) -> int:
        device.write(0, 2, number)
        return sum(device.read(1, 1) << 8 * i for i in range(size))

    assert item(fw_cfg.SIGNATURE, 4).to_bytes(4, "little") == b"QEMU"
    assert item(fw_cfg.RAM_SIZE, 8) == 0x1_2345_0000
    assert item(fw_cfg.NB_CPUS, 2) == 3
    assert item(fw_cfg.MAX_CPUS, 2) == 3
    assert item(0x11, 8) == 0
    assert item(fw_cfg.NB_CPUS, 4) == 3


# -- PCI


class _Constant:
    def read(self, offset: int, size: int) -> int:
        return 0x5A

    def write(self, offset: int, size: int, value: int) -> None:
        pass


def config(device: int, register: int) -> int:
    return 1 << 31 | device << 11 | register


def test_functions_answer_at_their_place_only() -> None:
    bus = PciConfig()
    bus.add(0, 0, pci.host_bridge())
    for device, expected in ((0, 0x12378086), (1, 0xFFFFFFFF)):
        bus.write(0, 4, config(device, 0))
        assert bus.read(4, 4) == expected
    bus.write(0, 4, config(0, 8))
    assert bus.read(4, 4) == 0x06000002
    assert bus.read(7, 1) == 0x06
    with pytest.raises(ValueError, match=r"00\.0"):
        bus.add(0, 0, pci.host_bridge())


def test_register_is_sized_and_moves_its_device(buses: tuple[Bus, Bus]) -> None:
    function = pci.Function(1, 2, 0)
    function.add_bar(0, pci.Bar(0x1000, _Constant(), False, "memory"), 0xF0000000)
    function.add_bar(1, pci.Bar(0x20, _Constant(), True, "ports"), 0xC000)
    function.connect(*buses)
    pio, mmio = buses
    assert mmio.read(0xF0000010, 1) == 0x5A
    assert pio.read(0xC01F, 1) == 0x5A
    function.write(0x10, 4, 0xFFFFFFFF)
    assert function.read(0x10, 4) == 0xFFFFF000
    function.write(0x14, 4, 0xFFFFFFFF)
    assert function.read(0x14, 4) == 0xFFFFFFE1
    assert mmio.find(0xF0000010) is None
    function.write(0x10, 4, 0xE0000000)
    assert mmio.read(0xE0000000, 1) == 0x5A
    function.write(0x04, 2, 0)  # decoding off
    assert mmio.find(0xE0000000) is None
    function.write(0x00, 4, 0)  # read-only
    assert function.read(0x00, 4) == 0x00020001


def test_two_registers_at_one_place_do_no_harm(buses: tuple[Bus, Bus]) -> None:
    function = pci.Function(1, 2, 0)
    function.add_bar(0, pci.Bar(0x1000, _Constant(), False, "one"), 0xF0000000)
    function.add_bar(1, pci.Bar(0x1000, _Constant(), False, "two"), 0xF0000000)
    function.connect(*buses)
    function.write(0x14, 4, 0xE0000000)
    assert [entry.start for entry in buses[1].ranges] == [0xE0000000, 0xF0000000]


class _Vm:
    """Notes ioeventfds; signals them when told."""

    def __init__(self, *, refuse: bool = False) -> None:
        self.fds: dict[int, int] = {}
        self.refuse = refuse

    def ioeventfd(self, fd: int, addr: int, len: int, datamatch: int | None = None, flags: int = 0) -> None:
        if self.refuse:
            raise OSError(22, "no")
        if flags & abi.KVM_IOEVENTFD_FLAG_DEASSIGN:
            del self.fds[addr]
        else:
            self.fds[addr] = fd


@pytest.mark.parametrize("is_io", [False, True])
def test_pci_test_device_counts_accesses_and_eventfds(buses: tuple[Bus, Bus], is_io: bool) -> None:
    vm = _Vm()
    device = pci_testdev.PciTestDevice(vm)
    device.connect(*buses)
    bus, base, target = (buses[0], 0xC000, 128) if is_io else (buses[1], 0xFEBFF000, 2048)

    def header() -> dict[str, Any]:
        return {"width": bus.read(base + 1, 1), "offset": bus.read(base + 4, 4), "data": bus.read(base + 8, 4)}

    assert header() == {"width": 0, "offset": 0, "data": 0}
    bus.write(base, 1, 0)
    assert header() == {"width": 1, "offset": target, "data": 0xFA}
    bus.write(base + target, 1, 0)
    assert bus.read(base + 12, 4) == 1
    bus.write(base, 1, 2)
    assert list(vm.fds) == [base + target + 2]
    os.eventfd_write(vm.fds[base + target + 2], 5)
    assert bus.read(base + 12, 4) == 5
    name = bytes(bus.read(base + 16 + i, 1) for i in range(24))
    assert name.startswith(b"portio-datamatch-eventfd" if is_io else b"mmio-datamatch-eventfd\0")
    bus.write(base, 1, 3)
    assert not vm.fds
    assert header()["width"] == 0
    device.close()


def test_pci_test_device_without_eventfds_takes_the_writes_itself(buses: tuple[Bus, Bus]) -> None:
    device = pci_testdev.PciTestDevice(_Vm(refuse=True))
    device.connect(*buses)
    buses[1].write(0xFEBFF000, 1, 2)
    buses[1].write(0xFEBFF000 + 2050, 1, 0x11)
    buses[1].write(0xFEBFF000 + 2050, 1, 0xFA)
    assert buses[1].read(0xFEBFF00C, 4) == 1


# -- VMware port


class _Registers:
    def __init__(self, **registers: int) -> None:
        self.regs = abi.kvm_regs(**registers)

    def get_regs(self) -> abi.kvm_regs:
        return abi.kvm_regs.from_buffer_copy(self.regs)

    def set_regs(self, regs: abi.kvm_regs) -> None:
        self.regs = regs


@pytest.mark.parametrize(
    ("rax", "rcx", "answer", "rbx"),
    [
        (vmport.MAGIC, vmport.GETVERSION, vmport.VERSION, vmport.MAGIC),
        (vmport.MAGIC, 0xFFF, 0xFFFFFFFF, 7),
        (0, vmport.GETVERSION, 0xFFFFFFFF, 7),
    ],
)
def test_vmware_port_answers_in_the_registers_of_its_caller(rax: int, rcx: int, answer: int, rbx: int) -> None:
    vcpu = _Registers(rax=rax, rcx=rcx, rbx=7)
    assert vmport.VmPort(lambda: vcpu).read(0, 4) == answer  # type: ignore[arg-type, return-value]
    assert vcpu.regs.rbx == rbx
