# SPDX-License-Identifier: Apache-2.0
"""``softkvm bench demand-paging``: the table, the files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.machines import open_soft

from softkvm.cli.main import main


def test_it_prints_a_table_and_writes_json_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_soft().close()  # skips where the software CPU is not built
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / name for name in ("paging.json", "paging.svg")}
    small = ["bench", "demand-paging", "--memory", "2M", "--vcpus", "2", "--mode", "exit", "--overlap"]
    assert main([*small, "--json", str(files["paging.json"]), "--plot", str(files["paging.svg"])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Demand paging: 2 vCPUs, 2 MiB, the same for all, 100 % written\n")
    assert [line.split()[0] for line in out.splitlines()[4:]] == ["none", "exit"]
    first, second = json.loads(files["paging.json"].read_text())
    assert (first["mode"], first["faults"], second["mode"]) == ("none", 0, "exit")
    assert second["options"]["pages"] == 512 <= second["faults"]
    assert b"<svg" in files["paging.svg"].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1M"], "--memory 1M: expected a size such as 256M or 2G, a multiple of 2M"),
        (["--vcpus", "0"], "--vcpus 0: expected a number from 1 to 256"),
        (["--write-percent", "101"], "--write-percent 101: expected a number from 0 to 100"),
        (["--delay", "-1"], "--delay -1: expected a number from 0 to 1000000"),
        (["--plot", "x.gif"], "--plot x.gif: expected a name that ends with .png or .svg"),
        (["--json", "/nowhere/x"], "--json /nowhere/x: No such file or directory"),
        (["--memory", "900T"], "this host has"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "demand-paging", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
