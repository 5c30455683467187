# SPDX-License-Identifier: Apache-2.0
"""Pages of the kernel's ring buffer, as trace files have them (``kernel/trace/ring_buffer.c``, ``events/header_page``).

A page begins with the time of its first event and the size of its data. Each event has a word before it: 5 bits of
type or length, 27 bits of the nanoseconds since the event before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

PAGE_SIZE: Final = 4096
_HEADER: Final = struct.Struct("<QQ")
_WORD: Final = struct.Struct("<I")
_DATA_SIZE: Final = PAGE_SIZE - _HEADER.size

_TYPE_BITS: Final = 5
_DELTA_BITS: Final = 27
_DELTA_MAX: Final = (1 << _DELTA_BITS) - 1
_MAX_TYPE_LEN: Final = 28
_PADDING: Final = 29
_TIME_EXTEND: Final = 30
_TIME_STAMP: Final = 31
_COMMIT_MASK: Final = (1 << 20) - 1
#: Events before this page are lost; their number stands behind the data.
_MISSED_EVENTS: Final = 1 << 31
_MISSED_STORED: Final = 1 << 30

HEADER_PAGE: Final = (
    "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n"
    "\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n"
    "\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n"
    f"\tfield: char data;\toffset:16;\tsize:{_DATA_SIZE};\tsigned:1;\n"
)
HEADER_EVENT: Final = (
    "# compressed entry header\n\ttype_len    :    5 bits\n\ttime_delta  :   27 bits\n\tarray       :   32 bits\n\n"
    "\tpadding     : type == 29\n\ttime_extend : type == 30\n\ttime_stamp : type == 31\n\tdata max type_len  == 28\n"
)


class PageWriter:
    """Makes pages of one processor's (for us: one thread's) events."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._start = self._last = 0
        self._lost = self._lost_here = 0

    def lost(self, count: int) -> bytes:
        """Note that events are lost here; returns the page that this ends, if it does."""
        page = self.flush()
        self._lost += count
        return page

    def add(self, time_ns: int, record: bytes) -> bytes:
        """Append a record, its length a multiple of 4; returns the page that was full before, if one was."""
        page = b""
        if not self._data:
            self._begin(time_ns)
        delta = max(time_ns - self._last, 0)
        event = self._event(delta, record)
        if len(self._data) + len(event) > _DATA_SIZE - 8 * bool(self._lost_here):
            page = self.flush()
            self._begin(time_ns)
            event = self._event(0, record)
        self._data += event
        self._last = max(time_ns, self._last)
        return page

    def _begin(self, time_ns: int) -> None:
        self._start = self._last = time_ns
        self._lost_here, self._lost = self._lost, 0

    def _event(self, delta: int, record: bytes) -> bytes:
        extend = b""
        if delta > _DELTA_MAX:
            extend = _WORD.pack(_TIME_EXTEND | (delta & _DELTA_MAX) << _TYPE_BITS)
            extend += _WORD.pack(delta >> _DELTA_BITS)
            delta = 0
        words = len(record) // 4
        if words > _MAX_TYPE_LEN:
            return extend + _WORD.pack(delta << _TYPE_BITS) + _WORD.pack(len(record) + 4) + record
        return extend + _WORD.pack(words | delta << _TYPE_BITS) + record

    def flush(self) -> bytes:
        """End the page; returns it, nothing if it is empty."""
        if not self._data:
            return b""
        commit = len(self._data)
        data = bytes(self._data)
        if self._lost_here:
            commit |= _MISSED_EVENTS | _MISSED_STORED
            data += struct.pack("<Q", self._lost_here)
        self._data = bytearray()
        self._lost_here = 0
        return (_HEADER.pack(self._start, commit) + data).ljust(PAGE_SIZE, b"\0")


class Lost(int):
    """How many events are lost; -1 for some."""


def read_page(page: memoryview) -> Iterator[tuple[int, memoryview | Lost]]:
    """Yield the time of each record of a page, and the record; what was lost before it as :class:`Lost`.

    A page that is damaged ends where that is found.
    """
    if len(page) < _HEADER.size:
        return
    time_ns, commit = _HEADER.unpack_from(page)
    end = min(_HEADER.size + (commit & _COMMIT_MASK), len(page))
    if commit & _MISSED_EVENTS:
        stored = commit & _MISSED_STORED and end + 8 <= len(page)
        yield time_ns, Lost(struct.unpack_from("<Q", page, end)[0] if stored else -1)
    at = _HEADER.size
    while at + 4 <= end:
        (word,) = _WORD.unpack_from(page, at)
        at += 4
        kind, delta = word & (1 << _TYPE_BITS) - 1, word >> _TYPE_BITS
        if kind == _PADDING:
            if not delta or at + 4 > end:
                return
            at += max(_WORD.unpack_from(page, at)[0], 4)
            time_ns += delta
            continue
        if kind in (_TIME_EXTEND, _TIME_STAMP):
            if at + 4 > end:
                return
            extended = delta | _WORD.unpack_from(page, at)[0] << _DELTA_BITS
            time_ns = time_ns + extended if kind == _TIME_EXTEND else time_ns & ~((1 << 59) - 1) | extended
            at += 4
            continue
        time_ns += delta
        if kind:
            size = kind * 4
        else:
            if at + 4 > end:
                return
            size = _WORD.unpack_from(page, at)[0] - 4
            at += 4
        if size <= 0 or at + size > end:
            return
        yield time_ns, page[at : at + size]
        at += size
