# SPDX-License-Identifier: Apache-2.0
"""What the interpreter in a client's process begins with: everything imported, KVM ready to be opened."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING, Any

from softkvm import _softcpu
from softkvm.client.files import SystemFile, open_memfd, unmapping
from softkvm.client.settings import Settings
from softkvm.client.trace import Recorder
from softkvm.kvm import Kvm, procfs
from softkvm.live.server import serve

if TYPE_CHECKING:
    from softkvm.plugin import Policy
    from softkvm.trace.record import Recorder as Recording

#: What the host's kernel takes for its time if it does not trust the time-stamp counter.
_OTHER_CLOCKS = ("hpet", "acpi_pm", "jiffies", "refined-jiffies")


def counts_steadily() -> bool:
    """Tell whether the host's time-stamp counter is one to tell the time with: invariant, equal on all processors."""
    try:
        with open("/sys/devices/system/clocksource/clocksource0/current_clocksource") as file:
            if file.read().strip() in _OTHER_CLOCKS:
                return False
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        return False
    return "constant_tsc" in flags and "nonstop_tsc" in flags


def _check_memfd() -> None:
    """Raise OSError, which says so, where there are no files in memory: all of a client's are."""
    try:
        os.close(os.memfd_create("kvm"))
    except OSError as error:
        raise OSError(error.errno, f"memfd_create: {error.strerror}") from None


def _let_look(vm: object) -> None:
    """Have other processes of the user's ask how the machine is (`softkvm stat`).

    Not in a client with a sanitizer: in children that it forks, that would tell of a thread which is not there.
    """
    if not _softcpu.sanitized():
        serve()


class World:
    """The KVM of a client's process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.recorder = Recorder(settings) if settings.trace or settings.stats else None
        self._policies: list[Policy] = []
        self._tracing: Recording | None = None

    def open_kvm(self) -> Kvm:
        """Open a KVM as the settings want it."""
        if self.settings.trace_kvm and self._tracing is None:
            self._tracing = self._start_tracing()
        kvm = Kvm()
        kvm.vm_created.append(_let_look)
        for name, text in self.settings.params.items():
            kvm.params.assign(name, text)
        if self.settings.plugins:
            from softkvm import plugin

            policy = plugin.Policy(kvm)
            for file in self.settings.plugins:
                plugin.load(file, policy)
            self._policies.append(policy)
        return kvm

    def at_exit(self) -> None:
        """The client's process is about to end: what plugins have to say, and what was counted."""
        while self._policies:
            self._policies.pop(0).end()
        if self.recorder is not None:
            self.recorder.close()
        if self._tracing is not None:
            self._write_trace(self._tracing)

    def _start_tracing(self) -> Recording:
        """Begin to record what KVM's tracepoints tell; a child that the client forks does not."""
        from softkvm.kvm import TRACEPOINTS, trace

        return trace.start(TRACEPOINTS, self.settings.trace_events, self.settings.trace_filters)

    def _write_trace(self, recording: Recording) -> None:
        """Write the trace. Another process that the client has executed may have written one: then beside that."""
        from softkvm.trace.save import save, told

        self._tracing = None
        if not recording.owned:
            return
        name = self.settings.trace_kvm
        if os.path.exists(name) and os.path.getsize(name):
            stem, extension = os.path.splitext(name)
            name = f"{stem}.{os.getpid()}{extension}"
        try:
            with open(name, "wb") as file:
                save(recording, file, name)
            print(f"softkvm: {told(name, recording.count, recording.lost)}", file=sys.stderr)
        except OSError as error:
            print(f"softkvm: --trace-kvm {name}: {error.strerror}", file=sys.stderr)
        recording.close()

    def open_system(self, flags: int) -> int:
        """Open ``/dev/kvm`` with flags of open(); returns the client's descriptor."""
        if flags & os.O_ACCMODE == os.O_ACCMODE:  # for requests alone; a file in memory has no such thing
            flags &= ~os.O_ACCMODE
        return open_memfd(SystemFile(self.open_kvm(), self.recorder), "kvm", flags)


def start(settings: dict[str, Any]) -> int:
    """Make the world; returns the address of what the client's side calls."""
    procfs.directory()  # a client may change its root later
    _check_memfd()
    if counts_steadily():
        _softcpu.use_host_tsc()  # the client executes RDTSC itself
    world = World(Settings(**settings))
    at_exit = world.at_exit if any((settings["plugins"], settings["trace_kvm"], world.recorder)) else None
    if at_exit is not None:
        atexit.register(at_exit)  # where the interpreter is the client's own, it ends before the process
    return _softcpu.client_core(world.open_system, unmapping, at_exit)
