# SPDX-License-Identifier: Apache-2.0
"""The measurements' own arithmetic and parsing."""

import mmap
import os
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.memory import resident_mib


def test_both_sides_get_the_same_machine_and_images() -> None:
    image = common.Image(Path("/k"), Path("/i"), "console=ttyS0 x", memory_mib=128, vcpus=2)
    qemu = common.command(common.QEMU, image)
    softkvm = common.command(common.SOFTKVM, image, Path("/s.json"))
    for option, value in (("-kernel", "/k"), ("-initrd", "/i"), ("-append", "console=ttyS0 x"), ("-smp", "2")):
        assert qemu[qemu.index(option) + 1] == value
    for option, value in (("--kernel", "/k"), ("--initrd", "/i"), ("--append", "console=ttyS0 x"), ("--vcpus", "2")):
        assert softkvm[softkvm.index(option) + 1] == value
    assert (qemu[qemu.index("-m") + 1], softkvm[softkvm.index("--mem") + 1]) == ("128", "128M")


def test_first_finds_the_first_matching_line() -> None:
    run = common.Run(3.0, 1.0, 0, [(0.5, "a"), (1.5, "Linux version 6"), (2.0, "Linux version 6")])
    assert run.first(r"Linux version") == 1.5
    with pytest.raises(common.BenchmarkError, match="no line matches"):
        run.first("absent")


def test_resident_memory_tells_the_guests_ram_apart() -> None:
    with mmap.mmap(-1, 96 << 20) as ram:
        for page in range(0, 8 << 20, 4096):
            ram[page] = 1
        other, guest = resident_mib(os.getpid(), 96)
    assert 8 <= guest <= 10 or guest >= 96  # huge pages may fill it
    assert 5 < other < 1000


@pytest.mark.parametrize(("a", "b", "text"), [(3.0, 2.0, "1.50"), (None, 2.0, "-"), (1.0, None, "-")])
def test_ratio(a: float | None, b: float | None, text: str) -> None:
    assert common.ratio(a, b) == text


def test_table_aligns_figures_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    common.table("T", ("x", "n"), [("long name", "1"), ("y", "1,000")])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "T",
        "  x              n",
        "  ---------  -----",
        "  long name      1",
        "  y          1,000",
    ]
