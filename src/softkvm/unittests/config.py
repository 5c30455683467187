# SPDX-License-Identifier: Apache-2.0
"""Reader of kvm-unit-tests' ``unittests.cfg``.

An entry is a section ``[name]`` with lines ``key = value``. Values run to the end of the line; one that begins with
three quotes runs to the closing ones. Source: kvm-unit-tests' ``docs/unittests.md`` and the files themselves.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONFIG = "unittests.cfg"
ARCHITECTURES = ("x86_64", "i386")
"""What the suite can be built for, by its names; the first is its default on a 64-bit host."""
_BUILD = "config.mak"
_CLASSES = {b"\x7fELF\x01": "i386", b"\x7fELF\x02": "x86_64"}
_SECTION = re.compile(r"^\[(.*)\]\s*$")
_ASSIGNMENT = re.compile(r"^(\w+)\s*=\s*(.*)$")
_QUOTES = '"""'
_COMMAND = re.compile(r"`([^`]*)`")

SUBSTITUTIONS: dict[str, Callable[[], str]] = {"date +%s": lambda: str(int(time.time()))}
"""Shell commands between backquotes whose output we know; nothing is executed."""


class SuiteError(Exception):
    """The directory is no build of kvm-unit-tests, or its configuration cannot be read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One section of the file; texts are as they stand there."""

    name: str
    file: str
    smp: str = "1"
    test_args: str = ""
    qemu_params: str = ""
    arch: str = ""
    groups: tuple[str, ...] = ()
    accel: str = ""
    machine: str = ""
    timeout: str = ""
    check: str = ""
    disabled_if: str = ""
    unknown: tuple[str, ...] = ()
    """Keys that no one knows, with their values."""


_KEYS = {
    "file": "file",
    "smp": "smp",
    "test_args": "test_args",
    "qemu_params": "qemu_params",
    "extra_params": "qemu_params",
    "arch": "arch",
    "groups": "groups",
    "accel": "accel",
    "machine": "machine",
    "timeout": "timeout",
    "check": "check",
    "disabled_if": "disabled_if",
}
_IGNORED = ("kvmtool_params",)


def parse(text: str) -> list[Entry]:
    """Return the entries of a configuration; SuiteError for an entry without a file or a name given twice."""
    sections: list[tuple[str, dict[str, str]]] = []
    lines = iter(text.splitlines())
    for line in lines:
        section = _SECTION.match(line)
        if section:
            sections.append((section[1], {}))
            continue
        assignment = _ASSIGNMENT.match(line)
        if line.startswith("#") or not assignment or not sections:
            continue
        key, value = assignment.groups()
        if value.startswith(_QUOTES):
            value = value[len(_QUOTES) :]
            while _QUOTES not in value:
                following = next(lines, None)
                if following is None:
                    raise SuiteError(f"[{sections[-1][0]}] {key}: closing {_QUOTES} is missing")
                value = value[:-1] + following if value.endswith("\\") else f"{value}\n{following}"
            value = value[: value.index(_QUOTES)]
        sections[-1][1][key] = value.strip()
    entries = [_entry(name, values) for name, values in sections]
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise SuiteError(f"[{entry.name}]: given twice")
        seen.add(entry.name)
    return entries


def _entry(name: str, values: dict[str, str]) -> Entry:
    if not values.get("file"):
        raise SuiteError(f"[{name}]: has no file")
    fields: dict[str, str] = {}
    unknown = []
    for key, value in values.items():
        if key in _KEYS:
            fields[_KEYS[key]] = value
        elif key not in _IGNORED:
            unknown.append(f"{key} = {value}")
    groups = tuple(fields.pop("groups", "").split())
    return Entry(name, groups=groups, unknown=tuple(unknown), **fields)


def expand(text: str) -> tuple[str, list[str]]:
    """Replace commands between backquotes by what they would print; return the text and the commands left out."""
    left: list[str] = []

    def replace(match: re.Match[str]) -> str:
        known = SUBSTITUTIONS.get(match[1].strip())
        if known is None:
            left.append(f"`{match[1]}`")
            return ""
        return known()

    return _COMMAND.sub(replace, text), left


def find(directory: Path) -> Path:
    """Return the x86 directory of a build: *directory* itself or its subdirectory x86; SuiteError if it is none."""
    try:
        for candidate in (directory / "x86", directory):
            if (candidate / CONFIG).is_file():
                return candidate
        if not directory.exists():
            raise SuiteError(f"{directory}: no such directory")
    except OSError as error:
        raise SuiteError(f"{directory}: {error.strerror}") from None
    raise SuiteError(f"{directory}: expected a build of kvm-unit-tests, with x86/{CONFIG}")


def architecture(directory: Path, file: str = "") -> str:
    """Return what the image *file* of a build was made for, or the build as a whole: ``x86_64`` or ``i386``.

    An image tells nothing (``.flat`` is a 32-bit ELF file in either, since Multiboot enters programs in 32-bit mode);
    the ELF file that it was made of does. Without one, what ``./configure`` wrote down counts. SuiteError if
    *directory* is no build.
    """
    programs = find(directory)
    if file:
        try:
            with (programs / file).with_suffix(".elf").open("rb") as elf:
                made_for = _CLASSES.get(elf.read(5))
        except OSError:
            made_for = None
        if made_for:
            return made_for
    try:
        lines = (programs.parent / _BUILD).read_text("utf-8", "replace").splitlines()
    except OSError:
        return ARCHITECTURES[0]
    written = dict(line.split("=", 1) for line in lines if "=" in line).get("ARCH", "").strip()
    return written if written in ARCHITECTURES else ARCHITECTURES[0]


def read(directory: Path) -> list[Entry]:
    """Return the entries of the build in *directory*; SuiteError if there is none."""
    path = find(directory) / CONFIG
    try:
        entries = parse(path.read_text("utf-8"))
        if not entries:
            raise SuiteError("has no test: expected sections [name] with file = ...")
        return entries
    except OSError as error:
        raise SuiteError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SuiteError(f"{path}: is no text: byte {error.start} is {error.object[error.start]:#x}") from None
    except SuiteError as error:
        raise SuiteError(f"{path}: {error}") from None
