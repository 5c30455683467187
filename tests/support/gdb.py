# SPDX-License-Identifier: Apache-2.0
"""A debugger's side of gdb's remote serial protocol, as far as tests need it (gdb's manual, appendix E)."""

from __future__ import annotations

import socket
from enum import IntEnum
from typing import Final

#: The order of registers in a ``g`` packet of x86-64: each 8 bytes, then 4 bytes for the flags and each selector.
REGISTERS: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)), "rip")
FLAGS: Final = ("eflags", "cs", "ss", "ds", "es", "fs", "gs")


class Stop(IntEnum):
    """What a target can be told to stop at: the number in ``Z`` and ``z`` packets."""

    SOFTWARE_BREAKPOINT = 0
    HARDWARE_BREAKPOINT = 1
    WRITE = 2
    READ = 3
    ACCESS = 4


class Debugger:
    """A connection to a stub; the target stands, until it is told to run."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self.ask("QStartNoAckMode", acknowledged=True)
        self.ask("qXfer:features:read:target.xml:0,fff")  # QEMU takes P packets of who has asked for it

    def ask(self, request: str, *, acknowledged: bool = False) -> str:
        """Send a packet; the packet that answers it. A target that stops for the debugger may tell so before that."""
        data = request.encode()
        self._connection.sendall(b"$%s#%02x" % (data, sum(data) & 0xFF))
        while (answer := self._packet()).startswith("T") and request not in ("s", "c"):
            pass
        if acknowledged:
            self._connection.sendall(b"+")
        return answer

    def _packet(self) -> str:
        while b"#" not in self._received or len(self._received) < self._received.index(b"#") + 3:
            part = self._connection.recv(4096)
            assert part, "the stub has gone"
            self._received += part
        packet, _, rest = self._received.partition(b"#")
        self._received = rest[2:]
        return packet.partition(b"$")[2].decode()

    def _do(self, request: str) -> None:
        answer = self.ask(request)
        assert answer == "OK", (request, answer)

    def registers(self) -> dict[str, int]:
        """The registers of the thread that stopped."""
        data = bytes.fromhex(self.ask("g").replace("x", "0"))
        wide = {name: int.from_bytes(data[8 * n : 8 * n + 8], "little") for n, name in enumerate(REGISTERS)}
        rest = data[8 * len(REGISTERS) :]
        return wide | {name: int.from_bytes(rest[4 * n : 4 * n + 4], "little") for n, name in enumerate(FLAGS)}

    def set_register(self, name: str, value: int) -> None:
        """Write one of the registers of 8 bytes."""
        self._do(f"P{REGISTERS.index(name):x}={value.to_bytes(8, 'little').hex()}")

    def read(self, address: int, size: int) -> bytes:
        """Read memory."""
        return bytes.fromhex(self.ask(f"m{address:x},{size:x}"))

    def write(self, address: int, data: bytes) -> None:
        """Write memory."""
        self._do(f"M{address:x},{len(data):x}:{data.hex()}")

    def set(self, stop: Stop, address: int, size: int = 1) -> None:
        """Have the target stop at something."""
        self._do(f"Z{stop:d},{address:x},{size:x}")

    def clear(self, stop: Stop, address: int, size: int = 1) -> None:
        """Take that back."""
        self._do(f"z{stop:d},{address:x},{size:x}")

    def step(self) -> str:
        """Execute one instruction; the packet that tells of the stop."""
        return self.ask("s")

    def go_on(self) -> str:
        """Continue to the next stop; the packet that tells of it."""
        return self.ask("c")

    def go_on_from(self, stop: Stop, address: int) -> str:
        """Continue from the breakpoint where the target stands, which is taken away for a step, as debuggers do."""
        self.clear(stop, address)
        self.step()
        self.set(stop, address)
        return self.go_on()

    def threads(self) -> list[str]:
        """The threads of the target, one for each processor."""
        names: list[str] = []
        answer = self.ask("qfThreadInfo")
        while answer != "l":
            names += answer.removeprefix("m").split(",")
            answer = self.ask("qsThreadInfo")
        return names

    def select(self, thread: str) -> None:
        """Have registers and memory be those of a thread."""
        self._do(f"Hg{thread}")

    def detach(self) -> None:
        """Let the target run, and go."""
        self._do("D")
