# SPDX-License-Identifier: Apache-2.0
"""Debian's kernels with modules that the default guest goes without: virtio, 9P, PTP, watchdogs and pvpanic."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.guests import linux_guest, missing
from tests.support.systems import archive, kept_directory, open_package

from softkvm.vmm.guest import GuestUnavailable
from softkvm.vmm.guest.deb import DebError, read_files

CLOUD = "linux-image-cloud-amd64"
"""The default guest's package."""
GENERIC = "linux-image-amd64"

_IMAGE = "vmlinuz"
_WANTED = re.compile(
    r"boot/vmlinuz-.*|lib/modules/[^/]+/kernel/"
    r"(?:drivers/(?:virtio|block|net|ptp|pps|watchdog|misc/pvpanic)|net/(?:core|9p)|fs/(?:9p|fscache|netfs))/[^/]+\.ko"
)
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and modules that were built with it, in a directory."""

    directory: Path

    @property
    def image(self) -> Path:
        return self.directory / _IMAGE

    def module(self, name: str) -> bytes:
        """A module's file."""
        return (self.directory / f"{name}.ko").read_bytes()

    def load_order(self, names: Sequence[str]) -> list[str]:
        """The modules that *names* need, and those, each behind what it depends on."""
        order: list[str] = []
        for name in names:
            match = _DEPENDS.search(self.module(name))
            needed = match[1].decode().split(",") if match and match[1] else []
            order += [module for module in (*self.load_order(needed), name) if module not in order]
        return order

    def initrd(self, names: Sequence[str], files: Mapping[str, bytes] | None = None) -> bytes:
        """The default guest's initial file system with *files*, and ``/load``, which loads the modules."""
        order = self.load_order(names)
        # The guest's init has loaded what belongs to devices that it knows.
        load = "".join(f"[ -d /sys/module/{name.replace('-', '_')} ] || insmod /modules/{name}.ko\n" for name in order)
        modules = {f"modules/{name}.ko": self.module(name) for name in order}
        added = {**modules, "load": f"#!/bin/sh -e\n{load}".encode(), **(files or {})}
        return linux_guest().initrd.read_bytes() + archive(added)


def kernel_with_modules(package: str = CLOUD) -> Kernel:
    """Return the newest kernel that *package* depends on; skips where it cannot be had, which CI does not accept."""
    kind = hashlib.sha256(_WANTED.pattern.encode()).hexdigest()[:8]
    directory = kept_directory() / f"{package}_modules_{kind}"
    if not directory.exists():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with (directory.parent / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not directory.exists():
                    _fetch(directory, package)
        except (GuestUnavailable, DebError, OSError) as error:
            missing(f"package {package}: {error}")
    return Kernel(directory)


def _fetch(directory: Path, package: str) -> None:
    work = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        with open_package(package, "amd64", kernel=True) as deb:
            for path, data in read_files(
                deb, lambda member: _WANTED.fullmatch(member) is not None, count=10_000
            ).items():
                (work / (_IMAGE if path.startswith("boot/") else Path(path).name)).write_bytes(data)
        work.chmod(0o755)
        os.rename(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
