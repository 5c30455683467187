# SPDX-License-Identifier: Apache-2.0
"""Systems to boot from Debian's packages, fetched as the default guest is and kept beside it."""

from __future__ import annotations

import fcntl
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.support.guests import missing

from softkvm.progress import NoProgress
from softkvm.vmm.guest import GuestUnavailable, cache_directory
from softkvm.vmm.guest.apt import Apt
from softkvm.vmm.guest.cpio import CpioWriter
from softkvm.vmm.guest.deb import DebError, read_files


def package_file(package: str, path: str, *, architecture: str = "amd64", kernel: bool = False) -> Path:
    """Return the file of *package* whose path matches the regular expression *path*, a copy of our own.

    With *kernel* the package is one that depends on the kernel's. Skips where it cannot be had, which CI does not
    accept.
    """
    kept = _kept(package, path, architecture)
    if not kept.exists():
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with (kept.parent / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not kept.exists():
                    _fetch(kept, package, path, architecture, kernel)
        except (GuestUnavailable, DebError, OSError) as error:
            missing(f"package {package}: {error}")
    return kept


def find_package_file(package: str, path: str) -> Path | None:
    """Return a file as :func:`package_file` does, or None where the system's package sources have no such package."""
    kept = _kept(package, path, "amd64")
    if not kept.exists():
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            _fetch(kept, package, path, "amd64", kernel=False)
        except (GuestUnavailable, DebError, OSError):
            return None
    return kept


def _kept(package: str, path: str, architecture: str) -> Path:
    return kept_directory() / f"{package}_{architecture}_{re.sub('[^A-Za-z0-9]+', '-', path)}"


def kept_directory() -> Path:
    """Where files of packages are kept, beside the default guest."""
    return cache_directory().parent / "systems"


@contextmanager
def open_package(package: str, architecture: str, *, kernel: bool) -> Iterator[Path]:
    """Download *package*, or with *kernel* the package of the kernel that it depends on, for as long as it is read."""
    with tempfile.TemporaryDirectory(dir=kept_directory()) as work:
        apt = apt_of(architecture)
        name = apt.resolve_kernel([package]) if kernel else package
        yield apt.download(name, Path(work), NoProgress()).path


def _fetch(kept: Path, package: str, path: str, architecture: str, kernel: bool) -> None:
    with open_package(package, architecture, kernel=kernel) as deb:
        files = read_files(deb, lambda member: re.fullmatch(path, member) is not None, count=1)
        if not files:
            raise GuestUnavailable(f"has no file {path}")
        file = deb.parent / "file"
        file.write_bytes(next(iter(files.values())))
        os.replace(file, kept)


@cache
def apt_of(architecture: str) -> Apt:
    """The package client with its lists; of another architecture some of the system's sources have none."""
    state = tempfile.mkdtemp(prefix="softkvm-apt-")
    apt = Apt(Path(state), architecture)
    apt.update(NoProgress(), all_sources=architecture == "amd64")
    return apt


def compile_program(source: str, target: Path, *options: str) -> Path:
    """Compile freestanding C into a static executable of Linux's or Mach's."""
    command = ["gcc", *options, "-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-pie", "-no-pie"]
    command += ["-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-Wl,--build-id=none,-z,noexecstack"]
    try:
        subprocess.run([*command, "-x", "c", "-o", target, "-"], input=source, text=True, check=True)
    except FileNotFoundError:
        missing("there is no gcc")
    return target


def archive(files: Mapping[str, bytes]) -> bytes:
    """Return an initramfs of executable *files*, and the directories that hold them."""
    out = io.BytesIO()
    writer = CpioWriter(out)
    for directory in sorted({str(parent) for path in files for parent in Path(path).parents} - {"."}):
        writer.directory(directory)
    for path, data in files.items():
        writer.file(path, data, 0o755)
    writer.close()
    return out.getvalue()
