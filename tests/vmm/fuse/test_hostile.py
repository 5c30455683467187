# SPDX-License-Identifier: Apache-2.0
"""Whatever a guest sends, there is an answer of the right form; nothing but the share is touched; nothing is left."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.fuse import ROOT, connect, header
from tests.support.p9 import views

from softkvm.vmm.fuse.protocol import Op
from softkvm.vmm.fuse.session import ProtocolError

SILENT = (2, 36, 42)
WORDS = [
    b"",
    b".",
    b"..",
    b"/",
    b"a/b",
    b"../x",
    b"file",
    b"dir",
    b"link",
    b"pipe",
    b"\xff\xfe",
    b"n" * 256,
    b"n" * 5000,
]
long = st.sampled_from([0, 1, 2, 3, 4, 5, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
word = st.sampled_from([0, 1, 2, 3, 8, 0x1FF, 0x8000, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])
pieces = st.one_of(
    st.builds(lambda number: struct.pack("<Q", number), long),
    st.builds(lambda first, second: struct.pack("<II", first, second), word, word),
    st.sampled_from(WORDS).map(lambda name: name + b"\0"),
    st.binary(max_size=40),
)
bodies = st.lists(pieces, max_size=10).map(b"".join)
operations = st.sampled_from([int(operation) for operation in Op if operation != Op.INIT])
requests = st.one_of(
    st.builds(lambda op, node, body: header(op, node, len(body)) + body, operations, long, bodies),
    st.builds(lambda op, size, body: header(op, ROOT, size) + body, operations, st.integers(0, 1 << 20), bodies),
    st.binary(max_size=100),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sent=st.lists(st.tuples(requests, st.lists(st.integers(1, 90), max_size=3, unique=True)), max_size=25),
    room=st.sampled_from([0, 8, 16, 40, 200, 8192]),
)
def test_whatever_is_sent_is_answered(sent: list[tuple[bytes, list[int]]], room: int) -> None:
    with tempfile.TemporaryDirectory() as outer:
        share = Path(outer) / "share"
        (share / "dir").mkdir(parents=True)
        (share / "file").write_bytes(b"x" * 1000)
        (share / "link").symlink_to("/etc/passwd")
        os.mkfifo(share / "pipe")
        before = len(os.listdir("/proc/self/fd"))
        client = connect(share)
        for name in ("file", "dir", "link", "pipe"):
            client.lookup(ROOT, name)
        client.open(client.path("file"), os.O_RDWR)
        client.open(ROOT, directory=True)
        for data, cuts in sent:
            answer = bytearray(room)
            inner = sorted(cut for cut in cuts if cut < min(len(data), room))
            try:
                length = client.session.handle(views(data, inner), views(answer, inner))
            except ProtocolError:
                assert len(data) < 40 or room < 16
                continue
            if length:
                size, error, unique = struct.unpack_from("<IiQ", answer)
                assert size == length <= room and -134 < error <= 0
                assert unique == struct.unpack_from("<Q", data, 8)[0]
                assert error == 0 or length == 16
            else:
                assert struct.unpack_from("<I", data, 4)[0] in SILENT
        client.session.close()
        assert len(os.listdir("/proc/self/fd")) == before
        assert os.listdir(outer) == ["share"]
