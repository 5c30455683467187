# SPDX-License-Identifier: Apache-2.0
"""A vCPU's thread, and the way exits find their handlers.

An exit's way: ``vcpu.run()`` returns on the vCPU's thread, :meth:`VcpuThread.loop` looks ``exit_reason`` up in a
table of handlers, a handler for I/O asks the bus for the range, the range's device answers. One way in, one way out.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from softkvm import abi, api
from softkvm.abi.run_page import (
    EXIT,
    EXIT_REASON_D,
    IO_DATA_OFFSET_D,
    IO_Q,
    MMIO_DATA_Q,
    MMIO_IS_WRITE_B,
    MMIO_LEN_D,
    MMIO_PHYS_ADDR_Q,
)
from softkvm.vmm.bus import CACHE_ENTRIES
from softkvm.vmm.errors import show_traceback, unexpected
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.stats import REASONS, ExitStats

if TYPE_CHECKING:
    from softkvm.vmm.cpu_limits import Bandwidth
    from softkvm.vmm.machine import Machine

_IO = struct.Struct("<BBHIQ")  # kvm_run.io
_MASKS = {size: (1 << 8 * size) - 1 for size in range(1, 9)}
#: Bytes from an address to the end of the device's range, the offset in that, and the device's methods.
_MmioRoute: TypeAlias = tuple[int, int, Callable[[int, int], int], Callable[[int, int, int], None]]


class VcpuThread:
    """One vCPU, the thread that runs it, and its statistics."""

    def __init__(self, machine: Machine, index: int, vcpu: api.Vcpu) -> None:
        self.machine = machine
        self.index = index
        self.vcpu = vcpu
        self.stats = ExitStats()
        self.cpu_time_ns = 0
        self.bandwidth: Bandwidth | None = None
        self.thread = threading.Thread(target=self._main, name=f"vcpu {index}", daemon=True)
        self.handlers: list[Callable[[], None]] = [self._unexpected] * REASONS
        self.handlers[abi.KVM_EXIT_IO] = self._io
        self.handlers[abi.KVM_EXIT_MMIO] = self._mmio
        for reason, handler in _EXIT_HANDLERS.items():
            self.handlers[reason] = handler.__get__(self)
        self._shared = vcpu.shared
        self._words = self._shared.cast("I")
        self._quads = self._shared.cast("Q")
        # (is_out, size, the device's method, offset, data offset) by what tells a single access
        self._io_routes = machine.pio.new_cache()
        self._mmio_routes: dict[int, _MmioRoute | None] = machine.mmio.new_cache()

    def _main(self) -> None:
        try:
            self.loop()
        except Exception as error:  # a thread's exception must end the machine, not vanish
            self.machine.failure = error
            show_traceback(error)
            self.machine.end(Outcome(End.ERROR, f"vCPU {self.index}: {unexpected(error)}"))
        finally:
            self.cpu_time_ns = time.thread_time_ns()

    def loop(self) -> None:
        """Run the vCPU until the machine ends. The hot path: nothing here that is not needed per exit."""
        run = self.vcpu.run
        words = self._words
        handlers = self.handlers
        counts, handler_ns = self.stats.counts, self.stats.handler_ns
        clock = time.perf_counter_ns
        ended, standstill = self.machine.ended, self.machine.standstill
        if standstill.held:  # it starts paused
            standstill.stand(self)
            if ended.is_set():
                return
        apart = 0  # not in KVM_RUN, and in no handler
        start = clock()
        try:
            while True:
                try:
                    run()
                except (InterruptedError, BlockingIOError):
                    # EINTR: a kick; EAGAIN: a processor that waited for its start-up IPI was woken
                    after = clock()
                    self.stats.interrupts += 1
                    if standstill.held:
                        standstill.stand(self)
                    if self.bandwidth is not None and self.bandwidth.throttled:
                        self.bandwidth.wait(self)
                    if ended.is_set():  # also while it stood: a machine that has moved away must not run a step more
                        return
                    apart += clock() - after
                    continue
                after = clock()
                reason = words[EXIT_REASON_D]
                handlers[reason]()
                before = clock()
                counts[reason] += 1
                handler_ns[reason] += before - after
        finally:
            self.stats.guest_ns = clock() - start - apart - sum(handler_ns)

    def close(self) -> None:
        """Give back the vCPU."""
        self._words.release()
        self._quads.release()
        self.vcpu.close()

    # -- exit handlers

    def _io(self) -> None:
        """KVM_EXIT_IO: one access of up to 4 bytes, by the route that its direction, size and port have."""
        try:
            is_out, size, access, offset, at = self._io_routes[self._quads[IO_Q]]
        except KeyError:
            return self._io_slow()
        if self._words[IO_DATA_OFFSET_D] != at:
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
        direction, size, port, count, at = _IO.unpack_from(shared, EXIT)
        is_out = direction == abi.KVM_EXIT_IO_OUT
        found = pio.whole(port, size)
        if found is not None and count == 1 and len(self._io_routes) < CACHE_ENTRIES:
            access = found.device.write if is_out else found.device.read
            self._io_routes[self._quads[IO_Q]] = (is_out, size, access, port - found.start, at)
            if pio.find(port) is not found:  # it has gone meanwhile
                self._io_routes.pop(self._quads[IO_Q], None)
        for start in range(at, at + size * count, size):
            if is_out:
                pio.write(port, size, int.from_bytes(shared[start : start + size], "little"))
            else:
                shared[start : start + size] = pio.read(port, size).to_bytes(size, "little")

    def _mmio(self) -> None:
        """KVM_EXIT_MMIO: one access of up to 8 bytes."""
        quads = self._quads
        address = quads[MMIO_PHYS_ADDR_Q]
        size = self._words[MMIO_LEN_D]
        try:
            route = self._mmio_routes[address]
        except KeyError:
            route = self._mmio_route(address)
        if route is None or size > route[0]:
            quads[MMIO_DATA_Q] = _MASKS[size]  # a write is lost, a read finds ones
            return
        _, offset, read, write = route
        if self._shared[MMIO_IS_WRITE_B]:
            write(offset, size, quads[MMIO_DATA_Q] & _MASKS[size])
        else:
            quads[MMIO_DATA_Q] = read(offset, size) & _MASKS[size]

    def _mmio_route(self, address: int) -> _MmioRoute | None:
        """Find who answers at an address, and note it."""
        found = self.machine.mmio.find(address)
        route = None
        if found is not None:
            device = found.device
            route = (found.end - address, address - found.start, device.read, device.write)
        if len(self._mmio_routes) < CACHE_ENTRIES:
            self._mmio_routes[address] = route
            if self.machine.mmio.find(address) is not found:  # it has come or gone meanwhile
                self._mmio_routes.pop(address, None)
        return route

    def _nothing(self) -> None:
        """An exit that asks for nothing."""

    def _halted(self) -> None:
        """KVM_EXIT_HLT: only a KVM without interrupt chips leaves it to us, and then nothing can wake the vCPU."""
        self.machine.end(Outcome(End.HALTED, f"vCPU {self.index}"))

    def _shutdown(self) -> None:
        """KVM_EXIT_SHUTDOWN: a triple fault. On AMD KVM has reset the vCPU by then, and where it was is lost."""
        self.machine.reset_by_guest(
            Outcome(End.TRIPLE_FAULT, f"vCPU {self.index}{self.machine.board.where(self.vcpu)}")
        )

    def _system_event(self) -> None:
        """KVM_EXIT_SYSTEM_EVENT."""
        kind = self.vcpu.kvm_run.system_event.type
        end = _SYSTEM_EVENTS.get(kind)
        if end is None:
            self.machine.end(Outcome(End.ERROR, f"vCPU {self.index}: unknown system event {kind}"))
        elif end is End.RESET:
            self.machine.reset_by_guest(Outcome(end, "KVM_EXIT_SYSTEM_EVENT"))
        else:
            self.machine.end(Outcome(end, "KVM_EXIT_SYSTEM_EVENT"))

    def _hyperv(self) -> None:
        """KVM_EXIT_HYPERV: a SynIC's pages have changed, or a hypercall is ours to answer."""
        self.machine.hyperv.handle(self.index, self.vcpu.kvm_run.hyperv)

    def _internal_error(self) -> None:
        """KVM_EXIT_INTERNAL_ERROR: KVM cannot go on."""
        internal = self.vcpu.kvm_run.internal
        data = " ".join(f"{value:#x}" for value in internal.data[: min(internal.ndata, 16)])
        where = self.machine.board.where(self.vcpu)
        name = _INTERNAL_ERRORS.get(internal.suberror, f"suberror {internal.suberror}")
        self.machine.end(Outcome(End.ERROR, f"KVM: {name}, vCPU {self.index}{where}, data {data}"))

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
    abi.KVM_EXIT_HYPERV: VcpuThread._hyperv,
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
