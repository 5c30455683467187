# SPDX-License-Identifier: Apache-2.0
"""Names of machines: a link from the name to its process's socket, which one process has at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.live.place import SUFFIX, address, directory

LINK: Final = ".machine"
NAME: Final = Size("characters of a machine's name", 64, None, least=1, effect="NameRefused", where=__name__)
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TIMEOUT_S: Final = 10.0


class NameRefused(Exception):
    """A name that no machine can have, or that another one has; one line."""


def check_name(name: str) -> str:
    """Return *name* if a machine can have it, else raise NameRefused. A number would be taken for a process's."""
    if not NAME.allows(len(name)) or not _NAME.fullmatch(name) or name.isdecimal():
        shown = name if len(name) <= NAME.most else f"{name[: NAME.most]}… ({len(name)} characters)"
        raise NameRefused(
            f"{shown}: expected up to {NAME.most} letters, digits, '_', '-' and '.', a letter or '_' among them"
        )
    return name


def default_name(pid: int) -> str:
    """Return the name of a machine that was given none, kvmtool's."""
    return f"guest-{pid}"


def listening(path: Path) -> bool:
    """Whether somebody listens at the socket *path*."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as channel:
        channel.settimeout(_TIMEOUT_S)
        try:
            with address(path) as where:
                channel.connect(where)
        except OSError as error:
            # one that is too busy to answer is there
            return not isinstance(error, (ConnectionRefusedError, FileNotFoundError))
    return True


@contextlib.contextmanager
def _locked(where: Path) -> Iterator[None]:
    """One process at a time takes or gives back a name."""
    fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def process_of(name: str) -> int | None:
    """Return the process whose machine has *name*, as far as the link tells; None if there is none."""
    where = directory()
    if where is None or not _NAME.fullmatch(name) or not NAME.allows(len(name)):
        return None
    try:
        target = os.readlink(where / f"{name}{LINK}").removesuffix(SUFFIX)
    except OSError:
        return None
    return int(target) if target.isdecimal() and len(target) < 10 else None


def claim(name: str, pid: int) -> None:
    """Have *name* lead to process *pid*; NameRefused if it leads to another that lives, OSError if that cannot be."""
    check_name(name)
    where = directory(make=True)
    if where is None:
        raise NameRefused(f"{name}: there is no directory for the sockets of machines that is this user's alone")
    link = where / f"{name}{LINK}"
    with _locked(where):
        owner = process_of(name)
        if owner is not None and (owner == pid or listening(where / f"{owner}{SUFFIX}")):
            raise NameRefused(f"{name}: process {owner} has a machine of this name")
        link.unlink(missing_ok=True)
        link.symlink_to(f"{pid}{SUFFIX}")


def release(name: str, pid: int) -> None:
    """Give *name* back, if it is *pid*'s."""
    where = directory()
    if where is None:
        return
    with contextlib.suppress(OSError), _locked(where):
        if process_of(name) == pid:
            (where / f"{name}{LINK}").unlink(missing_ok=True)
