# SPDX-License-Identifier: Apache-2.0
"""A machine: memory, buses, devices and vCPU threads on the KVM API, and the way exits find their handlers.

An exit's way: ``vcpu.run()`` returns on the vCPU's thread, :meth:`VcpuThread.loop` looks ``exit_reason`` up in a
table of handlers, a handler for I/O asks the bus for the range, the range's device answers. One way in, one way out.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from softkvm import abi, api
from softkvm.vmm.boot import acpi, bzimage, elf, firmware, flat, multiboot, pvh
from softkvm.vmm.boot.cpustate import jump_in_real_mode
from softkvm.vmm.bus import CACHE_ENTRIES, Bus
from softkvm.vmm.cpuid import set_boot_lapic, set_boot_msrs, vcpu_cpuid
from softkvm.vmm.devices import acpi_pm, cmos, debug_exit, hpet, i8042, pci_config, pvpanic, serial
from softkvm.vmm.errors import ConfigError, ImageError
from softkvm.vmm.memory import MIB, GuestMemory
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.reset import ResetState
from softkvm.vmm.routing import pc_routing
from softkvm.vmm.stats import REASONS, ExitStats

MAX_VCPUS = 16
MIN_MEMORY = 32 * MIB
MAX_MEMORY = 1 << 40

TSS_ADDRESS = 0xFFFBD000
IDENTITY_MAP_ADDRESS = 0xFFFBC000

_EXIT_REASON_U32 = 2  # index of kvm_run.exit_reason in the shared page seen as u32
_IO = struct.Struct("<BBHIQ")  # kvm_run.io
_UNION = 32  # offset of the union in kvm_run
_IO_KEY_U32 = 8  # direction, size and port in one word
_IO_COUNT_U32 = 9
_IO_DATA_OFFSET_U32 = 10
_MMIO_ADDRESS_U64 = 4
_MMIO_DATA_U64 = 5
_MMIO_LEN_U32 = 12
_MMIO_IS_WRITE = 52
_MASKS = {size: (1 << 8 * size) - 1 for size in range(1, 9)}

OTHER_ARCHITECTURES = (
    (56, b"ARM\x64", "arm64 Image"),
    (48, b"RISCV\0\0\0", "RISC-V Image"),
    (0, b"\x1f\x8b", "gzip-compressed file"),
)


@dataclass(frozen=True, slots=True)
class Config:
    """The size of a machine; ConfigError if it is one that we do not build."""

    memory_size: int = 256 * MIB
    vcpus: int = 1
    cpuid: Callable[[list[abi.kvm_cpuid_entry2]], list[abi.kvm_cpuid_entry2]] | None = None
    """Last word on every vCPU's CPUID table: gets what it would be, returns what it is."""
    pit: bool = True
    """Whether there is an i8254."""
    hpet: bool = False
    """Whether there is a high precision event timer."""
    devices: Callable[[Machine], None] | None = None
    """Called after the standard devices are on the buses, to add more."""

    def __post_init__(self) -> None:
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise ConfigError(f"{self.vcpus} vCPUs: expected 1 to {MAX_VCPUS}")
        if not MIN_MEMORY <= self.memory_size <= MAX_MEMORY:
            raise ConfigError(
                f"memory of {self.memory_size // MIB} MiB: expected {MIN_MEMORY // MIB} MiB to {MAX_MEMORY // MIB} MiB"
            )


class VcpuThread:
    """One vCPU, the thread that runs it, and its statistics."""

    def __init__(self, machine: Machine, index: int, vcpu: api.Vcpu) -> None:
        self.machine = machine
        self.index = index
        self.vcpu = vcpu
        self.stats = ExitStats()
        self.cpu_time_ns = 0
        self.thread = threading.Thread(target=self._main, name=f"vcpu {index}", daemon=True)
        self.handlers: list[Callable[[], None]] = [self._unexpected] * REASONS
        self.handlers[abi.KVM_EXIT_IO] = self._io
        self.handlers[abi.KVM_EXIT_MMIO] = self._mmio
        for reason, handler in _EXIT_HANDLERS.items():
            self.handlers[reason] = handler.__get__(self)
        self._shared = vcpu.shared
        self._words = self._shared.cast("I")
        self._quads = self._shared.cast("Q")
        # (is_out, size, the device's method, offset, data offset) by the word that tells the access
        self._io_routes = machine.pio.new_cache()

    def _main(self) -> None:
        try:
            self.loop()
        except Exception as error:  # a thread's exception must end the machine, not vanish
            self.machine.failure = error
            self.machine.end(Outcome(End.ERROR, f"vCPU {self.index}: {type(error).__name__}: {error}"))
        finally:
            self.cpu_time_ns = time.thread_time_ns()

    def loop(self) -> None:
        """Run the vCPU until the machine ends. The hot path: nothing here that is not needed per exit."""
        run = self.vcpu.run
        words = self._words
        handlers = self.handlers
        counts, handler_ns = self.stats.counts, self.stats.handler_ns
        clock = time.perf_counter_ns
        ended = self.machine.ended
        guest_ns = 0
        before = clock()
        try:
            while True:
                try:
                    run()
                except (InterruptedError, BlockingIOError):
                    # EINTR: a kick; EAGAIN: a processor that waited for its start-up IPI was woken
                    after = clock()
                    guest_ns += after - before
                    before = after
                    self.stats.interrupts += 1
                    if ended.is_set():
                        return
                    if self.machine.sleeping:
                        self.machine.sleep_on(self)
                        before = clock()
                    continue
                after = clock()
                guest_ns += after - before
                reason = words[_EXIT_REASON_U32]
                handlers[reason]()
                before = clock()
                counts[reason] += 1
                handler_ns[reason] += before - after
        finally:
            self.stats.guest_ns = guest_ns

    def close(self) -> None:
        """Give back the vCPU."""
        self._words.release()
        self._quads.release()
        self.vcpu.close()

    # -- exit handlers

    def _io(self) -> None:
        """KVM_EXIT_IO: one access of up to 4 bytes, by the route that its direction, size and port have."""
        words = self._words
        try:
            is_out, size, access, offset, at = self._io_routes[words[_IO_KEY_U32]]
        except KeyError:
            return self._io_slow()
        if words[_IO_COUNT_U32] != 1 or words[_IO_DATA_OFFSET_U32] != at:
            return self._io_slow()
        shared = self._shared
        if is_out:
            access(offset, size, shared[at] if size == 1 else int.from_bytes(shared[at : at + size], "little"))
        elif size == 1:
            shared[at] = access(offset, 1) & 0xFF
        else:
            shared[at : at + size] = (access(offset, size) & _MASKS[size]).to_bytes(size, "little")
        return None

    def _io_slow(self) -> None:
        """Any KVM_EXIT_IO: *count* accesses of *size* bytes at *port*, data in the shared page."""
        shared = self._shared
        pio = self.machine.pio
        direction, size, port, count, at = _IO.unpack_from(shared, _UNION)
        is_out = direction == abi.KVM_EXIT_IO_OUT
        found = pio.find(port)
        if found and port + size <= found.end and len(self._io_routes) < CACHE_ENTRIES:
            access = found.device.write if is_out else found.device.read
            self._io_routes[self._words[_IO_KEY_U32]] = (is_out, size, access, port - found.start, at)
        for start in range(at, at + size * count, size):
            if is_out:
                pio.write(port, size, int.from_bytes(shared[start : start + size], "little"))
            else:
                shared[start : start + size] = pio.read(port, size).to_bytes(size, "little")

    def _mmio(self) -> None:
        """KVM_EXIT_MMIO: one access of up to 8 bytes."""
        address = self._quads[_MMIO_ADDRESS_U64]
        size = self._words[_MMIO_LEN_U32]
        mask = _MASKS[size]
        found = self.machine.mmio.find(address)
        if found is None or address + size > found.end:
            self._quads[_MMIO_DATA_U64] = mask  # a write is lost, a read finds ones
        elif self._shared[_MMIO_IS_WRITE]:
            found.device.write(address - found.start, size, self._quads[_MMIO_DATA_U64] & mask)
        else:
            self._quads[_MMIO_DATA_U64] = found.device.read(address - found.start, size) & mask

    def _nothing(self) -> None:
        """An exit that asks for nothing."""

    def _halted(self) -> None:
        """KVM_EXIT_HLT: only a KVM without interrupt chips leaves it to us, and then nothing can wake the vCPU."""
        self.machine.end(Outcome(End.STOPPED, f"vCPU {self.index} halted"))

    def _shutdown(self) -> None:
        """KVM_EXIT_SHUTDOWN: a triple fault."""
        rip = self.vcpu.get_regs().rip
        self.machine.end(Outcome(End.TRIPLE_FAULT, f"vCPU {self.index} at RIP {rip:#x}"))

    def _system_event(self) -> None:
        """KVM_EXIT_SYSTEM_EVENT."""
        kind = self.vcpu.kvm_run.system_event.type
        end = _SYSTEM_EVENTS.get(kind)
        if end is None:
            self.machine.end(Outcome(End.ERROR, f"vCPU {self.index}: unknown system event {kind}"))
        else:
            self.machine.end(Outcome(end, "KVM_EXIT_SYSTEM_EVENT"))

    def _internal_error(self) -> None:
        """KVM_EXIT_INTERNAL_ERROR: KVM cannot go on."""
        internal = self.vcpu.kvm_run.internal
        data = " ".join(f"{value:#x}" for value in internal.data[: min(internal.ndata, 16)])
        rip = self.vcpu.get_regs().rip
        name = _INTERNAL_ERRORS.get(internal.suberror, f"suberror {internal.suberror}")
        self.machine.end(Outcome(End.ERROR, f"KVM: {name}, vCPU {self.index} at RIP {rip:#x}, data {data}"))

    def _fail_entry(self) -> None:
        """KVM_EXIT_FAIL_ENTRY: the processor refused the guest state."""
        reason = self.vcpu.kvm_run.fail_entry.hardware_entry_failure_reason
        self.machine.end(Outcome(End.ERROR, f"KVM: entry failed for hardware reason {reason:#x}"))

    def _unexpected(self) -> None:
        """An exit reason that this machine did not ask for."""
        reason = self.vcpu.kvm_run.exit_reason
        name = abi.EXIT_REASON_NAMES.get(reason, str(reason))
        self.machine.end(Outcome(End.ERROR, f"vCPU {self.index}: unexpected exit {name}"))


_EXIT_HANDLERS: dict[int, Callable[[VcpuThread], None]] = {
    abi.KVM_EXIT_HLT: VcpuThread._halted,
    abi.KVM_EXIT_IRQ_WINDOW_OPEN: VcpuThread._nothing,
    abi.KVM_EXIT_SHUTDOWN: VcpuThread._shutdown,
    abi.KVM_EXIT_FAIL_ENTRY: VcpuThread._fail_entry,
    abi.KVM_EXIT_INTR: VcpuThread._nothing,
    abi.KVM_EXIT_SET_TPR: VcpuThread._nothing,
    abi.KVM_EXIT_INTERNAL_ERROR: VcpuThread._internal_error,
    abi.KVM_EXIT_SYSTEM_EVENT: VcpuThread._system_event,
}

_SYSTEM_EVENTS = {
    abi.KVM_SYSTEM_EVENT_SHUTDOWN: End.POWER_OFF,
    abi.KVM_SYSTEM_EVENT_RESET: End.RESET,
    abi.KVM_SYSTEM_EVENT_CRASH: End.PANIC,
}

_INTERNAL_ERRORS = {
    abi.KVM_INTERNAL_ERROR_EMULATION: "an instruction could not be emulated",
    abi.KVM_INTERNAL_ERROR_SIMUL_EX: "simultaneous exceptions",
    abi.KVM_INTERNAL_ERROR_DELIVERY_EV: "exit during event delivery",
    abi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "unexpected hardware exit",
}


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
            self.vm.create_pit2()
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
        self.serial = serial.Serial(console, self._irq(serial.COM1_IRQ))
        self.cmos = cmos.Cmos(self.memory.end_below_4g, above, self._rtc_irq)
        self.acpi_pm = acpi_pm.AcpiPm(self._powered_off, self._irq(acpi_pm.SCI_IRQ), sleep=self._sleep)
        self.i8042 = i8042.I8042(lambda: self._reset("keyboard controller"))
        self.pci_config = pci_config.PciConfig(acpi_pm.ResetRegister(lambda: self._reset("reset control register")))
        self.pvpanic = pvpanic.PvPanic(self._panicked)
        self.debug_exit = debug_exit.DebugExit(self._debug_exit)
        self.hpet = hpet.Hpet(self.vm.irq_line) if self.config.hpet else None
        if self.hpet is not None:
            self.mmio.add(hpet.HPET_ADDRESS, hpet.HPET_SIZE, self.hpet, "hpet")
        add = self.pio.add
        add(serial.COM1_PORT, serial.REGISTERS, self.serial, "com1")
        add(cmos.CMOS_PORT, 2, self.cmos, "cmos")
        add(acpi_pm.PM_BASE_PORT, acpi_pm.PM_BLOCK_SIZE, self.acpi_pm, "acpi-pm")
        add(i8042.DATA_PORT, 1, self.i8042.data_port, "i8042 data")
        add(i8042.COMMAND_PORT, 1, self.i8042.command_port, "i8042 command")
        add(pci_config.PCI_CONFIG_PORT, pci_config.PCI_CONFIG_SIZE, self.pci_config, "pci-config")
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

    def _rtc_irq(self, level: int) -> None:
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

    def load(self, kernel: bytes, initrd: bytes | None = None, command_line: str = "", *, raw: bool = False) -> None:
        """Load *kernel*: a bzImage, an ELF file with a PVH note, a Multiboot image or, if *raw*, flat real-mode code.

        Raises ImageError for anything else and for what does not fit.
        """
        vcpu = self.vcpus[0].vcpu
        if raw:
            flat.load(vcpu, self.memory, kernel)
            return
        if "\0" in command_line:
            raise ImageError("command line holds a NUL character")
        arguments = command_line.encode("utf-8", "surrogateescape")
        rsdp = acpi.write_tables(self.memory, range(self.config.vcpus), with_hpet=self.config.hpet)
        if multiboot.find_header(kernel) and not (elf.is_elf(kernel) and elf.parse(kernel).pvh_entry):
            multiboot.load(vcpu, self.memory, kernel, arguments, [(initrd, b"")] if initrd else ())
            firmware.install(self.vm, self.memory, pit=self.config.pit)
        elif elf.is_elf(kernel):
            pvh.load(vcpu, self.memory, kernel, initrd, arguments, rsdp)
        elif bzimage.is_bzimage(kernel):
            bzimage.load(vcpu, self.memory, kernel, initrd, arguments, rsdp)
        else:
            raise ImageError(_describe_unknown(kernel))

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


def _describe_unknown(image: bytes) -> str:
    """Say what a file is that no loader takes."""
    for offset, magic, what in OTHER_ARCHITECTURES:
        if image[offset : offset + len(magic)] == magic:
            return f"kernel is a(n) {what}: expected an x86-64 bzImage or an ELF file with a PVH note"
    if not image:
        return "kernel is empty"
    return "kernel has an unknown format: expected an x86-64 bzImage or an ELF file with a PVH note"


def read_image(path: Path, what: str) -> bytes:
    """Read a kernel or an initrd; ImageError names *what* and the file if that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{what} {path}: {error.strerror or error}") from None
