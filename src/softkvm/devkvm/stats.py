# SPDX-License-Identifier: Apache-2.0
"""Binary statistics of a VM or vCPU (KVM_GET_STATS_FD): descriptors, names and 64-bit values behind one file."""

from __future__ import annotations

import ctypes
import errno
import os

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.devkvm.ioctl import ioctl_value

#: Today's kernels have 48.
_NAME = Size("kvm_stats_header.name_size", 4096, errno.EINVAL, giver="kernel", where=__name__)
_DESCRIPTORS = Size(
    "kvm_stats_header.num_desc",
    4096,
    errno.EINVAL,
    element=ctypes.sizeof(abi.kvm_stats_desc) + _NAME.most,
    giver="kernel",
    where=__name__,
)
_SCALARS = (abi.KVM_STATS_TYPE_CUMULATIVE, abi.KVM_STATS_TYPE_INSTANT, abi.KVM_STATS_TYPE_PEAK)


def read_stats(fd: int) -> dict[str, int]:
    """Return the scalar statistics of VM or vCPU descriptor *fd* by name; histograms are left out."""
    stats_fd = ioctl_value(fd, abi.KVM_GET_STATS_FD)
    try:
        header = abi.kvm_stats_header.from_buffer_copy(os.pread(stats_fd, ctypes.sizeof(abi.kvm_stats_header), 0))
        step = ctypes.sizeof(abi.kvm_stats_desc) + _NAME.check(header.name_size)
        table = os.pread(stats_fd, step * _DESCRIPTORS.check(header.num_desc), header.desc_offset)
        stats = {}
        for start in range(0, len(table), step):
            desc = abi.kvm_stats_desc.from_buffer_copy(table, start)
            if desc.size != 1 or desc.flags & abi.KVM_STATS_TYPE_MASK not in _SCALARS:
                continue
            name = table[start + ctypes.sizeof(abi.kvm_stats_desc) : start + step].split(b"\0")[0].decode()
            stats[name] = int.from_bytes(os.pread(stats_fd, 8, header.data_offset + desc.offset), "little")
        return stats
    finally:
        os.close(stats_fd)
