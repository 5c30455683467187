# SPDX-License-Identifier: Apache-2.0
"""A build of the selftests: ``tools/testing/selftests/kvm`` of a kernel's source after ``make``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

MAKEFILES = ("Makefile.kvm", "Makefile")
"""Where the programs are listed: the first in newer kernels."""

_LIST = re.compile(r"^TEST_GEN_PROGS(?:_EXTENDED)?_(?:x86_64|x86|COMMON)\s*\+?=\s*(.*)$")


class BuildError(Exception):
    """Why a directory is no build, in one line."""


@dataclass(frozen=True, slots=True)
class Program:
    """A selftest: its name is its path in the directory."""

    name: str
    path: Path

    @property
    def built(self) -> bool:
        """Whether the build has made it."""
        return self.path.is_file() and os.access(self.path, os.X_OK)


def programs(directory: Path) -> list[Program]:
    """Return the programs that the directory's Makefile lists for x86, in its order; BuildError if there is none."""
    for makefile in MAKEFILES:
        try:
            text = (directory / makefile).read_text()
        except OSError:
            continue
        lines = text.replace("\\\n", " ").splitlines()
        names = [name for line in lines if (match := _LIST.match(line)) for name in match[1].split()]
        found = [Program(name, directory / name) for name in dict.fromkeys(names) if "$" not in name]
        if any(program.built for program in found):
            return found
        if found:
            raise BuildError(f"{directory}: nothing is built; run make there")
    raise BuildError(f"{directory}: expected tools/testing/selftests/kvm of a kernel's source, built with make")
