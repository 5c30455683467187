# SPDX-License-Identifier: Apache-2.0
"""``softkvm bench dirty-log``: the table, the files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.machines import open_soft

from softkvm.cli.main import main


@pytest.fixture
def soft() -> None:
    """Skips where the software CPU is not built."""
    open_soft().close()


@pytest.mark.usefixtures("soft")
def test_it_prints_a_table_and_writes_json_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / name for name in ("log.json", "log.svg", "log.png")}
    small = ["bench", "dirty-log", "--memory", "2M", "--vcpus", "2", "--iterations", "1"]
    assert main([*small, "--json", str(files["log.json"]), "--plot", str(files["log.svg"])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Dirty logging: 2 vCPUs, 4 MiB, 100 % written\n")
    assert "pages in the logs: 1,024 of 1,024" in out
    report = json.loads(files["log.json"].read_text())
    assert report["options"]["pages"] == 1024
    assert set(report["seconds"]) == {"populate", "enable", "dirty", "get", "clear", "disable"}
    assert b"<svg" in files["log.svg"].read_bytes()
    assert main([*small, "--plot", str(files["log.png"])]) == 0
    assert files["log.png"].read_bytes().startswith(b"\x89PNG")
