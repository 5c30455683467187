# SPDX-License-Identifier: Apache-2.0
"""``softkvm exec --stats``: what a client has asked for is written however its process ends by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.clients import Completed


def runs(file: Path) -> int:
    """How many KVM_RUN a client's statistics have."""
    rows = json.loads(file.read_text())["requests"]
    return sum(row["count"] for row in rows if row["request"] == "KVM_RUN")


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("how", ["exit", "_exit", "_Exit", "exit_group", "thread"])
def test_counts_are_written(client: Callable[..., Completed], tmp_path: Path, how: str, static: bool) -> None:
    file = tmp_path / "counts.json"
    done = client("ends", how, options=("--stats", str(file)), flags=("-static",) if static else ())
    assert (done.returncode, done.stderr) == (5, "")
    assert runs(file) == 1


def test_children_count_for_themselves(client: Callable[..., Completed], tmp_path: Path) -> None:
    done = client("ends", "children", options=("--stats", str(tmp_path / "counts.json")))
    assert (done.returncode, done.stderr) == (5, "")
    assert runs(tmp_path / "counts.json") == 1
    (child,) = tmp_path.glob("counts.*.json")  # those that have not used KVM have none
    assert runs(child) == 3
