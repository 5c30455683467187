# SPDX-License-Identifier: Apache-2.0
"""The benchmark guests compute on the software CPU what they compute on QEMU (7.2, TCG)."""

import re

import pytest
from tests.support.guests import bench_image, booted, exits_image, run_in_qemu
from tests.support.machines import open_soft

from softkvm.bench import vmexit
from softkvm.vmm.outcome import End

pytestmark = pytest.mark.guest

ITERATIONS = 25
QEMU_CHECKSUMS = {
    "registers": "8a632b411bf4fdf2",
    "loadstore": "145",
    "callret": "145",
    "compiled": "97a390791fbf4f33",
    "footprint": "9b4ef15de3e581ee",
    "pages": "1595",
}
COMMAND_LINE = f"bench={','.join(QEMU_CHECKSUMS)} iterations={ITERATIONS}"


def checksums(text: str) -> dict[str, str]:
    found = re.findall(rf"^bench (\S+) iterations {ITERATIONS} checksum ([0-9a-f]+) ns \d+\s*$", text, re.MULTILINE)
    return dict(found)


def test_checksums_are_those_of_qemu() -> None:
    with booted(open_soft(), bench_image(), command_line=COMMAND_LINE) as (machine, console):
        outcome = machine.wait(120)
        text = console.text
    assert outcome.end is End.POWER_OFF, text
    assert checksums(text) == QEMU_CHECKSUMS


def test_every_kind_of_exit_comes_back() -> None:
    with booted(open_soft(), exits_image(), command_line=f"iterations={ITERATIONS}", vcpus=2) as (machine, console):
        outcome = machine.wait(60)
        text = console.text
    assert outcome.end is End.POWER_OFF, text
    assert set(checksums(text)) == set(vmexit.OWN)


def test_qemu_still_says_the_same() -> None:
    assert checksums(run_in_qemu(bench_image(), COMMAND_LINE)) == QEMU_CHECKSUMS
