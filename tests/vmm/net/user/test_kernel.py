# SPDX-License-Identifier: Apache-2.0
"""The user-mode network with a Linux kernel as its guest: what another implementation makes of ours."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from tests.support.net import Kernel, Loop

from softkvm.vmm.devices.virtio_net import parse
from softkvm.vmm.net.link import Offloads
from softkvm.vmm.net.spec import UserNet
from softkvm.vmm.net.user.stack import UserStack

ALL = Offloads(True, True, True)
NOTHING = Offloads()

MIB = 1 << 20


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A worker."""
    loop = Loop()
    yield loop
    loop.close()


Guest = Callable[..., Kernel]


@pytest.fixture
def guest(loop: Loop) -> Iterator[Guest]:
    """Makes a configured guest of the options of ``--net``."""
    made = []

    def make(options: str = "user", takes: Offloads = ALL, configured: bool = True) -> Kernel:
        net = parse(options).net
        assert isinstance(net, UserNet)
        kernel = Kernel(UserStack(net, clock=loop.clock), loop, takes=takes)
        made.append(kernel)
        if configured:
            kernel.call("configure()")
        return kernel

    yield make
    for kernel in made:
        kernel.close()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listening socket on the host's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)
        yield listening


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run the host's side; what is returned waits for its result."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> Any:
        thread.join(30)
        if isinstance(results[0], BaseException):
            raise results[0]
        return results[0]

    return result


def receive_all(connection: socket.socket) -> bytes:
    """Read to the end."""
    pieces = []
    while piece := connection.recv(MIB):
        pieces.append(piece)
    return b"".join(pieces)


def pattern(size: int) -> bytes:
    """Bytes at which a place is known by its contents."""
    return b"".join(number.to_bytes(4, "big") for number in range(size // 4))


GET = """
connection = socket.create_connection(("10.0.2.2", port), 15)
pieces = []
while piece := connection.recv(1 << 20):
    pieces.append(piece)
data = b"".join(pieces)
whole = b"".join(number.to_bytes(4, "big") for number in range(size // 4))
result = [len(data), data == whole]
connection.close()
"""

PUT = """
connection = socket.create_connection(("10.0.2.2", port), 15)
connection.sendall(b"".join(number.to_bytes(4, "big") for number in range(size // 4)))
connection.close()
"""


@pytest.mark.parametrize("takes", [ALL, NOTHING], ids=["offloads", "plain"])
def test_bytes_from_a_loopback_server_arrive_whole(guest: Guest, server: socket.socket, takes: Offloads) -> None:
    """Segments are uncut if the guest takes such; else they are of the MTU, with checksums that the kernel checks."""
    size = 8 * MIB

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(pattern(size))

    kernel = guest(takes=takes)
    done = in_thread(serve)
    assert kernel.call(GET, port=server.getsockname()[1], size=size) == [size, True]
    done()
    assert kernel.link.largest > 60000 if takes.tso4 else kernel.link.largest <= 1514


@pytest.mark.parametrize("takes", [ALL, NOTHING], ids=["offloads", "plain"])
def test_bytes_to_a_loopback_server_arrive_whole(guest: Guest, server: socket.socket, takes: Offloads) -> None:
    size = 8 * MIB

    def serve() -> bytes:
        connection, _ = server.accept()
        with connection:
            return receive_all(connection)

    kernel = guest(takes=takes)
    done = in_thread(serve)
    kernel.call(PUT, port=server.getsockname()[1], size=size)
    assert kernel.loop.run(lambda: not threads_alive(done), 20)
    assert done() == pattern(size)


def threads_alive(_: object) -> bool:
    """Whether a thread of the host's side runs."""
    return threading.active_count() > 1


def test_half_closed_connections_go_on_in_the_other_direction(guest: Guest, server: socket.socket) -> None:
    """RFC 9293, 3.6: the guest's FIN reaches the host's program as an end of file, whose answer still arrives."""

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"you said: " + receive_all(connection))

    done = in_thread(serve)
    code = """
connection = socket.create_connection(("10.0.2.2", port), 15)
connection.sendall(b"hello")
connection.shutdown(socket.SHUT_WR)
result = connection.makefile().read()
"""
    assert guest().call(code, port=server.getsockname()[1]) == "you said: hello"
    done()


def test_a_host_that_closes_first_still_reads_what_the_guest_sends(guest: Guest, server: socket.socket) -> None:
    def serve() -> bytes:
        connection, _ = server.accept()
        with connection:
            connection.shutdown(socket.SHUT_WR)
            return receive_all(connection)

    done = in_thread(serve)
    code = """
connection = socket.create_connection(("10.0.2.2", port), 15)
result = len(connection.recv(1))
connection.sendall(b"late")
connection.close()
"""
    kernel = guest()
    assert kernel.call(code, port=server.getsockname()[1]) == 0
    kernel.loop.run(lambda: not threads_alive(done))
    assert done() == b"late"


def test_a_reset_by_the_host_is_a_reset_for_the_guest(guest: Guest, server: socket.socket) -> None:
    def serve() -> None:
        connection, _ = server.accept()
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()

    done = in_thread(serve)
    code = """
connection = socket.create_connection(("10.0.2.2", port), 15)
connection.sendall(b"x")
try:
    result = repr(connection.recv(1))
except ConnectionResetError:
    result = "reset"
"""
    assert guest().call(code, port=server.getsockname()[1]) == "reset"
    done()


def test_a_reset_by_the_guest_is_a_reset_for_the_host(guest: Guest, server: socket.socket) -> None:
    def serve() -> str:
        connection, _ = server.accept()
        with connection:
            try:
                while connection.recv(1):
                    pass
            except ConnectionResetError:
                return "reset"
        return "end"

    done = in_thread(serve)
    code = """
connection = socket.create_connection(("10.0.2.2", port), 15)
connection.sendall(b"x")
connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0, 0, 0, 0, 0)))
connection.close()
"""
    kernel = guest()
    kernel.call(code, port=server.getsockname()[1])
    kernel.loop.run(lambda: not threads_alive(done))
    assert done() == "reset"


CONNECT = """
try:
    socket.create_connection((host, port), 15).close()
    result = "connected"
except OSError as error:
    result = error.strerror
"""


def test_a_port_that_nobody_listens_on_refuses(guest: Guest) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert guest().call(CONNECT, host="10.0.2.2", port=unused.getsockname()[1]) == "Connection refused"


@pytest.mark.parametrize("host", ["192.0.2.1", "198.51.100.7", "8.8.8.8"])
def test_other_addresses_are_refused_at_once_and_the_user_is_told(guest: Guest, host: str) -> None:
    """ICMP "communication administratively prohibited" is EHOSTUNREACH (Linux, icmp_err_convert)."""
    kernel = guest()
    assert kernel.call(CONNECT, timeout_s=5, host=host, port=80) == "No route to host"
    assert kernel.link.reports == [f"the guest may not reach {host}:80 (tcp): allow= names what it may"]


def test_a_restricted_guest_reaches_of_the_host_only_what_is_allowed(guest: Guest, server: socket.socket) -> None:
    port = server.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as other:
        kernel = guest(f"user,restrict=on,allow=10.0.2.2:{port}")
        assert kernel.call(CONNECT, host="10.0.2.2", port=port) == "connected"
        assert kernel.call(CONNECT, host="10.0.2.2", port=other.getsockname()[1]) == "No route to host"


def test_udp_goes_both_ways_and_a_closed_port_is_refused(guest: Guest) -> None:
    """A datagram of 4,000 bytes goes in fragments both ways."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("127.0.0.1", 0))
        host.settimeout(10)
        port = host.getsockname()[1]

        def serve() -> None:
            for _ in range(2):
                data, address = host.recvfrom(65536)
                host.sendto(data[::-1], address)

        done = in_thread(serve)
        code = """
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.settimeout(10)
    client.connect(("10.0.2.2", port))
    client.send(b"abc")
    result = [client.recv(100).decode()]
    large = bytes(range(250)) * 16
    client.send(large)
    result.append(client.recv(10000) == large[::-1])
"""
        kernel = guest()
        assert kernel.call(code, port=port) == ["cba", True]
        done()
    code = """
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.settimeout(10)
    client.connect(("10.0.2.2", port))
    client.send(b"abc")
    try:
        result = client.recv(100).decode()
    except OSError as error:
        result = error.strerror
"""
    assert kernel.call(code, port=port) == "Connection refused"


LISTEN = """
listening = socket.create_server(("", 22))
listening.settimeout(15)
"""

ACCEPT = """
connection, address = listening.accept()
data = b""
while len(data) < 5:
    data += connection.recv(5)
connection.sendall(b"from the guest")
connection.close()
listening.close()
result = [data.decode(), address[0]]
"""


def forwarded_port(kernel: Kernel) -> int:
    """The host's port."""
    backend = kernel.backend
    assert isinstance(backend, UserStack)
    return backend.listeners[0].port


def test_a_forwarded_port_leads_to_a_server_in_the_guest(guest: Guest) -> None:
    kernel = guest("user,hostfwd=tcp:127.0.0.1:0-:22")
    kernel.call(LISTEN)
    kernel.start(ACCEPT)

    def client() -> bytes:
        with socket.create_connection(("127.0.0.1", forwarded_port(kernel)), 15) as connection:
            connection.sendall(b"hello")
            return receive_all(connection)

    done = in_thread(client)
    assert kernel.result() == ["hello", "10.0.2.2"]
    kernel.loop.run(lambda: not threads_alive(done))
    assert done() == b"from the guest"


def test_a_forwarded_port_without_a_server_resets_the_client(guest: Guest) -> None:
    kernel = guest("user,hostfwd=tcp::0-:22")

    def client() -> str:
        with (
            suppress(ConnectionResetError),
            socket.create_connection(("127.0.0.1", forwarded_port(kernel)), 15) as client,
        ):
            client.recv(1)
            return "end"
        return "reset"

    done = in_thread(client)
    kernel.loop.run(lambda: not threads_alive(done))
    assert done() == "reset"


def test_a_forwarded_udp_port_answers_each_client(guest: Guest) -> None:
    kernel = guest("user,hostfwd=udp::0-:7")
    kernel.call(
        "server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); server.settimeout(10); server.bind(('', 7))"
    )
    kernel.start(
        """
for _ in range(4):
    data, address = server.recvfrom(1000)
    server.sendto(data + b" back", address)
"""
    )

    def clients() -> list[bytes]:
        found = []
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
        ):
            for client in (one, two):
                client.settimeout(10)
                client.connect(("127.0.0.1", forwarded_port(kernel)))
            for round in (b"1", b"2"):
                one.send(b"one" + round)
                two.send(b"two" + round)
                found += [one.recv(100), two.recv(100)]
        return found

    done = in_thread(clients)
    kernel.result()
    kernel.loop.run(lambda: not threads_alive(done))
    assert done() == [b"one1 back", b"two1 back", b"one2 back", b"two2 back"]


def test_the_gateway_answers_echoes(guest: Guest) -> None:
    """By a raw socket: ICMP echo with 100 bytes, whose answer has the same."""
    code = """
import struct
def checksum(data):
    value = sum(struct.unpack(">%dH" % (len(data) // 2), data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value ^ 0xFFFF
with socket.socket(socket.AF_INET, socket.SOCK_RAW, 1) as raw:
    raw.settimeout(10)
    body = struct.pack(">HH", 77, 1) + b"x" * 100
    raw.sendto(struct.pack(">BBH", 8, 0, checksum(bytes((8, 0, 0, 0)) + body)) + body, ("10.0.2.2", 0))
    answer = raw.recv(1000)[20:]
    result = [answer[0], answer[1], checksum(answer), answer[4:] == body]
"""
    assert guest().call(code) == [0, 0, 0, True]


def test_a_slow_reader_on_the_host_holds_the_guest_up_and_loses_nothing(guest: Guest, server: socket.socket) -> None:
    """The window closes and opens again."""
    size = 16 * MIB
    go = threading.Event()

    def serve() -> bytes:
        connection, _ = server.accept()
        with connection:
            go.wait(20)
            return receive_all(connection)

    kernel = guest()
    done = in_thread(serve)
    kernel.start(PUT, port=server.getsockname()[1], size=size)
    backend = kernel.backend
    assert isinstance(backend, UserStack)
    assert kernel.loop.run(lambda: any(c.buffered > 400_000 for c in backend.connections.by_key.values()), 20)
    for _ in range(20):
        kernel.loop.step(0.01)
    go.set()
    kernel.result()
    kernel.loop.run(lambda: not threads_alive(done), 20)
    assert done() == pattern(size)
    assert not backend.connections.buffered


def test_a_slow_reader_in_the_guest_holds_the_host_up_and_loses_nothing(guest: Guest, server: socket.socket) -> None:
    size = 16 * MIB

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(pattern(size))

    kernel = guest()
    done = in_thread(serve)
    slow = GET.replace("pieces = []", "pieces = []\nimport time\ntime.sleep(1)")
    assert kernel.call(slow, port=server.getsockname()[1], size=size) == [size, True]
    done()


def test_what_the_guest_drops_is_sent_again(guest: Guest, server: socket.socket) -> None:
    """A tenth of the frames to the guest is lost, as by a full backlog: the data is still whole."""
    size = 2 * MIB

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(pattern(size))

    kernel = guest()
    done = in_thread(serve)
    send, count = kernel.link.send, 0

    def lossy(*arguments: Any, **named: Any) -> bool:
        nonlocal count
        count += 1
        return True if count % 10 == 9 else send(*arguments, **named)

    kernel.link.send = lossy  # type: ignore[method-assign]
    kernel.start(GET, port=server.getsockname()[1], size=size)
    kernel.loop.ahead += 1.0
    assert kernel.result(60) == [size, True]
    done()
    backend = kernel.backend
    assert isinstance(backend, UserStack)
    assert backend.connections.retransmitted


def test_two_hundred_connections_at_once_each_get_their_own_bytes(guest: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        listening.settimeout(20)

        def serve() -> None:
            connections = [listening.accept()[0] for _ in range(200)]
            for connection in connections:
                with connection:
                    connection.sendall(receive_all(connection) * 2)

        done = in_thread(serve)
        code = """
clients = []
for number in range(200):
    client = socket.create_connection(("10.0.2.2", port), 15)
    client.sendall(b"%03d" % number)
    clients.append(client)
result = []
for client in clients:
    client.shutdown(socket.SHUT_WR)
for number, client in enumerate(clients):
    if client.makefile("rb").read() != b"%03d%03d" % (number, number):
        result.append(number)
    client.close()
"""
        kernel = guest()
        assert kernel.call(code, timeout_s=40, port=listening.getsockname()[1]) == []
        done()
    backend = kernel.backend
    assert isinstance(backend, UserStack)
    kernel.loop.run(lambda: all(c.waiting for c in backend.connections.by_key.values()), 10)
    kernel.loop.advance(5)
    assert not backend.connections.by_key
    assert not backend.connections.half_open


def test_ipv6_guests_make_an_address_of_the_advertisement_and_reach_the_hosts_loopback(guest: Guest) -> None:
    """RFC 4862: the kernel takes prefix and router from the router's advertisement."""
    try:
        listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("the host has no IPv6")
    with listening:
        listening.settimeout(20)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(pattern(4 * MIB))

        kernel = guest()
        code = """
import time
for _ in range(100):
    lines = open("/proc/net/if_inet6").read().splitlines()
    result = [line.split()[0] for line in lines if line.startswith("fd736f66746b")]
    flags = [int(line.split()[4], 16) for line in lines if line.startswith("fd736f66746b")]
    if flags and not flags[0] & 0x40:
        break
    time.sleep(0.1)
"""
        assert kernel.call(code) == ["fd736f66746b0000505400fffe123456"]
        done = in_thread(serve)
        get = GET.replace("10.0.2.2", "fd73:6f66:746b::2")
        assert kernel.call(get, port=listening.getsockname()[1], size=4 * MIB) == [4 * MIB, True]
        done()
        assert kernel.link.largest > 60000
        assert kernel.call(CONNECT, timeout_s=5, host="2001:db8::1", port=80) == "Permission denied"
