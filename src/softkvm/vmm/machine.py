# SPDX-License-Identifier: Apache-2.0
"""A machine: memory, buses, devices and vCPU threads on the KVM API, its life and its sleep."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from softkvm import abi, api
from softkvm.vmm.bios import services
from softkvm.vmm.boot import acpi, bzimage, firmware, flat, layout, loaders, multiboot, pvh
from softkvm.vmm.boot.cpustate import jump_in_real_mode
from softkvm.vmm.boot.image import Deadline, Image, Source
from softkvm.vmm.boot.loaders import Kind
from softkvm.vmm.boot.placement import Module
from softkvm.vmm.bus import Bus
from softkvm.vmm.cpuid import set_boot_lapic, set_boot_msrs, vcpu_cpuid
from softkvm.vmm.devices import acpi_pm, cmos, debug_exit, hpet, i8042, pci, pci_config, pvpanic, serial
from softkvm.vmm.errors import ConfigError, ImageError
from softkvm.vmm.memory import MIB, GuestMemory
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.reset import ResetState
from softkvm.vmm.routing import pc_routing
from softkvm.vmm.vcpu_thread import VcpuThread

MAX_VCPUS = 16
MIN_MEMORY = 32 * MIB
MAX_MEMORY = 1 << 40

TSS_ADDRESS = 0xFFFBD000
IDENTITY_MAP_ADDRESS = 0xFFFBC000


@dataclass(frozen=True, slots=True)
class Config:
    """The size of a machine; ConfigError if it is one that we do not build."""

    memory_size: int = 256 * MIB
    vcpus: int = 1
    cpuid: Callable[[list[abi.kvm_cpuid_entry2]], list[abi.kvm_cpuid_entry2]] | None = None
    """Last word on every vCPU's CPUID table: gets what it would be, returns what it is."""
    pit: bool = True
    """Whether there is an i8254."""
    hpet: bool = True
    """Whether there is a high precision event timer."""
    devices: Callable[[Machine], None] | None = None
    """Called after the standard devices are on the buses, to add more."""

    def __post_init__(self) -> None:
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise ConfigError(f"{self.vcpus} vCPUs: expected 1 to {MAX_VCPUS}")
        if not MIN_MEMORY <= self.memory_size <= MAX_MEMORY:
            raise ConfigError(
                f"memory of {self.memory_size // MIB} MiB: expected {MIN_MEMORY // MIB} MiB to {MAX_MEMORY >> 40} TiB"
            )


class Machine:
    """A PC on *kvm*: ``load`` an image, ``start`` it, ``wait`` for its end, ``close`` it.

    *console* gets what the guest writes to COM1, in pieces, on a thread of the machine's.
    """

    def __init__(
        self, kvm: api.Kvm, config: Config | None = None, console: Callable[[bytes], None] | None = None
    ) -> None:
        self.config = config or Config()
        self.ended = threading.Event()
        self.outcome: Outcome | None = None
        self.failure: BaseException | None = None
        """The exception behind an outcome of kind ``ERROR``, if there was one."""
        self.started_ns = 0
        self.ended_ns = 0
        self.sleeping = False
        """In S3: vCPUs other than the one that went there stand still."""
        self._woken = threading.Condition()
        self._standing = 0  # vCPUs in sleep_on
        self._end_lock = threading.Lock()
        self._closed = False
        self.pio = Bus("I/O port", 16)
        self.mmio = Bus("memory", 52)

        self.vcpus: list[VcpuThread] = []
        with contextlib.ExitStack() as resources:
            self._build(kvm, console, resources)
            self._resources = resources.pop_all()

    def _build(self, kvm: api.Kvm, console: Callable[[bytes], None] | None, resources: contextlib.ExitStack) -> None:
        """Make the parts; *resources* gets what closes them."""
        self.memory = GuestMemory(self.config.memory_size)
        resources.callback(self.memory.close)
        self.vm = kvm.create_vm()
        resources.callback(self.vm.close)
        if self.vm.check_extension(abi.KVM_CAP_SET_TSS_ADDR):
            self.vm.set_tss_addr(TSS_ADDRESS)
        if self.vm.check_extension(abi.KVM_CAP_SET_IDENTITY_MAP_ADDR):
            self.vm.set_identity_map_addr(IDENTITY_MAP_ADDRESS)
        self.vm.create_irqchip()
        self.vm.set_gsi_routing(pc_routing())
        if self.config.pit:
            self.vm.create_pit2(abi.KVM_PIT_SPEAKER_DUMMY)  # with port 0x61, which gates counter 2
        self.memory.attach(self.vm)
        self._add_devices(console)
        for device in (self.serial, self.cmos, self.acpi_pm, self.hpet):
            if device is not None:
                resources.callback(device.close)
        self._create_vcpus(kvm, resources)
        if self.config.devices is not None:
            self.config.devices(self)
        self._reset_state = ResetState.take(self.vm, [thread.vcpu for thread in self.vcpus])

    def _create_vcpus(self, kvm: api.Kvm, resources: contextlib.ExitStack) -> None:
        supported = kvm.get_supported_cpuid()
        deadline_timer = bool(kvm.check_extension(abi.KVM_CAP_TSC_DEADLINE_TIMER))
        count = self.config.vcpus
        for apic_id in range(count):
            vcpu = self.vm.create_vcpu(apic_id)
            cpuid = vcpu_cpuid(supported, apic_id, count, deadline_timer=deadline_timer)
            if self.config.cpuid is not None:
                cpuid = self.config.cpuid(cpuid)
            vcpu.set_cpuid2(cpuid)
            set_boot_msrs(vcpu, cpuid)
            set_boot_lapic(vcpu, bootstrap=apic_id == 0)
            state = abi.KVM_MP_STATE_RUNNABLE if apic_id == 0 else abi.KVM_MP_STATE_UNINITIALIZED
            vcpu.set_mp_state(abi.kvm_mp_state(state))
            thread = VcpuThread(self, apic_id, vcpu)
            resources.callback(thread.close)
            self.vcpus.append(thread)

    def _irq(self, line: int) -> Callable[[int], None]:
        """Return the callable that drives interrupt *line*."""
        irq_line = self.vm.irq_line

        def set_irq(level: int) -> None:
            irq_line(line, level)

        return set_irq

    def _add_devices(self, console: Callable[[bytes], None] | None) -> None:
        ranges = self.memory.ranges
        above = ranges[1].end - ranges[1].start if len(ranges) > 1 else 0
        self.hpet = hpet.Hpet(self.vm.irq_line, replace_pit=self._replace_pit) if self.config.hpet else None
        self.serial = serial.Serial(console, self._irq(serial.COM1_IRQ))
        self.cmos = cmos.Cmos(self.memory.end_below_4g, above, self._rtc_irq)
        self.acpi_pm = acpi_pm.AcpiPm(self._powered_off, self._irq(acpi_pm.SCI_IRQ), sleep=self._sleep)
        self.i8042 = i8042.I8042(lambda: self._reset("keyboard controller"))
        self.pci_config = pci_config.PciConfig(acpi_pm.ResetRegister(lambda: self._reset("reset control register")))
        self.pci_config.add(0, 0, pci.host_bridge())
        self.pvpanic = pvpanic.PvPanic(self._panicked)
        self.debug_exit = debug_exit.DebugExit(self._debug_exit)
        self.bios = services.Bios(
            self.current_vcpu,
            self.memory,
            lambda: layout.memory_map(self.memory),
            self.pio,
            lambda: self._reset("BIOS"),
            self.ended,
        )
        if self.hpet is not None:
            self.mmio.add(hpet.HPET_ADDRESS, hpet.HPET_SIZE, self.hpet, "hpet")
        add = self.pio.add
        add(serial.COM1_PORT, serial.REGISTERS, self.serial, "com1")
        add(cmos.CMOS_PORT, 2, self.cmos, "cmos")
        add(acpi_pm.PM_BASE_PORT, acpi_pm.PM_BLOCK_SIZE, self.acpi_pm, "acpi-pm")
        add(i8042.DATA_PORT, 1, self.i8042.data_port, "i8042 data")
        add(i8042.COMMAND_PORT, 1, self.i8042.command_port, "i8042 command")
        add(pci_config.PCI_CONFIG_PORT, pci_config.PCI_CONFIG_SIZE, self.pci_config, "pci-config")
        add(services.SERVICE_PORT, 1, self.bios, "bios")
        add(pvpanic.PVPANIC_PORT, 1, self.pvpanic, "pvpanic")
        add(debug_exit.DEBUG_EXIT_PORT, debug_exit.DEBUG_EXIT_SIZE, self.debug_exit, "debug-exit")

    # -- what devices tell

    def _powered_off(self) -> None:
        self.end(Outcome(End.POWER_OFF))

    def _reset(self, by: str) -> None:
        self.end(Outcome(End.RESET, by))

    def _panicked(self, events: int) -> None:
        if events & pvpanic.PANICKED:
            self.end(Outcome(End.PANIC, "pvpanic"))

    def _debug_exit(self, status: int) -> None:
        self.end(Outcome(End.DEBUG_EXIT, f"status {status}", status))

    def _replace_pit(self, on: bool) -> None:
        """The HPET drives IRQ 0 from now on, or no more: KVM's PIT does not, or does again (KVM API, KVM_SET_PIT2)."""
        if self.config.pit:
            state = self.vm.get_pit2()
            state.flags = state.flags & ~abi.KVM_PIT_FLAGS_HPET_LEGACY | (abi.KVM_PIT_FLAGS_HPET_LEGACY if on else 0)
            self.vm.set_pit2(state)

    def _rtc_irq(self, level: int) -> None:
        if self.hpet is not None:
            self.hpet.rtc_irq(level)
        else:
            self.vm.irq_line(cmos.RTC_IRQ, level)
        if level:
            self.acpi_pm.rtc_alarm()

    def current_vcpu(self) -> api.Vcpu:
        """Return the vCPU on whose thread we are: for a device that looks at the registers of its caller."""
        current = threading.current_thread()
        return next(thread.vcpu for thread in self.vcpus if thread.thread is current)

    # -- sleep

    def _sleep(self) -> None:
        """S3, entered by the vCPU on whose thread we are: wait for a wake-up event, go on at the waking vector.

        Memory and devices keep their state; processors and interrupt chips come up as after a reset. Source: ACPI
        specification 6.4, sections 16.3.1 (sleeping states), 5.2.10 (firmware waking vector).
        """
        self.sleeping = True
        current = threading.current_thread()
        for other in self.vcpus:
            if other.thread is not current:
                other.vcpu.kick()
        while not (self.acpi_pm.wait_for_wake_up(0.1) and self._standing == len(self.vcpus) - 1):
            if self.ended.is_set():
                return
        _complete_exit(self.current_vcpu())
        self._reset_state.restore(self.vm, [thread.vcpu for thread in self.vcpus])
        jump_in_real_mode(self.vcpus[0].vcpu, acpi.waking_vector(self.memory))
        with self._woken:
            self.sleeping = False
            self._woken.notify_all()

    def sleep_on(self, vcpu: VcpuThread) -> None:
        """Let *vcpu*'s thread stand until the machine is awake again."""
        with self._woken:
            self._standing += 1
            while self.sleeping and not self.ended.is_set():
                self._woken.wait(0.1)
            self._standing -= 1

    # -- life

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
        vcpu = self.vcpus[0].vcpu
        if "\0" in command_line:
            raise ImageError("command line holds a NUL character")
        with contextlib.ExitStack() as files:
            image = files.enter_context(Image.of(kernel, "kernel", self.memory.size, deadline))
            if initrd is not None:
                ramdisk = files.enter_context(Image.of(initrd, "initrd", self.memory.size, deadline))
                modules = [Module(ramdisk), *modules]
            if raw:
                flat.load(vcpu, self.memory, image, deadline)
                return
            image, kind = loaders.recognize(image, self.memory.size, deadline)
            if entry is not None and kind is not Kind.LINUX:
                raise ImageError(f"kernel is no Linux kernel: it has no {entry.value}-bit entry to choose")
            arguments = command_line.encode("utf-8", "surrogateescape")
            modules = [module for module in modules if module.image.size or module.command_line]
            rsdp = acpi.write_tables(self.memory, range(self.config.vcpus), with_hpet=self.config.hpet)
            if kind is Kind.LINUX:
                bzimage.load(vcpu, self.memory, image, modules, arguments, rsdp, entry=entry, deadline=deadline)
            elif kind is Kind.MULTIBOOT:
                multiboot.load(vcpu, self.memory, image, arguments, modules, deadline)
            elif kind is Kind.ELF:
                pvh.load(vcpu, self.memory, image, modules, arguments, rsdp, deadline)
            else:
                raise ImageError(loaders.describe_unknown(image))
            firmware.install(self.vm, self.memory, pit=self.config.pit)

    def start(self) -> None:
        """Let all vCPUs run."""
        self.started_ns = time.monotonic_ns()
        for vcpu in self.vcpus:
            vcpu.thread.start()

    def end(self, outcome: Outcome) -> None:
        """End the machine; the first outcome counts. From any thread; does not wait."""
        with self._end_lock:
            if self._closed:
                return
            if self.outcome is None:
                self.outcome = outcome
                self.ended_ns = time.monotonic_ns()
            self.ended.set()
            for vcpu in self.vcpus:
                vcpu.vcpu.kick()

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Wait for the end, which comes with outcome TIMEOUT after *timeout_s*; return it when all vCPUs stand."""
        if not self.ended.wait(timeout_s):
            self.end(Outcome(End.TIMEOUT, f"{timeout_s:g} s"))
        self._join()
        self.serial.flush()
        assert self.outcome is not None
        return self.outcome

    def _join(self) -> None:
        """Wait for the vCPU threads. Each was kicked; kick again in case one was between two runs."""
        for vcpu in self.vcpus:
            while vcpu.thread.is_alive():
                vcpu.thread.join(0.5)
                if vcpu.thread.is_alive():
                    vcpu.vcpu.kick()

    def run(self, timeout_s: float | None = None) -> Outcome:
        """Start, wait, return the outcome."""
        self.start()
        return self.wait(timeout_s)

    def close(self) -> None:
        """End the machine if it runs, and give back everything it holds."""
        if self._closed:
            return
        if self.started_ns:
            self.end(Outcome(End.STOPPED))
            self._join()
        with self._end_lock:
            self._closed = True
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """Return wall and processor time, and what every vCPU did; the KVM's own counters where it has some."""
        vcpus = []
        for vcpu in self.vcpus:
            entry = {"cpu_ns": vcpu.cpu_time_ns, **vcpu.stats.as_dict()}
            kvm_stats = getattr(vcpu.vcpu, "stats", None)
            if kvm_stats is not None:
                try:
                    entry["kvm"] = kvm_stats()
                except OSError as error:
                    entry["kvm_error"] = str(error)
            vcpus.append(entry)
        return {
            "wall_ns": (self.ended_ns or time.monotonic_ns()) - self.started_ns,
            "vcpus": vcpus,
        }


def _complete_exit(vcpu: api.Vcpu) -> None:
    """Let KVM finish the access that it left KVM_RUN for, without running the guest (KVM API, 5: immediate_exit)."""
    run = vcpu.kvm_run
    run.immediate_exit = 1
    try:
        vcpu.run()
    except InterruptedError:
        pass
    finally:
        run.immediate_exit = 0
