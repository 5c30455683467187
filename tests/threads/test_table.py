# SPDX-License-Identifier: Apache-2.0
"""docs/threads.md: every thread has a row, and what a row names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
THREADS = range(1, 34)

_ROW = re.compile(r"^\| (?P<numbers>[\d, ]+) \|(?P<cells>.*)\|$", re.MULTILINE)
_PATH = re.compile(r"`((?:src|tests|docs|cpu|client)/[^`:]+)(?:::(\w+))?`")


def rows() -> list[tuple[list[int], str]]:
    text = (ROOT / "docs" / "threads.md").read_text()
    return [([int(n) for n in row["numbers"].split(",")], row["cells"]) for row in _ROW.finditer(text)]


def test_every_thread_has_one_row() -> None:
    assert sorted(n for numbers, _ in rows() for n in numbers) == list(THREADS)


def test_what_is_named_exists() -> None:
    named = [match for _, cells in rows() for match in _PATH.finditer(cells)]
    assert len(named) > len(rows()) // 2
    for match in named:
        path, test = ROOT / match[1], match[2]
        assert path.exists(), match[0]
        assert test is None or f"def {test}(" in path.read_text(), match[0]


def test_a_row_without_a_test_says_what_is_to_come() -> None:
    for numbers, cells in rows():
        assert "::" in cells or "to come" in cells, numbers
