# SPDX-License-Identifier: Apache-2.0
"""The host's tap devices: in a network namespace without any other interface, where the kernel permits one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from softkvm.vmm.devices.virtio_net import parse
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.net import tap

ROOT = Path(__file__).resolve().parents[3]

EXCHANGE = """
import fcntl, os, socket, struct, sys
from softkvm.vmm.net.link import HEADER, Offloads
from softkvm.vmm.net.tap import Tap
from tests.support.net import Loop, TestLink, give

name = "a23456789-12345"
others = [name[:14], name[:14] + "6"]
try:
    tap = Tap(name)
except Exception as error:
    print("refused", error)
    sys.exit()
for other in others:  # each is one of its own, though they begin alike
    assert Tap(other).describe()["name"] == other
assert {name, *others} <= {entry[1] for entry in socket.if_nameindex()}
loop = Loop()
link = TestLink(loop, Offloads(True, True, True, True))
tap.start(link)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w").write("1")
    fcntl.ioctl(control, 0x8914, struct.pack("16sH22x", name.encode(), 1))
packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
packet.bind((name, 0))
packet.settimeout(10)
frame = b"\\xff" * 6 + b"\\2" * 6 + b"\\x88\\xb5" + bytes(range(200))
give(tap, frame)
assert packet.recv(2000) == frame
packet.send(frame)
assert loop.run(lambda: link.sent, 5)
assert link.take() == [frame]

# A driver without room: nothing is read, and nothing is lost.
link.full = True
for number in range(5):
    packet.send(frame + bytes((number,)))
for _ in range(5):
    loop.step(0.01)
assert not link.sent
link.full = False
tap.room()
assert loop.run(lambda: len(link.sent) == 5, 5)
assert link.take() == [frame + bytes((number,)) for number in range(5)]

# A segment of TCP that nobody has cut goes to the kernel as it is; a header of nonsense is the kernel's to refuse.
from softkvm.vmm.net import wire
path = wire.Path(b"\\xff" * 6, b"\\2" * 6, b"\\x0a\\0\\0\\1", b"\\x0a\\0\\0\\2")
tcp = path.tcp(b"\\0\\1\\0\\2", 1, 2, 0x10, 100, b"", 5000)
every = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
every.bind((name, 0))
every.settimeout(10)
give(tap, tcp + bytes(5000), header=HEADER.pack(1, 1, 54, 1448, 34, 16))
assert len(every.recv(10000)) == 5054
give(tap, frame, header=HEADER.pack(1, 0x77, 0xFFFF, 0, 0xFFFF, 0xFFFF))
assert tap.describe()["counters"] == {"dropped": 1}
tap.carrier(False)
tap.close()
print("done")
"""


def test_frames_go_both_ways_and_names_are_whole() -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare(1) to make a network namespace with")
    rights = ["-n"] if os.geteuid() == 0 else ["-rn"]
    ended = subprocess.run(
        [unshare, *rights, sys.executable, "-c", EXCHANGE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    if ended.stdout.startswith("refused") or "unshare" in ended.stderr:
        pytest.skip(f"no tap device: {ended.stdout or ended.stderr}")
    assert ended.stdout == "done\n", ended.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [(errno.EPERM, "CAP_NET_ADMIN"), (errno.ENOENT, "there is no /dev/net/tun"), (errno.EBUSY, "busy")],
)
def test_a_host_that_permits_none_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch, error: int, says: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=says) as caught:
        tap.Tap("t0")
    assert str(caught.value).startswith("--net tap=t0: ") and "\n" not in str(caught.value)


def test_a_device_with_another_name_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a pattern: the kernel would make tap0 of tap%d, which parse() refuses before."""
    monkeypatch.setattr(os, "open", lambda *_: os.dup(2))
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: b"tap1".ljust(40, b"\0"))
    with pytest.raises(ConfigError, match="the kernel made tap1 of it"):
        tap.Tap("tap0")


@pytest.mark.parametrize("name", ["t" * 16, "tap%d", "a/b", ""])
def test_names_are_whole_or_refused_before_the_kernel_sees_them(name: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"tap={name}")
    with pytest.raises(ValueError):
        tap.Tap(name)
