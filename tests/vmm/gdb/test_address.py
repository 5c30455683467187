# SPDX-License-Identifier: Apache-2.0
"""``--gdb WHERE``."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from softkvm.vmm.errors import ConfigError
from softkvm.vmm.gdb.address import GdbSpec, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tcp::1234", GdbSpec("127.0.0.1", 1234, "", wait=False)),
        ("tcp::0,wait", GdbSpec("127.0.0.1", 0, "", wait=True)),
        ("tcp:localhost:65535", GdbSpec("127.0.0.1", 65535, "", wait=False)),
        ("tcp:[::1]:1234", GdbSpec("::1", 1234, "", wait=False)),
        ("unix:/run/a,b", GdbSpec("", 0, "/run/a,b", wait=False)),
        ("unix:/run/a,wait", GdbSpec("", 0, "/run/a", wait=True)),
    ],
)
def test_a_place_is_what_it_says(text: str, expected: GdbSpec) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "tcp", "tcp:1234", "tcp::", "tcp::x", "tcp::65536", "tcp::-1", "tcp::١", "unix:", "udp::1", ",wait"]
)
def test_what_names_no_place_is_one_line_that_says_what_does(text: str) -> None:
    with pytest.raises(ConfigError, match="expected tcp::PORT"):
        parse(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "[::]", "example.org"])
def test_only_the_loopback_interface_is_listened_on(host: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        parse(f"tcp:{host}:1234")


def test_a_socket_is_the_users_alone_and_goes_when_it_is_done(tmp_path: Path) -> None:
    spec = parse(f"unix:{tmp_path}/gdb")
    with spec.listen():
        assert stat.S_IMODE(os.stat(spec.path).st_mode) == 0o600
        with pytest.raises(OSError, match="in use"):
            spec.listen()
    spec.listen().close()  # the one that nobody listens on any more is taken over
    spec.remove()
    assert not os.path.exists(spec.path)


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("contents")
    with pytest.raises(OSError, match="in use"):
        parse(f"unix:{path}").listen()
    assert path.read_text() == "contents"


def test_a_path_that_is_too_long_for_a_socket_is_refused_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        parse(f"unix:/{'x' * 107}")


def test_a_port_may_be_any_that_is_free() -> None:
    with parse("tcp::0").listen() as listener:
        assert GdbSpec.target(listener) == f"127.0.0.1:{listener.getsockname()[1]}"
        assert listener.family == socket.AF_INET
