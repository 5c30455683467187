# SPDX-License-Identifier: Apache-2.0
"""Whatever a guest sends, there is an answer of the right form; nothing but the share is touched; nothing is left."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.p9 import Client, connect, message, s, views

from softkvm.vmm.p9.protocol import T
from softkvm.vmm.p9.session import ProtocolError

KINDS = sorted(int(kind) for kind in T)
numbers = st.sampled_from([0, 1, 2, 3, 7, 100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
WORDS = [b"", b".", b"..", b"/", b"a/b", b"../x", b"file", b"dir", b"link", b"pipe", b"nul\0", b"\xff\xfe"]
names = st.sampled_from([*WORDS, b"n" * 255, b"n" * 256, b"n" * 5000, b"x" * 65535]) | st.binary(max_size=20)
LONG = [0, 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
pieces = st.one_of(
    st.builds(lambda number: struct.pack("<I", number), numbers),
    st.builds(lambda number: struct.pack("<Q", number), st.sampled_from(LONG)),
    st.builds(lambda number: struct.pack("<H", number), st.sampled_from([0, 1, 16, 17, 0xFFFF])),
    names.map(s),
    st.binary(max_size=30),
)
bodies = st.lists(pieces, max_size=8).map(b"".join)
kinds = st.sampled_from(KINDS)


def sized(size: int, kind: int, body: bytes) -> bytes:
    """A message whose header has a size of its own."""
    return struct.pack("<IBH", size, kind, 1) + body


messages = st.one_of(
    st.builds(message, kinds, bodies, st.integers(0, 0xFFFF)),
    st.builds(sized, numbers, kinds, bodies),
    st.binary(max_size=100),
)


def populate(directory: Path) -> None:
    (directory / "dir").mkdir()
    (directory / "file").write_bytes(b"x" * 1000)
    (directory / "link").symlink_to("/etc/passwd")
    os.mkfifo(directory / "pipe")


def check(client: Client, data: bytes, cuts: list[int], room: int) -> None:
    """Send *data*; the answer has to have the form of one."""
    answer = bytearray(room)
    inner = [cut for cut in cuts if cut < min(len(data), room)]
    try:
        length = client.session.handle(views(data, inner), views(answer, inner))
    except ProtocolError:
        assert len(data) < 7 or room < 11
        return
    size, kind, tag = struct.unpack_from("<IBH", answer)
    assert size == length <= room
    assert (kind == 7 and length == 11) or kind == data[4] + 1
    assert tag == struct.unpack_from("<H", data, 5)[0]
    assert kind != 7 or struct.unpack_from("<I", answer, 7)[0] in range(1, 134)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sent=st.lists(st.tuples(messages, st.lists(st.integers(1, 60), max_size=3, unique=True)), max_size=25),
    room=st.sampled_from([0, 5, 11, 20, 200, 8192]),
)
def test_whatever_is_sent_is_answered(sent: list[tuple[bytes, list[int]]], room: int) -> None:
    with tempfile.TemporaryDirectory() as outer:
        share = Path(outer) / "share"
        share.mkdir()
        (Path(outer) / "beside").write_text("untouched")
        populate(share)
        before = len(os.listdir("/proc/self/fd"))
        client = connect(share)
        # fids that the messages' small numbers find
        for number, path in ((1, "file"), (2, "dir"), (3, "link"), (7, "pipe")):
            client.call(110, struct.pack("<IIH", 0, number, 1) + s(path))
        for data, cuts in sent:
            check(client, data, sorted(cuts), room)
        client.session.close()
        assert len(os.listdir("/proc/self/fd")) == before
        assert sorted(os.listdir(outer)) == ["beside", "share"]
        assert (Path(outer) / "beside").read_text() == "untouched"


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), cut=st.integers(0, 60))
def test_a_request_that_is_cut_is_an_error(kind: int, cut: int) -> None:
    whole = {
        T.ATTACH: struct.pack("<II", 5, 0xFFFFFFFF) + s("root") + s("") + struct.pack("<I", 0),
        T.WALK: struct.pack("<IIH", 0, 5, 2) + s("dir") + s(".."),
        T.LCREATE: struct.pack("<I", 0) + s("new") + struct.pack("<III", 2, 0o644, 0),
        T.MKDIR: struct.pack("<I", 0) + s("new") + struct.pack("<II", 0o644, 0),
        T.SYMLINK: struct.pack("<I", 0) + s("new") + s("target") + struct.pack("<I", 0),
        T.RENAMEAT: struct.pack("<I", 0) + s("file") + struct.pack("<I", 0) + s("other"),
        T.UNLINKAT: struct.pack("<I", 0) + s("file") + struct.pack("<I", 0),
    }.get(T(kind))
    if whole is None or cut >= len(whole):
        return
    with tempfile.TemporaryDirectory() as directory:
        populate(Path(directory))
        listed = sorted(os.listdir(directory))
        client = connect(Path(directory))
        answer = client.send(message(kind, whole[:cut]))
        assert answer == (7, struct.pack("<I", 71))  # EPROTO
        assert client.send(message(kind, whole + b"x")) == (7, struct.pack("<I", 71))
        assert sorted(os.listdir(directory)) == listed
        client.session.close()


def test_numbers_of_fids_are_bounded(tmp_path: Path) -> None:
    from softkvm.vmm.p9.fids import FIDS

    client = connect(tmp_path)
    client.session.fids._fids.update(dict.fromkeys(range(1000, 1000 + FIDS.most - 1), client.session.fids.get(0)))
    answer = client.send(message(110, struct.pack("<IIH", 0, 9, 0)))
    assert answer == (7, struct.pack("<I", 24))  # EMFILE
