# SPDX-License-Identifier: Apache-2.0
"""What devices of shared directories have in common: requests that a session answers, each with room for its reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.queue import QueueError


class Session(Protocol):
    """A client's session of a file protocol."""

    def handle(self, readable: Sequence[memoryview], writable: Sequence[memoryview]) -> int:
        """Answer a request; return the bytes of the reply."""

    def reset(self) -> None:
        """Forget the client."""

    def save(self) -> dict[str, Any]:
        """Which files the client has, and which are open."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""

    def close(self) -> None:
        """Close all files."""


S = TypeVar("S", bound=Session)


class ShareDevice(VirtioDevice, Generic[S]):
    """Serves the requests of every queue by *session*, whose *violation* is what a driver must never do."""

    pci_class = 0x018000  # mass storage, none of its kinds

    def __init__(self, session: S, violation: type[Exception], tag: str) -> None:
        super().__init__()
        self.session = session
        self.tag = tag
        self._violation = violation

    def notified(self, index: int) -> None:
        """Serve what has been asked for."""
        queue = self.queues[index]
        handle = self.session.handle
        for chain in queue.drain():
            try:
                written = handle(chain.readable, chain.writable)
            except self._violation as error:
                raise QueueError(f"queue {index}: {error}") from None
            queue.push(chain, written)

    def reset(self) -> None:
        """The guest's mount is gone."""
        self.session.reset()

    def save(self) -> dict[str, Any]:
        """The session's state: which files the guest has, and which are open."""
        return self.session.save()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.session.restore(state)

    def close(self) -> None:
        """Close all files."""
        self.session.close()
