# SPDX-License-Identifier: Apache-2.0
"""docs/snapshots.md says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.support.guests import ROOT
from tests.support.machines import open_soft

from softkvm.cli import run_cached
from softkvm.cli.main import main
from softkvm.vmm.migration.source import DOWNTIME_S
from softkvm.vmm.migration.throttle import STEPS
from softkvm.vmm.snapshot.directory import MOST_BASES

TEXT = (ROOT / "docs" / "snapshots.md").read_text()
WORDS = re.sub(r"\s+", " ", TEXT)


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    open_soft().close()
    monkeypatch.chdir(tmp_path)
    example = TEXT.partition("```python\n")[2].partition("```")[0]
    exec(compile(example, "docs/snapshots.md", "exec"), {})
    assert "running" in capsys.readouterr().out
    assert (tmp_path / "one" / "manifest.json").exists()


@pytest.mark.parametrize("line", re.findall(r"^softkvm (\S.*?)(?: {2,}#.*)?$", TEXT, re.MULTILINE))
def test_commands_are_understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their options, that is: with --help a command does nothing else."""
    if line.startswith(("going", "web")):
        return
    words = line.split()
    assert main([*words[: 2 if words[0] == "snapshot" else 1], "--help"]) == 0
    shown = capsys.readouterr().out
    for word in words:
        if word.startswith("--"):
            assert word in shown


def test_numbers_are_the_codes() -> None:
    assert f"up to {MOST_BASES} of them" in WORDS
    assert f"`--downtime` ({DOWNTIME_S:g} s)" in WORDS
    assert f"(to {', '.join(map(str, STEPS))} % of a processor)" in WORDS
    assert {2: "Two", 4: "Four", 8: "Eight"}[run_cached.KEPT] + " such guests are kept" in WORDS
    assert run_cached.FRESH_S == 24 * 3600
    for option in ("append", "stats", "trace", "plugin", "param", "gdb", "pin-memory", "net", "disk", "port"):
        assert f"`--{option}`" in WORDS
        assert option.replace("-", "_") in run_cached._BOOTING
