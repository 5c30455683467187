# SPDX-License-Identifier: Apache-2.0
"""Messages that lie in several segments of memory."""

from __future__ import annotations

from collections.abc import Sequence


def total(segments: Sequence[memoryview]) -> int:
    """Return the bytes of all segments."""
    return sum(map(len, segments))


def behind(segments: Sequence[memoryview], skip: int, length: int) -> list[memoryview]:
    """Return the *length* bytes behind the first *skip* of *segments*, or as many as there are; no copy."""
    found = []
    for segment in segments:
        if length <= 0:
            break
        size = len(segment)
        if skip >= size:
            skip -= size
            continue
        piece = segment[skip : skip + length]
        skip = 0
        length -= len(piece)
        found.append(piece)
    return found


def gather(segments: Sequence[memoryview], length: int) -> bytes:
    """Return a copy of the first *length* bytes, or of as many as there are."""
    if segments and len(segments[0]) >= length:
        return bytes(segments[0][:length])
    return b"".join(behind(segments, 0, length))


def scatter(segments: Sequence[memoryview], data: bytes) -> None:
    """Store *data* in the first bytes."""
    if segments and len(segments[0]) >= len(data):
        segments[0][: len(data)] = data
        return
    at = 0
    for segment in segments:
        piece = data[at : at + len(segment)]
        segment[: len(piece)] = piece
        at += len(piece)
        if at == len(data):
            return
