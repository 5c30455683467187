# SPDX-License-Identifier: Apache-2.0
"""The console device (VIRTIO 1.3, 5.3): consoles, named ports, control messages, sizes, both directions."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.virtio_driver import Driver, driving

from softkvm.cli.main import main
from softkvm.vmm.devices.port_ends import FileEnd, PtyEnd, UnixEnd
from softkvm.vmm.devices.ports import PortSpec, parse
from softkvm.vmm.devices.virtio_console import INPUT, OUTPUT, Console, Outlet, Port
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.unix_socket import ADDRESS_SIZE, connect

F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 0, 1, 2
DEVICE_READY, DEVICE_ADD, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 0, 1, 3, 4, 5, 6, 7

TRANSPORTS = pytest.mark.parametrize("transport", ["pci", "mmio"])
PACKED = pytest.mark.parametrize("packed", [False, True])


class Recorder:
    """A host's end that takes what it is told to take."""

    def __init__(self, takes: int = 1 << 30) -> None:
        self.takes = takes
        self.got = b""
        self.port: Port | None = None
        self.rooms = 0

    def start(self, port: Port) -> None:
        self.port = port

    def send(self, data: bytes) -> int:
        taken = min(len(data), self.takes)
        self.takes -= taken
        self.got += data[:taken]
        return taken

    def room(self) -> None:
        self.rooms += 1

    def close(self) -> None:
        pass


def control(driver: Driver, number: int, event: int, value: int) -> None:
    driver.queues[3].request([struct.pack("<IHH", number, event, value)])


class Told:
    """The control messages that a driver gets."""

    def __init__(self, driver: Driver) -> None:
        self._queue = driver.queues[2]
        self._buffers = [self._queue.add(writable=[512]) for _ in range(24)]
        self._queue.notify()

    def next(self) -> bytes:
        """Wait for one."""
        data: bytes = self._queue.wait(self._buffers.pop(0)).data()
        return data

    def all(self) -> list[bytes]:
        """What has come."""
        self._queue.used()
        found = []
        while self._buffers[0].written is not None:
            found.append(self.next())
        return found


@contextmanager
def multiport(*ports: Port, size: tuple[int, int] = (0, 0)) -> Iterator[tuple[Driver, Told]]:
    """A driver that is ready, and what it is told from now on."""
    with driving(Console(ports, size)) as driver:
        told = greet(driver)
        told.all()
        yield driver, told


def greet(driver: Driver) -> Told:
    """Do what a driver does until all ports are known."""
    told = Told(driver)
    control(driver, 0, DEVICE_READY, 1)
    for number in range(len(driver.device.ports)):  # type: ignore[attr-defined]
        control(driver, number, PORT_READY, 1)
    return told


@TRANSPORTS
@PACKED
def test_a_single_console_is_open_with_its_driver(transport: str, packed: bool) -> None:
    end = Recorder()
    console = Console([Port(end, console=True)], (80, 25))
    with driving(console, transport=transport, packed=packed) as driver:
        assert driver.registers.features() & 7 == 1 << F_SIZE | 1 << F_EMERG_WRITE
        driver.wait_interrupt(2)
        assert [driver.registers.config(at, 2) for at in (0, 2)] == [80, 25]
        assert driver.queues[1].request([b"hello, ", b"world"]) == b""
        assert end.got == b"hello, world"
        buffers = [driver.queues[0].add(writable=[4]) for _ in range(3)]
        driver.queues[0].notify()
        assert end.port is not None
        console.call(end.port.feed, b"typed in")
        assert b"".join(driver.queues[0].wait(buffer).data() for buffer in buffers[:2]) == b"typed in"
        generation = driver.registers.generation()
        console.call(console.resize, 132, 43)
        driver.wait_interrupt(2)
        assert [driver.registers.config(at, 2) for at in (0, 2)] == [132, 43]
        assert driver.registers.generation() != generation or transport == "pci"


def test_a_character_gets_out_before_there_are_queues() -> None:
    end = Recorder()
    with driving(Console([Port(end, console=True)]), start=False) as driver:
        driver.registers.set_config(8, 4, ord("!"))
        assert end.got == b"!"


@PACKED
def test_ports_are_introduced_by_control_messages(packed: bool) -> None:
    ports = [Port(Recorder(), console=True), Port(Recorder(), "org.example.agent"), Port(Recorder(), "größe")]
    ports[2].host_open = False
    with driving(Console(ports, (80, 25)), packed=packed) as driver:
        assert driver.registers.features() & 7 == 1 << F_MULTIPORT | 1 << F_EMERG_WRITE
        assert driver.registers.config(4, 4) == 3
        told = greet(driver).all()
        assert told[:3] == [struct.pack("<IHH", number, DEVICE_ADD, 1) for number in range(3)]
        assert told[3:6] == [
            struct.pack("<IHH", 0, CONSOLE_PORT, 1),
            struct.pack("<IHHHH", 0, RESIZE, 0, 80, 25),
            struct.pack("<IHH", 0, PORT_OPEN, 1),
        ]
        assert told[6:8] == [
            struct.pack("<IHH", 1, PORT_NAME, 1) + b"org.example.agent",
            struct.pack("<IHH", 1, PORT_OPEN, 1),
        ]
        assert told[8:] == [struct.pack("<IHH", 2, PORT_NAME, 1) + "größe".encode()]


def test_a_ports_data_goes_by_its_own_queues() -> None:
    ends = [Recorder() for _ in range(3)]
    with multiport(*(Port(end, f"p{number}") for number, end in enumerate(ends))) as (driver, _):
        for number, queue in ((0, 1), (1, 5), (2, 7)):
            control(driver, number, PORT_OPEN, 1)
            driver.queues[queue].request([b"from %d" % number])
            assert ends[number].got == b"from %d" % number
            buffer = driver.queues[queue - 1].add(writable=[64])
            driver.queues[queue - 1].notify()
            port = ends[number].port
            assert port is not None
            driver.device.call(port.feed, b"to %d" % number)
            assert driver.queues[queue - 1].wait(buffer).data() == b"to %d" % number


def test_input_waits_until_the_guest_has_opened_the_port() -> None:
    end = Recorder()
    port = Port(end, "p")
    with multiport(port) as (driver, _):
        assert port.room == 0
        buffer = driver.queues[0].add(writable=[64])
        driver.queues[0].notify()
        driver.device.call(port.feed, b"early")
        control(driver, 0, PORT_OPEN, 1)
        assert driver.queues[0].wait(buffer).data() == b"early"
        assert port.room == INPUT.most and end.rooms


def test_what_the_host_does_not_take_stays_with_the_guest() -> None:
    end = Recorder(takes=5)
    port = Port(end, "p")
    with multiport(port) as (driver, _):
        control(driver, 0, PORT_OPEN, 1)
        first, second = (driver.queues[1].add([data]) for data in (b"hello, world", b"!" * 100_000))
        driver.queues[1].notify()
        driver.wait_until(lambda: end.got == b"hello")
        driver.queues[1].used()
        assert first.written is None and second.written is None
        end.takes = 1 << 30
        driver.device.call(port.go_on)
        driver.queues[1].wait(second)
        assert first.written == 0 and end.got == b"hello, world" + b"!" * 100_000


def test_without_anybody_at_the_hosts_end_output_is_dropped() -> None:
    end = Recorder(takes=0)
    port = Port(end, "p")
    with multiport(port) as (driver, told):
        buffer = driver.queues[1].add([b"lost"])
        driver.queues[1].notify()
        driver.device.call(port.set_host_open, False)
        assert driver.queues[1].wait(buffer).written == 0
        assert end.got == b""
        assert told.next() == struct.pack("<IHH", 0, PORT_OPEN, 0)


def test_control_messages_that_are_none_change_nothing() -> None:
    port = Port(Recorder(), "p")
    with multiport(port) as (driver, _):
        for number, event, value in ((1, PORT_READY, 1), (0xFFFFFFFF, PORT_OPEN, 1), (0, 99, 1), (0, PORT_READY, 0)):
            control(driver, number, event, value)
        driver.queues[3].request([b"short"])
        driver.queues[3].request([b"x" * 4096])
        assert not port.guest_open
        control(driver, 0, PORT_OPEN, 1)
        assert port.guest_open


def test_messages_without_buffers_are_kept_once_each() -> None:
    console = Console([Port(Recorder(), console=True), Port(Recorder(), "p")])
    with driving(console) as driver:
        control(driver, 0, DEVICE_READY, 1)
        for columns in range(1000):
            console.call(console.resize, columns, 25)
            console.call(console.ports[1].set_host_open, bool(columns % 2))
        done = threading.Event()
        console.call(done.set)
        assert done.wait(30)
        told = greet(driver).all()
        assert len(told) < 12
        assert struct.pack("<IHHHH", 0, RESIZE, 0, 999, 25) in told


def test_a_saved_console_goes_on_where_it_was() -> None:
    end = Recorder(takes=5)
    with multiport(Port(end, "p"), Port(Recorder(), "q")) as (driver, _):
        control(driver, 0, PORT_OPEN, 1)
        buffer = driver.queues[1].add([b"hello, world"])
        driver.queues[1].notify()
        driver.wait_until(lambda: end.got == b"hello")
        driver.device.call(driver.device.ports[0].feed, b"input")  # type: ignore[attr-defined]
        driver.wait_until(lambda: driver.device.ports[0].input)  # type: ignore[attr-defined]
        state = driver.transport.save()
        end.takes = 1 << 30
        driver.transport.restore(state)
        driver.queues[1].wait(buffer)
        assert end.got == b"hello, world"
        into = driver.queues[0].add(writable=[64])
        driver.queues[0].notify()
        assert driver.queues[0].wait(into).data() == b"input"


def test_a_function_that_waits_makes_the_guest_wait_and_nothing_is_lost() -> None:
    go_on = threading.Event()
    got: list[bytes] = []

    def sink(data: bytes) -> None:
        go_on.wait(30)
        got.append(data)

    outlet = Outlet(sink)
    data = os.urandom(PIECE := 60_000)
    with driving(Console([Port(outlet, console=True)])) as driver:
        buffers = []
        for _ in range(3 * OUTPUT.most // PIECE):
            buffers.append(driver.queues[1].add([data]))
            driver.queues[1].notify()
        driver.queues[1].used()
        driver.wait_until(lambda: len(outlet._output) == OUTPUT.most)
        assert any(buffer.written is None for buffer in buffers)
        go_on.set()
        for buffer in buffers:
            driver.queues[1].wait(buffer)
        outlet.flush(30)
        assert b"".join(got) == data * len(buffers)


def test_a_port_is_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with multiport(Port(UnixEnd(path), "p")) as (driver, told):
        assert os.stat(path).st_mode & 0o777 == 0o600
        control(driver, 0, PORT_OPEN, 1)
        for text in (b"first", b"second"):
            client = connect(path)
            client.settimeout(30)
            assert told.next() == struct.pack("<IHH", 0, PORT_OPEN, 1)
            driver.queues[1].request([text])
            assert client.recv(100) == text
            into = driver.queues[0].add(writable=[64])
            driver.queues[0].notify()
            client.sendall(text)
            assert driver.queues[0].wait(into).data() == text
            client.close()
            assert told.next() == struct.pack("<IHH", 0, PORT_OPEN, 0)
    assert not os.path.exists(path)


def test_a_client_that_reads_nothing_makes_the_guest_wait(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with multiport(Port(UnixEnd(path), "p")) as (driver, _):
        control(driver, 0, PORT_OPEN, 1)
        client = connect(path)
        client.settimeout(30)
        driver.wait_until(lambda: driver.device.ports[0].host_open)  # type: ignore[attr-defined]
        buffers = [driver.queues[1].add([b"x" * 60_000]) for _ in range(40)]
        driver.queues[1].notify()
        received = 0
        while received < 40 * 60_000:
            received += len(client.recv(1 << 16))
        driver.queues[1].wait(buffers[-1])
        client.close()


def test_a_port_is_a_pseudo_terminal_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pty = PtyEnd("p")
    assert f"port p at {pty.path}" in capsys.readouterr().err
    with multiport(Port(pty, "p"), Port(FileEnd(str(tmp_path / "file")), "q")) as (driver, _):
        for number, queue in ((0, 1), (1, 5)):
            control(driver, number, PORT_OPEN, 1)
            driver.queues[queue].request([b"output"])
        assert (tmp_path / "file").read_bytes() == b"output"
        fd = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
        assert os.read(fd, 100) == b"output"
        into = driver.queues[0].add(writable=[64])
        driver.queues[0].notify()
        os.write(fd, b"input")
        assert driver.queues[0].wait(into).data() == b"input"
        os.close(fd)


def test_names_of_sockets_are_whole_or_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    path = str(deep / "socket")
    assert len(path) > ADDRESS_SIZE
    end = UnixEnd(path)
    connect(path).close()
    end.close()
    assert os.listdir(deep) == []
    with pytest.raises(ConfigError, match="File name too long"):
        UnixEnd(str(tmp_path / ("s" * 105)))
    with pytest.raises(ConfigError, match="File name too long"):
        UnixEnd("/" + "x/" * 3000 + "s")
    assert os.listdir(tmp_path) == ["d" * 100]


def test_the_socket_of_a_process_that_is_gone_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    gone = socket.socket(socket.AF_UNIX)
    gone.bind(path)
    gone.close()
    end = UnixEnd(path)
    with pytest.raises(ConfigError, match="Address already in use"):
        UnixEnd(path)
    end.close()
    (tmp_path / "socket").write_text("a file of the user's")
    with pytest.raises(ConfigError, match="Address already in use"):
        UnixEnd(path)
    assert (tmp_path / "socket").read_text() == "a file of the user's"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "expected NAME="),
        ("name", "expected NAME="),
        ("=pty", "expected NAME="),
        ("a/b=pty", "expected printable characters"),
        ("n\n=pty", "expected printable characters"),
        ("n" * 256 + "=pty", "a name of 256 bytes, expected at most 255"),
        ("n=tcp:1", "tcp:1: expected"),
        ("n=unix:", "unix:: expected"),
        ("n=pty,size=3", "unknown: size"),
    ],
)
def test_what_is_no_port_is_said(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        parse(text)


def test_a_port_has_a_name_and_an_end() -> None:
    assert parse("org.example=unix:/tmp/a=b") == PortSpec("org.example", "unix:/tmp/a=b")
    assert parse("my port=file:/tmp/a,,b,id=files").end == "file:/tmp/a,b"


def test_standard_input_and_output_are_one_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernel").write_bytes(b"\xf4")
    assert main(["run", "--kernel", f"flat:{tmp_path}/kernel", "--port", "p=stdio"]) == 2
    assert capsys.readouterr().err == (
        "softkvm: --port NAME=stdio needs the console elsewhere: --console none, pty or file:PATH\n"
    )
    ends = ["--port", "p=stdio", "--port", "q=stdio", "--console", "none"]
    assert main(["run", "--kernel", f"flat:{tmp_path}/kernel", *ends]) == 2
    assert "one port's only" in capsys.readouterr().err
