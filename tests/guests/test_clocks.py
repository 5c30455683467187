# SPDX-License-Identifier: Apache-2.0
"""A guest's time passes as fast as the machine's, to 0.1 %, whatever Linux tells it by.

A program in the guest reads its clock between two accesses to a device here, which notes when they came. Every value of
the clock so has an error bar, and a rate has bounds: a busy host makes them wider, and the measurement longer.
"""

import io
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.guests import linux_guest
from tests.support.machines import open_soft

from softkvm.vmm.console import Console
from softkvm.vmm.guest.cpio import CpioWriter
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(900)]

SOURCE = Path(__file__).with_name("clock_probe.c")
PROBE_PORT, PROBE_SIZE = 0x1A00, 20
TOLERANCE = 0.001
SPAN_NS = 1_000_000_000
"""A rate is measured over this much of the machine's time at least."""
BOOT_S = 240
MEASURE_S = 60


@dataclass(frozen=True)
class Reading:
    """The clock came to ``guest_ns`` between two moments of the host's."""

    guest_ns: int
    earliest_ns: int
    latest_ns: int


class Probe:
    """The device that the guest's program talks to."""

    def __init__(self) -> None:
        self.wanted = 0
        self.current = threading.Semaphore(0)  # released at each switch
        self.readings: list[Reading] = []
        self._before_ns = self._earlier_ns = self._after_ns = 0
        self._low = self._guest_ns = 0

    def read(self, offset: int, size: int) -> int:
        return self.wanted if offset == 12 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        now_ns = time.monotonic_ns()
        if offset == 0:
            self._earlier_ns, self._before_ns = self._before_ns, now_ns
        elif offset == 4:
            self._after_ns, self._low = now_ns, value
        elif offset == 8:
            guest_ns = value << 32 | self._low
            if guest_ns != self._guest_ns and self._earlier_ns:
                # At the reading before, the clock had not come there: true for one that goes in steps, too.
                self.readings.append(Reading(guest_ns, self._earlier_ns, self._after_ns))
            self._guest_ns = guest_ns
        elif offset == 16:
            self.readings = []
            self._before_ns = self._earlier_ns = 0
            self.current.release()


def bounds(readings: list[Reading]) -> tuple[float, float] | None:
    """The least and the greatest rate of the guest's clock that the readings allow; None if they are too few.

    A clock of ticks lags while the host is busy: it counts the ticks that it got. Its best readings are the ones that
    it came to soonest.
    """

    def best(some: list[Reading]) -> Reading:
        return min(some, key=lambda reading: reading.latest_ns - reading.guest_ns)

    start_ns, end_ns = readings[0].latest_ns, readings[-1].latest_ns
    window_ns = (end_ns - start_ns) // 4
    if end_ns - start_ns < 2 * SPAN_NS:
        return None
    first = best([reading for reading in readings if reading.latest_ns <= start_ns + window_ns])
    last = best([reading for reading in readings if reading.latest_ns >= end_ns - window_ns])
    passed_ns = last.guest_ns - first.guest_ns
    return (
        passed_ns / (last.latest_ns - first.earliest_ns),
        passed_ns / max(last.earliest_ns - first.latest_ns, 1),
    )


def measure(probe: Probe, source: str) -> None:
    """Wait until the rate is known to be right; fail if it is known to be wrong, skip if the host was too busy."""
    deadline = time.monotonic() + MEASURE_S
    found = None
    while time.monotonic() < deadline:
        time.sleep(0.1)
        readings = list(probe.readings)
        found = bounds(readings) if readings else None
        if found and found[0] >= 1 - TOLERANCE and found[1] <= 1 + TOLERANCE:
            return
    assert found is not None, f"{source}: the guest's program did not get through"
    assert found[0] <= 1 + TOLERANCE, f"{source} is fast: between {found[0]:.5f} and {found[1]:.5f}"
    assert found[1] >= 1 - TOLERANCE, f"{source} is slow: between {found[0]:.5f} and {found[1]:.5f}"
    pytest.skip(f"the host is too busy: {source} runs at {found[0]:.5f} to {found[1]:.5f}")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An archive with the guest's program."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the guest's program")
    path = tmp_path_factory.mktemp("probe") / "clock_probe"
    flags = ["-O2", "-ffreestanding", "-fno-builtin", "-fno-stack-protector", "-nostdlib", "-static", "-no-pie"]
    subprocess.run([compiler, *flags, "-o", path, SOURCE], check=True)
    out = io.BytesIO()
    archive = CpioWriter(out)
    archive.file("bin/clock_probe", path.read_bytes(), 0o755)
    archive.close()
    return out.getvalue()


@pytest.mark.parametrize(
    ("options", "sources", "tsc_rate"),
    [
        pytest.param("", ("kvm-clock", "tsc", "hpet", "acpi_pm"), 1, id="all"),
        pytest.param("no-kvmclock", ("tsc",), 1, id="calibrated tsc"),
        # A counter that is not the processor's: KVM_SET_TSC_KHZ.
        pytest.param("", ("kvm-clock", "tsc"), 2.345678, id="scaled tsc"),
        pytest.param("no-kvmclock", ("tsc",), 0.7, id="scaled and calibrated tsc"),
        # Without anything better Linux counts ticks. The PIT's, through the IOAPIC: KVM gives it those that it was too
        # slow for later, which it does for no other timer, nor where the handler masks the line as with the i8259.
        # (Linux needs to be told twice to use it: with a TSC deadline timer it takes no other, even where that is off.)
        pytest.param(
            "no-kvmclock notsc nohpet pmtmr=0 nolapic_timer lapic=notscdeadline", ("refined-jiffies",), 1, id="ticks"
        ),
    ],
)
def test_clocks_keep_time(program: bytes, options: str, sources: tuple[str, ...], tsc_rate: float) -> None:
    guest = linux_guest()
    line = f'{guest.command_line} {options} quiet softkvm.run="clock_probe {" ".join(sources)}"'
    console, probe = Console(), Probe()

    def scaled(machine: Machine) -> None:
        machine.vm.set_tsc_khz(round(tsc_rate * machine.vm.get_tsc_khz()))

    with open_soft() as kvm, Machine(kvm, Config(256 * MIB, 1, devices=scaled), console.output) as machine:
        machine.pio.add(PROBE_PORT, PROBE_SIZE, probe, "probe")
        machine.load(guest.kernel.read_bytes(), guest.initrd.read_bytes() + program, line)
        machine.start()
        for index, source in enumerate(sources):
            probe.wanted = index
            assert probe.current.acquire(timeout=BOOT_S), f"{source}: {console.text[-2000:]}"
            measure(probe, source)
