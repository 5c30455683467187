# SPDX-License-Identifier: Apache-2.0
"""The KVM API's structures as bytes, and back, for states that may come from anywhere."""

from __future__ import annotations

from ctypes import Structure, sizeof
from typing import Any, TypeVar

from softkvm.vmm.errors import SnapshotError

S = TypeVar("S", bound=Structure)


def unpack(kind: type[S], data: object) -> S:
    """Return the structure that *data* is; SnapshotError if it is none."""
    if not isinstance(data, bytes) or len(data) != sizeof(kind):
        size = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise SnapshotError(f"{kind.__name__}: {size}, expected {sizeof(kind)} bytes")
    return kind.from_buffer_copy(data)


def field(state: object, name: str, kind: type) -> Any:
    """Return what *state* has of that name; SnapshotError if it has none of that type."""
    value = state.get(name) if isinstance(state, dict) else None
    if type(value) is not kind:
        raise SnapshotError(f"{name}: {type(value).__name__}, expected {kind.__name__}")
    return value
