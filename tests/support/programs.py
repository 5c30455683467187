# SPDX-License-Identifier: Apache-2.0
"""Programs of Debian's for a guest: the executable and the shared libraries that it needs, and nothing else."""

from __future__ import annotations

import fcntl
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment
from tests.support.guests import missing
from tests.support.systems import apt_of, archive, kept_directory

from softkvm.progress import NoProgress
from softkvm.vmm.guest import GuestUnavailable
from softkvm.vmm.guest.deb import DebError, read_files

_MOST_FILES = 10_000
_LIBRARY = re.compile(r"(?:usr/)?lib(?:64)?/(?:x86_64-linux-gnu/)?[^/]+\.so[^/]*")


def program(package: str, path: str) -> bytes:
    """Return an initramfs with the program that *path* matches in *package*, as ``bin/PACKAGE``, and its libraries.

    Skips where it cannot be had, which CI does not accept.
    """
    kept = kept_directory() / f"{package}_program"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with (kept.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                with tempfile.TemporaryDirectory(dir=kept.parent) as work:
                    made = Path(work) / "archive"
                    made.write_bytes(archive(_collect(package, path, Path(work))))
                    os.replace(made, kept)
        return kept.read_bytes()
    except (GuestUnavailable, DebError, OSError) as error:
        missing(f"package {package}: {error}")
        raise AssertionError from error


def _collect(package: str, path: str, work: Path) -> dict[str, bytes]:
    """Download the package with all that it depends on; return the files by their places in the guest."""
    apt_of("amd64").download_with_dependencies(package, work, NoProgress())
    libraries: dict[str, bytes] = {}
    main: dict[str, bytes] = {}
    for deb in work.glob("*.deb"):
        if deb.name.startswith(f"{package}_"):
            main = read_files(deb, lambda member: re.fullmatch(path, member) is not None, count=1)
        for data in read_files(deb, lambda member: _LIBRARY.fullmatch(member) is not None, count=_MOST_FILES).values():
            for name in _dynamic(data, "DT_SONAME"):
                libraries[name] = data
    if not main:
        raise GuestUnavailable(f"has no file {path}")
    (executable,) = main.values()
    files = {f"bin/{package}": executable}
    pending = [executable]
    while pending:
        for name in _dynamic(pending.pop(), "DT_NEEDED"):
            where = f"lib/x86_64-linux-gnu/{name}"
            if where not in files:
                if name not in libraries:
                    raise GuestUnavailable(f"{name} is in none of the packages")
                files[where] = libraries[name]
                pending.append(libraries[name])
    interpreter = _interpreter(executable)
    files[interpreter] = libraries[Path(interpreter).name]
    return files


def _dynamic(data: bytes, tag: str) -> Iterator[str]:
    """Yield the names that a dynamically linked file has by a tag; nothing for other files."""
    if data[:4] != b"\x7fELF":
        return
    for section in ELFFile(io.BytesIO(data)).iter_sections():
        if isinstance(section, DynamicSection):
            name = {"DT_NEEDED": "needed", "DT_SONAME": "soname"}[tag]
            for entry in section.iter_tags(tag):
                yield str(getattr(entry, name))


def _interpreter(data: bytes) -> str:
    """Return where a program wants its dynamic linker, without the leading slash."""
    for segment in ELFFile(io.BytesIO(data)).iter_segments():
        if isinstance(segment, InterpSegment):
            return str(segment.get_interp_name()).removeprefix("/")
    raise GuestUnavailable("the program is not dynamically linked")
