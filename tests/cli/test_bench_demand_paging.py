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
