# SPDX-License-Identifier: Apache-2.0
"""Linux is paused, goes on, and is reset: it finds a machine as new, its clocks agree, and no watchdog barks."""

from __future__ import annotations

import re
import time

import pytest
from tests.support.guests import linux_guest
from tests.support.machines import open_soft

from softkvm.vmm.console import Console
from softkvm.vmm.guest.initramfs import PROMPT
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

BOOT_S = 240


def test_linux_goes_on_and_begins_anew() -> None:
    guest = linux_guest()
    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(256 * MIB, 2, reboot=True), console.output) as machine:
        console.attach(machine)
        machine.load(guest.kernel, guest.initrd, guest.command_line)
        machine.start()
        console.expect(PROMPT, BOOT_S)
        machine.pause()
        before = len(console.text)
        console.send("echo went $((1 + 1)) on\n")
        time.sleep(1)
        assert len(console.text) == before
        machine.resume()
        console.expect("went 2 on", 60)
        console.send("echo b > /proc/sysrq-trigger\n")
        console.expect(r"softkvm: init reached", BOOT_S)
        console.expect(PROMPT, BOOT_S)
        assert machine.boots == 2
        console.send(
            "nproc; cat /sys/devices/system/clocksource/clocksource0/current_clocksource; dmesg; poweroff -f\n"
        )
        outcome = machine.wait(BOOT_S)
    assert outcome.end is End.POWER_OFF, console.text
    answer = console.text[console.text.rindex(PROMPT) :]
    assert re.search(r"^2\r$", answer, re.MULTILINE)
    assert "kvm-clock" in answer
    assert not re.search(r"lockup|stall|unstable|BUG|Call Trace|spurious", console.text), console.text
