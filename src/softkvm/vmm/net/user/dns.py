# SPDX-License-Identifier: Apache-2.0
"""A DNS server for a few names: what it doesn't know goes to another server, or is refused (RFC 1035, 3596, 8482)."""

from __future__ import annotations

import struct
from typing import Final

from softkvm.vmm.net.wire import IPAddress

A: Final = 1
AAAA: Final = 28
ANY: Final = 255
PTR: Final = 12
IN: Final = 1

NOERROR: Final = 0
FORMERR: Final = 1
NXDOMAIN: Final = 3
NOTIMP: Final = 4
REFUSED: Final = 5

TTL_S: Final = 60
NAME_MAX: Final = 255

_HEADER: Final = struct.Struct(">HHHHHH")


class Question:
    """The one question of a message. ValueError if it has none or another number, or is no question."""

    __slots__ = ("end", "flags", "identification", "kind", "labels", "of")

    def __init__(self, data: bytes) -> None:
        if len(data) < _HEADER.size:
            raise ValueError("short")
        self.identification, self.flags, questions, answers, _, _ = _HEADER.unpack_from(data)
        if self.flags & 0x8000 or questions != 1 or answers:
            raise ValueError("not one question")
        at = _HEADER.size
        self.labels: list[bytes] = []
        while True:
            if at >= len(data):
                raise ValueError("name")
            size = data[at]
            at += 1
            if not size:
                break
            if size > 63 or at + size > len(data) or at + size - _HEADER.size > NAME_MAX:
                raise ValueError("label")  # a question has no pointers: there is nothing before it
            self.labels.append(data[at : at + size])
            at += size
        if at + 4 > len(data):
            raise ValueError("type")
        self.kind, self.of = struct.unpack_from(">HH", data, at)
        self.end = at + 4

    @property
    def name(self) -> str:
        """The name, in lower case, as it is compared."""
        return b".".join(self.labels).decode("ascii", "replace").lower()

    @property
    def opcode(self) -> int:
        """0: an ordinary question."""
        return int(self.flags) >> 11 & 15


def reply(data: bytes, question: Question, code: int, records: list[tuple[int, bytes]]) -> bytes:
    """Return the answer to *data*: a code, and records of the question's name."""
    flags = 0x8080 | (question.flags & 0x7900) | (0x0400 if code in (NOERROR, NXDOMAIN) else 0) | code
    out = [_HEADER.pack(question.identification, flags, 1, len(records), 0, 0), data[_HEADER.size : question.end]]
    for kind, value in records:
        out.append(struct.pack(">HHHIH", 0xC000 | _HEADER.size, kind, IN, TTL_S, len(value)) + value)
    return b"".join(out)


def damaged(data: bytes) -> bytes | None:
    """Return the answer to what is no question: a format error; None for what no answer could name, or is one."""
    if len(data) < _HEADER.size or data[2] & 0x80:
        return None
    return _HEADER.pack(int.from_bytes(data[:2], "big"), 0x8000 | (data[2] & 0x79) << 8 | FORMERR, 0, 0, 0, 0)


def answer(data: bytes, names: dict[str, list[IPAddress]], *, forwards: bool) -> bytes | None:
    """Return the answer to a question that is ours; None if it is to go on to another server, if one *forwards*."""
    try:
        question = Question(data)
    except ValueError:
        return damaged(data)
    if question.opcode:
        return reply(data, question, NOTIMP, [])
    addresses = names.get(question.name)
    if addresses is None or question.of not in (IN, ANY):
        return None if forwards else reply(data, question, REFUSED, [])
    records = [
        (A if address.version == 4 else AAAA, address.packed)
        for address in addresses
        if question.kind in (ANY, A if address.version == 4 else AAAA)
    ]
    return reply(data, question, NOERROR, records)
