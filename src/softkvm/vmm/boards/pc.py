# SPDX-License-Identifier: Apache-2.0
"""The PC: memory map, interrupt chips, devices, boot protocols and ACPI tables of an x86 machine."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from softkvm import abi, api
from softkvm.vmm.bios import services
from softkvm.vmm.boards import Board, Saving, pc_state
from softkvm.vmm.boards.pc_halt import halted_for_good
from softkvm.vmm.boards.pc_virtio import PCI_STRIDE, PcVirtio
from softkvm.vmm.boot import layout
from softkvm.vmm.cpuid import set_boot_lapic, set_boot_msrs, vcpu_cpuid
from softkvm.vmm.devices import (
    acpi_pm,
    cmos,
    debug_exit,
    hpet,
    i8042,
    pci,
    pci_config,
    piix,
    pvpanic,
    serial,
    shutdown_ports,
)
from softkvm.vmm.devices.vmgenid import GPE, VmGenId
from softkvm.vmm.errors import StateError
from softkvm.vmm.events import Event
from softkvm.vmm.hyperv import enable as enable_hyperv
from softkvm.vmm.hyperv import hyperv_cpuid
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.reset import ResetState
from softkvm.vmm.routing import pc_routing

if TYPE_CHECKING:
    from softkvm.vmm.boards.pc_firmware import Firmware
    from softkvm.vmm.boot import bzimage
    from softkvm.vmm.boot.image import Deadline, Image, Source
    from softkvm.vmm.boot.placement import Module
    from softkvm.vmm.machine import Machine

F = TypeVar("F", bound=pci.Function)
TSS_ADDRESS = 0xFEFFD000
IDENTITY_MAP_ADDRESS = 0xFEFFC000
FIRMWARE_SLOT = 2
_RESET_RIP = 0xFFF0


class Pc(Board):
    """An x86 board in *machine*; *resources* gets what closes its parts."""

    def __init__(
        self, machine: Machine, console: Callable[[bytes], None] | None, resources: contextlib.ExitStack
    ) -> None:
        self.machine = machine
        self._load_again: Callable[[], None] | None = None
        self.firmware: Firmware | None = None
        """What boots the machine, if no kernel is loaded."""
        self.cpuid: list[list[abi.kvm_cpuid_entry2]] = []
        """What each processor's CPUID says."""
        config, vm = machine.config, machine.vm
        self.memory = config.memory or GuestMemory(config.memory_size, files=config.memory_files)
        resources.callback(self.memory.close)
        if config.pin_memory:
            self.memory.pin()
        if vm.check_extension(abi.KVM_CAP_SET_TSS_ADDR):
            vm.set_tss_addr(TSS_ADDRESS)
        if vm.check_extension(abi.KVM_CAP_SET_IDENTITY_MAP_ADDR):
            vm.set_identity_map_addr(IDENTITY_MAP_ADDRESS)
        vm.create_irqchip()
        vm.set_gsi_routing(pc_routing())
        if config.pit:
            vm.create_pit2(abi.KVM_PIT_SPEAKER_DUMMY)  # with port 0x61, which gates counter 2
        self.memory.attach(vm)
        self._add_devices(console)
        if config.firmware is None:
            self.memory.alias(vm, FIRMWARE_SLOT, layout.RESET_FIRMWARE, layout.FIRMWARE_SIZE, layout.FIRMWARE)
        else:
            from softkvm.vmm.boards.pc_firmware import Firmware

            self.firmware = Firmware(self, config.firmware)
        self.virtio = PcVirtio(machine, self.pci_config, self.memory)
        self.devices["virtio"] = self.virtio
        resources.callback(self.virtio.close)
        timed = (self.serial, self.cmos, self.acpi_pm, self.hpet)
        for device in timed:
            if device is not None:
                resources.callback(device.close)
        self.parts = [device for device in timed if device is not None]

    def create_vcpus(self, kvm: api.Kvm) -> Iterator[api.Vcpu]:
        """Make the processors, the first of which boots the machine."""
        config, vm = self.machine.config, self.machine.vm
        self._kvm = kvm
        self._msr_indices = kvm.get_msr_index_list()
        supported = kvm.get_supported_cpuid()
        deadline_timer = bool(kvm.check_extension(abi.KVM_CAP_TSC_DEADLINE_TIMER))
        count = config.vcpus
        for apic_id in range(count):
            vcpu = vm.create_vcpu(apic_id)
            cpuid = vcpu_cpuid(supported, apic_id, count, deadline_timer=deadline_timer)
            if config.hyperv:
                enable_hyperv(vcpu, vm)
                cpuid = hyperv_cpuid(cpuid, vcpu.get_supported_hv_cpuid())
            if config.cpuid is not None:
                cpuid = config.cpuid(cpuid)
            self.cpuid.append(cpuid)
            vcpu.set_cpuid2(cpuid)
            set_boot_msrs(vcpu, cpuid)
            set_boot_lapic(vcpu, bootstrap=apic_id == 0)
            state = abi.KVM_MP_STATE_RUNNABLE if apic_id == 0 else abi.KVM_MP_STATE_UNINITIALIZED
            vcpu.set_mp_state(abi.kvm_mp_state(state))
            yield vcpu

    def built(self) -> None:
        """All parts are there: what they are now is what a reset and a wake-up from S3 bring back."""
        self._reset_state = ResetState.take(self._kvm, self.machine.vm, self._vcpus(), pit=self.machine.config.pit)
        plain: tuple[Saving, ...] = (self.i8042, self.port_a, self.pci_config, self.shutdown_port)
        self._kept = [(device, device.save()) for device in plain]
        if self.firmware is not None:
            self._load_again = self.firmware.start
            self.firmware.start()

    def _vcpus(self) -> list[api.Vcpu]:
        return [thread.vcpu for thread in self.machine.vcpus]

    def where(self, vcpu: api.Vcpu) -> str:
        """Say where a vCPU is, for a message; nothing if KVM has reset it."""
        rip = vcpu.get_regs().rip
        return "" if rip == _RESET_RIP else f" at RIP {rip:#x}"

    def halted_for_good(self) -> bool:
        """Whether nothing that reaches a processor with interrupts disabled can come any more."""
        return not any(may_act() for may_act in self.wakers) and halted_for_good(self.machine.vm, self._vcpus())

    def was_stopped(self) -> None:
        """Set PVCLOCK_GUEST_STOPPED for guests that have KVM's clock: Linux's watchdogs look at it."""
        for vcpu in self._vcpus():
            with contextlib.suppress(OSError):  # no clock, or a KVM that cannot
                vcpu.kvmclock_ctrl()

    def press_power_button(self) -> None:
        """Press it: the guest's operating system shuts down, if it listens."""
        self.acpi_pm.press_power_button()

    def flush(self) -> None:
        """Write out what the console holds back."""
        self.serial.flush()

    def reset(self) -> None:
        """Reset every part, and put the image into memory again, which keeps what else is in it.

        StateError if there is no image: the machine was not loaded.
        """
        if self._load_again is None:
            raise StateError("the machine has no image to begin anew from: it was not loaded")
        for device in (self.serial, self.hpet, self.cmos, self.acpi_pm):
            if device is not None:
                device.reset()
        self.virtio.reset()
        if self.firmware is None:
            self.vmgenid.reset()
        for kept, state in self._kept:
            kept.restore(state)
        self.crash_loaded = False
        self._reset_state.restore(self.machine.vm, self._vcpus())
        self._load_again()

    def _irq(self, line: int) -> Callable[[int], None]:
        """Return the callable that drives interrupt *line*."""
        irq_line = self.machine.vm.irq_line

        def set_irq(level: int) -> None:
            irq_line(line, level)

        return set_irq

    def _add_devices(self, console: Callable[[bytes], None] | None) -> None:
        ranges = self.memory.ranges
        above = ranges[1].end - ranges[1].start if len(ranges) > 1 else 0
        self.hpet = (
            hpet.Hpet(self.machine.vm.irq_line, replace_pit=self._replace_pit) if self.machine.config.hpet else None
        )
        self.serial = serial.Serial(console, self._irq(serial.COM1_IRQ))
        self.cmos = cmos.Cmos(self.memory.end_below_4g, above, self._rtc_irq)
        sleep = self._sleep if self.machine.config.firmware is None else None  # S3 is the firmware's affair
        self.acpi_pm = acpi_pm.AcpiPm(self._powered_off, self._irq(acpi_pm.SCI_IRQ), sleep=sleep)
        self.i8042 = i8042.I8042(lambda: self._reset("keyboard controller"))
        self.port_a = i8042.SystemControlPortA(lambda: self._reset("port 0x92"))
        self.pci_config = pci_config.PciConfig(acpi_pm.ResetRegister(lambda: self._reset("reset control register")))
        self.pci_config.add(0, 0, pci.host_bridge() if self.machine.config.firmware is None else piix.HostBridge())
        self.pvpanic = pvpanic.PvPanic(self.panicked)
        self.crash_loaded = False
        """Whether the guest has said that it panicked, and that a crash kernel goes on."""
        self.wakers: list[Callable[[], bool]] = []
        """Each tells whether a device may yet do something to a machine that has halted."""
        self.vmgenid: VmGenId = VmGenId(self.memory, lambda: self.acpi_pm.raise_event(GPE))
        self.debug_exit = debug_exit.DebugExit(self._debug_exit)
        self.bios = services.Bios(
            self.machine.current_vcpu,
            self.memory,
            lambda: layout.memory_map(self.memory),
            self.machine.pio,
            lambda: self._reset("BIOS"),
            self.machine.ended,
        )
        self.devices: dict[str, Saving] = {
            "com1": self.serial,
            "cmos": self.cmos,
            "acpi_pm": self.acpi_pm,
            "i8042": self.i8042,
            "port_a": self.port_a,
            "pci": self.pci_config,
            "bios": self.bios,
            "vmgenid": self.vmgenid,
        }
        """What has a state to save, by a name that stays."""
        if self.hpet is not None:
            self.devices["hpet"] = self.hpet
            self.machine.mmio.add(hpet.HPET_ADDRESS, hpet.HPET_SIZE, self.hpet, "hpet")
        add = self.machine.pio.add
        add(serial.COM1_PORT, serial.REGISTERS, self.serial, "com1")
        add(cmos.CMOS_PORT, 2, self.cmos, "cmos", width=1)
        add(acpi_pm.PM_BASE_PORT, acpi_pm.PM_BLOCK_SIZE, self.acpi_pm, "acpi-pm")
        add(i8042.DATA_PORT, 1, self.i8042.data_port, "i8042 data")
        add(i8042.COMMAND_PORT, 1, self.i8042.command_port, "i8042 command")
        add(i8042.SYSTEM_CONTROL_PORT_A, 1, self.port_a, "system control port A")
        add(pci_config.PCI_CONFIG_PORT, pci_config.PCI_CONFIG_SIZE, self.pci_config, "pci-config")
        add(pvpanic.PVPANIC_PORT, 1, self.pvpanic, "pvpanic")
        if self.machine.config.firmware is None:
            add(services.SERVICE_PORT, 1, self.bios, "bios")
            # With firmware the power-management block itself is there, if it is put there.
            old_pm1_control = shutdown_ports.OldPm1Control(self._powered_off)
            add(shutdown_ports.OLD_PM1_CNT_PORT, shutdown_ports.OLD_PM1_CNT_SIZE, old_pm1_control, "old pm1-control")
        self.shutdown_port: shutdown_ports.ShutdownPort = shutdown_ports.ShutdownPort(self._powered_off)
        self.devices["shutdown_port"] = self.shutdown_port
        add(shutdown_ports.SHUTDOWN_PORT, shutdown_ports.SHUTDOWN_SIZE, self.shutdown_port, "shutdown")
        add(debug_exit.DEBUG_EXIT_PORT, debug_exit.DEBUG_EXIT_SIZE, self.debug_exit, "debug-exit")

    # -- snapshots

    def save(self) -> dict[str, Any]:
        """The state of processors, chips and devices, while the machine stands; StateError with a firmware."""
        if self.firmware is not None:
            raise StateError("a machine that firmware boots cannot be saved: its ROM is not part of a snapshot")
        state = pc_state.save(
            self.machine.vm, self._vcpus(), self.devices, self.cpuid, self._msr_indices, pit=self.machine.config.pit
        )
        return {**state, "crash_loaded": self.crash_loaded}

    def restore(self, state: dict[str, Any], *, step_time: bool) -> None:
        """Take over a state, and drive the interrupt chips' lines as the devices do.

        The chips' own states say how the lines were, but not (KVM_GET_IRQCHIP) who drove them. SnapshotError for the
        state of another machine, or one that this KVM does not take. *step_time*: the guest's clocks went on meanwhile.
        """
        pc_state.restore(
            self.machine.vm,
            self._vcpus(),
            self.devices,
            self.cpuid,
            state,
            pit=self.machine.config.pit,
            step_time=step_time,
        )
        self.crash_loaded = bool(state["crash_loaded"])
        irq_line = self.machine.vm.irq_line
        irq_line(serial.COM1_IRQ, self.serial.irq_level)
        irq_line(acpi_pm.SCI_IRQ, self.acpi_pm.irq_level)
        if self.hpet is not None:
            self.hpet.drive_lines()
        else:
            irq_line(cmos.RTC_IRQ, self.cmos.irq_level)

    def files(self) -> list[str]:
        """Return the files that the devices have open."""
        return [file for transport in self.virtio.transports.values() for file in transport.device.files()]

    def let_go_of_files(self) -> None:
        """Let another process have the devices' files."""
        for transport in self.virtio.transports.values():
            with transport.lock:
                transport.device.let_go_of_files()

    def take_files_back(self) -> None:
        """Have them again."""
        for transport in self.virtio.transports.values():
            with transport.lock:
                transport.device.take_files_back()

    def new_identity(self, number: int) -> None:
        """The machine's past goes on twice, or may: tell the guest, whose random numbers must not come again."""
        if self.firmware is None:  # whose memory it lies in
            self.vmgenid.change()
        for transport in self.virtio.transports.values():
            transport.device.new_identity(number)

    def add_function(self, make: Callable[[int], F]) -> F:
        """Put a PCI function on the bus that *make* makes, of the address of its memory; return it."""
        slot = self.pci_config.free_device()
        function = make(layout.PCI_DEVICES + slot * PCI_STRIDE)
        function.connect(self.machine.pio, self.machine.mmio)
        self.pci_config.add(slot, 0, function)
        return function

    # -- what devices tell

    def _powered_off(self) -> None:
        self._end(Outcome(End.POWER_OFF))

    def _reset(self, by: str) -> None:
        if self.crash_loaded:
            self._end(Outcome(End.RESET, by))
        else:
            self.machine.reset_by_guest(Outcome(End.RESET, by))

    def _end(self, outcome: Outcome) -> None:
        """End as the guest asks for; what ends a crash kernel is the end of a panic."""
        self.machine.end(Outcome(End.PANIC, "pvpanic, with a crash kernel") if self.crash_loaded else outcome)

    def panicked(self, events: int) -> None:
        """The guest has told of *events*."""
        if events & pvpanic.PANICKED:
            self.machine.end(Outcome(End.PANIC, "pvpanic"))
        elif events & pvpanic.CRASH_LOADED:
            self.crash_loaded = True
        elif events & pvpanic.SHUTDOWN:
            self._powered_off()

    def _debug_exit(self, status: int) -> None:
        self.machine.end(Outcome(End.DEBUG_EXIT, f"status {status}", status))

    def _replace_pit(self, on: bool) -> None:
        """The HPET drives IRQ 0 from now on, or no more: KVM's PIT does not, or does again (KVM API, KVM_SET_PIT2)."""
        if self.machine.config.pit:
            state = self.machine.vm.get_pit2()
            state.flags = state.flags & ~abi.KVM_PIT_FLAGS_HPET_LEGACY | (abi.KVM_PIT_FLAGS_HPET_LEGACY if on else 0)
            self.machine.vm.set_pit2(state)

    def _rtc_irq(self, level: int) -> None:
        if self.hpet is not None:
            self.hpet.rtc_irq(level)
        else:
            self.machine.vm.irq_line(cmos.RTC_IRQ, level)
        if level:
            self.acpi_pm.rtc_alarm()

    # -- sleep

    def _sleep(self) -> None:
        """S3, entered by the vCPU on whose thread we are: a wake-up event has it go on at the waking vector.

        Memory and devices keep their state; processors and interrupt chips come up as after a reset. Source: ACPI
        specification 6.4, sections 16.3.1 (sleeping states), 5.2.10 (firmware waking vector).
        """
        self.machine.events.tell(Event.ASLEEP)
        self.machine.sleep(lambda: self.acpi_pm.wait_for_wake_up(0.1), self._wake_up)

    def _wake_up(self) -> None:
        self.machine.events.tell(Event.AWAKE)
        self._reset_state.restore(self.machine.vm, self._vcpus())
        from softkvm.vmm.boot import acpi
        from softkvm.vmm.boot.cpustate import jump_in_real_mode

        jump_in_real_mode(self.machine.vcpus[0].vcpu, acpi.waking_vector(self.memory))

    # -- boot

    def remember(
        self,
        kernel: Source | Image,
        initrd: Source | Image | None,
        command_line: str,
        *,
        modules: Sequence[Module] = (),
        raw: bool = False,
        entry: bzimage.Entry | None = None,
    ) -> None:
        """Begin anew from this image when the machine is reset, which is loaded already, or was before a snapshot."""
        self._load_again = functools.partial(
            self.load, kernel, initrd, command_line, modules=modules, raw=raw, entry=entry
        )

    def load(
        self,
        kernel: Source | Image,
        initrd: Source | Image | None = None,
        command_line: str = "",
        *,
        modules: Sequence[Module] = (),
        raw: bool = False,
        entry: bzimage.Entry | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        """Load *kernel*: a Linux kernel, an ELF file with a PVH note, a Multiboot image or, if *raw*, flat code.

        *kernel* and *initrd* are contents, or paths of files that hold them; a Multiboot or ELF kernel may be
        compressed with gzip. *initrd* is the first of *modules*; Linux gets them as one RAM disk. *entry* chooses
        among a Linux kernel's entries (default: its best). Raises ImageError for anything else and for what does not
        fit, LoadTimeout if *deadline* passes.
        """
        if self.firmware is not None:
            raise StateError("the machine's firmware boots it: no kernel can be loaded")
        self.remember(kernel, initrd, command_line, modules=modules, raw=raw, entry=entry)
        from softkvm.vmm.boards import pc_boot

        pc_boot.load(self, kernel, initrd, command_line, modules, raw=raw, entry=entry, deadline=deadline)
