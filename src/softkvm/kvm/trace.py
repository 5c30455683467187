# SPDX-License-Identifier: Apache-2.0
"""KVM's tracepoints that every architecture has: where their events happen. And turning tracepoints on.

What is off costs nothing: its places are not in the code (:mod:`softkvm.trace.patch`). Like the kernel's, tracepoints
are the process's, of all its VMs: ``softkvm.kvm.TRACEPOINTS`` has them by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from softkvm.abi.run_page import EXIT_REASON_D
from softkvm.kvm import halt_poll, vcpu, vm
from softkvm.kvm.memory import async_pf, dirty_ring
from softkvm.kvm.memory.pages import PAGE_SHIFT
from softkvm.kvm.state import VM_LIST
from softkvm.kvm.trace_events import EVENTS
from softkvm.trace.cformat import FormatError, compile_filter
from softkvm.trace.event import Event
from softkvm.trace.patch import Wrapper
from softkvm.trace.record import RING_SIZE, Recorder
from softkvm.trace.tracepoint import Emit, Probe, Tracepoint, Tracepoints, after, before

if TYPE_CHECKING:
    from softkvm import abi
    from softkvm._softcpu import Machine
    from softkvm.kvm.memory.async_pf import Work
    from softkvm.kvm.memory.dirty_ring import DirtyRing
    from softkvm.kvm.state import VcpuState as Vcpu
    from softkvm.kvm.state import VmState as Vm

#: What is recorded unless something else is asked for.
DEFAULT_EVENTS: Final = ("kvm:*",)


class TraceError(ValueError):
    """A tracepoint that isn't there, or a filter that is none; one line."""


class FilterError(TraceError):
    """A filter that no tracepoint can have."""


# --- KVM_RUN and waiting -------------------------------------------------------------------------------


def _userspace_exit(emit: Emit) -> Wrapper:
    def run(call: Callable[[Vcpu, int], None], vcpu: Vcpu, told: int) -> None:
        error = 0
        try:
            call(vcpu, told)
        except OSError as raised:
            error = -(raised.errno or 0)
            raise
        finally:
            emit(vcpu.run_d[EXIT_REASON_D], error)

    return run


def _fpu(emit: Emit) -> Wrapper:
    """KVM_RUN's beginning and end: the guest's FPU is the one in use in between."""

    def run(call: Callable[[Vcpu, int], None], vcpu: Vcpu, told: int) -> None:
        emit(1)
        try:
            call(vcpu, told)
        finally:
            emit(0)

    return run


def _vcpu_wakeup(emit: Emit) -> Wrapper:
    def halt(call: Callable[[Vcpu], None], vcpu: Vcpu) -> None:
        start, polled = time.monotonic_ns(), vcpu.stat_halt_successful_poll
        call(vcpu)
        emit(time.monotonic_ns() - start, vcpu.stat_halt_successful_poll == polled, True)

    return halt


def _halt_poll_ns(emit: Emit) -> Wrapper:
    def adapt(call: Callable[[Vcpu, int], None], vcpu: Vcpu, halt_ns: int) -> None:
        old = vcpu.halt_poll_ns
        call(vcpu, halt_ns)
        if vcpu.halt_poll_ns != old:
            emit(vcpu.halt_poll_ns > old, vcpu.vcpu_id, vcpu.halt_poll_ns, old)

    return adapt


# --- memory --------------------------------------------------------------------------------------------


def _ring(ring: DirtyRing) -> tuple[int, int, int]:
    """Return the vCPU that a ring belongs to, and its indices."""
    owners = (vcpu.vcpu_id for vm in list(VM_LIST) for vcpu in vm.vcpus if vcpu.dirty_ring is ring)
    dirty, reset = ring.indices
    return next(owners, -1), dirty, reset


def _completed(_: None, work: Work, machine: Machine) -> tuple[int, int] | None:
    """A page has come that the guest was told of, or halts for; what the vCPU itself waits for has no frame number."""
    return (work.hva, work.gfn << PAGE_SHIFT) if work.gfn >= 0 else None


def _attributes(vm: Vm, attributes: abi.kvm_memory_attributes) -> tuple[int, int, int]:
    first = attributes.address >> PAGE_SHIFT
    return first, first + (attributes.size >> PAGE_SHIFT), attributes.attributes


PROBES: Final[dict[str, Sequence[Probe]]] = {
    "kvm_userspace_exit": [Probe(vcpu.Vcpu._run, _userspace_exit)],
    "kvm_vcpu_wakeup": [Probe(vcpu.Vcpu.halt_and_wait, _vcpu_wakeup)],
    "kvm_fpu": [Probe(vcpu.Vcpu._run, _fpu)],
    "kvm_halt_poll_ns": [Probe(halt_poll.adapt, _halt_poll_ns)],
    "kvm_try_async_get_page": [before(async_pf.AsyncPf.awaits, lambda pages, gfn: (gfn << PAGE_SHIFT, gfn))],
    "kvm_async_pf_repeated_fault": [
        after(async_pf.AsyncPf.awaits, lambda awaited, pages, gfn: (gfn << PAGE_SHIFT, gfn) if awaited else None)
    ],
    "kvm_async_pf_completed": [after(async_pf.Work.wait, _completed)],
    "kvm_dirty_ring_push": [
        after(dirty_ring.DirtyRing._push, lambda _, ring, slot, offset: (*_ring(ring), slot, offset))
    ],
    "kvm_dirty_ring_reset": [after(dirty_ring.DirtyRing.take_collected, lambda _, ring: _ring(ring))],
    "kvm_dirty_ring_exit": [after(vcpu.Vcpu._dirty_ring_full, lambda full, vcpu: (vcpu.vcpu_id,) if full else None)],
    "kvm_vm_set_mem_attributes": [before(vm.Vm.set_memory_attributes, _attributes)],
    "kvm_unmap_hva_range": [before(vm.Vm._users, lambda vm, hva, size: (hva, hva + size))],
}


# --- turning tracepoints on ----------------------------------------------------------------------------


def begin_anew() -> None:
    """Have every vCPU that runs leave its loop for a moment: it begins anew with what is there then.

    A vCPU stays in one call of its loop for as long as nobody wants anything of it.
    """
    for machine in list(VM_LIST):
        for one in machine.vcpus:
            if one.running:
                one.call_soon(_nothing)


def _nothing() -> None:
    pass


def tracepoints(events: Iterable[Event], probes: Mapping[str, Sequence[Probe]]) -> list[Tracepoint]:
    """Return the tracepoints of a table of events and one of their places."""
    return [Tracepoint(event, probes.get(event.name, ())) for event in events]


def general(of_architecture: Mapping[str, Sequence[Probe]]) -> list[Tracepoint]:
    """Return the tracepoints that every architecture has, with those of their places that are the architecture's."""
    return tracepoints(EVENTS, {**PROBES, **of_architecture})


def select(known: Tracepoints, patterns: Sequence[str]) -> list[Tracepoint]:
    """Return the tracepoints that globs name; TraceError for one that names none."""
    try:
        return known.match(*(patterns or DEFAULT_EVENTS))
    except KeyError as error:
        raise TraceError(f"{error.args[0]}: there is no such tracepoint; `softkvm trace list` has them") from None


def filters_of(chosen: Sequence[Tracepoint], texts: Iterable[str]) -> dict[str, Callable[[Sequence[Any]], bool]]:
    """Return the filters that texts name, by tracepoint: ``EVENT:CONDITION``, or a condition for all with its fields.

    FilterError for one that no tracepoint can have.
    """
    found: dict[str, Callable[[Sequence[Any]], bool]] = {}
    names = {tracepoint.event.name for tracepoint in chosen}
    for text in texts:
        name, colon, condition = text.partition(":")
        if not colon or name not in names:
            name, condition = "", text
        problems = []
        meant = [tracepoint.event for tracepoint in chosen if name in ("", tracepoint.event.name)]
        for event in meant:
            try:
                found[event.name] = compile_filter(condition, event.names)
            except FormatError as error:
                problems.append(str(error))
        if len(problems) == len(meant):
            raise FilterError(f"{text}: {problems[0] if problems else 'no tracepoint is chosen'}")
    return found


def start(
    known: Tracepoints,
    patterns: Sequence[str] = (),
    filters: Iterable[str] = (),
    spool: BinaryIO | None = None,
    ring_size: int = RING_SIZE,
) -> Recorder:
    """Begin to record the tracepoints that globs name, all by default; TraceError for what is none."""
    chosen = select(known, patterns)
    return Recorder(chosen, spool, filters_of(chosen, filters), ring_size)
