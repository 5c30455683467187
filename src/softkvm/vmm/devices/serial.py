# SPDX-License-Identifier: Apache-2.0
"""The 16550A UART of a PC's COM ports.

Source: National Semiconductor PC16550D data sheet (registers in section 8, FIFO operation in section 8.11). What
Linux's 8250 driver relies on beyond it: enabling the transmitter interrupt while the holding register is empty raises
it, every time; on a PC the interrupt output reaches the bus only while OUT2 is set.

The transmitter is infinitely fast: a byte written is a byte sent. A FIFO filled below its trigger level asks for the
character time-out interrupt at once instead of four character times later.

The far end is a patient sender: it heeds RTS (EIA-232's flow control, RTS as "ready for receiving"), sends a character
no sooner than somebody can see it, and keeps it until it is read. So what is typed or piped before an operating system
has opened the port is there when it does, and what a slow guest cannot take waits outside. In detail, a character comes

- while the guest has the receiver's interrupt enabled and RTS up: at once, as many as the FIFO holds, and the next
  :data:`PAUSE_NS` after that is empty. Without a pause the line would stay busy for as long as there is input, and with
  it a handler that empties the FIFO (Linux's gives up after 512 rounds, and an edge-triggered interrupt is lost then);
- while RTS is up without the interrupt: when the guest looks at LSR;
- for a guest that never raised RTS: as if it were up. But drivers that print without interrupts look at LSR, too, and
  lose what comes before they are opened (Linux's clear the FIFO then): once such a guest has written MCR, and whenever
  RTS is down, only to one that reads LSR :data:`POLLS` times in a row, as a debugger does that waits for a key;
- never in loopback mode.

A FIFO that is cleared, by FCR or by loopback mode, gives unread characters of the line back to it. Overruns happen only
in loopback mode.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from softkvm.vmm.devices.pump import Pump
from softkvm.vmm.devices.timer import Timer

COM1_PORT: Final = 0x3F8
COM1_IRQ: Final = 4
REGISTERS: Final = 8

FIFO_SIZE: Final = 16
TRIGGER_LEVELS: Final = (1, 4, 8, 14)

# Registers, by offset. THR/RBR and IER are the divisor latch while LCR.DLAB is set.
RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR: Final = 3
MCR: Final = 4
LSR: Final = 5
MSR: Final = 6
SCR: Final = 7

IER_RDI: Final = 0x01
IER_THRI: Final = 0x02
IER_RLSI: Final = 0x04
IER_MSI: Final = 0x08

IIR_NONE: Final = 0x01
IIR_MSI: Final = 0x00
IIR_THRI: Final = 0x02
IIR_RDI: Final = 0x04
IIR_RLSI: Final = 0x06
IIR_TIMEOUT: Final = 0x0C
IIR_FIFO: Final = 0xC0

FCR_ENABLE: Final = 0x01
FCR_CLEAR_RX: Final = 0x02
FCR_CLEAR_TX: Final = 0x04

LCR_DLAB: Final = 0x80

MCR_DTR: Final = 0x01
MCR_RTS: Final = 0x02
MCR_OUT1: Final = 0x04
MCR_OUT2: Final = 0x08
MCR_LOOP: Final = 0x10

LSR_DR: Final = 0x01
LSR_OE: Final = 0x02
LSR_PE: Final = 0x04
LSR_FE: Final = 0x08
LSR_BI: Final = 0x10
LSR_THRE: Final = 0x20
LSR_TEMT: Final = 0x40
LSR_FIFO_ERROR: Final = 0x80
_LSR_LINE: Final = LSR_OE | LSR_PE | LSR_FE | LSR_BI

MSR_DCTS: Final = 0x01
MSR_DDSR: Final = 0x02
MSR_TERI: Final = 0x04
MSR_DDCD: Final = 0x08
MSR_CTS: Final = 0x10
MSR_DSR: Final = 0x20
MSR_RI: Final = 0x40
MSR_DCD: Final = 0x80
_MSR_CONNECTED: Final = MSR_CTS | MSR_DSR | MSR_DCD

# Loopback ties the modem outputs to the modem inputs (data sheet, MCR bit 4).
_LOOPBACK: Final = ((MCR_DTR, MSR_DSR), (MCR_RTS, MSR_CTS), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))

POLLS: Final = 16
"""Reads of LSR in a row that tell a guest that waits for input from one that prints."""

PAUSE_NS: Final = 500_000
"""Between the moment a FIFO has been emptied and the next characters."""

INPUT_LIMIT: Final = 4096
"""Characters that may wait on the line before its sender is asked to wait, too."""

# An entry of the receiver: bits 7:0 the character, 15:8 its LSR error bits, and whether the line or loopback sent it.
_LOCAL: Final = 1 << 16


class Serial:
    """A 16550A whose far end is a terminal: what the guest sends goes to ``sink`` in pieces, ``feed()`` is its input.

    ``sink`` runs on a thread of the UART's, a few milliseconds after the first byte of a piece, so that a byte costs
    the vCPU an append; ``flush()`` and ``close()`` deliver what is left at once. A sink that blocks stops the guest
    only when a mebibyte waits. ``set_irq`` is called with the level of the interrupt line when that changes.
    """

    def __init__(
        self, sink: Callable[[bytes], object] | None = None, set_irq: Callable[[int], object] | None = None
    ) -> None:
        self._set_irq = set_irq
        self._lock = threading.Lock()
        self._rx: deque[int] = deque()
        self._backlog: deque[int] = deque()  # on the line: not there yet
        self._room = threading.Condition(self._lock)
        self._paused = False
        self._next = Timer("serial input", time.monotonic_ns, self._next_characters)
        self._pump = Pump(sink) if sink is not None else None
        self._reset()
        self._readers: tuple[Callable[[], int], ...] = (
            self._read_rbr,
            self._read_ier,
            self._read_iir,
            lambda: self._lcr,
            lambda: self._mcr,
            self._read_lsr,
            self._read_msr,
            lambda: self._scr,
        )
        self._writers: tuple[Callable[[int], None], ...] = (
            self._write_thr,
            self._write_ier,
            self._write_fcr,
            self._write_lcr,
            self._write_mcr,
            lambda value: None,  # LSR: factory testing only
            lambda value: None,  # MSR: read-only on a PC
            self._write_scr,
        )

    def reset(self) -> None:
        """Master reset: what the line has sent and nobody has read is sent again."""
        with self._lock:
            self._give_back()
            if self._irq_level and self._set_irq is not None:
                self._set_irq(0)
            self._reset()
            self._next.arm(None)

    def _reset(self) -> None:
        """Master reset (data sheet, table III)."""
        self._ier = 0
        self._lcr = 0
        self._mcr = 0
        self._scr = 0
        self._divisor = 0x0C  # 9600 baud, as firmware leaves it
        self._fifo = False
        self._trigger = 1
        self._lsr = LSR_THRE | LSR_TEMT
        self._msr = _MSR_CONNECTED
        self._thre_pending = False
        self._irq_level = 0
        self._mcr_written = False
        self._rts_used = False  # the guest has raised RTS: from then on it is flow control
        self._polls = 0  # reads of LSR since anything else

    # -- the bus's side

    def read(self, offset: int, size: int = 1) -> int:
        """Read ``size`` registers from ``offset``, the lowest in the low byte."""
        if size == 1:
            return self._readers[offset]()
        return sum(self._readers[offset + i]() << 8 * i for i in range(size) if offset + i < REGISTERS)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` registers from ``offset``, the lowest from the low byte."""
        if size == 1:
            self._writers[offset](value & 0xFF)
            return
        for i in range(min(size, REGISTERS - offset)):
            self._writers[offset + i](value >> 8 * i & 0xFF)

    # -- the terminal's side (any thread)

    def feed(self, data: bytes) -> None:
        """Send ``data`` on the line, where it waits as long as the guest takes nothing; any amount, without waiting."""
        with self._lock:
            self._backlog.extend(data)
            self._receive()

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until fewer than :data:`INPUT_LIMIT` characters are on the line; False if it takes longer."""
        with self._room:
            return self._room.wait_for(lambda: len(self._backlog) < INPUT_LIMIT, timeout_s)

    def send_break(self) -> None:
        """Send a break condition: a zero character with LSR.BI (SysRq on a Linux serial console).

        It goes before what waits on the line, and RTS does not hold it up.
        """
        with self._lock:
            if len(self._rx) < self._capacity and not self._mcr & MCR_LOOP and not self._paused:
                self._rx.append(LSR_BI << 8)
                self._update_lsr()
                self._update_irq()
            else:
                self._backlog.appendleft(LSR_BI << 8)

    @property
    def pending_input(self) -> int:
        """Characters fed and not yet read by the guest."""
        return len(self._rx) + len(self._backlog)

    def flush(self) -> None:
        """Hand everything sent so far to the sink before returning."""
        if self._pump is not None:
            self._pump.flush()

    def close(self) -> None:
        """Flush and end the threads; the registers keep working and what is sent from now on is dropped."""
        self._next.close()
        if self._pump is not None:
            self._pump.close()

    def pause(self) -> None:
        """Let what is fed wait on the line; what was sent goes on its way."""
        self._next.pause()
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        """Take what waits."""
        with self._lock:
            self._paused = False
            if not self._rx:
                self._receive()
        self._next.resume()

    # -- interrupts

    def _update_irq(self) -> None:
        level = int(self._pending_interrupt() != IIR_NONE and self._mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2)
        if level != self._irq_level:
            self._irq_level = level
            if self._set_irq is not None:
                self._set_irq(level)

    def _pending_interrupt(self) -> int:
        """The highest-priority interrupt as IIR shows it (data sheet, table IV)."""
        ier = self._ier
        if ier & IER_RLSI and self._lsr & _LSR_LINE:
            return IIR_RLSI
        if ier & IER_RDI and self._rx:
            return IIR_RDI if len(self._rx) >= self._trigger else IIR_TIMEOUT
        if ier & IER_THRI and self._thre_pending:
            return IIR_THRI
        if ier & IER_MSI and self._msr & 0x0F:
            return IIR_MSI
        return IIR_NONE

    @property
    def irq_level(self) -> int:
        """How the device drives its interrupt line."""
        return self._irq_level

    # -- receiver

    @property
    def _capacity(self) -> int:
        """Characters that the receiver holds."""
        return FIFO_SIZE if self._fifo else 1

    @property
    def _interrupting(self) -> bool:
        """Whether characters come by themselves: see the top of the module."""
        return bool(self._ier & IER_RDI and (self._mcr & MCR_RTS or not self._rts_used))

    def _receive(self) -> None:
        """Take from the line what comes without being looked for."""
        if self._backlog and self._interrupting:
            self._take(FIFO_SIZE)

    def _next_characters(self) -> None:
        with self._lock:
            if not self._rx:
                self._receive()

    def _take(self, most: int) -> None:
        """Move up to ``most`` characters that wait on the line into the receiver, as far as it has room."""
        if self._mcr & MCR_LOOP or self._paused:
            return
        rx, backlog = self._rx, self._backlog
        room = min(most, self._capacity - len(rx), len(backlog))
        if room > 0:
            for _ in range(room):
                rx.append(backlog.popleft())
            if len(backlog) < INPUT_LIMIT <= len(backlog) + room:
                self._room.notify_all()
            self._update_lsr()
            self._update_irq()

    def _give_back(self) -> None:
        """Empty the receiver: what the line sent is sent again."""
        self._backlog.extendleft(entry for entry in reversed(self._rx) if not entry & _LOCAL)
        self._rx.clear()
        self._lsr &= ~_LSR_LINE

    def _update_lsr(self) -> None:
        """LSR's data-ready and error bits belong to the character at the top of the FIFO."""
        lsr = self._lsr & ~(LSR_DR | LSR_FIFO_ERROR)
        if self._rx:
            lsr |= LSR_DR | self._rx[0] >> 8 & 0xFF
            self._rx[0] &= 0xFF | _LOCAL  # reported once
            if self._fifo and any(entry >> 8 & 0xFF for entry in self._rx):
                lsr |= LSR_FIFO_ERROR
        self._lsr = lsr

    def _read_rbr(self) -> int:
        with self._lock:
            if self._lcr & LCR_DLAB:
                return self._divisor & 0xFF
            if not self._rx:
                return 0
            value = self._rx.popleft() & 0xFF
            if self._backlog and not self._rx and self._interrupting:
                self._next.arm(time.monotonic_ns() + PAUSE_NS)
            self._update_lsr()
            self._update_irq()
            return value

    def _read_lsr(self) -> int:
        if self._backlog and not self._rx:
            self._poll()
        lsr = self._lsr
        if lsr & (_LSR_LINE | LSR_FIFO_ERROR):
            with self._lock:
                lsr = self._lsr
                self._lsr = lsr & ~_LSR_LINE
                self._update_lsr()
                self._update_irq()
        return lsr

    def _poll(self) -> None:
        """The guest looks whether something has come, or whether it can send: it does not say which."""
        with self._lock:
            self._polls += 1
            if self._interrupting:
                return
            if self._mcr & MCR_RTS or not self._mcr_written:
                self._take(FIFO_SIZE)
            elif self._polls >= POLLS:
                self._take(1)

    # -- transmitter

    def _write_thr(self, value: int) -> None:
        self._polls = 0
        if self._lcr & LCR_DLAB:
            with self._lock:
                self._divisor = self._divisor & 0xFF00 | value
            return
        if self._mcr & MCR_LOOP:
            self._loop_back(value)
        elif self._pump is not None:
            self._pump.put(value)
        # Sent at once: the register was full and is empty again.
        if self._ier & IER_THRI:
            with self._lock:
                self._thre_pending = True
                self._update_irq()
        else:
            self._thre_pending = True

    def _loop_back(self, value: int) -> None:
        with self._lock:
            if len(self._rx) < self._capacity:
                self._rx.append(value | _LOCAL)
            else:
                # The FIFO keeps what it has; without one the new character overwrites the old.
                self._lsr |= LSR_OE
                if not self._fifo:
                    self._rx[0] = value | _LOCAL
            self._update_lsr()
            self._update_irq()

    # -- control registers

    def _read_ier(self) -> int:
        return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier

    def _write_ier(self, value: int) -> None:
        with self._lock:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
                return
            rising = value & ~self._ier
            self._ier = value & 0x0F
            if rising & IER_THRI:
                self._thre_pending = True  # the holding register is always empty
            self._polls = 0
            self._receive()
            self._update_irq()

    def _read_iir(self) -> int:
        with self._lock:
            pending = self._pending_interrupt()
            if pending == IIR_THRI:
                self._thre_pending = False
                self._update_irq()
            return pending | (IIR_FIFO if self._fifo else 0)

    def _write_fcr(self, value: int) -> None:
        with self._lock:
            enable = bool(value & FCR_ENABLE)
            if enable != self._fifo:
                value |= FCR_CLEAR_RX
                self._fifo = enable
            if value & FCR_CLEAR_RX:
                self._give_back()
            # The other bits are programmed only together with bit 0 (data sheet, FCR bit 0).
            self._trigger = TRIGGER_LEVELS[value >> 6] if enable else 1
            self._polls = 0
            self._update_lsr()
            self._receive()
            self._update_irq()

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _write_mcr(self, value: int) -> None:
        with self._lock:
            if value & ~self._mcr & MCR_LOOP:
                self._give_back()
                self._update_lsr()
            self._mcr = value & 0x1F
            self._mcr_written = True
            self._polls = 0
            if self._mcr & MCR_LOOP:
                inputs = sum(msr for mcr, msr in _LOOPBACK if self._mcr & mcr)
            else:
                inputs = _MSR_CONNECTED
                self._rts_used |= bool(value & MCR_RTS)
            self._set_modem_inputs(inputs)
            self._receive()
            self._update_irq()

    def _set_modem_inputs(self, inputs: int) -> None:
        changed = (inputs ^ self._msr) & 0xF0
        deltas = changed >> 4 & (MSR_DCTS | MSR_DDSR | MSR_DDCD)
        if changed & MSR_RI and not inputs & MSR_RI:
            deltas |= MSR_TERI  # trailing edge only
        self._msr = inputs | self._msr & 0x0F | deltas

    def _read_msr(self) -> int:
        with self._lock:
            value = self._msr
            self._msr = value & 0xF0
            self._update_irq()
            return value

    def _write_scr(self, value: int) -> None:
        self._scr = value

    # -- snapshots

    _SAVED: Final = (
        "_ier",
        "_lcr",
        "_mcr",
        "_scr",
        "_divisor",
        "_fifo",
        "_trigger",
        "_lsr",
        "_msr",
        "_thre_pending",
        "_irq_level",
        "_mcr_written",
        "_rts_used",
        "_polls",
    )

    def save(self) -> dict[str, Any]:
        """The UART's state, unread input included; what was sent is flushed first and is no part of it."""
        self.flush()
        with self._lock:
            state: dict[str, Any] = {name[1:]: getattr(self, name) for name in self._SAVED}
            state["rx"] = list(self._rx)
            state["backlog"] = list(self._backlog)
            return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state. The interrupt line is not driven: the chip it leads to has its own snapshot."""
        with self._lock:
            for name in self._SAVED:
                setattr(self, name, state[name[1:]])
            self._rx = deque(state["rx"])
            self._backlog = deque(state["backlog"])
            self._room.notify_all()
            self._next.arm(time.monotonic_ns() + PAUSE_NS)
