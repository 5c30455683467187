# SPDX-License-Identifier: Apache-2.0
"""MSI-X: a table of messages in a function's memory, a mask for each and for all, and a bit for what waits behind one.

Source: PCI Local Bus Specification 3.0, section 6.8.2. Linux, KVM API: KVM_SIGNAL_MSI.
"""

from __future__ import annotations

import errno
import struct
import threading
from typing import Any, Final, Protocol

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.vmm.devices.pci import Bar, Function

CAPABILITY: Final = 0x11
TABLE_SIZE: Final = 0x1000
PENDING_AT: Final = 0x800
MOST_VECTORS: Final = PENDING_AT // 16
BAR_SIZE: Final = TABLE_SIZE

_ENABLE: Final = 0x80  # of the message control's high byte
_MASK_ALL: Final = 0x40
_ENTRY: Final = struct.Struct("<QII")
_VECTORS: Final = Size("vectors of an MSI-X table", MOST_VECTORS, ValueError, element=16, least=1, where=__name__)


class MsiVm(Protocol):
    """What MSI-X needs of a VM."""

    def signal_msi(self, msi: abi.kvm_msi) -> int:
        """KVM_SIGNAL_MSI."""


class Msix:
    """The capability of *function* and the table behind base address register *bar* at *address*."""

    def __init__(self, function: Function, vm: MsiVm, vectors: int, bar: int, address: int, name: str) -> None:
        self._vm = vm
        self._function = function
        self.vectors = _VECTORS.check(vectors)
        self._table = bytearray(16 * vectors)
        for vector in range(vectors):
            self._table[16 * vector + 12] = 1  # masked
        self._pending = 0
        self._messages: list[abi.kvm_msi | None] = [None] * vectors
        self._lock = threading.RLock()
        body = struct.pack("<HII", vectors - 1, bar, PENDING_AT | bar)
        self._control = function.add_capability(CAPABILITY, body, struct.pack("<H", (_ENABLE | _MASK_ALL) << 8)) + 3
        function.add_bar(bar, Bar(BAR_SIZE, self, False, f"{name} msi-x"), address)

    @property
    def enabled(self) -> bool:
        """Whether the function uses MSI-X and no INTx."""
        return bool(self._function.read(self._control, 1) & _ENABLE)

    def trigger(self, vector: int) -> None:
        """Send the message of *vector*, or note that it waits; nothing without such a vector."""
        if vector >= self.vectors:
            return
        message = self._messages[vector]
        if message is None:
            with self._lock:
                message = self._messages[vector]
                if message is None:
                    if self.enabled:
                        self._pending |= 1 << vector
                    return
        self._send(message)

    def _send(self, message: abi.kvm_msi) -> None:
        try:
            self._vm.signal_msi(message)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a message that no interrupt controller takes: it is lost, as on a bus
                raise

    # -- what the guest sees

    def changed(self) -> None:
        """Table, masks or the capability's control are others: what is due is sent."""
        with self._lock:
            control = self._function.read(self._control, 1)
            usable = control & (_ENABLE | _MASK_ALL) == _ENABLE
            due = []
            for vector in range(self.vectors):
                address, data, mask = _ENTRY.unpack_from(self._table, 16 * vector)
                if not usable or mask & 1:
                    self._messages[vector] = None
                    continue
                message = abi.kvm_msi(address_lo=address & 0xFFFFFFFF, address_hi=address >> 32, data=data)
                self._messages[vector] = message
                if self._pending >> vector & 1:
                    due.append(message)
            if usable:
                for vector in range(self.vectors):
                    if self._messages[vector] is not None:
                        self._pending &= ~(1 << vector)
            if not control & _ENABLE:
                self._pending = 0
        for message in due:
            self._send(message)

    def read(self, offset: int, size: int) -> int:
        """The table, and behind it the bits that wait."""
        with self._lock:
            if offset >= PENDING_AT:
                return self._pending >> 8 * (offset - PENDING_AT) & (1 << 8 * size) - 1
            return int.from_bytes(self._table[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the table: whole 32-bit words (6.8.2)."""
        if offset % 4 or size % 4 or offset + size > len(self._table):
            return
        with self._lock:
            self._table[offset : offset + size] = value.to_bytes(size, "little")
        self.changed()

    def reset(self) -> None:
        """As after a reset of the function: all masked, nothing waits."""
        with self._lock:
            self._table[:] = bytes(len(self._table))
            for vector in range(self.vectors):
                self._table[16 * vector + 12] = 1
            self._pending = 0
        self.changed()

    def save(self) -> dict[str, Any]:
        """The table and what waits."""
        with self._lock:
            return {"table": bytes(self._table), "pending": self._pending}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        with self._lock:
            self._table[:] = state["table"]
            self._pending = state["pending"]
        self.changed()
