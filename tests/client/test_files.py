# SPDX-License-Identifier: Apache-2.0
"""The files of a client's KVM, as far as they can be looked at without a client."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from softkvm.client import files


class Vm:
    """One that has none of the memory."""

    def host_unmapped(self, hva: int, size: int) -> None:
        pass


@pytest.fixture
def garbage_is_collected_all_the_time() -> Iterator[None]:
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*threshold)


def test_memory_goes_while_another_vm_is_made(
    monkeypatch: pytest.MonkeyPatch, garbage_is_collected_all_the_time: None
) -> None:
    monkeypatch.setattr(files, "_vms", {Vm() for _ in range(10)})

    def another(phase: str, info: dict[str, int]) -> None:
        """What another thread does while a destructor has given up the interpreter's lock."""
        files._vms.add(Vm())

    gc.callbacks.append(another)
    try:
        for _ in range(100):
            files.unmapping(0x1000, 0x1000)
    finally:
        gc.callbacks.remove(another)
