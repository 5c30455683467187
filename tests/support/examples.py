# SPDX-License-Identifier: Apache-2.0
"""Examples in the documents, to be run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def examples(document: str, language: str = "python") -> list[tuple[int, str]]:
    """The fenced blocks of a language in ``docs/``: the line that each begins in, and its text."""
    text = (ROOT / "docs" / document).read_text()
    blocks = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in blocks]
