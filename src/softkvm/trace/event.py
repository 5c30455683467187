# SPDX-License-Identifier: Apache-2.0
"""Trace events: their fields, as the kernel lays them out in a record, and their description (``events/*/format``)."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from softkvm.trace.cformat import FormatError, Printer, compile_format

#: What every record begins with: type, flags, preemption count, thread.
COMMON: Final = struct.Struct("<HBBi")
_COMMON_FIELDS: Final = """\
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;
"""

#: Types of C that fields have: bytes, and whether there is a sign.
_TYPES: Final = {
    "bool": (1, False),
    "u8": (1, False),
    "__u8": (1, False),
    "s8": (1, True),
    "__s8": (1, True),
    "u16": (2, False),
    "__u16": (2, False),
    "u32": (4, False),
    "__u32": (4, False),
    "unsigned": (4, False),
    "unsigned int": (4, False),
    "int": (4, True),
    "u64": (8, False),
    "__u64": (8, False),
    "s64": (8, True),
    "unsigned long": (8, False),
    "gfn_t": (8, False),
    "gpa_t": (8, False),
    "gva_t": (8, False),
}
_CODES: Final = {(1, False): "B", (1, True): "b", (2, False): "H", (2, True): "h"} | {
    (4, False): "I",
    (4, True): "i",
    (8, False): "Q",
    (8, True): "q",
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a record."""

    ctype: str
    name: str
    offset: int
    size: int
    signed: bool = False
    array: bool = False
    """An array of bytes."""

    @property
    def code(self) -> str:
        """How :mod:`struct` names it."""
        return f"{self.size}s" if self.array else _CODES.get((self.size, self.signed), f"{self.size}s")

    @property
    def declaration(self) -> str:
        """How C declares it."""
        return f"{self.ctype} {self.name}" + (f"[{self.size}]" if self.array else "")


@dataclass(frozen=True)
class Event:
    """One event: where it belongs, its number in files, its fields, and how it is printed."""

    system: str
    name: str
    id: int
    fields: tuple[Field, ...]
    print_fmt: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(field.name for field in self.fields)

    @cached_property
    def layout(self) -> struct.Struct:
        """A whole record: the common part and the fields, with the gaps that alignment makes."""
        parts, at = ["<HBBi"], COMMON.size
        for field in self.fields:
            parts.append(f"{field.offset - at}x" if field.offset > at else "")
            parts.append(field.code)
            at = field.offset + field.size
        parts.append(f"{-at % 4}x" if at % 4 else "")
        return struct.Struct("".join(parts))

    @cached_property
    def printer(self) -> Printer:
        """Prints the values of the fields; one that isn't understood is printed field by field."""
        try:
            return compile_format(self.print_fmt, self.names)
        except FormatError:
            return lambda values: " ".join(
                f"{name}={value.hex() if isinstance(value, bytes) else value}"
                for name, value in zip(self.names, values, strict=True)
            )

    def pack(self, pid: int, values: Sequence[Any]) -> bytes:
        """Return the record of thread *pid*; numbers that are too large for their field are cut, as in C."""
        try:
            return self.layout.pack(self.id, 0, 0, pid, *values)
        except struct.error:
            return self.layout.pack(self.id, 0, 0, pid, *map(_fit, self.fields, values))

    def unpack(self, data: bytes | memoryview) -> tuple[int, tuple[Any, ...]]:
        """Return a record's thread and the values of its fields; ``struct.error`` if it is too short."""
        _, _, _, pid, *values = self.layout.unpack_from(data)
        return pid, tuple(values)

    @property
    def description(self) -> str:
        """The contents of the event's ``format`` file."""
        fields = "".join(
            f"\tfield:{field.declaration};\toffset:{field.offset};\tsize:{field.size};\tsigned:{int(field.signed)};\n"
            for field in self.fields
        )
        return f"name: {self.name}\nID: {self.id}\nformat:\n{_COMMON_FIELDS}\n{fields}\nprint fmt: {self.print_fmt}\n"


def _fit(field: Field, value: Any) -> Any:
    """Return a value as a field takes it."""
    if field.array:
        return value
    value = int(value) & (1 << 8 * field.size) - 1
    return value - (1 << 8 * field.size) if field.signed and value >> 8 * field.size - 1 else value


def fields_of(declarations: str) -> tuple[Field, ...]:
    """Return the fields that C's declarations name, ``unsigned int vcpu_id; u8 insn[15]``, aligned as C has it."""
    fields, at = [], COMMON.size
    for declaration in declarations.split(";"):
        match = re.fullmatch(r"\s*(.+?)\s+(\w+)(?:\[(\d+)\])?\s*", declaration)
        if match is None:
            raise FormatError(f"{declaration!r} declares no field")
        ctype, name, count = match.groups()
        size, signed = _TYPES[ctype]
        at += -at % size
        fields.append(Field(ctype, name, at, size * int(count or 1), signed, count is not None))
        at += fields[-1].size
    return tuple(fields)


_FIELD: Final = re.compile(
    r"\tfield:(?P<ctype>[^;]*?)(?P<name>\w+)(?P<array>\[[^]]*\])?;\toffset:(?P<offset>\d+);\tsize:(?P<size>\d+);"
    r"(?:\tsigned:(?P<signed>[01]);)?"
)


def parse(system: str, description: str) -> Event:
    """Return the event that a ``format`` file describes; FormatError if it is none."""
    name = re.search(r"^name: (\S+)$", description, re.MULTILINE)
    number = re.search(r"^ID: (\d+)$", description, re.MULTILINE)
    print_fmt = re.search(r"^print fmt: (.*)\Z", description, re.MULTILINE | re.DOTALL)
    if name is None or number is None:
        raise FormatError("an event's description lacks its name or ID")
    fields = tuple(
        Field(
            match["ctype"].strip(),
            match["name"],
            int(match["offset"]),
            int(match["size"]),
            match["signed"] == "1",
            match["array"] is not None,
        )
        for match in _FIELD.finditer(description)
        if not match["name"].startswith("common_")
    )
    at = COMMON.size
    for field in fields:
        if field.offset < at or field.size > 1 << 12:
            raise FormatError(f"{name[1]}: fields of an event overlap")
        at = field.offset + field.size
    return Event(system, name[1], int(number[1]), fields, print_fmt[1].strip() if print_fmt else '""')
