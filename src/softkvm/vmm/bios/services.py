# SPDX-License-Identifier: Apache-2.0
"""BIOS services: what software interrupts do for a guest in real mode.

The handlers in the firmware's segment (:mod:`softkvm.vmm.boot.firmware`) push the vector and write port 0xB2, where a
PC's BIOS hands its work to system management mode, and here it is done: registers and flags of the caller go in and
come back changed. A write from anywhere but the firmware's own code in real mode does nothing.

State is in the BIOS data area and on the text screen, in guest memory, so that it is what the guest sees there. What
goes to the screen goes to COM1 as well, as a serial console's extension ROM does it; keys come from there.

Sources: IBM PC AT Technical Reference, "System BIOS"; Phoenix, "System BIOS for IBM PCs, Compatibles, and EISA
Computers"; ACPI specification 6.4, section 15.1 (INT 15h E820h); Ralf Brown's Interrupt List for what programs
rely on beyond them. Each service's function says which interrupt and function it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from softkvm import abi, api
from softkvm.abi.sizes import Size
from softkvm.vmm.bios.call import CARRY, ZERO, Call, Retry
from softkvm.vmm.bios.keyboard import Keyboard
from softkvm.vmm.bios.screen import Screen
from softkvm.vmm.bus import Bus
from softkvm.vmm.devices import cmos, rtc_calendar, serial
from softkvm.vmm.memory import KIB, MIB, GuestMemory

SERVICE_PORT: Final = 0xB2
FIRMWARE_SEGMENT: Final = 0xF000
SERVICES: Final = (0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1A)

BIOS_DATA: Final = 0x400
EQUIPMENT: Final = BIOS_DATA + 0x10
MEMORY_SIZE: Final = BIOS_DATA + 0x13
TICKS: Final = BIOS_DATA + 0x6C
MIDNIGHT: Final = BIOS_DATA + 0x70

VIRTUAL_8086: Final = 1 << 17
SMAP: Final = 0x534D4150

STATUS_INVALID: Final = 0x01
STATUS_NOT_READY: Final = 0x80
UNSUPPORTED: Final = 0x86

_ROW: Final = Size(
    "bytes for a row of INT 15h, AX=E820h",
    0xFFFFFFFF,
    None,
    least=20,
    giver="guest",
    effect="carry",
    where=__name__,
)
_BLOCK: Final = Size(
    "words of INT 15h, AH=87h",
    0xFFFF,
    None,
    element=2,
    giver="guest",
    effect="the register has no more",
    where=__name__,
)

WAIT_SLICE_S: Final = 0.01
"""A service that waits lets the guest take interrupts this often."""


class Bios:
    """The device at port 0xB2.

    *current_vcpu* is the vCPU on whose thread we are called; *memory_map* gives the rows (start, size, type) of INT 15h
    E820h; *ports* are where COM1 and the clock answer; *reset* is called by INT 19h; *ended* is set when the machine
    ends.
    """

    def __init__(
        self,
        current_vcpu: Callable[[], api.Vcpu],
        memory: GuestMemory,
        memory_map: Callable[[], Sequence[tuple[int, int, int]]],
        ports: Bus,
        reset: Callable[[], None],
        ended: threading.Event,
    ) -> None:
        self._current_vcpu = current_vcpu
        self.memory = memory
        self.memory_map = memory_map
        self.ports = ports
        self.reset = reset
        self._ended = ended
        self._wait_end_ns: int | None = None
        self.screen = Screen(memory, self._send)
        self.keyboard = Keyboard(self._receive)

    def read(self, offset: int, size: int) -> int:
        """Nothing can be read."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Carry out the service that the vCPU on whose thread we are asks for."""
        vcpu = self._current_vcpu()
        sregs = vcpu.get_sregs()
        regs = vcpu.get_regs()
        real = not sregs.cr0 & abi.X86_CR0_PE or regs.rflags & VIRTUAL_8086
        if not real or sregs.cs.selector != FIRMWARE_SEGMENT:
            return
        try:
            call = Call(regs, sregs, self.memory)
        except IndexError:  # a stack outside of RAM
            return
        service = _SERVICES.get(call.vector)
        if service is None:
            return
        try:
            service(self, call)
            call.finish()
            regs.rflags &= ~CARRY
        except Retry:
            regs.rflags |= CARRY
        except IndexError:  # the caller's buffer is not RAM
            call.fail(UNSUPPORTED)
            call.finish()
            regs.rflags &= ~CARRY
        vcpu.set_regs(regs)

    # -- COM1

    def _send(self, data: bytes) -> None:
        """Transmit on COM1, unless a driver of the guest's is programming its divisor."""
        if not self.ports.read(serial.COM1_PORT + serial.LCR, 1) & serial.LCR_DLAB:
            for byte in data:
                self.ports.write(serial.COM1_PORT + serial.THR, 1, byte)

    def _receive(self) -> int | None:
        """Return the next byte received on COM1."""
        if not self.ports.read(serial.COM1_PORT + serial.LSR, 1) & serial.LSR_DR:
            return None
        return self.ports.read(serial.COM1_PORT + serial.RBR, 1)

    def _cmos(self, index: int) -> int:
        """Return a byte of the real-time clock's."""
        self.ports.write(cmos.CMOS_PORT, 1, index)
        return self.ports.read(cmos.CMOS_PORT + 1, 1)

    def _wait(self) -> None:
        """Stand for a moment, less if the machine ends, and let the guest ask again."""
        self._ended.wait(WAIT_SLICE_S)
        raise Retry

    # -- services

    def _equipment(self, call: Call) -> None:
        """INT 11h."""
        call.ax = int.from_bytes(self.memory.read(EQUIPMENT, 2), "little")

    def _memory_size(self, call: Call) -> None:
        """INT 12h: KiB of conventional memory."""
        call.ax = int.from_bytes(self.memory.read(MEMORY_SIZE, 2), "little")

    def _disk(self, call: Call) -> None:
        """INT 13h: there is no drive."""
        if call.ah in (0x00, 0x15) or (call.ah == 0x01 and not call.dl & 0x80):  # reset; type: none; last status
            call.succeed()
        else:
            call.fail(STATUS_INVALID if call.dl & 0x80 else STATUS_NOT_READY)

    def _serial(self, call: Call) -> None:
        """INT 14h: COM1."""
        if call.dx:  # there is no other
            call.ah = STATUS_NOT_READY
            return
        function = call.ah
        if function == 0x01:
            self._send(bytes([call.al]))
        elif function == 0x02:
            byte = self._receive()
            if byte is None:
                call.ah = STATUS_NOT_READY
                return
            call.al = byte
            call.ah = 0
            return
        call.ah = self.ports.read(serial.COM1_PORT + serial.LSR, 1)
        if function in (0x00, 0x03):
            call.al = self.ports.read(serial.COM1_PORT + serial.MSR, 1)

    def _system(self, call: Call) -> None:
        """INT 15h."""
        function = _SYSTEM_BY_AX.get(call.ax) or _SYSTEM.get(call.ah)
        if function is None:
            call.fail(UNSUPPORTED)
        else:
            function(self, call)

    def _a20_on(self, call: Call) -> None:
        """INT 15h 2401h: the A20 line is always on."""
        call.succeed()

    def _a20_status(self, call: Call) -> None:
        """INT 15h 2402h."""
        call.succeed()
        call.al = 1

    def _a20_support(self, call: Call) -> None:
        """INT 15h 2403h: by keyboard controller and by port 0x92."""
        call.succeed()
        call.bx = 0x3

    def _wait_event(self, call: Call) -> None:
        """INT 15h 86h: wait CX:DX microseconds."""
        now_ns = time.monotonic_ns()
        if self._wait_end_ns is None:
            self._wait_end_ns = now_ns + (call.cx << 16 | call.dx) * 1000
        if now_ns < self._wait_end_ns:
            self._ended.wait(min(WAIT_SLICE_S, (self._wait_end_ns - now_ns) / 1e9))
            raise Retry
        self._wait_end_ns = None
        call.succeed()

    def _move_block(self, call: Call) -> None:
        """INT 15h 87h: copy CX words between the segments that the descriptors at ES:SI say."""
        table = self.memory.read(call.es + call.si, 0x20)

        def base(at: int) -> int:
            return int.from_bytes(table[at + 2 : at + 5], "little") | table[at + 7] << 24

        data = self.memory.read(base(0x10), _BLOCK.bytes(call.cx))
        self.memory.write(base(0x18), data)
        call.succeed()
        call.set(ZERO, True)

    def _extended_memory(self, call: Call) -> None:
        """INT 15h 88h: KiB from 1 MiB on, as far as 16 bits say."""
        call.ax = min((self.memory.end_below_4g - MIB) // KIB, 0xFC00)
        call.set(CARRY, False)

    def _memory_e801(self, call: Call) -> None:
        """INT 15h E801h: KiB from 1 to 16 MiB, and 64 KiB blocks from there to 4 GiB."""
        end = self.memory.end_below_4g
        call.ax = call.cx = min(end - MIB, 15 * MIB) // KIB
        call.bx = call.dx = max(end - 16 * MIB, 0) // (64 * KIB)
        call.set(CARRY, False)

    def _memory_e820(self, call: Call) -> None:
        """INT 15h E820h: the row of the memory map that EBX continues with."""
        rows = self.memory_map()
        if call.edx != SMAP or not _ROW.allows(call.ecx) or call.ebx >= len(rows):
            call.fail(UNSUPPORTED)
            return
        start, size, type = rows[call.ebx]
        row = start.to_bytes(8, "little") + size.to_bytes(8, "little") + type.to_bytes(4, "little")
        self.memory.write(call.es + call.di, row)
        call.ebx = (call.ebx + 1) % len(rows)
        call.eax = SMAP
        call.ecx = 20
        call.set(CARRY, False)

    def _keyboard(self, call: Call) -> None:
        """INT 16h."""
        function = call.ah & ~0x10
        if function == 0x00:
            key = self.keyboard.take()
            if key is None:
                self._wait()
            else:
                call.ax = key
        elif function == 0x01:
            key = self.keyboard.peek()
            call.set(ZERO, key is None)
            if key is not None:
                call.ax = key
        elif function == 0x02:
            call.al = 0  # no shift key is down
        elif call.ah == 0x05:
            call.al = 0 if self.keyboard.put(call.cx) else 1
        elif call.ah == 0x09:
            call.al = 0x20  # INT 16h 10h to 12h are there

    def _printer(self, call: Call) -> None:
        """INT 17h: a printer that is not there times out."""
        call.ah = 0x01

    def _bootstrap(self, call: Call) -> None:
        """INT 18h and 19h: there is nothing to boot from, but the machine can be reset."""
        self.reset()

    def _clock(self, call: Call) -> None:
        """INT 1Ah."""
        function = _CLOCK.get(call.ah)
        if function is None:
            call.fail(call.ah)  # PCI BIOS among them: AH as it was
        else:
            function(self, call)

    def _ticks(self, call: Call) -> None:
        """INT 1Ah 00h: timer ticks since midnight, 18.2 a second."""
        ticks = int.from_bytes(self.memory.read(TICKS, 4), "little")
        call.cx, call.dx = ticks >> 16, ticks & 0xFFFF
        call.al = self.memory.read(MIDNIGHT, 1)[0]
        self.memory.write(MIDNIGHT, b"\0")

    def _set_ticks(self, call: Call) -> None:
        """INT 1Ah 01h."""
        self.memory.write(TICKS, (call.cx << 16 | call.dx).to_bytes(4, "little"))
        self.memory.write(MIDNIGHT, b"\0")

    def _time(self, call: Call) -> None:
        """INT 1Ah 02h: hour, minute, second of the real-time clock, in its format (BCD)."""
        call.ch, call.cl, call.dh, call.dl = self._cmos(4), self._cmos(2), self._cmos(0), 0
        call.set(CARRY, False)

    def _date(self, call: Call) -> None:
        """INT 1Ah 04h: century, year, month, day."""
        call.ch, call.cl, call.dh, call.dl = (
            self._cmos(rtc_calendar.CENTURY),
            self._cmos(9),
            self._cmos(8),
            self._cmos(7),
        )
        call.set(CARRY, False)

    # -- snapshots

    def save(self) -> dict[str, Any]:
        """What is not in guest memory: keys that wait, where COM1's terminal has its cursor, a wait's rest."""
        left_ns = None if self._wait_end_ns is None else max(self._wait_end_ns - time.monotonic_ns(), 0)
        return {"keys": self.keyboard.save(), "screen": self.screen.save(), "wait_left_ns": left_ns}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.keyboard.restore(state["keys"])
        self.screen.restore(state["screen"])
        left_ns = state["wait_left_ns"]
        self._wait_end_ns = None if left_ns is None else time.monotonic_ns() + left_ns


_Service = Callable[[Bios, Call], None]

_SERVICES: dict[int, _Service] = {
    0x10: lambda bios, call: bios.screen.service(call),
    0x11: Bios._equipment,
    0x12: Bios._memory_size,
    0x13: Bios._disk,
    0x14: Bios._serial,
    0x15: Bios._system,
    0x16: Bios._keyboard,
    0x17: Bios._printer,
    0x18: Bios._bootstrap,
    0x19: Bios._bootstrap,
    0x1A: Bios._clock,
}

_SYSTEM_BY_AX: dict[int, _Service] = {
    0x2401: Bios._a20_on,
    0x2402: Bios._a20_status,
    0x2403: Bios._a20_support,
    0xE801: Bios._memory_e801,
    0xE820: Bios._memory_e820,
}

_SYSTEM: dict[int, _Service] = {
    0x86: Bios._wait_event,
    0x87: Bios._move_block,
    0x88: Bios._extended_memory,
}

_CLOCK: dict[int, _Service] = {
    0x00: Bios._ticks,
    0x01: Bios._set_ticks,
    0x02: Bios._time,
    0x04: Bios._date,
}
