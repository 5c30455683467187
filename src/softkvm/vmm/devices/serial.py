# SPDX-License-Identifier: Apache-2.0
"""The 16550A UART of a PC's COM ports.

Source: National Semiconductor PC16550D data sheet (registers in section 8, FIFO operation in section 8.11). What
Linux's 8250 driver relies on beyond it: enabling the transmitter interrupt while the holding register is empty raises
it, every time; on a PC the interrupt output reaches the bus only while OUT2 is set.

The transmitter is infinitely fast: a byte written is a byte sent. Received bytes that find the FIFO full wait
outside it, so nothing is lost and overruns happen only in loopback mode. A FIFO filled below its trigger level asks
for the character time-out interrupt at once instead of four character times later.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

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

_FLUSH_DELAY_S: Final = 0.004
_BACKLOG_LIMIT: Final = 1 << 20


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
        self._rx: deque[int] = deque()  # bits 7:0 the character, 15:8 its LSR error bits
        self._backlog: deque[int] = deque()
        self._pump = _Pump(sink) if sink is not None else None
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
        """Receive ``data`` on the line."""
        with self._lock:
            self._backlog.extend(data)
            self._refill()
            self._update_irq()

    def send_break(self) -> None:
        """Receive a break condition: a zero character with LSR.BI (SysRq on a Linux serial console)."""
        with self._lock:
            self._backlog.append(LSR_BI << 8)
            self._refill()
            self._update_irq()

    @property
    def pending_input(self) -> int:
        """Characters fed and not yet read by the guest."""
        return len(self._rx) + len(self._backlog)

    def flush(self) -> None:
        """Hand everything sent so far to the sink before returning."""
        if self._pump is not None:
            self._pump.flush()

    def close(self) -> None:
        """Flush and end the output thread; the registers keep working and what is sent from now on is dropped."""
        if self._pump is not None:
            self._pump.close()

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

    # -- receiver

    def _refill(self) -> None:
        """Move waiting characters into the FIFO; in loopback mode the line is disconnected."""
        if self._mcr & MCR_LOOP:
            return
        room = (FIFO_SIZE if self._fifo else 1) - len(self._rx)
        while room > 0 and self._backlog:
            self._rx.append(self._backlog.popleft())
            room -= 1
        self._update_lsr()

    def _update_lsr(self) -> None:
        """LSR's data-ready and error bits belong to the character at the top of the FIFO."""
        lsr = self._lsr & ~(LSR_DR | LSR_FIFO_ERROR)
        if self._rx:
            lsr |= LSR_DR | self._rx[0] >> 8
            self._rx[0] &= 0xFF  # reported once
            if self._fifo and any(entry >> 8 for entry in self._rx):
                lsr |= LSR_FIFO_ERROR
        self._lsr = lsr

    def _read_rbr(self) -> int:
        with self._lock:
            if self._lcr & LCR_DLAB:
                return self._divisor & 0xFF
            if not self._rx:
                return 0
            value = self._rx.popleft() & 0xFF
            if self._backlog:
                self._refill()
            self._update_lsr()
            self._update_irq()
            return value

    def _read_lsr(self) -> int:
        lsr = self._lsr
        if lsr & (_LSR_LINE | LSR_FIFO_ERROR):
            with self._lock:
                lsr = self._lsr
                self._lsr = lsr & ~_LSR_LINE
                self._update_lsr()
                self._update_irq()
        return lsr

    # -- transmitter

    def _write_thr(self, value: int) -> None:
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
            if len(self._rx) < (FIFO_SIZE if self._fifo else 1):
                self._rx.append(value)
            else:
                # The FIFO keeps what it has; without one the new character overwrites the old.
                self._lsr |= LSR_OE
                if not self._fifo:
                    self._rx[0] = value
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
                self._rx.clear()
                self._lsr &= ~_LSR_LINE
            # The other bits are programmed only together with bit 0 (data sheet, FCR bit 0).
            self._trigger = TRIGGER_LEVELS[value >> 6] if enable else 1
            self._refill()
            self._update_lsr()
            self._update_irq()

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _write_mcr(self, value: int) -> None:
        with self._lock:
            self._mcr = value & 0x1F
            if self._mcr & MCR_LOOP:
                inputs = sum(msr for mcr, msr in _LOOPBACK if self._mcr & mcr)
            else:
                inputs = _MSR_CONNECTED
            self._set_modem_inputs(inputs)
            self._refill()
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


class _Pump:
    """Collects sent bytes and hands them to the sink from a thread of its own."""

    def __init__(self, sink: Callable[[bytes], object]) -> None:
        self._sink = sink
        self._buffer = bytearray()
        self._lock = threading.Lock()  # the buffer
        self._delivery = threading.Lock()  # the order of pieces at the sink
        self._wake = threading.Event()
        self._room = threading.Condition(self._lock)
        self._closed = False
        self._broken = False
        self._thread: threading.Thread | None = None

    def put(self, value: int) -> None:
        with self._lock:
            buffer = self._buffer
            buffer.append(value)
            length = len(buffer)
            if 1 < length < _BACKLOG_LIMIT:
                return
            if self._closed:
                buffer.clear()
                return
            if length == 1:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._loop, name="serial output", daemon=True)
                    self._thread.start()
                self._wake.set()
                return
            while len(self._buffer) >= _BACKLOG_LIMIT and not self._closed:
                self._room.wait()

    def flush(self) -> None:
        with self._delivery:
            with self._lock:
                data, self._buffer = bytes(self._buffer), bytearray()
                self._room.notify_all()
            if data and not self._broken:
                try:
                    self._sink(data)
                except OSError:
                    self._broken = True  # the far end is gone: the line is open, the guest need not know

    def close(self) -> None:
        with self._lock:
            self._closed = True
            thread = self._thread
            self._room.notify_all()
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self.flush()

    def _loop(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            if not self._closed:
                # Let a line gather.
                time.sleep(_FLUSH_DELAY_S)
            self.flush()
