# SPDX-License-Identifier: Apache-2.0
"""The file of KVM_GET_STATS_FD: header, identifier, descriptors, data (KVM API 4.133; kvm_main.c, binary_stats.c).

The kernel's file has its data at the moment of a read. This one is memory: it has them as of its making, or of the
last :func:`refresh`, which whoever serves reads of unmodified clients calls before each.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm import procfs

if TYPE_CHECKING:
    from softkvm.kvm.stats import Statistic

#: Bytes of a name, of the identifier's too, with the zeros behind it (``KVM_STATS_NAME_SIZE``).
NAME_SIZE: Final = 48

_HEADER_SIZE: Final = ctypes.sizeof(abi.kvm_stats_header)
_DESC_SIZE: Final = ctypes.sizeof(abi.kvm_stats_desc) + NAME_SIZE


def _data_offset(table: Sequence[Statistic]) -> int:
    return _HEADER_SIZE + NAME_SIZE + len(table) * _DESC_SIZE


def _name(name: str) -> bytes:
    return name.encode()[: NAME_SIZE - 1].ljust(NAME_SIZE, b"\0")


def _description(identifier: str, table: Sequence[Statistic]) -> bytes:
    """Return everything before the data."""
    header = abi.kvm_stats_header(
        flags=0,
        name_size=NAME_SIZE,
        num_desc=len(table),
        id_offset=_HEADER_SIZE,
        desc_offset=_HEADER_SIZE + NAME_SIZE,
        data_offset=_data_offset(table),
    )
    parts = [bytes(header), _name(identifier)]
    offset = 0
    for row in table:
        flags = row.kind | row.unit | abi.KVM_STATS_BASE_POW10
        desc = abi.kvm_stats_desc(flags=flags, exponent=row.exponent, size=row.size, offset=offset, bucket_size=0)
        parts += [bytes(desc), _name(row.name)]
        offset += 8 * row.size
    return b"".join(parts)


def _data(table: Sequence[Statistic], owner: object) -> bytes:
    values = (value for row in table for value in row.values(owner))
    return b"".join((value & (1 << 64) - 1).to_bytes(8, "little") for value in values)


def create(identifier: str, table: Sequence[Statistic], owner: object) -> int:
    """Return a descriptor of an object's statistics, to be read and closed by the caller."""
    fd = os.memfd_create(f"kvm-stats:{identifier}", os.MFD_CLOEXEC)
    try:
        os.write(fd, _description(identifier, table) + _data(table, owner))
        return procfs.open_own(f"fd/{fd}")
    finally:
        os.close(fd)


def refresh(fd: int, table: Sequence[Statistic], owner: object) -> None:
    """Write an object's statistics of now into the file that :func:`create` made for it, in their place."""
    writable = procfs.open_own(f"fd/{fd}", os.O_WRONLY)
    try:
        os.pwrite(writable, _data(table, owner), _data_offset(table))
    finally:
        os.close(writable)
