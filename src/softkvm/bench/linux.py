# SPDX-License-Identifier: Apache-2.0
"""Linux guests for measurements: the default guest, with a program that uses memory (``guests/linux/pages.c``)."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Sequence
from pathlib import Path

from softkvm import api
from softkvm.bench.walkers import BenchError
from softkvm.closing import Closing
from softkvm.vmm.console import Console, ConsoleError
from softkvm.vmm.devices.spec import DeviceSpec
from softkvm.vmm.guest import GuestUnavailable, prepare
from softkvm.vmm.guest.cpio import CpioWriter
from softkvm.vmm.machine import Config, Machine

BOOT_S = 120.0
"""How long a guest may take to its prompt, and any command that says no other time."""


def data_file(name: str) -> Path:
    """Return the path of a guest or a program that ``make guests`` builds; BenchError if it has not."""
    path = Path(__file__).parent / "data" / name
    if not path.is_file():
        raise BenchError(f"{name} is not built: run `make guests` in the source tree")
    return path


def _programs() -> bytes:
    """Return an initial file system of our programs."""
    out = io.BytesIO()
    writer = CpioWriter(out)
    writer.directory("bin")
    writer.file("bin/pages", data_file("pages.elf").read_bytes(), 0o755)
    writer.close()
    return out.getvalue()


class LinuxGuest(Closing):
    """A machine on *kvm* whose guest is at its prompt; ``seconds`` is how long it took to come there.

    BenchError if there is no default guest, or if it does not come to its prompt.
    """

    def __init__(
        self, kvm: api.Kvm, memory_size: int, vcpus: int = 1, devices: Sequence[DeviceSpec] = (), options: str = ""
    ) -> None:
        try:
            guest = prepare()
        except GuestUnavailable as error:
            raise BenchError(f"there is no guest to measure: {error}") from None
        self.console = Console()
        start = time.perf_counter()
        self.machine = Machine(kvm, Config(memory_size, vcpus, device_specs=tuple(devices)), self.console.output)
        try:
            self.console.attach(self.machine)
            initrd = guest.initrd.read_bytes() + _programs()
            self.machine.load(guest.kernel, initrd, f"{guest.command_line} quiet {options}")
            self.machine.start()
            self._expect(r"root@softkvm:\S*# ", BOOT_S)
        except BaseException:
            self.machine.close()
            raise
        self.seconds = time.perf_counter() - start

    def run(self, command: str, pattern: str = "", timeout_s: float = BOOT_S) -> re.Match[str]:
        """Run *command* in the guest's shell, return what of its output matches *pattern*; BenchError if it fails."""
        self.console.send(f"{command}; echo status=$?\n")
        found = self._expect(pattern, timeout_s)
        status = self._expect(r"^status=(\d+)", timeout_s)[1]
        self._expect(r"root@softkvm:\S*# ", timeout_s)
        if status != "0":
            raise BenchError(f"the guest: {command}: status {status}")
        return found

    def instructions(self) -> int:
        """Return how many instructions the guest has executed; 0 where KVM does not count them."""
        counts = [vcpu.get("kvm", {}).get("instructions", 0) for vcpu in self.machine.stats()["vcpus"]]
        return sum(counts)

    def _expect(self, pattern: str, timeout_s: float) -> re.Match[str]:
        try:
            return self.console.expect(pattern, timeout_s)
        except ConsoleError as error:
            raise BenchError(f"the guest: {error}") from None

    def close(self) -> None:
        """End the machine."""
        self.machine.close()
