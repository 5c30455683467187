# SPDX-License-Identifier: Apache-2.0
"""How long arrays may be whose length somebody else gives: a client, a guest, a file.

Each such length is a :class:`Size`, which is looked at before anything is read or made of that length, and is in
:data:`ALL`, of which ``scripts/sizes_table.py`` makes ``docs/sizes.md``. A size's largest product with the bytes of an
element fits a C size_t, which is looked at when it is defined: behind :meth:`Size.check` nothing can overflow
(``krealloc_array``, ``check_mul_overflow``).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from softkvm.abi.checks import kvm_error

SIZE_MAX: Final = (1 << 64) - 1

#: Makes an exception of what is wrong.
Raises = Callable[[str], Exception]


def os_error(code: int) -> Raises:
    """Return the maker of an OSError with an errno."""
    return lambda message: kvm_error(code, message)


class Size:
    """The length of one kind of array: at most ``most`` elements of ``element`` bytes, at least ``least``.

    ``giver`` is who gives the length, ``where`` the module that looks at it. A length out of these bounds is ``error``:
    an errno, or what makes an exception of a message; None for where it isn't an error, but a status or a cut
    (``effect`` says which). Where there may be less room than ``most`` at times, each look says how much (``room``).
    """

    __slots__ = ("code", "effect", "element", "giver", "least", "most", "name", "raises", "where")

    def __init__(
        self,
        name: str,
        most: int,
        error: int | Raises | None,
        *,
        where: str,
        element: int = 1,
        least: int = 0,
        giver: str = "client",
        effect: str = "",
    ) -> None:
        if not 0 <= least <= most or element < 1 or most * element > SIZE_MAX:
            raise ValueError(f"{name}: {least} to {most} elements of {element} bytes are no size")
        self.name = name
        self.most = most
        self.least = least
        self.element = element
        self.giver = giver
        self.where = where
        self.code = error if isinstance(error, int) else None
        self.raises = os_error(error) if isinstance(error, int) else error
        self.effect = effect or (errno.errorcode[error] if isinstance(error, int) else "")
        ALL.append(self)

    def allows(self, count: int, *, room: int | None = None) -> bool:
        """Tell whether so many elements may be, of which there is room for ``room``."""
        return self.least <= count <= (self.most if room is None else self.cut(room))

    def check(self, count: int, *, room: int | None = None, called: str = "") -> int:
        """Return ``count`` if so many elements may be, or raise; ``called`` is the length's name in the message."""
        most = self.most if room is None else self.cut(room)
        if self.least <= count <= most:
            return count
        expected = f"at most {most}" if count > most else f"at least {self.least}"
        raise self._error(f"{called or self.name.rpartition('.')[2]}={count}, expected {expected}")

    def index(self, number: int, *, called: str = "") -> int:
        """Return the number of an element of the longest array, counted from 0, or raise."""
        if 0 <= number < self.most:
            return number
        raise self._error(f"{called or self.name.rpartition('.')[2]}={number}, expected below {self.most}")

    def _error(self, message: str) -> Exception:
        return kvm_error(errno.EINVAL, message) if self.raises is None else self.raises(message)

    def bytes(self, count: int, *, room: int | None = None, called: str = "") -> int:
        """Return how many bytes so many elements have, after :meth:`check`; it fits a size_t."""
        return self.check(count, room=room, called=called) * self.element

    def cut(self, count: int) -> int:
        """Return ``count``, or ``most`` where that is less: what is behind isn't looked at."""
        return min(count, self.most)

    def __repr__(self) -> str:
        return f"<Size {self.name}: {self.least} to {self.most} of {self.element} bytes>"


#: Every kind of array, in the order that their modules are loaded.
ALL: Final[list[Size]] = []
