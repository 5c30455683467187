# SPDX-License-Identifier: Apache-2.0
"""What a request's third argument is: how a method's arguments become it, and how it becomes the method's result.

The API's methods take and return structures and plain Python values; an ioctl takes a number or the address of a
structure, some of them with an array behind. An :class:`Argument` says which, so that nothing else has to know a
request's layout, nor what its arguments may be. The row of a request (:mod:`softkvm.abi.requests`) names its structure
and its argument::

    KVM_GET_REGS = IOR(0x81, kvm_regs, VCPU, Gives)
    KVM_IRQ_LINE = IOW(0x61, kvm_irq_level, VM, fields("irq", "level"))
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from softkvm.abi import checks
from softkvm.abi._layout import flexible
from softkvm.abi.checks import kvm_error

#: The most elements that a table is grown to when the kernel says E2BIG.
_MOST_ENTRIES = 1 << 16

_U32 = checks.limits(ctypes.c_uint32)
_U64 = _ULONG = checks.limits(ctypes.c_uint64)


class Argument:
    """What a request takes; this one takes nothing and returns nothing.

    ``structure`` is the row's: a structure, a number's type, or None.
    """

    def __init__(self, structure: Any = None) -> None:
        self.structure = structure

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """Return the method's arguments, whose names are ``names``, as :meth:`pack` takes them.

        Raises TypeError for arguments of other types, OSError for what no structure can hold, each in one line.
        """
        return args

    def pack(self, *args: Any) -> Any:
        """Return what the request takes for the method's arguments: a number, or a ctypes object to point to."""
        return 0

    def unpack(self, packed: Any, value: int) -> Any:
        """Return the method's result after ioctl() has returned ``value``."""
        return None

    def grown(self, packed: Any) -> Any:
        """Return a larger argument after E2BIG, None where that doesn't help."""
        return None


Nothing = Argument


class Value(Argument):
    """Nothing; the method returns what ioctl() does."""

    def unpack(self, packed: Any, value: int) -> Any:
        """The request's own result."""
        return value


class Number(Argument):
    """A number, by value."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """What an unsigned long holds."""
        return (checks.number(names[0], args[0], *_ULONG),)

    def pack(self, number: int = 0) -> int:
        """The number itself."""
        return number


class NumberValue(Number, Value):
    """A number, by value; the method returns what ioctl() does."""


class Takes(Argument):
    """The address of a structure, or of a number, that the request reads."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """The structure, or a number of the type."""
        if issubclass(self.structure, ctypes.Structure):
            checks.structure(names[0], args[0], self.structure)
            return args
        return (checks.number(names[0], args[0], *checks.limits(self.structure)),)

    def pack(self, given: Any) -> Any:
        """The caller's own structure, or the number in memory."""
        return given if isinstance(given, ctypes.Structure) else self.structure(given)


class TakesValue(Takes, Value):
    """The address of a structure that the request reads; the method returns what ioctl() does."""


class Gives(Argument):
    """The address of a structure, or of a number, that the request fills."""

    def pack(self) -> Any:
        """Room for it."""
        return self.structure()

    def unpack(self, packed: Any, value: int) -> Any:
        """The filled structure; the number itself."""
        return packed if isinstance(packed, ctypes.Structure) else packed.value


class _Fields(Argument):
    def __init__(self, structure: Any, names: tuple[str, ...], gives: str) -> None:
        super().__init__(structure)
        self.names = names
        self.gives = gives
        self.limits = tuple(checks.limits(checks.field_type(self.structure, name)) for name in names)

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        for value, (low, high) in zip(args, self.limits, strict=True):
            if type(value) is not int or not low <= value <= high:
                rows = zip(names, args, self.limits, strict=True)
                return [checks.number(name, number, *limits) for name, number, limits in rows]
        return args

    def pack(self, *args: Any) -> Any:
        return self.structure(**dict(zip(self.names, args, strict=True)))

    def unpack(self, packed: Any, value: int) -> Any:
        if not self.gives:
            return None
        return packed if self.gives == "*" else getattr(packed, self.gives)


def fields(*names: str, gives: str = "", structure: Any = None) -> Callable[[Any], Argument]:
    """Return the argument whose fields ``names`` are the method's arguments, in this order; the rest is zero.

    ``gives`` is the field that is the method's result, or ``"*"`` for the whole structure. ``structure`` is for a
    request whose number doesn't count its size.
    """
    return lambda counted: _Fields(counted or structure, names, gives)


class _Table(Argument):
    """A header that counts its entries in the field ``count``, and the entries behind it, named ``entries``."""

    def __init__(self, structure: Any, entry: Any, count: str, entries: str) -> None:
        super().__init__(structure)
        self.entry = entry
        self.count = count
        self.entries = entries

    def table(self, length: int) -> Any:
        """Return an empty table of ``length`` entries."""
        return flexible(self.structure, self.entry, length, self.entries)(**{self.count: length})


class _TakesTable(_Table):
    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        for index, row in enumerate(checks.sequence(names[0], args[0], self.entry.__name__)):
            if not isinstance(row, self.entry):
                checks.structure(f"{names[0]}[{index}]", row, self.entry)
        return args

    def pack(self, rows: Sequence[Any]) -> Any:
        table = self.table(len(rows))
        getattr(table, self.entries)[:] = rows
        return table


class _GivesTable(_Table):
    _FIRST = 128

    def pack(self) -> Any:
        return self.table(self._FIRST)

    def grown(self, packed: Any) -> Any:
        capacity = len(getattr(packed, self.entries))
        if capacity >= _MOST_ENTRIES:
            return None
        return self.table(max(capacity * 2, getattr(packed, self.count)))

    def unpack(self, packed: Any, value: int) -> Any:
        rows = getattr(packed, self.entries)[: getattr(packed, self.count)]
        if issubclass(self.entry, ctypes.Structure):
            return [self.entry.from_buffer_copy(row) for row in rows]
        return list(rows)


def takes_table(entry: Any, count: str, entries: str = "entries") -> Callable[[Any], Argument]:
    """Return the argument of a method that takes a sequence: a header that counts it, and its elements behind."""
    return partial(_TakesTable, entry=entry, count=count, entries=entries)


def gives_table(entry: Any, count: str, entries: str = "entries") -> Callable[[Any], Argument]:
    """Return the argument of a method that returns a list; E2BIG asks for more room."""
    return partial(_GivesTable, entry=entry, count=count, entries=entries)


class Capability(Argument):
    """KVM_ENABLE_CAP: a capability and up to four arguments."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """A number of 32 bits, the others of 64; EINVAL for more."""
        cap, *rest = args
        if len(rest) > 4:
            raise kvm_error(errno.EINVAL, f"{len(rest)} arguments of a capability, expected at most 4")
        cap = checks.number(names[0], cap, *_U32)
        return cap, *(checks.number(f"args[{n}]", value, *_U64) for n, value in enumerate(rest))

    def pack(self, cap: int, *args: int) -> Any:
        """The structure of the capability."""
        structure = self.structure(cap=cap)
        structure.args[: len(args)] = args
        return structure


class SignalMask(Argument):
    """KVM_SET_SIGNAL_MASK: the bytes of a signal set behind their number, or nothing."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """Bytes, or None."""
        return (None if args[0] is None else checks.data(names[0], args[0]),)

    def pack(self, sigset: bytes | None) -> Any:
        """The mask; a null pointer for None."""
        if sigset is None:
            return 0
        mask = flexible(self.structure, ctypes.c_uint8, len(sigset), "sigset")(len=len(sigset))
        mask.sigset[:] = sigset
        return mask


def bitmap(given: bytes, size: int, most: int | None = None) -> Any:
    """Return memory that holds ``given``, a bitmap of ``size`` bytes; EFAULT if it is shorter than that or ``most``."""
    if len(given) < (size if most is None else min(size, most)):
        raise kvm_error(errno.EFAULT, f"bitmap of {len(given)} bytes, expected {size}")
    return ctypes.create_string_buffer(given, max(len(given), 1))


def keep(structure: Any, *buffers: Any) -> None:
    """Let ``structure`` hold the memory that its fields are addresses of."""
    structure.kept = buffers
