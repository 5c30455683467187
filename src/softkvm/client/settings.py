# SPDX-License-Identifier: Apache-2.0
"""What ``softkvm exec`` was asked for, from its process to the client's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Settings:
    """Options of ``softkvm exec``."""

    params: dict[str, str] = field(default_factory=dict)
    """Module parameters, as text."""
    plugins: list[str] = field(default_factory=list)
    """Files, by their absolute paths."""
    trace: str = ""
    """The file that has the client's requests; JSON if its name ends so."""
    stats: str = ""
    """The file that has what was counted, when the client has ended; JSON if its name ends so."""
    trace_kvm: str = ""
    """The file that has what KVM's tracepoints tell, when the client has ended; for Perfetto if it is FILE.json."""
    trace_events: list[str] = field(default_factory=list)
    """Which tracepoints, as globs; none: all."""
    trace_filters: list[str] = field(default_factory=list)
    """Conditions on their fields."""

    def as_dict(self) -> dict[str, Any]:
        """Return what the constructor takes by name."""
        return asdict(self)
