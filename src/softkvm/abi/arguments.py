# SPDX-License-Identifier: Apache-2.0
"""What a request's third argument is: how a method's arguments become it, and how it becomes the method's result.

And the other way round, for who serves requests of a client: how the argument in the client's memory becomes the
method's arguments (:meth:`Argument.take`), and how the method's result gets there (:meth:`Argument.give`).

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
from typing import Any, Protocol

from softkvm.abi import checks
from softkvm.abi._layout import flexible
from softkvm.abi.checks import kvm_error
from softkvm.abi.sizes import Size

#: The size of a signal set in the kernel's own interface.
_SIGSET_BYTES = Size("kvm_signal_mask.len", 8, errno.EINVAL, least=8, where=__name__)
_CAP_ARGS = Size("args of KVM_ENABLE_CAP", 4, errno.EINVAL, element=8, where=__name__)
#: What a table is grown to when the kernel says E2BIG.
_GIVEN = Size("entries of a table that the kernel fills", 1 << 16, None, giver="kernel", effect="E2BIG", where=__name__)

_U32 = checks.limits(ctypes.c_uint32)
_U64 = _ULONG = checks.limits(ctypes.c_uint64)


class Memory(Protocol):
    """A client's memory; both methods raise OSError with EFAULT where it is not readable, or writable."""

    def read(self, address: int, size: int) -> bytes:
        """Return a copy of ``size`` bytes at ``address``."""

    def write(self, address: int, data: Any) -> None:
        """Put bytes, or a structure, to ``address``."""


class Unread:
    """Bytes of a client's memory that are read when ``bytes()`` asks for them.

    The kernel reads an array that the structure points to when all else of the request is right: what is wrong with its
    size, or with whom it is for, is said before EFAULT, and costs nothing.
    """

    def __init__(self, memory: Memory, address: int, size: int) -> None:
        self._memory = memory
        self._address = address
        self._size = size

    def __len__(self) -> int:
        """How many bytes there are to be."""
        return self._size

    def __bytes__(self) -> bytes:
        """Return a copy; raises OSError with EFAULT."""
        return self._memory.read(self._address, self._size)

    def __repr__(self) -> str:
        """Only how many."""
        return f"{self._size} bytes"


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

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """Return the method's arguments for an ioctl's third argument ``value``, mostly an address in ``memory``.

        Raises OSError: EFAULT, and what the kernel says of a header before it looks at anything else.
        """
        return ()

    def give(self, memory: Memory, value: int, result: Any) -> int:
        """Put the method's result to where the client has it; return what ioctl() returns."""
        return 0

    def serve(self, method: Callable[..., Any], memory: Memory, value: int) -> tuple[Any, int]:
        """Call the method for an ioctl; returns its result, and what ioctl() returns."""
        result = method(*self.take(memory, value))
        return result, self.give(memory, value, result)


def read_structure(memory: Memory, structure: Any, address: int) -> Any:
    """Return a copy of a structure, or of a number's type, in a client's memory."""
    return structure.from_buffer_copy(memory.read(address, ctypes.sizeof(structure)))


Nothing = Argument


class Value(Argument):
    """Nothing; the method returns what ioctl() does."""

    def unpack(self, packed: Any, value: int) -> Any:
        """The request's own result."""
        return value

    def give(self, memory: Memory, value: int, result: Any) -> int:
        """The method's result."""
        return int(result)


class ValueAlone(Value):
    """Nothing, and it has to be: the method returns what ioctl() does."""

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """No arguments; EINVAL for any."""
        if value:
            raise kvm_error(errno.EINVAL, f"argument {value:#x}, expected 0")
        return ()


class Number(Argument):
    """A number, by value."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """What an unsigned long holds."""
        return (checks.number(names[0], args[0], *_ULONG),)

    def pack(self, number: int = 0) -> int:
        """The number itself."""
        return number

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """The number itself."""
        return (value,)


class NumberValue(Number, Value):
    """A number, by value; the method returns what ioctl() does."""


class _Whole(Argument):
    """The address of a structure, or of a number."""

    def __init__(self, structure: Any) -> None:
        super().__init__(structure)
        self.size = ctypes.sizeof(structure)
        self.is_structure = issubclass(structure, ctypes.Structure)


class Takes(_Whole):
    """The address of a structure, or of a number, that the request reads."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """The structure, or a number of the type."""
        if self.is_structure:
            checks.structure(names[0], args[0], self.structure)
            return args
        return (checks.number(names[0], args[0], *checks.limits(self.structure)),)

    def pack(self, given: Any) -> Any:
        """The caller's own structure, or the number in memory."""
        return given if isinstance(given, ctypes.Structure) else self.structure(given)

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """A copy of the structure; the number itself."""
        given = self.structure.from_buffer_copy(memory.read(value, self.size))
        return (given if self.is_structure else given.value,)


class TakesValue(Takes, Value):
    """The address of a structure that the request reads; the method returns what ioctl() does."""


class Updates(Takes):
    """The address of a structure that the request reads and changes; the method changes the caller's own."""

    def serve(self, method: Callable[..., Any], memory: Memory, value: int) -> tuple[Any, int]:
        """The structure goes back as the method has left it."""
        (given,) = self.take(memory, value)
        method(given)
        memory.write(value, given)
        return given, 0


class Gives(_Whole):
    """The address of a structure, or of a number, that the request fills."""

    def pack(self) -> Any:
        """Room for it."""
        return self.structure()

    def unpack(self, packed: Any, value: int) -> Any:
        """The filled structure; the number itself."""
        return packed if self.is_structure else packed.value

    def give(self, memory: Memory, value: int, result: Any) -> int:
        """The structure, or the number."""
        memory.write(value, result if self.is_structure else self.structure(result))
        return 0


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

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        given = read_structure(memory, self.structure, value)
        return [getattr(given, name) for name in self.names]

    def give(self, memory: Memory, value: int, result: Any) -> int:
        if self.gives == "*":
            memory.write(value, result)
        elif self.gives:
            at = getattr(self.structure, self.gives).offset
            memory.write(value + at, checks.field_type(self.structure, self.gives)(result))
        return 0


def fields(*names: str, gives: str = "", structure: Any = None) -> Callable[[Any], Argument]:
    """Return the argument whose fields ``names`` are the method's arguments, in this order; the rest is zero.

    ``gives`` is the field that is the method's result, or ``"*"`` for the whole structure. ``structure`` is for a
    request whose number doesn't count its size.
    """
    return lambda counted: _Fields(counted or structure, names, gives)


class _Table(Argument):
    """A header that counts its entries in the field ``count``, and the entries behind it, named ``entries``."""

    def __init__(
        self,
        structure: Any,
        entry: Any,
        count: str,
        entries: str,
        tells: bool = False,
    ) -> None:
        super().__init__(structure)
        self.entry = entry
        self.count = count
        self.entries = entries
        self.tells = tells

    def table(self, length: int) -> Any:
        """Return an empty table of ``length`` entries."""
        return flexible(self.structure, self.entry, length, self.entries)(**{self.count: length})


class _TakesTable(_Table):
    def __init__(self, structure: Any, most: tuple[int, int], **layout: Any) -> None:
        super().__init__(structure, **layout)
        limit, error = most
        name, element = f"{structure.__name__}.{self.count}", ctypes.sizeof(self.entry)
        self.size = Size(name, limit, error, element=element, where="softkvm.abi.requests")

    def read_rows(self, memory: Memory, address: int) -> Sequence[Any]:
        """Return copies of a table's entries in a client's memory."""
        header = read_structure(memory, self.structure, address)
        length = self.size.check(getattr(header, self.count))
        if getattr(header, "flags", 0):
            raise kvm_error(errno.EINVAL, f"flags={header.flags:#x}, expected 0")
        size = self.size.bytes(length)
        data = memory.read(address + ctypes.sizeof(self.structure), size) if length else b""
        return [self.entry.from_buffer_copy(data, at) for at in range(0, size, self.size.element)]

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        for index, row in enumerate(checks.sequence(names[0], args[0], self.entry.__name__)):
            if not isinstance(row, self.entry):
                checks.structure(f"{names[0]}[{index}]", row, self.entry)
        return args

    def pack(self, rows: Sequence[Any]) -> Any:
        table = self.table(len(rows))
        getattr(table, self.entries)[:] = rows
        return table

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        return (self.read_rows(memory, value),)


class _GivesTable(_Table):
    _FIRST = 128

    def pack(self) -> Any:
        return self.table(self._FIRST)

    def grown(self, packed: Any) -> Any:
        wanted = max(2 * len(getattr(packed, self.entries)), getattr(packed, self.count))
        return self.table(wanted) if _GIVEN.allows(wanted) else None

    def unpack(self, packed: Any, value: int) -> Any:
        rows = getattr(packed, self.entries)[: getattr(packed, self.count)]
        if issubclass(self.entry, ctypes.Structure):
            return [self.entry.from_buffer_copy(row) for row in rows]
        return list(rows)

    def give(self, memory: Memory, value: int, result: Any) -> int:
        header = read_structure(memory, self.structure, value)
        room = getattr(header, self.count)
        setattr(header, self.count, len(result))
        fits = len(result) <= room
        if fits or self.tells:
            memory.write(value, header)
        if not fits:
            raise kvm_error(errno.E2BIG, f"{self.count}={room}, expected {len(result)}")
        memory.write(value + ctypes.sizeof(self.structure), (self.entry * len(result))(*result))
        return 0


def takes_table(
    entry: Any, count: str, entries: str = "entries", *, most: tuple[int, int]
) -> Callable[[Any], Argument]:
    """Return the argument of a method that takes a sequence: a header that counts it, and its elements behind.

    ``most`` is how many there may be, and the errno for more.
    """
    return partial(_TakesTable, entry=entry, count=count, entries=entries, most=most)


def gives_table(entry: Any, count: str, entries: str = "entries", *, tells: bool = False) -> Callable[[Any], Argument]:
    """Return the argument of a method that returns a list; E2BIG asks for more room.

    ``tells``: the count is put into the header then, too.
    """
    return partial(_GivesTable, entry=entry, count=count, entries=entries, tells=tells)


class Capability(Argument):
    """KVM_ENABLE_CAP: a capability and up to four arguments."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """A number of 32 bits, the others of 64; EINVAL for more."""
        cap, *rest = args
        _CAP_ARGS.check(len(rest), called="number of arguments")
        cap = checks.number(names[0], cap, *_U32)
        return cap, *(checks.number(f"args[{n}]", value, *_U64) for n, value in enumerate(rest))

    def pack(self, cap: int, *args: int) -> Any:
        """The structure of the capability."""
        structure = self.structure(cap=cap)
        structure.args[: len(args)] = args
        return structure

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """The capability and all of its arguments; EINVAL for flags."""
        given = read_structure(memory, self.structure, value)
        if given.flags:
            raise kvm_error(errno.EINVAL, f"flags={given.flags:#x}, expected 0")
        return given.cap, *given.args


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

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """The bytes of the set, None for a null pointer; EINVAL for a set of another size than the kernel's."""
        if not value:
            return (None,)
        mask = read_structure(memory, self.structure, value)
        return (memory.read(value + ctypes.sizeof(self.structure), _SIGSET_BYTES.bytes(mask.len)),)


def bitmap(given: bytes, size: int, most: int | None = None) -> Any:
    """Return memory that holds ``given``, a bitmap of ``size`` bytes; EFAULT if it is shorter than that or ``most``."""
    if len(given) < (size if most is None else min(size, most)):
        raise kvm_error(errno.EFAULT, f"bitmap of {len(given)} bytes, expected {size}")
    return ctypes.create_string_buffer(given, max(len(given), 1))


def keep(structure: Any, *buffers: Any) -> None:
    """Let ``structure`` hold the memory that its fields are addresses of."""
    structure.kept = buffers
