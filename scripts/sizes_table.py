# SPDX-License-Identifier: Apache-2.0
"""Prints docs/sizes.md: every kind of array whose length a client, a guest or a file gives, and its limit.

python scripts/sizes_table.py > docs/sizes.md

The limits are asked of the code itself: whatever module makes a ``softkvm.abi.sizes.Size`` is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from softkvm.abi import sizes

ROOT: Final = Path(__file__).resolve().parents[1]
SOURCE: Final = ROOT / "src"

_INTRODUCTION: Final = """\
# Sizes

Arrays whose length somebody else gives: a client by an ioctl, a guest by a hypercall or an instruction, a file by its
header. Each length goes through one check (`softkvm.abi.sizes.Size`) before anything is read, or made, of that length;
that an element's bytes times the limit fit a size_t is looked at where the limit is defined.

This page is made by `python scripts/sizes_table.py > docs/sizes.md`; `tests/properties/test_sizes.py` looks that it is
up to date, and tries each length at its edges.

| array | who gives its length | elements | bytes each | beyond that | checked by |
|---|---|---|---|---|---|"""


def load() -> list[sizes.Size]:
    """Return all sizes, in the order of their modules and names."""
    for path in sorted(SOURCE.rglob("*.py")):
        if "Size(" in path.read_text(encoding="utf-8"):
            importlib.import_module(".".join(path.relative_to(SOURCE).with_suffix("").parts))
    return sorted(sizes.ALL, key=lambda size: (size.giver, size.where, size.name))


def table() -> Iterator[str]:
    """Yield the page's lines."""
    yield _INTRODUCTION
    for size in load():
        path = "src/" + size.where.replace(".", "/") + ".py"
        count = f"{size.most}" if not size.least else f"{size.least} to {size.most}"
        yield f"| {size.name} | {size.giver} | {count} | {size.element} | {size.effect} | `{path}` |"


if __name__ == "__main__":
    print("\n".join(table()))
