# SPDX-License-Identifier: Apache-2.0
"""The entropy device: fills the driver's buffers from the host's generator (VIRTIO 1.3, section 5.4).

A buffer gets :data:`MOST` bytes at most: a driver asks for as much as it likes, and the host's work has to have an end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.devices.spec import Placement, Words
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.ids import VIRTIO_ID_RNG

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

MOST: Final = Size(
    "bytes of entropy for a buffer", 1 << 16, None, giver="guest", effect="the rest of the buffer stays", where=__name__
)


class Rng(VirtioDevice):
    """One queue of buffers to fill."""

    type = VIRTIO_ID_RNG
    name = "rng"
    queue_sizes = (64,)

    def notified(self, index: int) -> None:
        """Fill what is there."""
        queue = self.queues[0]
        for chain in queue.drain():
            chain.write(os.urandom(MOST.cut(chain.writable_size)))
            queue.push(chain)


@dataclass(frozen=True, slots=True)
class RngSpec:
    """``--rng``."""

    placement: Placement = field(default_factory=Placement)

    def attach(self, machine: Machine) -> Rng:
        """Make the device."""
        device = Rng()
        self.placement.add(machine, device)
        return device


def parse(text: str) -> RngSpec:
    """Read ``--rng``'s text."""
    words = Words.of("--rng", text, first=False)
    spec = RngSpec(words.placement())
    words.end()
    return spec
