# SPDX-License-Identifier: Apache-2.0
"""Opens a disk's files: what format they have, what is behind them, and who else uses them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.block import hostfile
from softkvm.vmm.block.image import Image, ImageFileError
from softkvm.vmm.block.overlay import Overlay
from softkvm.vmm.block.qcow2 import Qcow2Image
from softkvm.vmm.block.qcow2_header import MAGIC, read_header, write_new
from softkvm.vmm.block.raw import RawImage

RAW, QCOW2, AUTO = "raw", "qcow2", "auto"
FORMATS: Final = (RAW, QCOW2, AUTO)

_CHAIN: Final = Size("images behind one another", 64, ImageFileError, giver="file", effect="refused", where=__name__)


def open_image(path: str, *, read_only: bool = False, format: str = AUTO) -> Image:
    """Open the image in the file at *path*, and those behind it, which are only read.

    ImageFileError, one line, for what cannot be opened, is no image, is damaged, or is used by somebody else.
    """
    return _open(path, read_only=read_only, format=format, above=())


def _open(path: str, *, read_only: bool, format: str, above: tuple[tuple[int, int], ...]) -> Image:
    with ExitStack() as files:
        try:
            fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ImageFileError(_cannot_open(path, error, read_only=read_only)) from None
        files.callback(os.close, fd)
        status = os.fstat(fd)
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise ImageFileError(f"{path}: the image is behind itself")
        _CHAIN.check(len(above) + 1)
        hostfile.file_size(fd, path)
        try:
            found = QCOW2 if os.pread(fd, 4, 0) == MAGIC else RAW
            actual = found if format == AUTO else format
            hostfile.lock(fd, path, write=not read_only, grow=actual == QCOW2 and not read_only)
        except OSError as error:
            raise ImageFileError(f"{path}: {error.strerror}") from None
        if actual == RAW:
            image: Image = RawImage(fd, path, read_only=read_only, guessed=format == AUTO)
            files.pop_all()
            return image
        header = read_header(fd, path)
        backing = None
        if header.backing_file:
            backing = _open_backing(path, header.backing_file, header.backing_format, (*above, here))
            files.callback(backing.close)
        image = Qcow2Image(fd, path, read_only=read_only, header=header, backing=backing)
        files.pop_all()
        return image


def _open_backing(path: str, name: str, format: str, above: tuple[tuple[int, int], ...]) -> Image:
    if format not in (RAW, QCOW2):
        what = f"has the unknown format {format}" if format else "has no format in the image's header"
        raise ImageFileError(f"{path}: its backing file {name} {what}: qemu-img rebase -u -F FORMAT sets it")
    try:
        backing = os.path.join(os.path.dirname(path), name.removeprefix("file:"))
        return _open(backing, read_only=True, format=format, above=above)
    except ImageFileError as error:
        raise ImageFileError(f"{path}: its backing file {error}") from None


def _cannot_open(path: str, error: OSError, *, read_only: bool) -> str:
    if isinstance(error, PermissionError) and not read_only and os.access(path, os.R_OK):
        return f"{path}: the file cannot be written: ro or overlay leaves it as it is"
    return f"{path}: {error.strerror}"


def open_overlay(path: str, *, format: str = AUTO) -> Image:
    """Open an image that stays as it is: what is written is gone with the machine."""
    below = open_image(path, read_only=True, format=format)
    try:
        return Overlay(below)
    except OSError as error:
        below.close()
        raise ImageFileError(f"{path}: no room for its overlay: {error.strerror}") from None


def create_qcow2(path: str, size: int, *, backing: str = "", backing_format: str = "", cluster_bits: int = 16) -> None:
    """Make an empty qcow2 image in a new file; ImageFileError if that cannot be, FileExistsError if there is one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_new(fd, size, cluster_bits=cluster_bits, backing_file=backing, backing_format=backing_format)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
