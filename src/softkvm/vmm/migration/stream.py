# SPDX-License-Identifier: Apache-2.0
"""What goes over a migration's connection: frames.

A frame is a header, little endian (a word that tells frames from anything else, the kind, the length, the CRC-32 of the
contents), and contents of that length:

===============  ======  ================================================================================
kind             from    contents
===============  ======  ================================================================================
HELLO            source  JSON: the version of all this, softkvm's, the machine's configuration
ACCEPTED         target  nothing: send memory
PAGES            source  an offset of 8 bytes into memory, and pages that belong there
ZEROES           source  an offset and a size: pages of zeroes
STATE            source  the machine's state (:mod:`softkvm.vmm.snapshot.encoding`); memory is complete
READY            target  nothing: there is a machine with all of it
COMMIT           source  nothing: it is yours
COMMITTED        target  nothing: it is ours, and starts
REFUSED          both    a line that says why it will not be
===============  ======  ================================================================================
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import socket
import struct
import zlib
from typing import Any, Final

from softkvm.abi.sizes import Size
from softkvm.closing import Closing
from softkvm.vmm.errors import MigrationError
from softkvm.vmm.memory import MIB, PAGE_SIZE
from softkvm.vmm.snapshot import encoding

VERSION: Final = 1
MAGIC: Final = 0x4B53_4D47
IDLE_S: Final = 60.0
"""How long the other side may say nothing."""
PIECE: Final = 1 * MIB
"""Memory of one frame at most."""

_HEADER: Final = struct.Struct("<IIQI")
OFFSET: Final = struct.Struct("<Q")
RANGE: Final = struct.Struct("<QQ")


class Kind(enum.IntEnum):
    """The kinds of frames."""

    HELLO = 1
    ACCEPTED = 2
    PAGES = 3
    ZEROES = 4
    STATE = 5
    READY = 6
    COMMIT = 7
    COMMITTED = 8
    REFUSED = 9


def _size(kind: Kind, most: int, least: int = 0) -> Size:
    return Size(
        f"bytes of a migration's {kind.name}",
        most,
        MigrationError,
        least=least,
        giver="peer",
        effect="MigrationError",
        where=__name__,
    )


#: The others are empty.
_SIZES: Final = {
    Kind.HELLO: _size(Kind.HELLO, 1 << 20),
    Kind.PAGES: _size(Kind.PAGES, OFFSET.size + PIECE, OFFSET.size + PAGE_SIZE),
    Kind.ZEROES: _size(Kind.ZEROES, RANGE.size, RANGE.size),
    Kind.STATE: _size(Kind.STATE, encoding.ENCODED.most),
    Kind.REFUSED: _size(Kind.REFUSED, 4096),
}


class Channel(Closing):
    """One end of a connection; MigrationError, one line, for whatever is wrong with the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(IDLE_S)
        self.sent = 0
        """Bytes so far."""

    def send(self, kind: Kind, *parts: bytes | memoryview) -> None:
        """Send a frame."""
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        length = sum(map(len, parts))
        header = _HEADER.pack(MAGIC, kind, length, checksum)
        try:
            self._send_all([header, *parts])
        except OSError as error:
            raise MigrationError(self._refusal() or _lost(error)) from None
        self.sent += len(header) + length

    def _send_all(self, parts: list[bytes | memoryview]) -> None:
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        while views:
            done = self._socket.sendmsg(views)
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if done:
                views[0] = views[0][done:]

    def send_refusal(self, why: str) -> None:
        """Tell the other side that it will not be, if it still listens."""
        with contextlib.suppress(MigrationError):
            self.send(Kind.REFUSED, why.encode("utf-8", "replace")[: _SIZES[Kind.REFUSED].most])

    def wait_for_ever(self) -> None:
        """Wait for the next frame, or the connection's end, however long that takes."""
        self._socket.settimeout(None)

    def _refusal(self) -> str:
        """Return why the other side has gone, if it said so before."""
        with contextlib.suppress(MigrationError, OSError):
            self._socket.settimeout(0.2)
            self.receive()
        return self._why

    _why = ""

    def receive(self, *expected: Kind) -> tuple[Kind, bytearray]:
        """Return the next frame, one of the kinds *expected*; MigrationError for another, and for a refusal."""
        magic, number, length, checksum = _HEADER.unpack(self._take(_HEADER.size))
        if magic != MAGIC:
            raise MigrationError("the other side speaks something else than a migration")
        try:
            kind = Kind(number)
        except ValueError:
            raise MigrationError(f"the other side sends frames of an unknown kind, {number}") from None
        if kind not in _SIZES and length:
            raise MigrationError(f"the other side sends {kind.name} with contents, expected none")
        contents = self._take(_SIZES[kind].check(length)) if kind in _SIZES else bytearray()
        if zlib.crc32(contents) != checksum:
            raise MigrationError(f"the {kind.name} of the other side is damaged: its checksum is another")
        if kind is Kind.REFUSED:
            self._why = f"the other side refuses: {contents.decode('utf-8', 'replace')}"
            raise MigrationError(self._why)
        if kind not in expected:
            names = " or ".join(one.name for one in expected) or "nothing"
            raise MigrationError(f"the other side sends {kind.name}, expected {names}")
        return kind, contents

    def _take(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise MigrationError(_lost(error)) from None
            if not count:
                raise MigrationError("the other side has ended")
            view = view[count:]
        return data

    def shut_down(self) -> None:
        """End the connection in both directions, whatever another thread waits for."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _lost(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"the other side has said nothing for {IDLE_S:g} s"
    return f"the connection is lost: {error.strerror or error}"


def encode_json(value: dict[str, Any]) -> bytes:
    """Return a JSON object as a frame's contents."""
    return json.dumps(value).encode()


def decode_json(data: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object that a frame has; MigrationError for none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise MigrationError("the other side sends what is no JSON object")
    return value


# -- where to


def _address(where: str) -> tuple[socket.AddressFamily, Any]:
    """Return family and address of ``unix:PATH`` or ``tcp:127.0.0.1:PORT``; MigrationError for another text."""
    kind, _, rest = where.partition(":")
    if kind == "unix" and rest and "\0" not in rest:
        if len(os.fsencode(rest)) > 107:  # sun_path, with its NUL
            raise MigrationError(f"{where}: a path of more than 107 bytes")
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host in ("127.0.0.1", "localhost", "[::1]") and port.isdecimal() and int(port) < 1 << 16:
        if host == "[::1]":
            return socket.AF_INET6, ("::1", int(port))
        return socket.AF_INET, ("127.0.0.1", int(port))
    raise MigrationError(f"{where}: expected unix:PATH or tcp:127.0.0.1:PORT")


def connect(where: str) -> Channel:
    """Connect to a target that listens there; MigrationError if there is none."""
    family, address = _address(where)
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(IDLE_S)
        connection.connect(address)
    except OSError as error:
        connection.close()
        raise MigrationError(f"{where}: {error.strerror or error}") from None
    return Channel(connection)


class Listener(Closing):
    """Listens at ``unix:PATH``, which is the user's alone, or ``tcp:127.0.0.1:PORT``, 0 for any; MigrationError."""

    def __init__(self, where: str) -> None:
        family, address = _address(where)
        self._path = address if family == socket.AF_UNIX else None
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family != socket.AF_UNIX:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            before = os.umask(0o077)
            try:
                self._socket.bind(address)
            finally:
                os.umask(before)
            self._socket.listen(1)
        except OSError as error:
            self._socket.close()
            raise MigrationError(f"{where}: {error.strerror or error}") from None
        if self._path is None:
            host = "[::1]" if family == socket.AF_INET6 else "127.0.0.1"
            where = f"tcp:{host}:{self._socket.getsockname()[1]}"
        self.where = where
        """With the port that it has become."""

    def accept(self) -> Channel:
        """Wait for the source."""
        connection, _ = self._socket.accept()
        return Channel(connection)

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._path = None
