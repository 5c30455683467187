# SPDX-License-Identifier: Apache-2.0
"""``--vsock [cid=N][,path=PATH]``: what a vsock device is to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from softkvm.vmm.errors import ConfigError
from softkvm.vmm.vsock.packet import CID_MAX, CID_MIN
from softkvm.vmm.vsock.unix import check_path

DEFAULT_CID: Final = CID_MIN
EXPECTED: Final = f"expected cid=N (a context ID, {CID_MIN} to {CID_MAX}), path=PATH (UNIX sockets), or both"


@dataclass(frozen=True, slots=True)
class VsockSpec:
    """A vsock device; ConfigError if it is none that there can be."""

    cid: int | None = None
    """The guest's context ID; None: 3, or what a restored machine had."""
    path: str | None = None
    """Where the UNIX sockets for the host's programs are; None: there are none."""

    def __post_init__(self) -> None:
        if self.cid is not None and (not isinstance(self.cid, int) or not CID_MIN <= self.cid <= CID_MAX):
            raise ConfigError(f"vsock cid={self.cid!r}: expected a number from {CID_MIN} to {CID_MAX}")
        if self.path is not None:
            check_path(self.path)


def parse(text: str) -> VsockSpec:
    """Return what ``--vsock`` *text* says; ConfigError if that is nothing that there can be."""
    cid: int | None = None
    path: str | None = None
    rest = text
    while rest:
        name, equals, value = rest.partition("=")
        if name == "path" and equals and path is None:
            # A comma ends a path only before another option: files may have commas in their names.
            head, found, tail = value.rpartition(",cid=")
            path, rest = (head, f"cid={tail}") if found and cid is None else (value, "")
        elif name == "cid" and equals and cid is None:
            number, _, rest = value.partition(",")
            if not number.isdecimal() or len(number) > 10:
                raise ConfigError(f"--vsock {text}: cid={number}: expected a number from {CID_MIN} to {CID_MAX}")
            cid = int(number)
        else:
            raise ConfigError(f"--vsock {text}: {EXPECTED}")
    return VsockSpec(cid, path)
