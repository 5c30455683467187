# SPDX-License-Identifier: Apache-2.0
"""What a disk's contents are to a device, whatever file they are in.

Data go between the file and views of guest memory directly. Offsets and sizes are bytes within the image, which the
caller has looked at; errors are the host's OSError. Several threads may read and write at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Final

from softkvm.closing import Closing
from softkvm.vmm.errors import ConfigError

SECTOR: Final = 512


class ImageFileError(ConfigError):
    """A file that is no image of ours, a damaged one, or one that somebody else uses."""


class Image(Closing):
    """The contents of a disk, of ``size`` bytes."""

    name: str
    """The file's name, for messages."""
    size: int
    read_only: bool

    def files(self) -> list[str]:
        """Return the files that the contents come from."""
        return [self.name]

    def save(self) -> dict[str, Any]:
        """What isn't in the files."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what isn't in the files; ValueError if it cannot be this image's."""

    def let_go(self) -> None:
        """Let another process have the file: all is in it, and nothing is read or written until :meth:`take_back`."""

    def take_back(self) -> None:
        """Have the file again, as it was; ImageFileError if another process uses it."""

    @abstractmethod
    def readv(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill *views* with what is at *offset*."""

    @abstractmethod
    def writev(self, views: Sequence[memoryview], offset: int) -> None:
        """Store the contents of *views* at *offset*."""

    @abstractmethod
    def flush(self) -> None:
        """Return when all that was written is where neither we nor the host can lose it."""

    @abstractmethod
    def discard(self, offset: int, size: int) -> None:
        """Nobody needs what is there any more: give the room back, as far as that can be."""

    @abstractmethod
    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """Have zeroes there; with *unmap*, the room may go."""


class Views:
    """Views of memory one after the other, from which pieces are taken."""

    def __init__(self, views: Iterable[memoryview]) -> None:
        self._views = [view for view in views if view.nbytes]
        self._index = 0
        self._at = 0

    def take(self, size: int) -> list[memoryview]:
        """Return the next *size* bytes, or as many as there are."""
        found = []
        while size and self._index < len(self._views):
            view = self._views[self._index]
            piece = view[self._at : self._at + size]
            found.append(piece)
            size -= len(piece)
            self._at += len(piece)
            if self._at == len(view):
                self._index, self._at = self._index + 1, 0
        return found


def total(views: Iterable[memoryview]) -> int:
    """Return the bytes of all *views*."""
    return sum(view.nbytes for view in views)


_ZEROES: Final = bytes(1 << 16)


def fill_zeroes(views: Iterable[memoryview]) -> None:
    """Fill *views* with zeroes."""
    for view in views:
        for at in range(0, len(view), len(_ZEROES)):
            piece = view[at : at + len(_ZEROES)]
            piece[:] = _ZEROES[: len(piece)]
