# SPDX-License-Identifier: Apache-2.0
"""What to expect of the programs: who skips for which reason, what a program needs that it does not ask for itself.

``expected.toml`` has it. A program that is in no table is expected to pass.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from softkvm import abi

FILE = Path(__file__).parent / "expected.toml"


@dataclass(frozen=True, slots=True)
class Skip:
    """Programs that skip by themselves."""

    reason: str
    says: str
    """What is in the output of such a program: the requirement that is not met, and no other."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a program takes for granted, and later versions of it ask for."""

    capability: str
    reason: str

    @property
    def number(self) -> int:
        """Return the capability's number."""
        return int(getattr(abi, self.capability))


@dataclass(frozen=True, slots=True)
class Table:
    """What is expected, by :func:`key`."""

    skips: Mapping[str, Skip]
    needs: Mapping[str, Need]
    slow: Mapping[str, float]
    """Time limits of programs that take long, in seconds."""


def key(name: str) -> str:
    """Return a program's name without its directory, which newer kernels call ``x86``."""
    return name.rpartition("/")[2]


def read(document: Mapping[str, Any]) -> Table:
    """Return the table of a parsed file; ValueError for what it should not have."""
    unknown = set(document) - {"skip", "need", "slow"}
    if unknown:
        raise ValueError(f"no such tables: {', '.join(sorted(unknown))}")
    skips, needs, slow = {}, {}, {}
    for entry in document.get("skip", ()):
        skip = Skip(entry["reason"], entry["says"])
        skips.update(dict.fromkeys(map(key, entry["programs"]), skip))
    for entry in document.get("need", ()):
        need = Need(entry["capability"], entry["reason"])
        if not hasattr(abi, need.capability):
            raise ValueError(f"no capability is named {need.capability}")
        needs.update(dict.fromkeys(map(key, entry["programs"]), need))
    for entry in document.get("slow", ()):
        slow.update(dict.fromkeys(map(key, entry["programs"]), float(entry["limit_s"])))
    return Table(skips, needs, slow)


@cache
def expected() -> Table:
    """Return the table for this KVM."""
    return read(tomllib.loads(FILE.read_text()))
