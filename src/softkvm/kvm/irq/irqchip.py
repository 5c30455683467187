# SPDX-License-Identifier: Apache-2.0
"""What interrupt lines and eventfds ask of an architecture's in-kernel interrupt chips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

AckNotifier = Callable[[], None]
"""Called when the guest has acknowledged (EOI) the interrupt of a GSI; no chip's lock is held."""

# Interrupt sources: a line's level is the OR over the sources that drive it. An architecture adds its own behind.
KVM_USERSPACE_IRQ_SOURCE_ID: Final = 0
KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID: Final = 1


class Irqchip(Protocol):
    """The chips, by the global numbers of their pins (GSIs)."""

    @property
    def can_resample(self) -> bool:
        """Whether the chips tell of the guest's acknowledgements."""

    def set_gsi(self, gsi: int, level: int, source: int = KVM_USERSPACE_IRQ_SOURCE_ID) -> int:
        """Drive a GSI for one source: > 0 delivered, 0 coalesced, < 0 ignored."""

    def add_ack_notifier(self, gsi: int, notifier: AckNotifier) -> None:
        """Call ``notifier`` when the guest acknowledges the GSI."""

    def remove_ack_notifier(self, gsi: int, notifier: AckNotifier) -> None:
        """Stop calling it."""
