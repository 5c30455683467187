# SPDX-License-Identifier: Apache-2.0
"""What is asked of KVM in Python itself: counters of all virtual machines of the process, and tracing."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from softkvm import _softcpu
from softkvm.kvm.state import BLOCKING, IN_GUEST_MODE, VM_LIST
from softkvm.kvm.stats import VM_STATS, scalars
from softkvm.live.server import Refused

if TYPE_CHECKING:
    from softkvm.live.server import Connection
    from softkvm.trace.record import Recorder

_MODES: Final = {IN_GUEST_MODE: "guest", BLOCKING: "halted"}


def statistics() -> dict[str, Any]:
    """Return the counters of all virtual machines of this process."""
    machines = []
    for vm in sorted(VM_LIST, key=id):
        if vm.closed or vm.inherited:
            continue
        vcpus = [
            {"id": vcpu.vcpu_id, "state": _MODES.get(vcpu.mode, "host"), "stats": vcpu.stats()}  # type: ignore[attr-defined]
            for vcpu in vm.vcpus
            if not vcpu.closed
        ]
        memory = sum(slot.npages for slot in vm.memslots) << 12
        machines.append({"stats": scalars(VM_STATS, vm), "memory_bytes": memory, "vcpus": vcpus})
    return {"pid": os.getpid(), "machines": machines}


def stats(connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
    """Answer ``stats``."""
    return statistics()


class _Recording:
    """What a connection records."""

    def __init__(self, recorder: Recorder, spool: BinaryIO) -> None:
        self.recorder = recorder
        self._spool = spool

    def close(self) -> None:
        self.recorder.stop()
        _softcpu.close_own_descriptor(self._spool.fileno())


def trace(connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
    """Answer ``trace``: begin to record."""
    from softkvm.kvm import TRACEPOINTS
    from softkvm.kvm import trace as kvm_trace

    if connection.recording is not None:
        raise Refused("this connection records already")
    if not connection.given:
        raise Refused("the request lacks the descriptor of a file")
    events, filters = request.get("events", []), request.get("filters", [])
    if not all(isinstance(text, str) for given in (events, filters) for text in given):
        raise Refused("events and filters: expected texts")
    with contextlib.ExitStack() as undo:
        fd = connection.given.pop(0)
        undo.callback(_softcpu.close_own_descriptor, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # whoever writes to a pipe waits for who reads it
            raise Refused("the descriptor is of no regular file")
        spool = open(fd, "wb", closefd=False, buffering=0)  # noqa: SIM115 (ours until close)
        recorder = kvm_trace.start(TRACEPOINTS, events, filters, spool)
        connection.recording = _Recording(recorder, spool)
        undo.pop_all()
    return {"events": [[event.system, event.description] for event in recorder.events]}


def threads(connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
    """Answer ``threads``: who has recorded something, and what was lost."""
    recording = connection.recording
    if not isinstance(recording, _Recording):
        raise Refused("this connection records nothing")
    recorder = recording.recorder
    counts = {"count": recorder.count, "lost": recorder.lost}
    return {"threads": recorder.threads, "problem": recorder.problem, **counts}


def stop(connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
    """Answer ``stop``: end the recording."""
    if isinstance(connection.recording, _Recording):
        connection.recording.recorder.stop()
    return threads(connection, request)
