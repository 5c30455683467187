# SPDX-License-Identifier: Apache-2.0
"""kallsyms: the kernel's own table of its symbols.

Source: Linux, ``scripts/kallsyms.c`` (the format: names are sequences of tokens, addresses are relative) and
``kernel/kallsyms.c``, 4.20 to 6.12.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from softkvm.abi.sizes import Size
from softkvm.vmm.linux.errors import KernelError
from softkvm.vmm.linux.vmcoreinfo import Vmcoreinfo

Read = Callable[[int, int], bytes]

_TOKENS: Final = 256
_NEEDED: Final = ("names", "num_syms", "token_table", "token_index", "offsets", "relative_base")
_SYMBOLS: Final = Size(
    "symbols of a guest's kernel", 1 << 21, KernelError, giver="guest", element=4, effect="KernelError", where=__name__
)
_NAME_BYTES: Final = Size(
    "bytes of the names of a guest's kernel", 1 << 25, KernelError, giver="guest", effect="KernelError", where=__name__
)


class Symbol(NamedTuple):
    """A symbol: its address, the bytes to the next one, its type as ``nm`` has it, its name, its module's."""

    address: int
    size: int
    type: str
    name: str
    module: str = ""


class Symbols:
    """Symbols by name and by address."""

    def __init__(self, symbols: Iterable[tuple[int, str, str, str]]) -> None:
        """*symbols* are addresses, types, names and modules; several may have one name."""
        ordered = sorted(symbols, key=lambda symbol: symbol[0])
        self._addresses = [symbol[0] for symbol in ordered]
        self._symbols = ordered
        self._by_name: dict[str, int] = {}
        for n in range(len(ordered) - 1, -1, -1):
            self._by_name[ordered[n][2]] = n

    def __len__(self) -> int:
        return len(self._symbols)

    def __iter__(self) -> Iterator[Symbol]:
        return (self._symbol(n) for n in range(len(self._symbols)))

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def _symbol(self, n: int) -> Symbol:
        address, kind, name, module = self._symbols[n]
        end = bisect.bisect_right(self._addresses, address, n)
        following = self._addresses[end] if end < len(self._addresses) else address
        return Symbol(address, following - address, kind, name, module)

    def named(self, name: str) -> list[Symbol]:
        """Return all symbols of a name, by address."""
        first = self._by_name.get(name)
        if first is None:
            return []
        return [self._symbol(n) for n in range(first, len(self._symbols)) if self._symbols[n][2] == name]

    def __getitem__(self, name: str) -> int:
        """Return the address of a symbol, of the first one if there are several; KeyError if there is none."""
        return self._addresses[self._by_name[name]]

    def find(self, name: str) -> Symbol | None:
        """Return a symbol, the first one of that name."""
        n = self._by_name.get(name)
        return None if n is None else self._symbol(n)

    def at(self, address: int) -> tuple[Symbol, int] | None:
        """Return the symbol that *address* is in, and how far; None if it is before or far behind all.

        Of several at one address the first that is no local label is taken.
        """
        n = bisect.bisect_right(self._addresses, address) - 1
        if n < 0:
            return None
        start = bisect.bisect_left(self._addresses, self._addresses[n])
        symbol = self._symbol(start)
        if symbol.size and address >= symbol.address + symbol.size:
            return None
        if not symbol.size and address - symbol.address > 0x10000:
            return None
        return symbol, address - symbol.address


def read_kallsyms(info: Vmcoreinfo, read: Read) -> list[tuple[int, str, str, str]]:
    """Return the kernel's symbols: address, type, name and an empty module.

    KernelError if vmcoreinfo does not say where they are, or they are not what they should be; MemoryFault if the
    memory is not there.
    """
    missing = [name for name in _NEEDED if f"kallsyms_{name}" not in info.symbols]
    if missing:
        raise KernelError(
            f"vmcoreinfo of Linux {info.release} does not name kallsyms_{missing[0]}: it is older than 6.0, or built "
            "without CONFIG_KALLSYMS; give its System.map"
        )
    places = {name: info.symbols[f"kallsyms_{name}"] for name in _NEEDED}
    count = int.from_bytes(read(places["num_syms"], 4), "little")
    _SYMBOLS.check(count)
    tokens = _tokens(places, read)
    # the order of the tables has changed with time: names end before the next one of them
    behind = [place for place in places.values() if place > places["names"]]
    size = min(behind, default=places["names"] + 12 * count) - places["names"]
    names = _names(read(places["names"], _NAME_BYTES.check(size)), count, tokens)
    addresses = _addresses(read(places["offsets"], _SYMBOLS.bytes(count)), read(places["relative_base"], 8))
    return [(address, name[0], name[1:], "") for address, name in zip(addresses, names, strict=True)]


def _tokens(places: dict[str, int], read: Read) -> list[str]:
    index = struct.unpack(f"<{_TOKENS}H", read(places["token_index"], 2 * _TOKENS))
    table = read(places["token_table"], max(index) + 256)
    return [table[start : table.find(b"\0", start)].decode("ascii", "replace") for start in index]


def _names(data: bytes, count: int, tokens: list[str]) -> Iterator[str]:
    at = 0
    for _ in range(count):
        if at + 2 > len(data):
            raise KernelError(f"kallsyms: {count} names do not end where they should")
        size = data[at]
        at += 1
        if size & 0x80:  # since 6.1: a second byte for long names
            size = size & 0x7F | data[at] << 7
            at += 1
        name = "".join([tokens[token] for token in data[at : at + size]])
        at += size
        if len(name) < 2:
            raise KernelError("kallsyms: a name has no letter")
        yield name


def _addresses(offsets: bytes, base: bytes) -> list[int]:
    """Return addresses. Before 6.15 positive offsets are per-CPU addresses, and others go down from the base."""
    signed = memoryview(offsets).cast("i")
    relative = int.from_bytes(base, "little")
    down = sum(offset < 0 for offset in signed) * 2 > len(signed)
    if not down:
        return [relative + (offset & 0xFFFF_FFFF) & (1 << 64) - 1 for offset in signed]
    return [offset if offset >= 0 else relative - 1 - offset & (1 << 64) - 1 for offset in signed]


def read_system_map(text: bytes) -> list[tuple[int, str, str, str]]:
    """Return the symbols of a System.map, or of ``nm``; KernelError if it is none."""
    symbols = []
    for line in text.decode("ascii", "replace").splitlines():
        fields = line.split()
        try:
            address, kind, name = int(fields[0], 16), fields[1], fields[2]
        except (ValueError, IndexError):
            raise KernelError(f"System.map: {line[:60]!r} is no line of an address, a type and a name") from None
        symbols.append((address, kind, name, ""))
    return symbols
