# SPDX-License-Identifier: Apache-2.0
"""One gdb's session: what each packet of the remote serial protocol does.

Source: gdb's manual, E.2 (packets), E.3 (stop reply packets), E.4 (general query packets); the ``qemu.`` packets are
QEMU's (its manual, "GDB usage").
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm.vmm.debug.breakpoints import BreakpointError, Kind, Point
from softkvm.vmm.debug.debugger import Cause, Debugger, Go, Stop
from softkvm.vmm.debug.report import vcpu_state
from softkvm.vmm.debug.virtual import MemoryFault
from softkvm.vmm.errors import StateError
from softkvm.vmm.gdb import description, monitor
from softkvm.vmm.gdb.packets import PACKET_BYTES, escape, unescape
from softkvm.vmm.outcome import End, Outcome

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

SIGINT, SIGTRAP = 2, 5
_SSTEP_ENABLE, _SSTEP_NOIRQ, _SSTEP_NOTIMER = 1, 2, 4
_WATCH: Final = {Kind.WRITE: "watch", Kind.READ: "rwatch", Kind.ACCESS: "awatch"}
_TEXT_BYTES: Final = 4000
Reply = bytes | None
"""A packet's data; None: there is no answer now."""


class _Malformed(ValueError):
    """A packet that says nothing."""


def _number(text: bytes) -> int:
    """Return a hexadecimal number of at most 64 bits."""
    if not text or len(text) > 16 or not all(byte in b"0123456789abcdefABCDEF" for byte in text):
        raise _Malformed(text)
    return int(text, 16)


def _numbers(text: bytes) -> tuple[int, int]:
    first, _comma, second = text.partition(b",")
    return _number(first), _number(second)


def _unhex(text: bytes) -> bytes:
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        raise _Malformed(text) from None


def _error(code: int) -> bytes:
    return b"E%02x" % (code & 0xFF)


class Session:
    """What *debugger* does for the gdb at the other end; *send* sends it a packet of its own accord."""

    def __init__(self, machine: Machine, debugger: Debugger, send: Callable[[bytes], None]) -> None:
        self.machine = machine
        self.debugger = debugger
        self.selected = 0
        """The vCPU that registers and memory are of."""
        self.physical = False
        """Whether addresses of memory are guest-physical ones."""
        self.over = False
        """Whether the client has gone, or the machine."""
        self.no_ack = False
        """Whether packets aren't acknowledged any more, from the answer to this one on."""
        self._send = send
        self._continued = -1  # the vCPU that `c` and `s` are for; -1: all
        self._stop = Stop(Cause.STEP, 0)
        self._sstep = _SSTEP_ENABLE | (_SSTEP_NOIRQ | _SSTEP_NOTIMER if debugger.can_block_interrupts else 0)
        self._told_breaks: set[str] = set()
        self._there = description.registers(machine.vcpus[0].vcpu)
        self._xml = description.target_xml(self._there).encode()

    @property
    def running(self) -> bool:
        """Whether gdb waits for a stop."""
        return not self.debugger.halted and not self.over

    # -- from outside

    def handle(self, packet: bytes) -> Reply:
        """Return the answer to a packet: empty for one that isn't known."""
        for name, handler in _NAMED.items():
            if packet.startswith(name):
                return self._call(handler, packet[len(name) :])
        single = _SINGLE.get(packet[:1])
        return b"" if single is None else self._call(single, packet[1:])

    def _call(self, handler: Callable[[Session, bytes], Reply], rest: bytes) -> Reply:
        try:
            return handler(self, rest)
        except (_Malformed, ValueError):
            return _error(errno.EINVAL)
        except MemoryFault:
            return _error(errno.EFAULT)
        except BreakpointError:
            return _error(errno.ENOSPC)
        except StateError:
            return self._ended() if self.machine.ended.is_set() else _error(errno.EBUSY)
        except OSError as error:
            return _error(error.errno or errno.EIO)

    def stopped(self, stop: Stop) -> bytes:
        """Return the packet that tells gdb of a stop."""
        self._stop = stop
        if stop.cause is Cause.END:
            return self._ended()
        self.selected = stop.vcpu
        return self._stop_reply()

    def _ended(self) -> bytes:
        self.over = True
        outcome = self.machine.outcome
        return b"W%02x" % (0 if outcome is not None and outcome.end is End.POWER_OFF else 1)

    def _stop_reply(self) -> bytes:
        stop = self._stop
        signal = SIGINT if stop.cause is Cause.INTERRUPT else SIGTRAP
        text = f"T{signal:02x}thread:{stop.vcpu + 1:x};"
        if stop.cause is Cause.WATCHPOINT and stop.point is not None:
            text += f"{_WATCH[stop.point.kind]}:{stop.point.address:x};"
        elif stop.cause is Cause.SOFTWARE and "swbreak" in self._told_breaks:
            text += "swbreak:;"
        elif stop.cause is Cause.HARDWARE and "hwbreak" in self._told_breaks:
            text += "hwbreak:;"
        return text.encode()

    # -- threads

    def _thread(self, text: bytes) -> int:
        """Return the vCPU of a thread's id; -1 for all, the selected one for any."""
        if text == b"-1":
            return -1
        number = _number(text)
        if number == 0:
            return self.selected
        if number > len(self.machine.vcpus):
            raise _Malformed(text)
        return number - 1

    def describe(self, vcpu: int) -> str:
        """Say what a vCPU does."""
        state = vcpu_state(self.machine.vcpus[vcpu].vcpu)
        return f"vCPU {vcpu}: {state}, RIP {self.debugger.linear_rip(vcpu):#x}"

    def _select(self, rest: bytes) -> Reply:
        operation, vcpu = rest[:1], self._thread(rest[1:])
        if operation == b"c":
            self._continued = vcpu if rest[1:] != b"0" else -1
        elif operation == b"g" and vcpu >= 0:
            self.selected = vcpu
        else:
            raise _Malformed(rest)
        return b"OK"

    def _alive(self, rest: bytes) -> Reply:
        self._thread(rest)
        return b"OK"

    def _first_threads(self, rest: bytes) -> Reply:
        return b"m" + b",".join(b"%x" % (n + 1) for n in range(len(self.machine.vcpus)))

    def _extra_info(self, rest: bytes) -> Reply:
        return self.describe(self._thread(rest)).encode().hex().encode()

    def _threads_xml(self) -> bytes:
        rows = (f'<thread id="{n + 1:x}" core="{n}" name="vCPU {n}">{self.describe(n)}</thread>'
                for n in range(len(self.machine.vcpus)))  # fmt: skip
        return f'<?xml version="1.0"?><threads>{"".join(rows)}</threads>'.encode()

    # -- registers

    def _read_registers(self, rest: bytes) -> Reply:
        registers = self.debugger.registers[self.selected]
        parts = (registers.get(register).to_bytes(register.size, "little") for register in self._there)
        return b"".join(parts).hex().encode()

    def _write_registers(self, rest: bytes) -> Reply:
        data = _unhex(rest)
        if len(data) > sum(register.size for register in self._there):
            raise _Malformed(rest)
        registers = self.debugger.registers[self.selected]
        at = 0
        for register in self._there:
            part = data[at : at + register.size]
            if len(part) == register.size:
                registers.set(register, int.from_bytes(part, "little"))
            at += register.size
        return b"OK"

    def _read_register(self, rest: bytes) -> Reply:
        number = _number(rest)
        if number >= len(self._there):
            raise _Malformed(rest)
        register = self._there[number]
        value = self.debugger.registers[self.selected].get(register)
        return value.to_bytes(register.size, "little").hex().encode()

    def _write_register(self, rest: bytes) -> Reply:
        text, _equals, value = rest.partition(b"=")
        number, data = _number(text), _unhex(value)
        if number >= len(self._there) or len(data) != self._there[number].size:
            raise _Malformed(rest)
        self.debugger.registers[self.selected].set(self._there[number], int.from_bytes(data, "little"))
        return b"OK"

    # -- memory

    def _read(self, address: int, size: int) -> bytes:
        if self.physical:
            return self.debugger.read_physical(address, size)
        return self.debugger.read(self.selected, address, size)

    def _read_memory(self, rest: bytes) -> Reply:
        address, size = _numbers(rest)
        size = min(size, PACKET_BYTES // 2)
        try:
            data = self._read(address, size)
        except MemoryFault:
            data = self._read(address, min(size, 4096 - address % 4096))  # as much as there is
        return data.hex().encode()

    def _store(self, address: int, data: bytes) -> bytes:
        if self.physical:
            self.debugger.write_physical(address, data)
        else:
            self.debugger.write(self.selected, address, data)
        return b"OK"

    def _write_memory(self, rest: bytes) -> Reply:
        where, _colon, text = rest.partition(b":")
        address, size = _numbers(where)
        data = _unhex(text)
        if len(data) != size:
            raise _Malformed(where)
        return self._store(address, data)

    def _write_binary(self, rest: bytes) -> Reply:
        where, _colon, text = rest.partition(b":")
        address, size = _numbers(where)
        data = unescape(text)
        if len(data) != size:
            raise _Malformed(where)
        return self._store(address, data)

    # -- breakpoints

    def _point(self, rest: bytes) -> Point | None:
        kind, _comma, where = rest.partition(b";")[0].partition(b",")
        number = _number(kind)
        if number > Kind.ACCESS:
            return None
        address, size = _numbers(where)
        return Point(Kind(number), address, size if number > Kind.EXECUTE else 1)

    def _insert(self, rest: bytes) -> Reply:
        point = self._point(rest)
        if point is None:
            return b""
        self.debugger.breakpoints.add(point, self.machine.vcpus[self.selected].vcpu)
        return b"OK"

    def _remove(self, rest: bytes) -> Reply:
        point = self._point(rest)
        if point is None:
            return b""
        self.debugger.breakpoints.remove(point)
        return b"OK"

    # -- going on

    def _resume(self, how: dict[int, Go] | None) -> Reply:
        if self.machine.ended.is_set():
            return self._ended()
        self.debugger.block_interrupts = bool(self._sstep & _SSTEP_NOIRQ) and self.debugger.can_block_interrupts
        self.debugger.resume(how)
        return None

    def _old_resume(self, rest: bytes, *, step: bool) -> Reply:
        """``c`` and ``s``: all vCPUs, or the one that ``Hc`` has chosen; an address to go on at, perhaps."""
        chosen = self._continued if self._continued >= 0 else self.selected
        if rest:
            self.debugger.registers[chosen]["rip"] = _number(rest)
        if self._continued >= 0:
            return self._resume({chosen: Go(step)})
        return self._resume({n: Go(step and n == chosen) for n in range(len(self.machine.vcpus))})

    def _continue(self, rest: bytes) -> Reply:
        return self._old_resume(rest, step=False)

    def _step(self, rest: bytes) -> Reply:
        return self._old_resume(rest, step=True)

    def _continue_signal(self, rest: bytes) -> Reply:
        return self._old_resume(rest.partition(b";")[2], step=False)  # a machine takes no signals

    def _step_signal(self, rest: bytes) -> Reply:
        return self._old_resume(rest.partition(b";")[2], step=True)

    def _vcont(self, rest: bytes) -> Reply:
        how: dict[int, Go] = {}
        for text in rest.split(b";"):
            action, colon, thread = text.partition(b":")
            match action[:1]:
                case b"c" | b"C":
                    go = Go()
                case b"s" | b"S":
                    go = Go(step=True)
                case b"r":
                    go = Go(True, *_numbers(action[1:]))
                case _:
                    raise _Malformed(rest)
            vcpu = self._thread(thread) if colon else -1
            for n in range(len(self.machine.vcpus)) if vcpu < 0 else (vcpu,):
                how.setdefault(n, go)  # the leftmost action that names a thread is the thread's
        return self._resume(how)

    def _vcont_actions(self, rest: bytes) -> Reply:
        return b"vCont;c;C;s;S;r"

    def _detach(self, rest: bytes) -> Reply:
        self.over = True
        return b"OK"

    def _kill(self, rest: bytes) -> Reply:
        self.machine.end(Outcome(End.STOPPED, "gdb"))
        self.over = True
        return None

    def _kill_process(self, rest: bytes) -> Reply:
        self._kill(rest)
        return b"OK"

    # -- queries

    def _why(self, rest: bytes) -> Reply:
        return self._stop_reply()

    def _supported(self, rest: bytes) -> Reply:
        asked = rest.decode("ascii", "replace").split(";")
        self._told_breaks = {name for name in ("swbreak", "hwbreak") if f"{name}+" in asked}
        features = (
            f"PacketSize={PACKET_BYTES:x}", "qXfer:features:read+", "qXfer:threads:read+", "QStartNoAckMode+",
            "vContSupported+", "swbreak+", "hwbreak+",
        )  # fmt: skip
        return ";".join(features).encode()

    def _no_ack_mode(self, rest: bytes) -> Reply:
        self.no_ack = True
        return b"OK"

    def _transfer(self, data: bytes, rest: bytes) -> Reply:
        offset, size = _numbers(rest)
        if offset > len(data):
            raise _Malformed(rest)
        part = data[offset : offset + min(size, PACKET_BYTES // 2)]
        return (b"l" if offset + len(part) >= len(data) else b"m") + escape(part)

    def _features(self, rest: bytes) -> Reply:
        return self._transfer(self._xml, rest)

    def _threads(self, rest: bytes) -> Reply:
        return self._transfer(self._threads_xml(), rest)

    def _current(self, rest: bytes) -> Reply:
        return b"" if rest else b"QC%x" % (self.selected + 1)

    def _command(self, rest: bytes) -> Reply:
        text = monitor.run(self, _unhex(rest).decode("utf-8", "replace")).encode()
        for at in range(0, len(text), _TEXT_BYTES):
            self._send(b"O" + text[at : at + _TEXT_BYTES].hex().encode())
        return b"OK"

    def _set_physical(self, rest: bytes) -> Reply:
        self.physical = bool(_number(rest))
        return b"OK"

    def _get_physical(self, rest: bytes) -> Reply:
        return b"%d" % self.physical

    def _sstep_bits(self, rest: bytes) -> Reply:
        bits = b"ENABLE=%x" % _SSTEP_ENABLE
        if self.debugger.can_block_interrupts:
            bits += b",NOIRQ=%x,NOTIMER=%x" % (_SSTEP_NOIRQ, _SSTEP_NOTIMER)
        return bits

    def _get_sstep(self, rest: bytes) -> Reply:
        return b"0x%x" % self._sstep

    def _set_sstep(self, rest: bytes) -> Reply:
        bits = _number(rest.removeprefix(b"0x"))
        allowed = _SSTEP_ENABLE | (_SSTEP_NOIRQ | _SSTEP_NOTIMER if self.debugger.can_block_interrupts else 0)
        if bits & ~allowed:
            raise _Malformed(rest)
        self._sstep = bits
        return b"OK"


def _constant(answer: bytes) -> Callable[[Session, bytes], Reply]:
    return lambda session, rest: answer


_SINGLE: Final[dict[bytes, Callable[[Session, bytes], Reply]]] = {
    b"?": Session._why,
    b"g": Session._read_registers,
    b"G": Session._write_registers,
    b"p": Session._read_register,
    b"P": Session._write_register,
    b"m": Session._read_memory,
    b"M": Session._write_memory,
    b"X": Session._write_binary,
    b"Z": Session._insert,
    b"z": Session._remove,
    b"c": Session._continue,
    b"s": Session._step,
    b"C": Session._continue_signal,
    b"S": Session._step_signal,
    b"H": Session._select,
    b"T": Session._alive,
    b"D": Session._detach,
    b"k": Session._kill,
}

_NAMED: Final[dict[bytes, Callable[[Session, bytes], Reply]]] = {
    b"vCont?": Session._vcont_actions,
    b"vCont;": Session._vcont,
    b"vKill;": Session._kill_process,
    b"qSupported": lambda session, rest: session._supported(rest.removeprefix(b":")),
    b"QStartNoAckMode": Session._no_ack_mode,
    b"qXfer:features:read:target.xml:": Session._features,
    b"qXfer:threads:read::": Session._threads,
    b"qfThreadInfo": Session._first_threads,
    b"qsThreadInfo": _constant(b"l"),
    b"qThreadExtraInfo,": Session._extra_info,
    b"qAttached": _constant(b"1"),
    b"qSymbol": _constant(b"OK"),
    b"qRcmd,": Session._command,
    b"qqemu.sstepbits": Session._sstep_bits,
    b"qqemu.sstep": Session._get_sstep,
    b"Qqemu.sstep=": Session._set_sstep,
    b"qqemu.PhyMemMode": Session._get_physical,
    b"Qqemu.PhyMemMode:": Session._set_physical,
    b"qC": Session._current,
}
"""Longer names come before those that they begin with."""
