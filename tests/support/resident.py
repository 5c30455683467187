# SPDX-License-Identifier: Apache-2.0
"""How much of a range of the process's memory the host holds."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)


def resident(address: int, size: int) -> int:
    """Bytes at ``address`` that the host holds (mincore)."""
    pages = (ctypes.c_ubyte * (size // 4096))()
    assert not _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages), os.strerror(ctypes.get_errno())
    return 4096 * sum(page & 1 for page in pages)
