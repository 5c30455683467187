# SPDX-License-Identifier: Apache-2.0
"""What the interpreter in a client's process begins with: everything imported, KVM ready to be opened."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING, Any

from softkvm import _softcpu
from softkvm.client.files import SystemFile, open_memfd, unmapping
from softkvm.client.settings import Settings
from softkvm.client.trace import Recorder
from softkvm.kvm import Kvm, procfs

if TYPE_CHECKING:
    from softkvm.plugin import Policy

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


class World:
    """The KVM of a client's process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.recorder = Recorder(settings) if settings.trace or settings.stats else None
        self._policies: list[Policy] = []

    def open_kvm(self) -> Kvm:
        """Open a KVM as the settings want it."""
        kvm = Kvm()
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
    at_exit = world.at_exit if settings["plugins"] or world.recorder is not None else None
    if at_exit is not None:
        atexit.register(at_exit)  # where the interpreter is the client's own, it ends before the process
    return _softcpu.client_core(world.open_system, unmapping, at_exit)
