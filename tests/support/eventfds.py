# SPDX-License-Identifier: Apache-2.0
"""What tests of event files need, for fixtures: a machine with in-kernel chips, and an eventfd."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.support.tiny import Tiny


def machine_with_chips() -> Iterator[Tiny]:
    """A machine with in-kernel interrupt chips."""
    machine = Tiny(irqchip=True)
    yield machine
    machine.close()


def new_eventfd() -> Iterator[int]:
    """An eventfd that nobody waits for."""
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)
