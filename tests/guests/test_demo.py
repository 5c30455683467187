# SPDX-License-Identifier: Apache-2.0
"""The demonstration guest, on the software CPU and, where installed, on QEMU."""

import re

import pytest
from tests.support.guests import booted, demo_image, run_in_qemu
from tests.support.machines import open_soft

from softkvm.vmm.outcome import End

pytestmark = pytest.mark.guest


@pytest.mark.parametrize("vcpus", [1, 2, 4, 16])
def test_all_vcpus_come_up_and_it_powers_off(vcpus: int) -> None:
    with booted(open_soft(), demo_image(), command_line='run="irq; poweroff"', vcpus=vcpus) as (machine, console):
        outcome = machine.wait(60)
        text = console.text
    assert outcome.end is End.POWER_OFF, text
    assert f"vcpus       {vcpus} of {vcpus} running, APIC ids {' '.join(map(str, range(vcpus)))}" in text
    assert "unexpected exception" not in text


def test_it_sees_its_memory_and_processor() -> None:
    with booted(open_soft(), demo_image(), command_line='run="poweroff"', memory_mib=64) as (machine, console):
        machine.wait(60)
        text = console.text
    ram_kib = int(re.search(r"memory +(\d+) KiB of RAM", text)[1])  # type: ignore[index]
    assert 63 << 10 <= ram_kib <= 64 << 10
    assert "processor   AuthenticAMD" in text
    features = re.search(r"features((?:\s+\S+)*?)\s*\nhypervisor", text.replace("\r", ""))
    assert features is not None
    assert {"lm", "nx", "sse2", "sse4.2", "aes", "apic", "popcnt"} <= set(features[1].split())
    assert "hypervisor  KVMKVMKVM" in text


def test_memory_above_4_gib_is_in_the_map() -> None:
    with booted(open_soft(), demo_image(), command_line='run="poweroff"', memory_mib=5 << 10) as (machine, console):
        machine.wait(60)
        text = console.text
    ranges = re.findall(r"([0-9a-f]{12})-([0-9a-f]{12}) RAM", text)
    assert any(int(start, 16) == 1 << 32 for start, _ in ranges)


def test_commands_at_the_prompt_and_timer_interrupts() -> None:
    with booted(open_soft(), demo_image(), vcpus=2) as (machine, console):
        console.expect("> ", 60)
        console.send("nonsense\r")
        console.expect("no command 'nonsense'", 10)
        console.send("hel\x7flp\r")
        console.expect("switch the machine off", 10)
        # The timer ticks 20 times a second: on a quick host the first commands are done before the first tick.
        for _ in range(100):
            console.send("irq\r")
            timer, _ipi, serial = map(int, console.expect(r"^0 +(\d+) +(\d+) +(\d+)", 10).groups())
            if timer:
                break
        assert timer > 0
        assert serial > 0
        console.send("poweroff\r")
        assert machine.wait(30).end is End.POWER_OFF


def test_reboot_resets_the_machine() -> None:
    with booted(open_soft(), demo_image(), command_line='run="reboot"') as (machine, _):
        assert machine.wait(60).end is End.RESET


def test_it_works_on_another_machine() -> None:
    text = run_in_qemu(demo_image(), 'run="irq; mem; bench; poweroff"', vcpus=3)
    assert "vcpus       3 of 3 running, APIC ids 0 1 2" in text
    assert "unexpected exception" not in text
