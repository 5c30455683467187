# SPDX-License-Identifier: Apache-2.0
"""Takes files out of Debian binary packages, without dpkg.

Source: deb(5): an ar archive with the members ``debian-binary``, ``control.tar*`` and ``data.tar*``, the last in any of
the named compressions. The package is read as a stream and nothing in it chooses where anything is written: the
caller names the files it wants and gets their contents.
"""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, cast

from softkvm.abi.sizes import Size

_AR_MAGIC: Final = b"!<arch>\n"
_AR_HEADER: Final = 60
_AR_END: Final = b"`\n"
_MEMBER: Final = Size("bytes of a member of a package", 1 << 32, None, giver="file", effect="DebError", where=__name__)

FileWanted = Callable[[str], bool]


class DebError(ValueError):
    """The file is not a package this module can read; the message says why in one line."""


def read_files(package: Path, wanted: FileWanted, *, count: int, size_max: int = 256 << 20) -> dict[str, bytes]:
    """Return the contents of up to ``count`` regular files whose path ``wanted`` accepts, by path.

    Paths are the archive's without a leading ``./``. Reading stops once ``count`` files were found. Raises DebError
    for a damaged or truncated package, or a wanted file larger than ``size_max`` bytes; OSError if it cannot be read.
    """
    found: dict[str, bytes] = {}
    try:
        with package.open("rb") as file, _data_archive(file, package.name) as archive:
            for member in archive:
                path = member.name.removeprefix("./")
                if not member.isreg() or not wanted(path):
                    continue
                if member.size > size_max:
                    raise DebError(f"{package.name}: {path} has {member.size} bytes, more than the limit {size_max}")
                contents = archive.extractfile(member)
                data = contents.read() if contents is not None else b""
                if len(data) != member.size:
                    raise DebError(f"{package.name}: truncated in {path}")
                found[path] = data
                if len(found) == count:
                    break
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise DebError(f"{package.name}: damaged package: {error}") from error
    except OSError as error:
        if error.errno is None:  # a decompressor's, not the system's
            raise DebError(f"{package.name}: damaged package: {error}") from error
        raise
    return found


@contextmanager
def _data_archive(file: BinaryIO, name: str) -> Iterator[tarfile.TarFile]:
    member, size = _find_data_member(file, name)
    suffix = member.removeprefix("data.tar")
    if suffix not in _DECOMPRESSORS:
        raise DebError(f"{name}: member {member} has an unknown compression")
    plain = _DECOMPRESSORS[suffix](cast("IO[bytes]", _Part(file, size)))
    with tarfile.open(fileobj=plain, mode="r|") as archive:
        yield archive


def _find_data_member(file: BinaryIO, name: str) -> tuple[str, int]:
    """Position ``file`` at the contents of the ``data.tar*`` member; return its name and size."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise DebError(f"{name}: not a Debian package (no ar archive)")
    while True:
        header = file.read(_AR_HEADER)
        if not header:
            raise DebError(f"{name}: no data.tar member")
        if len(header) < _AR_HEADER or header[58:60] != _AR_END:
            raise DebError(f"{name}: damaged ar header")
        member = header[:16].decode("ascii", "replace").rstrip().rstrip("/")
        digits = header[48:58].strip()
        if not digits.isdigit() or not _MEMBER.allows(int(digits)):
            raise DebError(f"{name}: ar member {member} has the size {digits!r}")
        size = int(digits)
        if member.startswith("data.tar"):
            return member, size
        file.seek(size + size % 2, 1)


class _Part:
    """The next ``size`` bytes of a file, as a file to read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, count: int = -1) -> bytes:
        count = self._left if count < 0 else min(count, self._left)
        data = self._file.read(count)
        self._left -= len(data)
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        pass

    closed = False


class _Zstd:
    """The plain bytes of a zstd stream."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._reader = zstandard.ZstdDecompressor().stream_reader(file)

    def read(self, count: int = -1) -> bytes:
        try:
            return self._reader.read(count)
        except self._error as error:
            raise DebError(f"damaged zstd stream: {error}") from error


def _lzma_alone(file: IO[bytes]) -> lzma.LZMAFile:
    return lzma.LZMAFile(file, format=lzma.FORMAT_ALONE)


def _gzip(file: IO[bytes]) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=file)


def _plain(file: IO[bytes]) -> IO[bytes]:
    return file


_DECOMPRESSORS: Final[dict[str, Callable[[IO[bytes]], Any]]] = {
    "": _plain,
    ".gz": _gzip,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".lzma": _lzma_alone,
    ".zst": _Zstd,
}
