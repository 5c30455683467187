# SPDX-License-Identifier: Apache-2.0
"""What is measured side by side: softkvm, on the software CPU or on ``/dev/kvm``, and QEMU's TCG.

Both run the same two things: our own guest of ``guests/bench/exits.c``, which comes with the package, and entries of a
build of kvm-unit-tests.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import softkvm
from softkvm import api, qemu
from softkvm.reports.result import Result
from softkvm.unittests.config import Entry
from softkvm.unittests.qemu import ACCEL
from softkvm.unittests.qemu import run_entry as run_entry_on_qemu
from softkvm.unittests.runner import DEVICES, Settings, run_entry, set_params
from softkvm.unittests.suite import SuiteRun
from softkvm.vmm.console import Console
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End

SOFTKVM, QEMU = "softkvm", "qemu"
GUEST_MEMORY_MIB = 64
_TSC = re.compile(r"^bench begins, \d+ vcpus, tsc (\d+) Hz\s*$", re.MULTILINE)


class SideError(Exception):
    """A side cannot be measured at all."""


class GuestTimeout(Exception):
    """The guest did not end within its time."""


class GuestFailure(Exception):
    """The guest ended otherwise than by powering off; the message says how."""


def guest_image() -> Path:
    """Return the path of our guest. SideError in a source tree where ``make guests`` has not built it."""
    path = Path(__file__).parent / "data" / "exits.elf"
    if not path.is_file():
        raise SideError("the guest of `softkvm bench` is not built: run `make guests` in the source tree")
    return path


class Side(Protocol):
    """One of the things compared."""

    name: str
    """Key of its results: ``softkvm``, ``qemu``."""
    title: str
    """Heading of its column."""
    version: str

    def guest(self, command_line: str, vcpus: int, timeout_s: float) -> str:
        """Run our guest until it powers off; return what it prints. Raises GuestTimeout, GuestFailure."""

    def run_entries(
        self,
        directory: Path,
        entries: list[Entry],
        jobs: int,
        timeout_s: float | None = None,
        tick: Callable[[list[tuple[str, float]]], None] = lambda running: None,
    ) -> list[Result]:
        """Run entries of the suite in *directory*, *jobs* vCPUs at a time; *timeout_s* overrides their limits."""

    def tsc_hz(self) -> float:
        """Return how often a guest's time-stamp counter ticks in a second."""


class SoftkvmSide:
    """softkvm; *accel* is ``soft`` or ``kvm``. SideError if that KVM cannot be opened.

    *params* are module parameters, which only the software KVM has: SuiteError for a name or a value that is none.
    """

    def __init__(self, accel: str = "soft", params: Mapping[str, str] | None = None) -> None:
        self.name = SOFTKVM
        self.params = dict(params or {})
        self.title = " ".join(
            ["softkvm" if accel == "soft" else "softkvm on /dev/kvm"]
            + [f"{name}={value}" for name, value in self.params.items()]
        )
        self.version = f"softkvm {softkvm.__version__}"
        self.accel = accel
        try:
            self.open().close()
        except ImportError as error:
            raise SideError(f"the software CPU is not built: {error}") from None
        except OSError as error:
            raise SideError(f"--accel {accel}: {DEVICES[accel]}: {error.strerror or error}") from None

    def open(self) -> api.Kvm:
        """Open the KVM that is measured."""
        kvm = softkvm.open(DEVICES[self.accel])
        set_params(kvm, self.params)
        return kvm

    def guest(self, command_line: str, vcpus: int, timeout_s: float) -> str:
        """See :class:`Side`."""
        console = Console()
        config = Config(GUEST_MEMORY_MIB * MIB, vcpus)
        with self.open() as kvm, Machine(kvm, config, console.output) as machine:
            machine.load(guest_image().read_bytes(), None, command_line)
            outcome = machine.run(timeout_s)
        if outcome.end is End.TIMEOUT:
            raise GuestTimeout
        if outcome.end is not End.POWER_OFF:
            raise GuestFailure(str(outcome))
        return console.text

    def run_entries(
        self,
        directory: Path,
        entries: list[Entry],
        jobs: int,
        timeout_s: float | None = None,
        tick: Callable[[list[tuple[str, float]]], None] = lambda running: None,
    ) -> list[Result]:
        """See :class:`Side`. Limits are the suite's, scaled as ``softkvm unittests`` does."""
        settings = Settings(self.accel, timeout_s, run_nodefault=True, params=self.params)
        return SuiteRun(directory, entries, settings, jobs, run=run_entry, tick=tick).run()

    def tsc_hz(self) -> float:
        """What KVM_GET_TSC_KHZ says."""
        with self.open() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            return vcpu.get_tsc_khz() * 1e3


class QemuSide:
    """QEMU's TCG, run by the executable *program*."""

    def __init__(self, program: str = qemu.PROGRAM) -> None:
        self.name = QEMU
        self.title = "QEMU TCG"
        self.program = program
        self.version = qemu.version(program)

    def guest(self, command_line: str, vcpus: int, timeout_s: float) -> str:
        """See :class:`Side`."""
        machine = [*qemu.TCG, "-m", str(GUEST_MEMORY_MIB), "-smp", str(vcpus), "-no-reboot"]
        devices = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
        boot = ["-kernel", str(guest_image()), "-append", command_line]
        try:
            ended = qemu.run([self.program, *machine, *devices, *boot], timeout_s)
        except OSError as error:
            raise SideError(f"{self.program}: {error.strerror}") from None
        if ended.status is None:
            raise GuestTimeout
        if ended.status != 0:
            last = (ended.errors or ended.output).strip().splitlines()[-1:]
            raise GuestFailure(f"status {ended.status}" + "".join(f": {line}" for line in last))
        return ended.output

    def run_entries(
        self,
        directory: Path,
        entries: list[Entry],
        jobs: int,
        timeout_s: float | None = None,
        tick: Callable[[list[tuple[str, float]]], None] = lambda running: None,
    ) -> list[Result]:
        """See :class:`Side`. Limits are the suite's."""
        settings = Settings(ACCEL, timeout_s, run_nodefault=True)
        run = functools.partial(run_entry_on_qemu, program=self.program)
        return SuiteRun(directory, entries, settings, jobs, run=run, tick=tick).run()

    def tsc_hz(self) -> float:
        """What our guest measures against the ACPI timer: QEMU does not say it (TCG hands out the host's counter)."""
        try:
            text = self.guest("bench=none", 1, 60)
        except (GuestTimeout, GuestFailure) as error:
            raise SideError(f"{self.program}: the rate of its TSC cannot be measured: {error or 'timeout'}") from None
        match = _TSC.search(text)
        if match is None or not int(match[1]):
            raise SideError(f"{self.program}: the rate of its TSC cannot be measured")
        return float(match[1])
