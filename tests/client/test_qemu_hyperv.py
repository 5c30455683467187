# SPDX-License-Identifier: Apache-2.0
"""QEMU's guests of Hyper-V's (``-cpu …,hv-…``): Linux boots with enforced privileges, and goes on after a migration."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.qemu import PROMPT, default_guest, machine, wait_for

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

ENLIGHTENMENTS = (
    "hv-relaxed,hv-vapic,hv-vpindex,hv-time,hv-runtime,hv-synic,hv-stimer,hv-stimer-direct,hv-frequencies,hv-reset,"
    "hv-crash,hv-ipi,hv-tlbflush,hv-reenlightenment,hv-spinlocks=0x1fff,hv-enforce-cpuid"
)
CLOCKSOURCE = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"


def test_linux_on_hyper_vs_interfaces_is_migrated_to_a_file_and_back(tmp_path: Path) -> None:
    state = tmp_path / "state"
    cpu = f"host,kvm=off,{ENLIGHTENMENTS}"
    options = ["-M", "q35", "-m", "128", "-smp", "2", "-cpu", cpu, *default_guest()]
    with machine(tmp_path / "one", *options) as before:
        before.expect(PROMPT)
        assert before.shell(CLOCKSOURCE) == "hyperv_clocksource_tsc_page\n"
        before.shell("x=$(cut -d. -f1 /proc/uptime)")
        before.migrate(state)
        before.quit()
    with machine(tmp_path / "two", *options, "-incoming", f"exec:cat {state}") as after:
        wait_for(lambda: bool(after.do("query-status")["status"] == "running"))
        assert after.shell("sleep 1; echo $(($(cut -d. -f1 /proc/uptime) > x))") == "1\n"
        assert after.shell(CLOCKSOURCE) == "hyperv_clocksource_tsc_page\n"
        assert after.shell("dmesg | grep -ciE 'stall|lockup|BUG:'") == "0\n"
        after.quit()
