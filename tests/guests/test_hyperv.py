# SPDX-License-Identifier: Apache-2.0
"""An unmodified Linux boots as a guest of Hyper-V's: its clock, timer, interrupts and flushes are Hyper-V's."""

import re
import subprocess
import sys

import pytest
from tests.support.guests import linux_guest

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

CLOCKSOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
BOOT_S = 300


def test_linux_runs_on_hyper_vs_interfaces() -> None:
    linux_guest()
    commands = f"cat {CLOCKSOURCE}; dmesg | grep -i hyper; grep HVS /proc/interrupts; date +%s; sleep 2; date +%s"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "softkvm.cli.main", "run", "--cpu", "hv", "--vcpus", "2"),
            *("--timeout", str(BOOT_S), "--append", f'quiet softkvm.run="{commands}"'),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BOOT_S + 60,
        check=False,
    )
    text = done.stdout
    assert done.returncode == 0, (text[-3000:], done.stderr)
    assert re.search(r"^hyperv_clocksource_tsc_page\s*$", text, re.MULTILINE), text[-3000:]
    for line in (
        "Hypervisor detected: Microsoft Hyper-V",
        "Using hypercall for remote TLB flush",
        "Using IPI hypercalls",
    ):
        assert line in text
    ticks = re.search(r"HVS:\s+(\d+)\s+(\d+)\s+Hyper-V stimer0 interrupts", text)
    assert ticks is not None and min(int(ticks[1]), int(ticks[2])) > 10
    before, after = (int(line) for line in re.findall(r"^(\d{9,})\s*$", text, re.MULTILINE))
    assert 2 <= after - before <= 30
    assert not re.search(r"BUG:|Oops|WARNING: CPU|Call Trace|rcu.*stall|soft lockup", text), text
