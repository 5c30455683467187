# SPDX-License-Identifier: Apache-2.0
"""Which suite the results are of."""

from __future__ import annotations

from typing import NamedTuple


class Suite(NamedTuple):
    """What a report says of the suite, whatever came out."""

    name: str
    """In reports for machines: ``kvm-unit-tests``."""
    title: str
    command: str
    """The command of softkvm that runs it."""
    accel: str
    """On what: ``soft``, ``kvm``, ``tcg``."""
    engine: str
    """The same for people."""
    where: str
    """How the command was told so."""
    argument: str = " DIR"
    """What stands behind the command."""
    origin: str = "from your own build of it; nothing of it is in this repository"
    """Where the suite is from that the command runs."""

    @property
    def page(self) -> str:
        """The name of the page of the documentation."""
        return f"{self.name}.md"
