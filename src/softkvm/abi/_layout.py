# SPDX-License-Identifier: Apache-2.0
"""How the structures of this package are declared.

A kernel structure is a class whose annotations read like the C declaration; :func:`layout` turns them into
the ``_fields_`` of :mod:`ctypes`::

    @layout
    class kvm_dtable(Structure):
        base: u64
        limit: u16
        padding: Annotated[u16s, 3]

An annotation is a scalar alias (``u8`` ... ``s64``), a structure class, or ``Annotated[<array alias>, n]``.
"""

import functools
from collections.abc import Callable, Iterator
from ctypes import (
    Array,
    Structure,
    Union,
    c_char,
    c_int8,
    c_int16,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    sizeof,
)
from typing import Annotated, Any, TypeVar, get_args, get_origin

u8 = Annotated[int, c_uint8]
u16 = Annotated[int, c_uint16]
u32 = Annotated[int, c_uint32]
u64 = Annotated[int, c_uint64]
s8 = Annotated[int, c_int8]
s16 = Annotated[int, c_int16]
s32 = Annotated[int, c_int32]
s64 = Annotated[int, c_int64]
chars = Annotated[bytes, c_char]
u8s = Annotated[Array[c_uint8], c_uint8]
u16s = Annotated[Array[c_uint16], c_uint16]
u32s = Annotated[Array[c_uint32], c_uint32]
u64s = Annotated[Array[c_uint64], c_uint64]
u8s2 = Annotated[Array[Array[c_uint8]], c_uint8]


class Bits:
    """Marks a bit field: ``Annotated[u8, Bits(3)]``."""

    __slots__ = ("width",)

    def __init__(self, width: int) -> None:
        self.width = width


S = TypeVar("S", bound=type[Structure] | type[Union])
T = TypeVar("T", bound=Structure)


def _field(name: str, annotation: Any) -> tuple[Any, ...]:
    """Return the ``_fields_`` entry for one annotation."""
    if get_origin(annotation) is not Annotated:
        return (name, annotation)
    ctype, *rest = get_args(annotation)[1:]
    for item in reversed(rest):  # the last dimension is the innermost, as in C
        if isinstance(item, Bits):
            return (name, ctype, item.width)
        ctype = ctype * item
    return (name, ctype)


_SHOWN = 8
"""Elements of an array that a structure's text has."""
_SMALL_UNION = 8
"""Bytes of a union whose first member stands for it; a larger one means something by another field alone."""


def _text(value: Any) -> str:
    """Return a field's value, the empty text for nothing but zeros."""
    if isinstance(value, (Structure, Union)):
        return repr(value) if any(bytes(value)) else ""
    if isinstance(value, Array):
        texts = [_text(element) or "0" for element in value[:_SHOWN]]
        more = ", …" if len(value) > _SHOWN else ""
        return f"[{', '.join(texts)}{more}]" if any(bytes(value)) else ""
    if isinstance(value, int):
        return (str(value) if -10 < value < 10 else hex(value)) if value else ""
    return repr(value) if value else ""


def _fields_of(structure: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and values of fields, those of bases and of anonymous members included."""
    anonymous = getattr(type(structure), "_anonymous_", ())
    for cls in reversed(type(structure).__mro__):
        for name, *_ in vars(cls).get("_fields_", ()):
            value = getattr(structure, name)
            if isinstance(value, Union):
                if sizeof(value) <= _SMALL_UNION:
                    yield next(_fields_of(value))
            elif name in anonymous:
                yield from _fields_of(value)
            else:
                yield name, value


def _repr(structure: Any) -> str:
    """Return the structure with the fields that are not zero, numbers above 9 in hexadecimal."""
    fields = ((name, _text(value)) for name, value in _fields_of(structure))
    return f"{type(structure).__name__}({', '.join(f'{name}={text}' for name, text in fields if text)})"


def layout(cls: S) -> S:
    """Give *cls* the ``_fields_`` that its annotations describe, behind those of bases that have none themselves."""
    bases = [base for base in cls.__mro__[1:] if "__annotations__" in vars(base) and "_fields_" not in vars(base)]
    annotations: dict[str, Any] = {}
    for part in (*reversed(bases), cls):
        annotations |= vars(part)["__annotations__"]
    cls._fields_ = [_field(name, annotation) for name, annotation in annotations.items()]
    if issubclass(cls, Structure):
        cls.__repr__ = _repr  # type: ignore[method-assign]
    return cls


@functools.lru_cache(maxsize=256)
def flexible(header: type[T], entry: Any, count: int, name: str = "entries") -> type[T]:
    """Return *header* followed by its flexible array member, with *count* elements of type *entry*.

    ``flexible(kvm_msrs, kvm_msr_entry, 3)`` is ``struct kvm_msrs`` with room for three entries.
    """
    make: Callable[..., Any] = type(header)
    cls: type[T] = make(f"{header.__name__}_{count}", (header,), {"_fields_": [(name, entry * count)]})
    return cls
