# SPDX-License-Identifier: Apache-2.0
"""A machine with a stub, and gdb itself, for tests."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.guests import missing

from softkvm import api
from softkvm.vmm.gdb.address import parse
from softkvm.vmm.gdb.server import GdbServer
from softkvm.vmm.machine import Config, Machine

CODE = 0x1000
"""Where :func:`tiny_machine` has its program."""


@contextmanager
def tiny_machine(kvm: api.Kvm, code: str, *, vcpus: int = 1) -> Iterator[Machine]:
    """A machine that has not been started, with 16-bit code (hexadecimal digits) at 0:1000."""
    with kvm, Machine(kvm, Config(32 << 20, vcpus, end_when_halted=False)) as machine:
        machine.memory.write(CODE, bytes.fromhex(code))
        vcpu = machine.vcpus[0].vcpu
        sregs = vcpu.get_sregs()
        for name in ("cs", "ds", "es", "ss"):
            segment = getattr(sregs, name)
            segment.selector, segment.base = 0, 0
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rsp, regs.rflags = CODE, 0x8000, 2
        vcpu.set_regs(regs)
        yield machine


@contextmanager
def stub(machine: Machine, where: str = "tcp::0,wait") -> Iterator[GdbServer]:
    """A stub for *machine*; the guest waits."""
    with GdbServer(machine, parse(where)) as server:
        yield server


def connect(server: GdbServer) -> socket.socket:
    """Connect to a stub."""
    host, _, port = server.target.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def gdb(*commands: str, program: Path | None = None) -> str:
    """What gdb prints when it carries out *commands*; skips where there is none, which CI does not accept."""
    found = shutil.which("gdb")
    if found is None:
        missing("there is no gdb to debug with")
        raise AssertionError
    arguments = [found, "-nx", "-batch", "-ex", "set confirm off", "-ex", "set height 0", "-ex", "set width 0"]
    for command in commands:
        arguments += ["-ex", command]
    if program is not None:
        arguments.append(str(program))
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False)
    return done.stdout + done.stderr


class Client:
    """A client of the protocol, byte by byte: it acknowledges nothing once it has asked for that."""

    def __init__(self, server: GdbServer) -> None:
        self.socket = connect(server)
        self._received = b""
        self.send(b"QStartNoAckMode")
        assert self.receive() == b"OK"
        self.socket.sendall(b"+")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send a packet."""
        self.socket.sendall(b"$%b#%02x" % (data, sum(data) & 0xFF))

    def receive(self) -> bytes:
        """The next packet; nothing when the stub has gone."""
        while b"#" not in self._received or len(self._received) < self._received.index(b"#") + 3:
            part = self.socket.recv(4096)
            if not part:
                return b""
            self._received += part
        packet, _, rest = self._received.partition(b"#")
        assert rest[:2] == b"%02x" % (sum(packet.partition(b"$")[2]) & 0xFF)
        self._received = rest[2:]
        return packet.partition(b"$")[2]

    def ask(self, data: str | bytes) -> str:
        """What a packet is answered with."""
        self.send(data.encode() if isinstance(data, str) else data)
        return self.receive().decode("latin-1")

    def monitor(self, command: str) -> str:
        """What a command of the monitor says."""
        answer = self.ask(f"qRcmd,{command.encode().hex()}")
        text = ""
        while answer != "OK":
            assert answer.startswith("O"), answer
            text += bytes.fromhex(answer[1:]).decode()
            answer = self.receive().decode()
        return text
