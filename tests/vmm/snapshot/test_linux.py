# SPDX-License-Identifier: Apache-2.0
"""A Linux boot that is saved and restored at random moments ends as one that isn't."""

from __future__ import annotations

import hashlib
import random
import re

import pytest
from tests.support.guests import linux_guest
from tests.support.hops import hop
from tests.support.machines import open_soft

from softkvm.vmm.console import Console
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End

pytestmark = pytest.mark.guest

WORK = "echo sum $((40 + 2)); nproc; head -c 300000 /dev/zero | md5sum; sleep 0.3; echo slept"


@pytest.mark.parametrize(("vcpus", "hyperv", "seed"), [(1, True, 1), (4, False, 2)])
def test_boot_that_moves_ends_as_one_that_does_not(vcpus: int, hyperv: bool, seed: int) -> None:
    guest = linux_guest()
    moments = random.Random(seed)
    console = Console()
    with open_soft() as kvm:
        machine = Machine(kvm, Config(128 * MIB, vcpus, hyperv=hyperv), console.output)
        try:
            machine.load(guest.kernel, guest.initrd, f'{guest.command_line} quiet softkvm.run="{WORK}"')
            machine.start()
            hops = 0
            while hops < 6 and not machine.ended.wait(moments.uniform(0.05, 1.0)):
                machine = hop(machine, kvm, console)
                hops += 1
            outcome = machine.wait(120)
        finally:
            machine.close()
    text = console.text
    assert outcome.end is End.POWER_OFF, text[-2000:]
    assert hops >= 3
    assert "sum 42" in text
    assert re.search(rf"^{vcpus}\r$", text, re.MULTILINE)
    assert hashlib.md5(bytes(300_000)).hexdigest() in text
    assert "slept" in text
    assert not re.search(r"BUG:|Oops|WARNING: CPU|Call Trace|rcu.*stall|soft lockup|clocksource.*unstable", text), text
