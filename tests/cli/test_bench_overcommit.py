# SPDX-License-Identifier: Apache-2.0
"""``softkvm bench overcommit``: the table, the files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.guests import missing
from tests.support.machines import open_soft

from softkvm.bench import overcommit
from softkvm.cli.main import main


@pytest.fixture
def guest() -> None:
    """Skips where the software CPU, or the guest, is not built."""
    open_soft().close()
    if not (Path(overcommit.__file__).parent / "data" / "allocator.elf").exists():
        missing("src/softkvm/bench/data/allocator.elf is not built: make guests")


@pytest.mark.usefixtures("guest")
def test_it_prints_a_table_and_writes_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "overcommit", "--modes", "bare,hypercall", "--memory", "64M", "--guests", "3"]
    command += ["--budget", "140M", "--enforce", "accounting", "--swap-speed", "50M"]
    files = ["--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.svg")]
    assert main([*command, *files]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Overcommit: guests of 64 MiB that use 40 MiB, a host of 140 MiB\n")
    assert "bare (bare metal, gives nothing back; accounting): 2 guests fit" in out
    assert "hypercall (bare metal, a hypercall for each unused huge page; accounting): 3 guests fit" in out
    report = json.loads((tmp_path / "o.json").read_text())
    assert [run["fits"] for run in report["series"]["bare"]["runs"]] == [True, True, False]
    assert report["options"]["swap_speed"] == 50 << 20
    assert b"<svg" in (tmp_path / "o.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "on"], "mode=on: expected off, reporting, hinting, bare, hypercall"),
        (["--memory", "8G"], "memory=8192 MiB: expected 64 MiB to 1024 MiB"),
        (["--guests", "0"], "--guests 0: expected a number from 1 to 64"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "overcommit", *arguments]) == 2
    assert message in capsys.readouterr().err
