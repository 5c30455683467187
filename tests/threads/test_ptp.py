# SPDX-License-Identifier: Apache-2.0
"""Clock pairing (thread 23, its x86 half): an unmodified Linux guest's /dev/ptp0 is the host's wall clock.

Every value of the guest's PTP clock is read between two moments of the host's clock that are known, and has to be
between the two: how busy the host is makes no difference.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support.kernels import kernel_with_modules
from tests.support.machines import open_soft
from tests.support.systems import compile_program

from softkvm.vmm.console import Console
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

SOURCE = Path(__file__).with_name("ptp_probe.c")
PROBE_PORT, PROBE_SIZE = 0x1A00, 28
READINGS = 200


@dataclass
class Probe:
    """The device that the guest's program talks to."""

    #: The PTP clock, and the host's before and after it was read.
    readings: list[tuple[int, int, int]] = field(default_factory=list)
    #: The PTP clock and the guest's CLOCK_MONOTONIC_RAW at one moment.
    pairs: list[tuple[int, int]] = field(default_factory=list)
    before_ns: int = 0
    after_ns: int = 0
    words: dict[int, int] = field(default_factory=dict)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        now = time.time_ns()
        self.words[offset] = value
        if offset == 0:
            self.before_ns = now
        elif offset == 4:
            self.after_ns = now
        elif offset == 8:
            self.readings.append((self._long(4), self.before_ns, self.after_ns))
        elif offset == 24:
            self.pairs.append((self._long(12), self._long(20)))

    def _long(self, offset: int) -> int:
        return self.words[offset] | self.words[offset + 4] << 32


def test_the_guests_ptp_clock_is_the_hosts_wall_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = kernel_with_modules()
    program = compile_program(SOURCE.read_text(), tmp_path / "ptp_probe").read_bytes()
    initrd = kernel.initrd(["ptp_kvm"], {"bin/ptp_probe": program})
    console, probe = Console(), Probe()
    with open_soft() as kvm, Machine(kvm, Config(256 * MIB, 2), console.output) as machine:
        machine.pio.add(PROBE_PORT, PROBE_SIZE, probe, "probe")
        # Cross time stamps are by kvm-clock, which has to be the guest's clock then.
        run = "/load && cat /sys/class/ptp/ptp0/clock_name && ptp_probe"
        line = f'console=ttyS0 quiet clocksource=kvm-clock softkvm.run="{run}"'
        machine.load(kernel.image.read_bytes(), initrd, line)
        console.attach(machine)
        steps = time.time_ns() - time.monotonic_ns()
        machine.start()
        console.expect("ptp read", timeout_s=400)
        stepped = abs(time.time_ns() - time.monotonic_ns() - steps)
    assert "KVM virtual PTP" in console.text
    assert len(probe.readings) == len(probe.pairs) == READINGS
    for value, before, after in probe.readings:
        assert before - stepped <= value <= after + stepped
    # The two clocks of a pair go together: what they differ by is nearly the same every time.
    first = probe.pairs[0][0] - probe.pairs[0][1]
    differences = [wall - raw - first for wall, raw in probe.pairs]
    middle = statistics.median(differences)
    spread = statistics.median(abs(difference - middle) for difference in differences)
    width = min(after - before for _, before, after in probe.readings)
    with capsys.disabled():
        print(f"\nptp: between two accesses {width} ns apart at best; pairs differ by {spread:.0f} ns in the median")
