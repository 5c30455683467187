# SPDX-License-Identifier: Apache-2.0
"""Stops a machine and lets it go on: all of it, some vCPUs, or one of them by an instruction.

What a vCPU stops at comes to its own thread (KVM_EXIT_DEBUG), which stands from then on and leaves word. Who controls
the debugger takes that, one stop at a time (:meth:`Debugger.wait`), and then the whole machine stands, as for
``Machine.pause()``: registers, memory and breakpoints are looked at and changed only then.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.closing import Closing
from softkvm.vmm.debug.breakpoints import Breakpoints, Kind, Point
from softkvm.vmm.debug.registers import Registers
from softkvm.vmm.debug.virtual import MemoryFault, pages, translate
from softkvm.vmm.errors import StateError

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine
    from softkvm.vmm.vcpu_thread import VcpuThread

BP_VECTOR: Final = 3
_DR6_HITS: Final = 0xF
_DR6_BS: Final = 1 << 14
RESET_S: Final = 10.0
_LOOK_S: Final = 0.1  # the end wakes nobody

_attached: weakref.WeakKeyDictionary[Machine, Debugger] = weakref.WeakKeyDictionary()


class Cause(enum.Enum):
    """Why a machine has stopped for its debugger."""

    SOFTWARE = "software breakpoint"
    HARDWARE = "hardware breakpoint"
    WATCHPOINT = "watchpoint"
    STEP = "step"
    INTERRUPT = "interrupt"
    END = "end of the machine"


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop: why, of which vCPU, at which linear address, and for which breakpoint or watchpoint."""

    cause: Cause
    vcpu: int
    address: int = 0
    point: Point | None = None
    more: tuple[Point, ...] = ()
    """Other watchpoints that the same access has hit."""


@dataclass(frozen=True, slots=True)
class Go:
    """How a vCPU goes on: freely, or by single steps until it is outside of ``start <= RIP < end``."""

    step: bool = False
    start: int = 0
    end: int = 0


class Debugger(Closing):
    """The debugger of *machine*, which has no more than one: StateError if there is another.

    It may be attached before the machine has been started, and while it runs. ``told`` is called, on any thread, when
    there is a stop to :meth:`wait` for. Its methods are for one thread, but for :meth:`interrupt`. :meth:`close` takes
    all breakpoints away and lets the machine go on.
    """

    def __init__(self, machine: Machine, told: Callable[[], object] | None = None) -> None:
        machine.expect_going()
        if _attached.setdefault(machine, self) is not self:
            raise StateError("the machine has a debugger already: expected one that has none")
        self.machine = machine
        self.breakpoints = Breakpoints(machine.memory, standing=machine.pausing.standing)
        machine.pausing.parts.append(self.breakpoints)
        self.registers = [Registers(thread.vcpu) for thread in machine.vcpus]
        mask = machine.vm.check_extension(abi.KVM_CAP_SET_GUEST_DEBUG2)
        self.can_block_interrupts = mask > 0 and bool(mask & abi.KVM_GUESTDBG_BLOCKIRQ)
        self.block_interrupts = self.can_block_interrupts
        """Whether a single step takes no interrupt, where KVM can have it so."""
        self._told = told
        self._changed = threading.Condition()
        self._stops: deque[Stop] = deque()
        self._held: set[VcpuThread] = set()
        self._going: dict[VcpuThread, Go] = dict.fromkeys(machine.vcpus, Go())
        self._set: dict[VcpuThread, tuple[int, int]] = {}
        self._halt = contextlib.ExitStack()
        self.halted = False
        """Whether the machine stands for the debugger."""
        self._closed = False
        self._handlers = [thread.handlers[abi.KVM_EXIT_DEBUG] for thread in machine.vcpus]
        for thread in machine.vcpus:
            thread.handlers[abi.KVM_EXIT_DEBUG] = partial(self._debug_exit, thread)
        machine.resets.append(self.breakpoints.clear_software)

    # -- on the vCPUs' threads

    def _debug_exit(self, thread: VcpuThread) -> None:
        """KVM_EXIT_DEBUG: ours, or the guest's own."""
        exit = thread.vcpu.kvm_run.debug.arch
        pc, dr6 = exit.pc, exit.dr6
        go = self._going.get(thread, Go())
        if exit.exception == BP_VECTOR:
            if not self.breakpoints.is_ours(thread.vcpu, pc):
                self._give(thread, abi.KVM_GUESTDBG_INJECT_BP)
                return
            self._stop(thread, Stop(Cause.SOFTWARE, thread.index, pc, Point(Kind.SOFTWARE, pc, 1)))
            return
        hits = self.breakpoints.hits(dr6) if dr6 & _DR6_HITS else []
        accesses = [point for point in hits if point.kind is not Kind.EXECUTE]
        if accesses:  # an instruction to come finds its breakpoint again
            self._stop(thread, Stop(Cause.WATCHPOINT, thread.index, pc, accesses[0], tuple(accesses[1:])))
        elif hits:
            self._stop(thread, Stop(Cause.HARDWARE, thread.index, pc, hits[0]))
        elif go.step and dr6 & _DR6_BS:
            if not go.start <= pc < go.end:
                self._stop(thread, Stop(Cause.STEP, thread.index, pc))
        else:
            debugregs = thread.vcpu.get_debugregs()
            debugregs.dr6 |= dr6 & (_DR6_HITS | _DR6_BS | 1 << 13)
            thread.vcpu.set_debugregs(debugregs)
            self._give(thread, abi.KVM_GUESTDBG_INJECT_DB)

    def _give(self, thread: VcpuThread, injection: int) -> None:
        """Have the guest take an exception that is its own."""
        debug = self._debug(self._going.get(thread, Go()))
        debug.control |= injection
        thread.vcpu.set_guest_debug(debug)

    def _stop(self, thread: VcpuThread, stop: Stop) -> None:
        standstill = self.machine.standstill
        with self._changed:
            if self._closed:
                return
            self._held.add(thread)
            standstill.acquire_thread(thread)
        self._tell(stop)
        standstill.stand(thread)

    def _tell(self, stop: Stop) -> None:
        with self._changed:
            self._stops.append(stop)
            self._changed.notify_all()
        if self._told is not None:
            self._told()

    # -- stopping

    def interrupt(self, vcpu: int = 0) -> None:
        """Have the machine stop, as seen by *vcpu*; from any thread."""
        self._tell(Stop(Cause.INTERRUPT, vcpu))

    def halt(self) -> None:
        """Let the whole machine stand, now; StateError if it has ended, or a vCPU does not come to stand."""
        if self.halted:
            return
        self._halt.enter_context(self.machine.pausing.still())
        self.halted = True
        for registers in self.registers:
            registers.forget()

    def poll(self) -> Stop | None:
        """Return a stop if there is one; the machine stands then, or has ended."""
        with self._changed:
            stop = self._stops.popleft() if self._stops else None
        if self.machine.ended.is_set():
            return Stop(Cause.END, 0)
        if stop is not None:
            try:
                self.halt()
            except StateError:
                if self.machine.ended.is_set():
                    return Stop(Cause.END, 0)
                raise
        return stop

    def wait(self, timeout_s: float | None = None) -> Stop | None:
        """Wait for a stop; None if there is none within *timeout_s*. The machine stands then, or has ended."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            stop = self.poll()
            if stop is not None:
                return stop
            left_s = _LOOK_S if deadline is None else min(deadline - time.monotonic(), _LOOK_S)
            if left_s <= 0:
                return None
            with self._changed:
                if not self._stops:
                    self._changed.wait(left_s)

    # -- going on

    def _debug(self, go: Go) -> abi.kvm_guest_debug:
        return self.breakpoints.debug(step=go.step, block_interrupts=self.block_interrupts)

    def resume(self, how: Mapping[int, Go] | None = None) -> None:
        """Let vCPUs go on, each as *how* says by its number, and the others stand; None: all go on freely.

        If one of them has stopped meanwhile, for what would be lost, it is that stop's turn, and nothing goes on.
        """
        if not self.halted:
            return
        threads = self.machine.vcpus
        going = {threads[n]: go for n, go in how.items()} if how is not None else dict.fromkeys(threads, Go())
        with self._changed:
            # an instruction that is to be executed yet finds its breakpoint again, if that is still there
            self._stops = deque(stop for stop in self._stops if self._would_be_lost(stop))
            waiting = bool(self._stops)
        if waiting:
            if self._told is not None:
                self._told()
            return
        self._going = going
        for thread in threads:
            self._set_debug(thread, going.get(thread, Go()))
        self._hold_all_but(going)
        self.halted = False
        self._halt.close()

    def _would_be_lost(self, stop: Stop) -> bool:
        """Whether nobody would hear of *stop* any more: an access has happened."""
        return stop.cause is Cause.WATCHPOINT and any(point in self.breakpoints for point in (stop.point, *stop.more))

    def _set_debug(self, thread: VcpuThread, go: Go) -> None:
        debug = self._debug(go)
        wanted = (debug.control, self.breakpoints.changed)
        if self._set.get(thread, (0, 0)) != wanted:
            thread.vcpu.set_guest_debug(debug)
            self._set[thread] = wanted

    def _hold_all_but(self, going: Mapping[VcpuThread, Go]) -> None:
        """Have those threads stand, each by itself, that don't go on; all stand while this is called."""
        standstill = self.machine.standstill
        with self._changed:
            for thread in self.machine.vcpus:
                if thread in going and thread in self._held:
                    self._held.discard(thread)
                    standstill.release_thread(thread)
                elif thread not in going and thread not in self._held:
                    self._held.add(thread)
                    standstill.acquire_thread(thread)

    def step(self, vcpu: int, timeout_s: float | None = None) -> Stop | None:
        """Execute one instruction on *vcpu* while the others stand; return the stop, None if it takes longer."""
        self.resume({vcpu: Go(step=True)})
        return self.wait(timeout_s)

    def leave_breakpoints(self, vcpus: Iterable[int]) -> Stop | None:
        """Have each of *vcpus* that stands at a breakpoint execute that instruction, without stopping there.

        Returns the stop that this led to, if it wasn't the step itself: a watchpoint, the machine's end.
        """
        for index in sorted(vcpus):
            thread = self.machine.vcpus[index]
            here = self.points_here(index)
            if not here:
                continue
            for point in here:
                self.breakpoints.remove(point)
            stop = self.step(index)
            if stop is not None and stop.cause is Cause.END:
                return stop
            for point in here:
                with contextlib.suppress(MemoryFault):  # the instruction took its page away
                    self.breakpoints.add(point, thread.vcpu)
            if stop is not None and stop.cause is not Cause.STEP:
                return stop
        return None

    def points_here(self, vcpu: int) -> list[Point]:
        """Return the breakpoints on the instruction that a vCPU would execute next."""
        state = self.machine.vcpus[vcpu].vcpu.get_mp_state() if self.breakpoints else None
        if state is None or state.mp_state == abi.KVM_MP_STATE_UNINITIALIZED:
            return []
        address = self.linear_rip(vcpu)
        points = (Point(Kind.SOFTWARE, address, 1), Point(Kind.EXECUTE, address, 1))
        return [point for point in points if point in self.breakpoints]

    def linear_rip(self, vcpu: int) -> int:
        """Return the linear address of the instruction that *vcpu* would execute next."""
        registers = self.registers[vcpu]
        base = 0 if registers.sregs.cs.l and registers.sregs.efer & 1 << 10 else registers.sregs.cs.base
        address = registers.regs.rip + base
        return address & (1 << 64) - 1 if base == 0 else address & 0xFFFF_FFFF

    def reset(self, by: str, timeout_s: float = RESET_S) -> None:
        """Have the machine begin anew from its image, and stand at its first instruction; software breakpoints go.

        StateError if it has not been started, ends, or takes longer than *timeout_s*.
        """
        self.halt()
        boots = self.machine.boots
        self._going = {}
        self._hold_all_but({})
        self.halted = False
        self._halt.close()
        try:
            self.machine.reset(by)
            end = time.monotonic() + timeout_s
            while self.machine.boots == boots and time.monotonic() < end and not self.machine.ended.is_set():
                time.sleep(0.005)
        finally:
            self.halt()
        if self.machine.boots == boots:
            raise StateError(f"the machine has not begun anew within {timeout_s:g} s")

    # -- memory

    def read(self, vcpu: int, address: int, size: int) -> bytes:
        """Return memory as *vcpu* sees it at a virtual address, without our breakpoints; MemoryFault if it isn't."""
        kvm, memory = self.machine.vcpus[vcpu].vcpu, self.machine.memory
        return b"".join(self.read_physical(translate(kvm, memory, at), count) for at, count in pages(address, size))

    def write(self, vcpu: int, address: int, data: bytes) -> None:
        """Store *data* at a virtual address, under our breakpoints; MemoryFault, and nothing written."""
        parts = list(pages(address, len(data)))
        places = [translate(self.machine.vcpus[vcpu].vcpu, self.machine.memory, at) for at, _ in parts]
        for (_, count), gpa in zip(parts, places, strict=True):
            self._is_ram(gpa, count)
        for (at, count), gpa in zip(parts, places, strict=True):
            self.write_physical(gpa, data[at - address : at - address + count])

    def read_physical(self, address: int, size: int) -> bytes:
        """Return memory at a guest-physical address, without our breakpoints; MemoryFault if it is no RAM."""
        self._is_ram(address, size)
        return self.breakpoints.hide(address, self.machine.memory.read(address, size))

    def write_physical(self, address: int, data: bytes) -> None:
        """Store *data* at a guest-physical address, under our breakpoints; MemoryFault if it is no RAM."""
        self._is_ram(address, len(data))
        self.machine.memory.write(address, self.breakpoints.keep(address, data))

    def _is_ram(self, address: int, size: int) -> None:
        try:
            self.machine.memory.slice(address, size)
        except IndexError as error:
            raise MemoryFault(address, str(error)) from None

    # -- the end

    def close(self) -> None:
        """Take all breakpoints away and let the machine go on."""
        with self._changed:
            if self._closed:
                return
        machine = self.machine
        with contextlib.suppress(StateError):  # it has ended
            self.halt()
        with self._changed:
            self._closed = True
            self._stops.clear()
        if self.halted and not machine.ended.is_set():
            self.breakpoints.clear()
            for thread, handler in zip(machine.vcpus, self._handlers, strict=True):
                self._set_debug(thread, Go())
                thread.handlers[abi.KVM_EXIT_DEBUG] = handler
        with contextlib.suppress(ValueError):
            machine.resets.remove(self.breakpoints.clear_software)
            machine.pausing.parts.remove(self.breakpoints)
        self._going = dict.fromkeys(machine.vcpus, Go())
        self._hold_all_but(self._going)
        self.halted = False
        self._halt.close()
        if _attached.get(machine) is self:
            del _attached[machine]
