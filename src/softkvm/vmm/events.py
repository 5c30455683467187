# SPDX-License-Identifier: Apache-2.0
"""What happens to a machine as a whole, told to who wants to know: its control sockets, a script."""

from __future__ import annotations

import enum
from collections.abc import Callable

Listener = Callable[["Event", dict[str, str]], object]
"""Takes an event and what there is to say of it; on any thread, in a signal's handler too: it must not wait."""


class Event(enum.Enum):
    """What happens."""

    PAUSED = "paused"
    RESUMED = "resumed"
    RESET = "reset"
    """It begins anew; ``by`` says why."""
    POWER_BUTTON = "power button"
    ASLEEP = "asleep"
    AWAKE = "awake"
    ENDED = "ended"
    """``end`` and ``detail`` are the outcome's."""


class Events:
    """The listeners of one machine."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()

    def add(self, listener: Listener) -> None:
        """Call *listener* from now on."""
        self._listeners = (*self._listeners, listener)

    def remove(self, listener: Listener) -> None:
        """Call it no more; nothing happens if it isn't there."""
        self._listeners = tuple(other for other in self._listeners if other != listener)

    def tell(self, event: Event, **more: str) -> None:
        """Call every listener."""
        for listener in self._listeners:
            listener(event, more)
