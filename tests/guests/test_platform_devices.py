# SPDX-License-Identifier: Apache-2.0
"""Debian's general kernel finds the small devices: generation ID, panic device, watchdog; and poisons its free pages.

The kernel for clouds, the default guest's, has no drivers for the first and the third.
"""

from __future__ import annotations

import time

import pytest
from tests.support.kernels import GENERIC, kernel_with_modules
from tests.support.machines import open_soft

from softkvm.vmm.console import Console
from softkvm.vmm.devices.pvpanic import PvPanicSpec
from softkvm.vmm.devices.virtio_balloon import BalloonSpec
from softkvm.vmm.devices.watchdog import WatchdogSpec
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]


def test_linux_finds_generation_id_panic_device_and_watchdog_and_keeps_its_poisoned_pages() -> None:
    kernel = kernel_with_modules(GENERIC)
    modules = ["virtio_pci", "virtio_balloon", "pvpanic-pci", "watchdog"]
    initrd = kernel.initrd(modules, {"modules/i6300esb.ko": kernel.module("i6300esb")})
    specs = (BalloonSpec(reporting=True), PvPanicSpec(), WatchdogSpec())
    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(256 * MIB, device_specs=specs), console.output) as machine:

        def run(command: str, pattern: str) -> None:
            console.send(f"{command}\n")
            console.expect(pattern, timeout_s=120)

        console.attach(machine)
        machine.load(kernel.image.read_bytes(), initrd, "console=ttyS0 quiet page_poison=1")
        machine.start()
        console.expect("root@softkvm", timeout_s=300)
        run("/load", "root@softkvm")
        loaded = time.monotonic()

        # The generation ID: the driver is bound, and mixes a new one into the random generator.
        run("ls /sys/bus/acpi/drivers/vmgenid", "SKVM0001:00")
        machine.board.vmgenid.change()
        run("sleep 0.2; dmesg | grep random:", "crng reseeded due to virtual machine fork")

        run("cat /sys/bus/pci/drivers/pvpanic-pci/*/capability", r"^3\b")

        # Free pages are full of 0xAA, and Linux looks whether they are still: it says so, and nothing is taken.
        balloon = machine.devices[0]
        assert balloon.poisoned
        assert balloon.negotiated(5)  # VIRTIO_BALLOON_F_PAGE_REPORTING
        while time.monotonic() - loaded < 4:
            time.sleep(0.1)
        run("echo balloon $?", "balloon 0")
        assert balloon.reclaimed["reported"] == 0

        run("insmod /modules/i6300esb.ko heartbeat=2; cat /sys/class/watchdog/watchdog0/identity", "i6300ESB timer")
        console.send("sleep 1000 > /dev/watchdog\n")  # opened, and nobody writes to it
        outcome = machine.wait(120)
        assert (outcome.end, outcome.detail) == (End.RESET, "watchdog")
    assert "corruption" not in console.text
