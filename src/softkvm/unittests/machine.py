# SPDX-License-Identifier: Apache-2.0
"""The machine that a test program runs on: the PC of :mod:`softkvm.vmm` with the suite's test devices.

It also remembers each vCPU's last exits, for the report of a test that hangs.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from softkvm import abi, api
from softkvm.reports.result import Place
from softkvm.unittests.options import Platform
from softkvm.unittests.symbols import Symbols
from softkvm.vmm.devices import fw_cfg, hyperv_testdev, pci_testdev, testdev, vmport
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.routing import pc_routing
from softkvm.vmm.sint_routes import SintRoutes
from softkvm.vmm.stats import REASONS
from softkvm.vmm.vcpu_thread import VcpuThread

LAST_EXITS = 8
PCI_TESTDEV_SLOT = 2

_UNION = 32  # offset of the union in kvm_run
_UNION_SIZE = 24
_IO = struct.Struct("<BBHIQ")
_MMIO = struct.Struct("<Q8sIB")

_STATES = {
    abi.KVM_MP_STATE_UNINITIALIZED: "waits for INIT",
    abi.KVM_MP_STATE_INIT_RECEIVED: "waits for SIPI",
    abi.KVM_MP_STATE_HALTED: "halted",
    abi.KVM_MP_STATE_SIPI_RECEIVED: "starts",
}


class Exit(NamedTuple):
    """An exit to the monitor: its reason and the union's first bytes, which say what was asked for."""

    reason: int
    data: bytes

    def __str__(self) -> str:
        name = abi.EXIT_REASON_NAMES.get(self.reason, str(self.reason)).removeprefix("KVM_EXIT_")
        if self.reason == abi.KVM_EXIT_IO:
            direction, size, port, count, _ = _IO.unpack_from(self.data)
            times = f" x{count}" if count != 1 else ""
            return f"{name} {'out' if direction == abi.KVM_EXIT_IO_OUT else 'in'} {port:#x}/{size}{times}"
        if self.reason == abi.KVM_EXIT_MMIO:
            address, value, size, is_write = _MMIO.unpack_from(self.data)
            what = f"write {int.from_bytes(value[:size], 'little'):#x} to" if is_write else "read"
            return f"{name} {what} {address:#x}/{size}"
        return name


class TestMachine(Machine):
    """A machine for one test program. ``exits[i]`` are vCPU i's last exits."""

    __test__ = False  # pytest: not a test class

    def __init__(
        self, kvm: api.Kvm, platform: Platform, vcpus: int, console: Callable[[bytes], None] | None = None
    ) -> None:
        self.platform = platform
        self._console = console
        self._hyperv_testdev: hyperv_testdev.HypervTestDevice | None = None
        config = Config(
            platform.memory_size,
            vcpus,
            cpuid=platform.cpu.apply,
            pit=platform.pit,
            hyperv=platform.cpu.hyperv,
            devices=self._add_test_devices,
        )
        super().__init__(kvm, config, console)
        self.exits = [deque[Exit](maxlen=LAST_EXITS) for _ in self.vcpus]
        for thread, exits in zip(self.vcpus, self.exits, strict=True):
            _remember(thread, exits)

    def _add_test_devices(self, machine: Machine) -> None:
        config = machine.config
        testdev.TestDevice(self.vm.irq_line, self._flush_page, self._console).attach(self.pio, self.mmio)
        items = fw_cfg.machine_items(config.memory_size, config.vcpus, config.vcpus - 1)
        self.pio.add(fw_cfg.FW_CFG_PORT, fw_cfg.FW_CFG_SIZE, fw_cfg.FwCfg(items), "fw_cfg")
        if self.platform.vmport:
            self.pio.add(vmport.VMPORT, 4, vmport.VmPort(self.current_vcpu), "vmport")
        if self.platform.hyperv_testdev:
            routes = SintRoutes(self.vm, pc_routing())
            device = self._hyperv_testdev = hyperv_testdev.HypervTestDevice(self.hyperv, self.memory, routes)
            self.pio.add(hyperv_testdev.CONTROL_PORT, hyperv_testdev.CONTROL_SIZE, device, "hyperv-testdev")
        self._pci_testdev = pci_testdev.PciTestDevice(self.vm)
        self._pci_testdev.connect(self.pio, self.mmio)
        self.board.pci_config.add(PCI_TESTDEV_SLOT, 0, self._pci_testdev)

    def close(self) -> None:
        """Give back everything, the test device's eventfds too."""
        self._pci_testdev.close()
        super().close()
        if self._hyperv_testdev is not None:
            self._hyperv_testdev.close()

    def _flush_page(self, gpa: int) -> None:
        """Take the page at *gpa* out of KVM's page tables: its next use is a fault."""
        zap = getattr(self.vm, "zap_gfn_range", None)
        if zap is not None:
            zap(gpa >> 12, 1)

    def places(self, symbols: Symbols) -> list[Place]:
        """Return where every vCPU stands; the machine must have ended."""
        return [self._place(thread, symbols) for thread in self.vcpus]

    def _place(self, thread: VcpuThread, symbols: Symbols) -> Place:
        exits = tuple(str(entry) for entry in self.exits[thread.index])
        try:
            rip = thread.vcpu.get_regs().rip
            sregs = thread.vcpu.get_sregs()
            state = _STATES.get(thread.vcpu.get_mp_state().mp_state, "")
        except OSError as error:
            return Place(thread.index, 0, "", f"registers cannot be read: {error}", exits)
        linear = rip if sregs.efer & abi.EFER_LMA and sregs.cs.l else sregs.cs.base + rip
        if not sregs.cr0 & abi.X86_CR0_PE:
            state = f"{state}, real mode".lstrip(", ")
        return Place(thread.index, linear, symbols.name(linear), state, exits)


def _remember(thread: VcpuThread, exits: deque[Exit]) -> None:
    """Let *thread* note every exit in *exits* before it handles it."""
    shared = thread.vcpu.shared
    append = exits.append
    end = _UNION + _UNION_SIZE

    def noting(reason: int, handler: Callable[[], None]) -> Callable[[], None]:
        def note() -> None:
            append(Exit(reason, bytes(shared[_UNION:end])))
            handler()

        return note

    for reason in range(REASONS):
        thread.handlers[reason] = noting(reason, thread.handlers[reason])
