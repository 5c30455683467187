# SPDX-License-Identifier: Apache-2.0
"""Memory of which no page is there until a test provides it."""

from __future__ import annotations

import ctypes

import pytest
from tests.support.tiny import Memory

from softkvm.bench.userfaultfd import MISSING, Userfaultfd

PAGE = 4096


class Provider:
    """Some memory and its userfaultfd; closed, that lets everybody go on."""

    def __init__(self, size: int, *, register: bool = True) -> None:
        """Skips the test where the host lets nobody have one."""
        self.memory = Memory(size)
        self._source = ctypes.create_string_buffer(PAGE)
        try:
            self.uffd = Userfaultfd(MISSING)
        except OSError as error:
            pytest.skip(f"the host lets nobody have a userfaultfd: {error.strerror}")
        if register:
            self.register()

    def register(self) -> None:
        """From now on no page comes by itself."""
        self.uffd.register(self.memory.address, self.memory.size)

    def provide(self, page: int, value: int) -> None:
        """Provide a page full of a byte."""
        ctypes.memset(self._source, value, PAGE)
        self.uffd.copy(self.memory.address + page * PAGE, ctypes.addressof(self._source), PAGE)
