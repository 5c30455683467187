# SPDX-License-Identifier: Apache-2.0
"""A variable of the guest kernel's: members by name, elements by index, read from guest memory when they are asked for.

Names that end in ``_`` are this class's own, all others are the kernel's, as drgn has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

from softkvm.vmm.linux.btf import POINTER_BYTES, Btf, Kind, Type, pointer_to
from softkvm.vmm.linux.errors import KernelError

_LIST_MOST: Final = 1 << 20
_STRING_MOST: Final = 1 << 16
_CHUNK: Final = 256


class Source(Protocol):
    """Where values come from."""

    @property
    def btf(self) -> Btf:
        """The types."""

    def read(self, address: int, size: int) -> bytes:
        """Return memory."""


class Value:
    """An object of *type* at *address* in the kernel of *source*; or, with *data*, one that is no longer there."""

    __slots__ = ("_bit_offset_", "_bit_size_", "_data_", "_source_", "address_", "type_")

    def __init__(
        self,
        source: Source,
        type: Type,
        address: int,
        *,
        data: bytes | None = None,
        bits: tuple[int, int] = (0, 0),
    ) -> None:
        self._source_ = source
        self.type_ = type
        self.address_ = address
        self._data_ = data
        self._bit_offset_, self._bit_size_ = bits

    # -- ways on

    def member_(self, name: str) -> Value:
        """Return a member, of what is pointed to if this is a pointer; KernelError if there is none."""
        btf = self._source_.btf
        type = btf.resolve(self.type_)
        if type.kind is Kind.PTR:
            return self.dereference_().member_(name)
        found, offset, size = btf.member(type, name)
        if size:
            return Value(self._source_, found, self.address_ + offset // 8, bits=(offset % 8, size))
        part = None
        if self._data_ is not None:
            part = self._data_[offset // 8 : offset // 8 + btf.size(found)]
        return Value(self._source_, found, self.address_ + offset // 8, data=part)

    def __getattr__(self, name: str) -> Value:
        if name.startswith("__") and name.endswith("__"):  # what Python asks objects for
            raise AttributeError(name)
        try:
            return self.member_(name)
        except KernelError as error:
            raise AttributeError(str(error)) from None

    def __getitem__(self, index: int) -> Value:
        """Return an element of an array, or what is there behind a pointer."""
        btf = self._source_.btf
        type = btf.resolve(self.type_)
        if type.kind is Kind.PTR:
            element, start = btf.target(type), int(self)
        elif type.kind is Kind.ARRAY:
            element, start = btf.target(type), self.address_
            if type.count and not 0 <= index < type.count:
                raise IndexError(f"{btf.spell(type)} has no element {index}")
        else:
            raise TypeError(f"{btf.spell(type)} has no elements")
        return Value(self._source_, element, start + index * btf.size(element))

    def __len__(self) -> int:
        type = self._source_.btf.resolve(self.type_)
        if type.kind is not Kind.ARRAY:
            raise TypeError(f"{self._source_.btf.spell(type)} has no length")
        return type.count

    def __iter__(self) -> Iterator[Value]:
        return (self[n] for n in range(len(self)))

    def dereference_(self) -> Value:
        """Return what a pointer points to."""
        btf = self._source_.btf
        type = btf.resolve(self.type_)
        if type.kind is not Kind.PTR:
            raise TypeError(f"{btf.spell(type)} is no pointer")
        return Value(self._source_, btf.target(type), int(self))

    def pointer_(self) -> Value:
        """Return a pointer to this object."""
        data = self.address_.to_bytes(POINTER_BYTES, "little")
        return Value(self._source_, pointer_to(self.type_), 0, data=data)

    def cast_(self, type: str | Type) -> Value:
        """Return the object at the same place, or the same value, as one of another type."""
        made = self._source_.btf.named(type) if isinstance(type, str) else type
        return Value(self._source_, made, self.address_, data=self._data_)

    def container_of_(self, type: str, member: str) -> Value:
        """Return the structure that this object, or what it points to, is *member* of (``container_of``)."""
        btf = self._source_.btf
        made = btf.named(type)
        address = int(self) if btf.resolve(self.type_).kind is Kind.PTR else self.address_
        return Value(self._source_, made, address - btf.offset(made, member))

    def list_(self, type: str, member: str) -> Iterator[Value]:
        """Yield the entries of a ``struct list_head`` (``list_for_each_entry``), this being its head.

        KernelError for a list without an end: of a guest that changes it meanwhile, say.
        """
        entry = self.next
        for _ in range(_LIST_MOST):
            if int(entry) == self.address_:
                return
            yield entry.container_of_(type, member)
            entry = entry.dereference_().next
        raise KernelError(f"the list at {self.address_:#x} has no end")

    # -- values

    def bytes_(self) -> bytes:
        """Return the object's bytes."""
        if self._data_ is not None:
            return self._data_
        return self._source_.read(self.address_, self._source_.btf.size(self.type_))

    def read_(self) -> Value:
        """Return the object as it is now: it does not change with the guest's memory any more."""
        return Value(self._source_, self.type_, self.address_, data=self.bytes_())

    def value_(self) -> int | bool:
        """Return a number, a pointer or an enumerator as a number; TypeError for what is none of these."""
        btf = self._source_.btf
        type = btf.resolve(self.type_)
        if type.kind not in (Kind.INT, Kind.PTR, Kind.ENUM, Kind.ENUM64):
            raise TypeError(f"{btf.spell(self.type_)} is no number")
        if self._bit_size_:
            size = (self._bit_offset_ + self._bit_size_ + 7) // 8
            word = int.from_bytes(self._source_.read(self.address_, size), "little")
            value = word >> self._bit_offset_ & (1 << self._bit_size_) - 1
            if type.signed and value >> self._bit_size_ - 1:
                value -= 1 << self._bit_size_
        else:
            value = int.from_bytes(self.bytes_(), "little", signed=type.signed)
        return bool(value) if type.is_bool else value

    def __int__(self) -> int:
        return int(self.value_())

    __index__ = __int__

    def __bool__(self) -> bool:
        return bool(self.value_())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Value):
            return (self.address_, self.value_()) == (other.address_, other.value_()) if self is not other else True
        return self.value_() == other

    def __hash__(self) -> int:
        return hash(self.address_)

    def enumerator_(self) -> str:
        """Return the name of an enumerator; the number if it has none."""
        type = self._source_.btf.resolve(self.type_)
        value = int(self)
        return next((name for name, number in type.enumerators if number == value), str(value))

    def string_(self, size_max: int = _STRING_MOST) -> str:
        """Return the text in an array of characters, or at a pointer, up to its NUL or *size_max* bytes."""
        btf = self._source_.btf
        type = btf.resolve(self.type_)
        if type.kind is Kind.PTR:
            read, start, most = self._source_.read, int(self), size_max
        elif type.kind is Kind.ARRAY:
            if type.count:
                return self.bytes_()[:size_max].partition(b"\0")[0].decode("utf-8", "replace")
            read, start, most = self._source_.read, self.address_, size_max
        else:
            raise TypeError(f"{btf.spell(type)} is no string")
        return _c_string(read, start, most)

    def __str__(self) -> str:
        btf = self._source_.btf
        type = btf.resolve(self.type_)
        match type.kind:
            case Kind.PTR:
                return f"{int(self):#x}"
            case Kind.ENUM | Kind.ENUM64:
                return self.enumerator_()
            case Kind.INT:
                return str(self.value_())
            case Kind.ARRAY if btf.size(btf.target(type)) == 1:
                return self.string_()
            case _:
                return repr(self)

    def __repr__(self) -> str:
        return f"<{self._source_.btf.spell(self.type_)} at {self.address_:#x}>"

    def members_(self) -> dict[str, Value]:
        """Return all members of a structure by name, those of anonymous ones too."""
        btf = self._source_.btf
        names: dict[str, Value] = {}

        def collect(type: Type) -> None:
            for member in type.members:
                if member.name:
                    names[member.name] = self.member_(member.name)
                else:
                    collect(btf.resolve(btf.type(member.type)))

        type = btf.resolve(self.type_)
        collect(btf.resolve(btf.target(type)) if type.kind is Kind.PTR else type)
        return names


def _c_string(read: Callable[[int, int], bytes], start: int, most: int) -> str:
    data = b""
    while len(data) < most:
        at = start + len(data)
        part = read(at, min(_CHUNK - at % _CHUNK, most - len(data)))  # never over a page's end
        text, end, _ = part.partition(b"\0")
        data += text
        if end:
            break
    return data.decode("utf-8", "replace")
