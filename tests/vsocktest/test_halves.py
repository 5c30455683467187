# SPDX-License-Identifier: Apache-2.0
"""The host's halves against each other: two hubs, each the other's guest, with a wire between them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from softkvm.reports.result import Status
from softkvm.vmm.vsock.api import Vsock
from softkvm.vmm.vsock.hub import Hub
from softkvm.vmm.vsock.packet import VMADDR_CID_HOST, Header
from softkvm.vsocktest import stream
from softkvm.vsocktest.cases import CASES, Case, cases_of
from softkvm.vsocktest.control import CaseFailed, Control, ControlLost
from softkvm.vsocktest.half import Half, hash_djb2
from softkvm.vsocktest.session import CLIENT, SERVER, GuestLost, Suite

CID = 3
ROOM = 3732


class Wire:
    """Carries packets between two hubs, each of which believes to be the host's."""

    def __init__(self) -> None:
        self.hubs = Hub(CID), Hub(CID)
        self._wake = threading.Event()
        self._end = False
        for hub in self.hubs:
            hub.wake = self._wake.set
            hub.wake_at = lambda seconds: None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end:
            self._wake.wait(0.05)
            self._wake.clear()
            moved = True
            while moved:
                moved = any([self._move(*self.hubs), self._move(*reversed(self.hubs))])
            for hub in self.hubs:
                hub.expire()

    @staticmethod
    def _move(source: Hub, target: Hub) -> bool:
        packet = source.transmit(ROOM)
        if packet is None:
            return False
        header = Header.unpack(packet[0])
        target.receive(header._replace(src_cid=CID, dst_cid=VMADDR_CID_HOST), packet[1])
        return True

    def close(self) -> None:
        self._end = True
        self._wake.set()
        self._thread.join()


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def sides(wire: Wire) -> tuple[Half, Half]:
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(60)
    return tuple(Half(Vsock(hub, lambda cid: None), Control(end)) for hub, end in zip(wire.hubs, ends, strict=True))  # type: ignore[return-value]


def test_a_case_that_only_one_half_does_needs_a_guest() -> None:
    assert {case.name for case in CASES if case.client is stream.nothing} == {
        "SOCK_STREAM transport release use-after-free"
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_halves_agree_and_leave_no_connection_behind(
    case: Case, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STRESS_S", 0.1)
    client, server = sides(wire)
    join = server.in_background(lambda: case.server(server))
    try:
        case.client(client)
        client.close()
        join()
    finally:
        server.close()
        client.close()
    for hub in wire.hubs:
        client.wait_until(lambda hub=hub: not hub.connections, "connections stay")  # type: ignore[misc]


def test_the_hash_is_that_of_the_kernels_program() -> None:
    """H = 33 H + byte from 5381, in 64 bits (``hash_djb2`` of tools/testing/vsock/util.c)."""
    value = 5381
    data = bytes(range(256)) * 3
    for byte in data:
        value = ((value << 5) + value + byte) & 0xFFFFFFFFFFFFFFFF
    assert hash_djb2(data) == value


def test_a_list_without_big_message_is_of_an_older_kernel() -> None:
    old = cases_of(["SOCK_STREAM MSG_PEEK", "SOCK_SEQPACKET msg bounds"])
    new = cases_of(["SOCK_STREAM MSG_PEEK", "SOCK_SEQPACKET msg bounds", "SOCK_SEQPACKET big message", "unheard of"])
    assert len(new) == 3 and all(old[name] != new[name] for name in old)


# -- sessions


class Program:
    """What the guest's program does, by a script of its words."""

    def __init__(self, vsock: Vsock, port: int) -> None:
        self._vsock = vsock
        self._port = port

    def open(self) -> Control:
        return Control(self._vsock.connect(self._port, timeout_s=10))

    def session(self, names: list[str]) -> Control:
        control = self.open()
        control.put(f"CASES {len(names)}")
        for name in names:
            control.put(name)
        return control

    def end(self, status: int, *log: str) -> str:
        control = self.open()
        control.put(f"EXIT {status}")
        for line in log:
            control.put(f"| {line}")
        control.put("END")
        return control.get()


def suite(wire: Wire, mode: str = SERVER) -> tuple[Suite, Program]:
    host = Vsock(wire.hubs[0], lambda cid: None)
    listener = host.listen(1111)
    listener.settimeout(10)
    return Suite(host, listener, mode, "fake", lambda result: None, lambda name: True), Program(
        Vsock(wire.hubs[1], lambda cid: None), 1111
    )


RESET, LINGER = "SOCK_STREAM connection reset", "SOCK_STREAM SO_LINGER null-ptr-deref"


def run(tested: Suite) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def main() -> None:
        try:
            tested.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    return thread, errors


def test_a_case_that_fails_is_skipped_the_next_time_and_the_others_go_on(wire: Wire) -> None:
    tested, program = suite(wire, CLIENT)
    thread, errors = run(tested)
    control = program.session([RESET, LINGER, "unheard of", "old\tno such thing in this kernel"])
    assert control.get() == "NEXT"
    control.put("NEXT")
    control.close()
    assert program.end(1, "RESET: it went wrong") == "AGAIN"
    control = program.session([RESET, LINGER, "unheard of", "old\tno such thing in this kernel"])
    assert control.get() == "SKIP"
    control.put("NEXT")
    assert control.get() == "NEXT"
    control.put("SKIP")
    for _ in range(2):
        assert control.get() == "SKIP"
        control.put("NEXT")
    control.put("COMPLETED")
    assert control.get() == "COMPLETED"
    assert program.end(0) == "DONE"
    thread.join(30)
    assert not errors
    failure = tested.results.pop(0)
    assert (failure.status, failure.name) == (Status.FAIL, f"fake as client: {RESET}")
    assert failure.reason.endswith("guest: RESET: it went wrong")
    assert [result.line for result in tested.results] == [
        f"SKIP fake as client: {LINGER} (by the guest's half)",
        "SKIP fake as client: unheard of (unknown to the host's half)",
        "SKIP fake as client: old (no such thing in this kernel)",
    ]


def test_a_program_that_gets_nowhere_is_not_started_for_ever(wire: Wire) -> None:
    tested, program = suite(wire)
    thread, errors = run(tested)
    program.session([RESET]).close()
    assert program.end(1, "cannot begin") == "DONE"
    thread.join(30)
    assert isinstance(errors[0], GuestLost) and "cannot begin" in str(errors[0])


@pytest.mark.parametrize("words", [["HELLO"], ["CASES x"], ["CASES 999999"], ["CASES 1"], ["x" * 2000]])
def test_a_guest_that_says_something_else_is_refused(wire: Wire, words: list[str]) -> None:
    tested, program = suite(wire)
    thread, errors = run(tested)
    control = program.open()
    for word in words:
        control.put(word)
    control.close()
    if not errors and words == ["CASES 1"]:
        thread.join(0.2)
    thread.join(30)
    assert isinstance(errors[0], (GuestLost, ControlLost, CaseFailed))
