# SPDX-License-Identifier: Apache-2.0
"""The virtual machine generation ID: 128 bits in guest memory that are others once the machine has a twin.

A machine that was restored from a snapshot, or cloned, shares its past with another: its random generator, unique
identifiers and caches are no longer unique. The firmware's tables name the place of the ID, and a general-purpose event
tells that it has changed. Linux reseeds its random generator then.

Source: Microsoft, "Virtual Machine Generation ID" (2012-08-01): the ACPI object with _CID "VM_Gen_Counter" and ADDR,
notification 0x80, where the ID may lie.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from softkvm.vmm.boot import layout
from softkvm.vmm.memory import GuestMemory

SIZE: Final = 16
GPE: Final = 5
"""The general-purpose event that tells of a change, as on QEMU's machines."""


class VmGenId:
    """The ID in *memory*; ``notify()`` raises the event. It is a new one, until :meth:`restore`."""

    def __init__(self, memory: GuestMemory, notify: Callable[[], object]) -> None:
        self._memory = memory
        self._notify = notify
        self._set(os.urandom(SIZE))

    @property
    def identifier(self) -> bytes:
        """The ID, 16 bytes as they lie in memory: a GUID's, little endian."""
        return self._identifier

    def _set(self, identifier: bytes) -> None:
        if len(identifier) != SIZE:
            raise ValueError(f"generation ID of {len(identifier)} bytes: expected {SIZE}")
        self._identifier = identifier
        self._memory.write(layout.VM_GENERATION, identifier)

    def change(self, identifier: bytes | None = None) -> None:
        """The machine is another from now on: give it *identifier*, or a random one, and tell the guest."""
        self._set(os.urandom(SIZE) if identifier is None else identifier)
        self._notify()

    def reset(self) -> None:
        """Put the ID into memory again, which the guest may have written to."""
        self._set(self._identifier)

    def save(self) -> dict[str, Any]:
        """The ID."""
        return {"identifier": self._identifier}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state, without telling: whoever restores a machine whose past goes on twice changes it."""
        self._set(state["identifier"])
