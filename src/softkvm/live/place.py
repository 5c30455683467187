# SPDX-License-Identifier: Apache-2.0
"""Where the sockets are: a directory that is the user's alone."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SUFFIX: Final = ".sock"
#: A process for which this is 0 does not listen.
SWITCH: Final = "SOFTKVM_LIVE"

_SUN_PATH: Final = 108  # unix(7): with the NUL behind it


def directory(*, make: bool = False) -> Path | None:
    """Return the directory, made if that is wanted; None if there is none that nobody else can put anything into."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    user = os.geteuid()
    path = Path(runtime, "softkvm") if runtime and os.path.isabs(runtime) else Path(f"/tmp/softkvm-{user}")
    try:
        if make:
            path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        return None
    return path


def socket_of(pid: int, *, make: bool = False) -> Path | None:
    """Return the socket of a process."""
    where = directory(make=make)
    return None if where is None else where / f"{pid}{SUFFIX}"


@contextlib.contextmanager
def address(path: Path | str) -> Iterator[str]:
    """Return the address of a socket at *path*, of which an address (107 bytes) may have no room for the whole."""
    name = os.fspath(path)
    if len(os.fsencode(name)) < _SUN_PATH:
        yield name
        return
    where, last = os.path.split(name)
    fd = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{last}"
    finally:
        os.close(fd)
