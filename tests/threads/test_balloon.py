# SPDX-License-Identifier: Apache-2.0
"""Memory that comes back (threads 5, 21, 24): an unmodified Linux guest reports, hints and inflates.

The program in the guest is guests/linux/pages.c. One guest serves all tests, and each leaves it as it was.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.guests import linux_guest
from tests.support.machines import open_soft

from softkvm.bench.host_budget import resident
from softkvm.bench.linux import LinuxGuest
from softkvm.vmm.console import Console
from softkvm.vmm.devices.virtio_balloon import Balloon, BalloonSpec
from softkvm.vmm.errors import StateError
from softkvm.vmm.host_memory import Backing
from softkvm.vmm.memory import KIB, MIB
from softkvm.vmm.snapshot.directory import Snapshot, save

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

PATIENCE_S = 120.0
SPEC = BalloonSpec(reporting=True, hinting=True, deflate_on_oom=True, stats_s=1)


class Guest:
    """The guest, and what it has of the host."""

    def __init__(self, linux: LinuxGuest) -> None:
        self.linux = linux
        self.balloon: Balloon = linux.machine.devices[0]

    def held(self) -> int:
        """Bytes of its memory that the host holds."""
        return resident([[(ram.hva, ram.hva + ram.end - ram.start) for ram in self.linux.machine.memory.ranges]])[0]

    def hog(self, mebibytes: int) -> None:
        """Let a program use so much memory, and end."""
        self.linux.run(f"pages hog {mebibytes}", rf"^hog {mebibytes * 256} pages")

    def meminfo(self, name: str) -> int:
        """A line of the guest's /proc/meminfo, in bytes."""
        return int(self.linux.run("cat /proc/meminfo", rf"^{name}: +(\d+) kB")[1]) * KIB

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the guest does by itself."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.05)

    def hint(self) -> int:
        """Ask for all free pages."""
        assert self.balloon.hinting is not None
        return self.balloon.hinting.reclaim(PATIENCE_S)


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    linux_guest()
    with open_soft() as kvm, LinuxGuest(kvm, 256 * MIB, devices=(SPEC,)) as linux:
        made = Guest(linux)
        # Huge pages are off where there is so little memory; with them a million pages take a third of the time.
        linux.run("echo always > /sys/kernel/mm/transparent_hugepage/enabled")
        made.wait(lambda: made.balloon.reclaimed["reported"] > 0)
        yield made


def test_linux_reports_free_pages_and_the_host_has_them_back(guest: Guest) -> None:
    before = guest.balloon.reclaimed["reported"]
    guest.hog(128)
    guest.wait(lambda: guest.balloon.reclaimed["reported"] - before > 100 * MIB)
    guest.wait(lambda: guest.held() < 120 * MIB)
    guest.hog(128)  # and uses them again


def test_linux_names_its_free_pages_when_it_is_asked(guest: Guest) -> None:
    guest.hog(128)
    assert guest.hint() > 100 * MIB
    assert guest.held() < 120 * MIB
    assert not guest.linux.machine.memory.logging
    guest.hog(128)  # it has them all back


def test_the_balloon_takes_memory_and_gives_it_back(guest: Guest) -> None:
    free = guest.meminfo("MemFree")
    guest.balloon.set_target(64 * MIB)
    guest.wait(lambda: guest.balloon.size == 64 * MIB)
    assert free - guest.meminfo("MemFree") > 48 * MIB
    guest.balloon.set_target(0)
    guest.wait(lambda: guest.balloon.size == 0)
    assert free - guest.meminfo("MemFree") < 16 * MIB


def test_a_guest_that_has_no_more_memory_takes_it_out_of_the_balloon(guest: Guest) -> None:
    """VIRTIO_BALLOON_F_DEFLATE_ON_OOM: nobody is killed."""
    guest.balloon.set_target(128 * MIB)
    guest.wait(lambda: guest.balloon.size == 128 * MIB)
    guest.hog(150)
    assert guest.balloon.size < 100 * MIB
    assert guest.balloon.target == 128 * MIB
    guest.balloon.set_target(0)
    guest.wait(lambda: guest.balloon.size == 0)


def test_statistics_are_the_guests_own(guest: Guest) -> None:
    found = guest.balloon.statistics(PATIENCE_S)
    assert found["total_memory"] == guest.meminfo("MemTotal")
    assert abs(found["free_memory"] - guest.meminfo("MemFree")) < 32 * MIB
    assert {"available_memory", "disk_caches", "minor_faults", "major_faults"} <= set(found)


def test_of_a_million_pages_none_is_lost_while_they_are_reported_hinted_and_inflated(guest: Guest) -> None:
    stop = threading.Event()
    before = dict(guest.balloon.reclaimed)

    def disturb() -> None:
        inflated = False
        while not stop.wait(0.5):
            inflated = not inflated
            guest.balloon.set_target(24 * MIB if inflated else 0)
            with contextlib.suppress(StateError):
                guest.hint()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        found = guest.linux.run("pages check 128 1000000", r"^check (\d+) pages, lost (\d+), not zero (\d+)", 500)
    finally:
        stop.set()
        thread.join()
    guest.balloon.set_target(0)
    assert int(found[1]) >= 1_000_000
    assert (found[2], found[3]) == ("0", "0")
    assert all(guest.balloon.reclaimed[way] > before[way] for way in ("reported", "hinted", "inflated"))
    assert not re.search(r"BUG|Call Trace|Out of memory", guest.linux.console.text)


def test_a_restored_guest_gives_back_what_its_snapshots_file_has(guest: Guest, tmp_path: Path) -> None:
    """Its memory is a private mapping of a file: a page that was dropped would show the file's contents again."""
    console = Console()
    save(guest.linux.machine, tmp_path / "saved")
    with (
        open_soft() as kvm,
        Snapshot(tmp_path / "saved") as snapshot,
        snapshot.restore(kvm, console.output, device_specs=(SPEC,)) as machine,
    ):
        console.attach(machine)
        machine.start()
        balloon: Balloon = machine.devices[0]
        assert machine.memory.backing is Backing.PRIVATE_FILE
        assert balloon.hinting is not None
        for _ in range(3):
            console.send("pages check 128 20000\n")
            assert console.expect(r"^check (\d+) pages, lost (\d+), not zero (\d+)", PATIENCE_S)[2] == "0"
            assert balloon.hinting.reclaim(PATIENCE_S) > 64 * MIB
        console.send("pages check 128 20000\n")
        found = console.expect(r"^check (\d+) pages, lost (\d+), not zero (\d+)", PATIENCE_S)
        assert (found[2], found[3]) == ("0", "0")
        assert balloon.statistics(PATIENCE_S)["total_memory"] == guest.balloon.statistics()["total_memory"]
