# SPDX-License-Identifier: Apache-2.0
"""BTF: a kernel's types, as it has them in its own memory.

Source: Linux, Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.linux.errors import KernelError

_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("<HBBIIIII")
_TYPE: Final = struct.Struct("<III")
_BYTES: Final = Size(
    "bytes of a guest kernel's types", 1 << 28, KernelError, giver="guest", effect="KernelError", where=__name__
)
_TYPES: Final = Size(
    "types of a guest's kernel", 1 << 22, KernelError, giver="guest", element=12, effect="KernelError", where=__name__
)
_CHAIN_MOST: Final = 64
POINTER_BYTES: Final = 8


class Kind(enum.IntEnum):
    """What a type is, without ``BTF_KIND_``."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


MODIFIERS: Final = frozenset({Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})
#: Bytes behind ``struct btf_type``: fixed, and for each of its ``vlen`` elements.
_BEHIND: Final = {
    Kind.INT: (4, 0),
    Kind.ARRAY: (12, 0),
    Kind.STRUCT: (0, 12),
    Kind.UNION: (0, 12),
    Kind.ENUM: (0, 8),
    Kind.FUNC_PROTO: (0, 8),
    Kind.VAR: (4, 0),
    Kind.DATASEC: (0, 12),
    Kind.DECL_TAG: (4, 0),
    Kind.ENUM64: (0, 12),
}
_KEYWORDS: Final = {"struct": Kind.STRUCT, "union": Kind.UNION, "enum": Kind.ENUM}


class Member(tuple[str, int, int, int]):
    """A member of a structure: name, type, offset in bits, size in bits if it is a bit field (else 0)."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """Its name; empty for an anonymous structure or union."""
        return self[0]

    @property
    def type(self) -> int:
        """Its type's number."""
        return self[1]

    @property
    def bit_offset(self) -> int:
        """Where it begins."""
        return self[2]

    @property
    def bit_size(self) -> int:
        """How long it is, if it is a bit field."""
        return self[3]


@dataclass(frozen=True, eq=False)
class Type:
    """A type; which fields say something depends on its kind."""

    kind: Kind
    name: str = ""
    size: int = 0
    """Bytes; of arrays, pointers and modifiers see :meth:`Btf.size`."""
    type: int = 0
    """The type that it refers to: pointed to, of elements, returned, aliased."""
    target: Type | None = None
    """That type, of one that is not in the table."""
    signed: bool = False
    is_bool: bool = False
    bits: int = 0
    count: int = 0
    """Elements of an array."""
    members: tuple[Member, ...] = ()
    enumerators: tuple[tuple[str, int], ...] = ()
    parameters: tuple[tuple[str, int], ...] = ()
    union: bool = False
    """Whether a forward declaration is a union's."""
    number: int = 0


VOID: Final = Type(Kind.VOID, "void")


class Btf:
    """The types in *data*: of a kernel, or of a module that goes on from the kernel's (*base*).

    KernelError for what is no BTF; a type that is damaged raises it when it is looked at.
    """

    def __init__(self, data: bytes, base: Btf | None = None) -> None:
        _BYTES.check(len(data))
        if len(data) < _HEADER.size:
            raise KernelError("BTF is shorter than its header")
        magic, version, _, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != 1:
            raise KernelError(f"BTF begins with {magic:#x}, version {version}: expected {_MAGIC:#x}, version 1")
        if header + max(type_off + type_len, str_off + str_len) > len(data):
            raise KernelError("BTF's sections lie beyond its end")
        self._base = base
        self._first = 1 if base is None else len(base)
        self._first_string = 0 if base is None else base._strings_end
        self._types = data[header + type_off : header + type_off + type_len]
        self._strings = data[header + str_off : header + str_off + str_len]
        self._strings_end: int = self._first_string + str_len
        self._places: list[int] = []
        self._by_name: dict[int, list[int]] = {}
        self._made: dict[int, Type] = {}
        self._index()

    def _index(self) -> None:
        at, end, unpack = 0, len(self._types), _TYPE.unpack_from
        places, by_name, number = self._places, self._by_name, self._first
        fixed = {int(kind): behind for kind, behind in _BEHIND.items()}
        while at < end:
            if at + 12 > end:
                raise KernelError("BTF ends within a type")
            name, info, _ = unpack(self._types, at)
            kind = info >> 24 & 0x1F
            if kind > Kind.ENUM64 or kind == 0:
                raise KernelError(f"BTF has a type of kind {kind}: it is newer than what is known here")
            places.append(at)
            if name:
                by_name.setdefault(name, []).append(number)
            number += 1
            more, each = fixed.get(kind, (0, 0))
            at += 12 + more + each * (info & 0xFFFF)
        _TYPES.check(len(places))

    def __len__(self) -> int:
        """One more than the highest number of a type."""
        return self._first + len(self._places)

    def _string(self, offset: int) -> str:
        if offset < self._first_string and self._base is not None:
            return self._base._string(offset)
        at = offset - self._first_string
        end = self._strings.find(b"\0", at)
        if not 0 <= at < len(self._strings) or end < 0:
            raise KernelError(f"BTF has a name at {offset}, beyond its strings")
        return self._strings[at:end].decode("utf-8", "replace")

    def type(self, number: int) -> Type:
        """Return the type of a number; 0 is ``void``. KernelError if there is none."""
        if number == 0:
            return VOID
        if number < self._first and self._base is not None:
            return self._base.type(number)
        made = self._made.get(number)
        if made is None:
            if not 0 <= number - self._first < len(self._places):
                raise KernelError(f"BTF has no type {number}")
            made = self._made[number] = self._make(number, self._places[number - self._first])
        return made

    def _make(self, number: int, at: int) -> Type:
        data = self._types
        name_at, info, third = _TYPE.unpack_from(data, at)
        kind, count, flag = Kind(info >> 24 & 0x1F), info & 0xFFFF, info >> 31
        name = self._string(name_at) if name_at else ""
        more, each = _BEHIND.get(kind, (0, 0))
        at += 12
        if at + more + each * count > len(data):
            raise KernelError(f"BTF type {number} lies beyond the types' end")
        match kind:
            case Kind.INT:
                encoding = int.from_bytes(data[at : at + 4], "little")
                return Type(
                    kind, name, third, signed=bool(encoding >> 24 & 1), is_bool=bool(encoding >> 24 & 4),
                    bits=encoding & 0xFF, number=number,
                )  # fmt: skip
            case Kind.ARRAY:
                element, _, length = _TYPE.unpack_from(data, at)
                return Type(kind, name, type=element, count=length, number=number)
            case Kind.STRUCT | Kind.UNION:
                members = []
                for n in range(count):
                    member_name, member_type, offset = _TYPE.unpack_from(data, at + 12 * n)
                    bits = offset >> 24 if flag else 0
                    where = offset & 0xFFFFFF if flag else offset
                    text = self._string(member_name) if member_name else ""
                    members.append(Member((text, member_type, where, bits)))
                return Type(kind, name, third, members=tuple(members), number=number)
            case Kind.ENUM | Kind.ENUM64:
                return Type(kind, name, third, signed=bool(flag), number=number,
                            enumerators=self._enumerators(kind, at, count, signed=bool(flag)))  # fmt: skip
            case Kind.FUNC_PROTO:
                parameters = []
                for n in range(count):
                    parameter_name, parameter_type = struct.unpack_from("<II", data, at + 8 * n)
                    parameters.append((self._string(parameter_name) if parameter_name else "", parameter_type))
                return Type(kind, name, type=third, parameters=tuple(parameters), number=number)
            case Kind.FLOAT | Kind.DATASEC:
                return Type(kind, name, third, number=number)
            case Kind.FWD:
                return Type(kind, name, union=bool(flag), number=number)
            case _:
                return Type(kind, name, type=third, number=number)

    def _enumerators(self, kind: Kind, at: int, count: int, *, signed: bool) -> tuple[tuple[str, int], ...]:
        found = []
        for n in range(count):
            if kind is Kind.ENUM:
                name, value = struct.unpack_from("<Ii" if signed else "<II", self._types, at + 8 * n)
            else:
                name, low, high = struct.unpack_from("<III", self._types, at + 12 * n)
                value = low | high << 32
                value -= (value >> 63) << 64 if signed else 0
            found.append((self._string(name), value))
        return tuple(found)

    def target(self, type: Type) -> Type:
        """Return the type that *type* refers to."""
        return type.target if type.target is not None else self.type(type.type)

    def resolve(self, type: Type) -> Type:
        """Return *type* without typedefs and qualifiers; KernelError if they go round."""
        for _ in range(_CHAIN_MOST):
            if type.kind not in MODIFIERS:
                return type
            type = self.target(type)
        raise KernelError(f"BTF type {type.number} refers to itself")

    def size(self, type: Type) -> int:
        """Return the bytes of a type; 0 of void, functions and what is declared only."""
        count = 1
        for _ in range(_CHAIN_MOST):
            type = self.resolve(type)
            if type.kind is not Kind.ARRAY:
                return count * (POINTER_BYTES if type.kind is Kind.PTR else type.size)
            count *= type.count
            type = self.target(type)
        raise KernelError(f"BTF type {type.number} refers to itself")

    def all(self, *kinds: Kind) -> Iterator[Type]:
        """Yield all types of some kinds."""
        for number in range(1, len(self)):
            if self._kind(number) in kinds:
                yield self.type(number)

    # -- by name

    def _numbers(self, name: str) -> list[int]:
        numbers = [] if self._base is None else self._base._numbers(name)
        if self._base is not None:
            at = self._base._offset_of(name)
            if at is not None:
                numbers = numbers + self._by_name.get(at, [])
        at = self._offset_of(name)
        return numbers + (self._by_name.get(at, []) if at is not None else [])

    def _offset_of(self, name: str) -> int | None:
        at = self._strings.find(b"\0" + name.encode() + b"\0")
        return None if at < 0 else at + 1 + self._first_string

    def find(self, name: str, *kinds: Kind) -> Type | None:
        """Return the first type of a name that is of one of *kinds*; None if there is none."""
        for number in self._numbers(name):
            place = self._kind(number)
            if place in kinds:
                return self.type(number)
        return None

    def _kind(self, number: int) -> Kind:
        if number < self._first and self._base is not None:
            return self._base._kind(number)
        at = self._places[number - self._first]
        return Kind(self._types[at + 7] & 0x1F)

    def named(self, text: str) -> Type:
        """Return the type that C would write as *text*: ``struct list_head``, ``char *``, ``unsigned long [4]``.

        KernelError if there is none.
        """
        match = re.fullmatch(r"\s*((?:\w+\s+)*\w+)\s*((?:\*\s*)*)((?:\[\s*\d*\s*\]\s*)*)", text)
        if match is None:
            raise KernelError(f"{text!r}: expected a type such as 'struct task_struct *' or 'char [16]'")
        words = [word for word in match[1].split() if word not in ("const", "volatile")]
        type = self._base_type(words, text)
        for _ in range(match[2].count("*")):
            type = pointer_to(type)
        for count in reversed(re.findall(r"\[\s*(\d*)", match[3])):
            type = Type(Kind.ARRAY, target=type, count=int(count or 0))
        return type

    def _base_type(self, words: list[str], text: str) -> Type:
        found: Type | None
        if words == ["void"]:
            return VOID
        if words and words[0] in _KEYWORDS and len(words) == 2:
            kind = _KEYWORDS[words[0]]
            found = self.find(words[1], kind, *((Kind.ENUM64,) if kind is Kind.ENUM else ()))
        else:
            name = " ".join(words)
            names = [name, *_SPELLINGS.get(name, ())]
            found = next(filter(None, (self.find(one, Kind.TYPEDEF, Kind.INT, Kind.FLOAT) for one in names)), None)
        if found is None:
            raise KernelError(f"the kernel has no type {text.strip()!r}")
        return found

    # -- members

    def member(self, type: Type, name: str) -> tuple[Type, int, int]:
        """Return a member's type, offset in bits from the structure's beginning, and size if it is a bit field.

        Members of anonymous structures are members, too. KernelError if there is none of that name.
        """
        found = self._member(self.resolve(type), name, 0)
        if found is None:
            raise KernelError(f"{self.spell(type)} has no member {name!r}")
        return found

    def _member(self, type: Type, name: str, depth: int) -> tuple[Type, int, int] | None:
        for member in type.members:
            if member.name == name:
                return self.type(member.type), member.bit_offset, member.bit_size
            if not member.name and depth < _CHAIN_MOST:
                inner = self.resolve(self.type(member.type))
                found = self._member(inner, name, depth + 1)
                if found is not None:
                    return found[0], found[1] + member.bit_offset, found[2]
        return None

    def offset(self, type: Type | str, path: str) -> int:
        """Return the offset in bytes of a member, or of a member's member: ``a.b``."""
        at = 0
        current = self.named(type) if isinstance(type, str) else type
        for name in path.split("."):
            current, bits, _ = self.member(current, name)
            at += bits // 8
        return at

    def spell(self, type: Type) -> str:
        """Return a type as C has it."""
        match type.kind:
            case Kind.STRUCT | Kind.UNION:
                return f"{type.kind.name.lower()} {type.name or '<anonymous>'}"
            case Kind.ENUM | Kind.ENUM64:
                return f"enum {type.name or '<anonymous>'}"
            case Kind.FWD:
                return f"{'union' if type.union else 'struct'} {type.name}"
            case Kind.PTR:
                inner = self.spell(self.target(type))
                return inner + ("*" if inner.endswith("*") else " *")
            case Kind.ARRAY:
                return f"{self.spell(self.target(type))} [{type.count}]"
            case Kind.CONST | Kind.VOLATILE | Kind.RESTRICT:
                return f"{type.kind.name.lower()} {self.spell(self.target(type))}"
            case Kind.TYPE_TAG:
                return self.spell(self.target(type))
            case Kind.FUNC_PROTO:
                return f"{self.spell(self.target(type))} ()"
            case _:
                return type.name or "void"


def pointer_to(type: Type) -> Type:
    """Return the type of pointers to *type*."""
    return Type(Kind.PTR, target=type, size=POINTER_BYTES)


#: Other ways to write what compilers name in their own.
_SPELLINGS: Final = {
    "unsigned": ("unsigned int",),
    "long": ("long int",),
    "unsigned long": ("long unsigned int", "unsigned long int"),
    "unsigned long int": ("long unsigned int",),
    "long long": ("long long int",),
    "unsigned long long": ("long long unsigned int",),
    "short": ("short int",),
    "unsigned short": ("short unsigned int",),
    "bool": ("_Bool",),
}
