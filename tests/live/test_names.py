# SPDX-License-Identifier: Apache-2.0
"""Names of machines: one process has a name at a time, and those of the dead are free."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from softkvm.live import names, place
from softkvm.live.asker import Asker, processes
from softkvm.live.names import NameRefused, check_name, claim, process_of, release
from softkvm.live.server import Server

ANOTHER = 4711


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "softkvm").mkdir(mode=0o700)
    return tmp_path / "softkvm"


@pytest.fixture
def other(runtime: Path) -> Iterator[socket.socket]:
    """Another process's socket, at which somebody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(runtime / f"{ANOTHER}.sock"))
        listener.listen()
        yield listener


@given(st.text(max_size=100))
@example("a" * 64)
@example("a" * 65)
@example("../../etc/passwd")
@example("1234")
@example("")
@example(".hidden")
@example("a\n")
@example("é")
def test_a_name_is_a_file_name_and_no_number(name: str) -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
    good = 1 <= len(name) <= 64 and set(name) <= allowed and name[0] not in "-." and not name.isdecimal()
    if good:
        assert check_name(name) == name
    else:
        with pytest.raises(NameRefused) as refused:
            check_name(name)
        assert len(str(refused.value)) < 250


def test_a_name_leads_to_its_process_and_is_given_back(runtime: Path) -> None:
    assert process_of("one") is None
    claim("one", os.getpid())
    assert process_of("one") == os.getpid()
    release("one", ANOTHER)
    assert process_of("one") == os.getpid()
    release("one", os.getpid())
    assert process_of("one") is None
    assert list(runtime.iterdir()) == []


def test_two_machines_of_one_name(runtime: Path, other: socket.socket) -> None:
    claim("one", ANOTHER)
    with pytest.raises(NameRefused, match=rf"^one: process {ANOTHER} has a machine of this name$"):
        claim("one", os.getpid())
    other.close()
    claim("one", os.getpid())  # it has died
    with pytest.raises(NameRefused):
        claim("one", os.getpid())
    assert process_of("one") == os.getpid()


@pytest.mark.parametrize("target", ["nonsense", "../../x", "99999999999.sock", "1" * 300])
def test_a_link_that_leads_nowhere_is_replaced(runtime: Path, target: str) -> None:
    if len(target) > 255:
        target = target[:200]
    (runtime / "one.machine").symlink_to(target)
    assert process_of("one") is None
    claim("one", os.getpid())
    assert process_of("one") == os.getpid()


def test_a_file_in_place_of_the_link_is_replaced(runtime: Path) -> None:
    (runtime / "one.machine").touch()
    claim("one", os.getpid())
    assert process_of("one") == os.getpid()


def test_of_many_who_want_a_name_one_has_it(runtime: Path) -> None:
    listeners, had = [], []
    for pid in range(1000, 1008):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(runtime / f"{pid}.sock"))
        listener.listen()
        listeners.append(listener)

    def work(pid: int) -> None:
        try:
            claim("one", pid)
        except NameRefused:
            return
        had.append(pid)

    threads = [threading.Thread(target=work, args=(pid,)) for pid in range(1000, 1008)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(had) == 1
    assert process_of("one") == had[0]
    for listener in listeners:
        listener.close()


def test_without_a_directory_of_ones_own_there_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert process_of("one") is None
    with pytest.raises(NameRefused, match="no directory"):
        claim("one", os.getpid())
    release("one", os.getpid())


def test_a_long_path_has_sockets_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of a UNIX socket holds 107 bytes; a runtime directory's path may be longer."""
    deep = tmp_path
    while len(str(deep)) < 300:
        deep /= "directory"
    deep.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    server = Server()
    try:
        assert server.listens
        claim("one", os.getpid())
        assert names.listening(deep / "softkvm" / f"{os.getpid()}.sock")
        assert [one.pid for one in processes()] == [os.getpid()]
        with Asker(os.getpid()) as asker:
            assert asker.ask("version")["protocol"] == 1
    finally:
        server.close()
    assert place.socket_of(os.getpid()) is not None
    assert processes() == []
