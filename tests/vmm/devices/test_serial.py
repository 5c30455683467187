# SPDX-License-Identifier: Apache-2.0
"""16550A semantics, expected values from the PC16550D data sheet and from what Linux's 8250 driver probes."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from softkvm.vmm.devices import serial
from softkvm.vmm.devices.serial import FCR, IER, IIR, LCR, LSR, MCR, MSR, RBR, SCR, THR, Serial


class Line:
    """An interrupt line that remembers its edges."""

    def __init__(self) -> None:
        self.levels: list[int] = []

    def __call__(self, level: int) -> None:
        self.levels.append(level)

    @property
    def level(self) -> int:
        return self.levels[-1] if self.levels else 0


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def output() -> bytearray:
    return bytearray()


@pytest.fixture
def uart(line: Line, output: bytearray) -> Iterator[Serial]:
    uart = Serial(output.extend, line)
    yield uart
    uart.close()


def receive(uart: Serial) -> bytes:
    """Take what comes, as a driver without interrupts does."""
    received = bytearray()
    while uart.read(LSR) & serial.LSR_DR:
        received.append(uart.read(RBR))
    return bytes(received)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def receive_by_interrupt(uart: Serial, line: Line, count: int) -> bytes:
    """Take *count* characters, looking when the interrupt line says so."""
    received = b""
    while len(received) < count:
        wait_until(lambda: line.level == 1)
        received += receive(uart)
    return received


def linux_probes(uart: Serial) -> None:
    """What Linux's 8250 driver does to find the port and its kind (autoconfig(), serial8250_config_port())."""
    before = uart.read(MCR)
    uart.write(MCR, 1, serial.MCR_LOOP | serial.MCR_OUT2 | serial.MCR_RTS)
    uart.read(MSR)
    uart.write(MCR, 1, before)
    for fcr in (serial.FCR_ENABLE, serial.FCR_ENABLE | serial.FCR_CLEAR_RX | serial.FCR_CLEAR_TX, 0):
        uart.write(FCR, 1, fcr)
    uart.read(RBR)
    uart.write(IER, 1, 0)
    uart.write(MCR, 1, serial.MCR_DTR)  # a console's port


def linux_prints(uart: Serial, text: bytes) -> None:
    """Its console output: serial8250_console_write(), which waits for the transmitter before and after."""
    for byte in text:
        assert uart.read(LSR) & serial.LSR_THRE
        uart.write(THR, 1, byte)
    uart.read(LSR)
    uart.read(LSR)


def linux_opens(uart: Serial) -> None:
    """What it does when a process opens the port (serial8250_do_startup(), _set_termios(), uart_port_dtr_rts())."""
    for fcr in (serial.FCR_ENABLE, serial.FCR_ENABLE | serial.FCR_CLEAR_RX | serial.FCR_CLEAR_TX, 0):
        uart.write(FCR, 1, fcr)
    for register in (LSR, RBR, IIR, MSR):
        uart.read(register)
    uart.write(MCR, 1, serial.MCR_DTR | serial.MCR_OUT2)
    for fcr in (serial.FCR_ENABLE, serial.FCR_ENABLE | 0x80):
        uart.write(FCR, 1, fcr)
    uart.write(IER, 1, serial.IER_RDI | serial.IER_RLSI)
    uart.write(MCR, 1, serial.MCR_DTR | serial.MCR_RTS | serial.MCR_OUT2)


def test_master_reset_values(uart: Serial) -> None:
    assert uart.read(IER) == 0x00
    assert uart.read(IIR) == 0x01
    assert uart.read(LCR) == 0x00
    assert uart.read(MCR) == 0x00
    assert uart.read(LSR) == 0x60


def test_linux_detects_a_16550a(uart: Serial) -> None:
    # autoconfig(): IER keeps four bits, the scratch register eight, IIR's top bits say the FIFO works.
    uart.write(IER, 1, 0xFF)
    assert uart.read(IER) == 0x0F
    uart.write(IER, 1, 0)
    uart.write(SCR, 1, 0xA5)
    assert uart.read(SCR) == 0xA5
    uart.write(FCR, 1, serial.FCR_ENABLE)
    assert uart.read(IIR) >> 6 == 3
    uart.write(FCR, 1, 0)
    assert uart.read(IIR) >> 6 == 0


def test_linux_loopback_test(uart: Serial) -> None:
    uart.write(MCR, 1, serial.MCR_LOOP | serial.MCR_OUT2 | serial.MCR_RTS)
    assert uart.read(MSR) & 0xF0 == serial.MSR_DCD | serial.MSR_CTS


@pytest.mark.parametrize(
    ("mcr", "msr"),
    [
        (serial.MCR_DTR, serial.MSR_DSR),
        (serial.MCR_RTS, serial.MSR_CTS),
        (serial.MCR_OUT1, serial.MSR_RI),
        (serial.MCR_OUT2, serial.MSR_DCD),
    ],
)
def test_loopback_ties_modem_outputs_to_inputs(uart: Serial, mcr: int, msr: int) -> None:
    uart.write(MCR, 1, serial.MCR_LOOP | mcr)
    assert uart.read(MSR) & 0xF0 == msr


def test_thre_interrupt_is_raised_every_time_it_is_enabled_while_empty(uart: Serial) -> None:
    # serial8250_do_startup()'s THRE test: the second enabling must raise it again.
    for _ in range(2):
        uart.write(IER, 1, serial.IER_THRI)
        assert uart.read(IIR) & 0x0F == serial.IIR_THRI
        assert uart.read(IIR) & 0x0F == serial.IIR_NONE
        uart.write(IER, 1, 0)


def test_thre_interrupt_is_cleared_by_reading_iir_and_raised_by_the_next_byte(uart: Serial, line: Line) -> None:
    uart.write(MCR, 1, serial.MCR_OUT2)
    uart.write(IER, 1, serial.IER_THRI)
    assert line.level == 1
    uart.read(IIR)
    assert line.level == 0
    uart.write(THR, 1, ord("x"))
    assert line.level == 1
    assert uart.read(IIR) & 0x0F == serial.IIR_THRI


def test_interrupt_reaches_the_bus_only_with_out2(uart: Serial, line: Line) -> None:
    uart.write(IER, 1, serial.IER_RDI)
    uart.feed(b"a")
    assert line.level == 0
    assert uart.read(IIR) == serial.IIR_RDI
    uart.write(MCR, 1, serial.MCR_OUT2)
    assert line.level == 1
    uart.write(MCR, 1, serial.MCR_OUT2 | serial.MCR_LOOP)
    assert line.level == 0


def test_output_arrives_whole_and_in_order(uart: Serial, output: bytearray) -> None:
    text = bytes(range(256)) * 8
    for byte in text:
        uart.write(THR, 1, byte)
    uart.flush()
    assert output == text


def test_output_arrives_without_flush(uart: Serial, output: bytearray) -> None:
    uart.write(THR, 1, ord("$"))
    deadline = time.monotonic() + 5
    while not output and time.monotonic() < deadline:
        time.sleep(0.001)
    assert output == b"$"
    uart.close()


def test_close_delivers_what_is_left(uart: Serial, output: bytearray) -> None:
    for byte in b"bye":
        uart.write(THR, 1, byte)
    uart.close()
    assert output == b"bye"


def test_a_sink_that_fails_does_not_reach_the_guest() -> None:
    def broken(data: bytes) -> None:
        raise BrokenPipeError

    uart = Serial(broken)
    uart.write(THR, 1, 1)
    uart.flush()
    uart.write(THR, 1, 2)
    uart.close()
    assert uart.read(LSR) == 0x60


def test_output_from_several_threads_loses_nothing(uart: Serial, output: bytearray) -> None:
    def send(byte: int) -> None:
        for _ in range(2000):
            uart.write(THR, 1, byte)

    threads = [threading.Thread(target=send, args=(byte,)) for byte in b"abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    uart.close()
    assert {byte: output.count(byte) for byte in b"abcd"} == dict.fromkeys(b"abcd", 2000)


def test_input_without_fifo_is_one_character_at_a_time_and_never_lost(uart: Serial) -> None:
    uart.feed(b"hello")
    assert receive(uart) == b"hello"
    assert not uart.read(LSR) & serial.LSR_OE


@pytest.mark.parametrize("early", [False, True], ids=["", "earlycon"])
def test_what_is_typed_before_linux_opens_the_port_is_there_when_it_does(uart: Serial, line: Line, early: bool) -> None:
    text = bytes(range(0x20, 0x60))
    uart.feed(text)
    if early:
        uart.write(MCR, 1, serial.MCR_DTR | serial.MCR_RTS)
        linux_prints(uart, b"early")
    linux_probes(uart)
    linux_prints(uart, b"Linux version\n" * 100)
    linux_probes(uart)  # once more, as a plug and play device
    assert line.level == 0
    linux_opens(uart)
    assert line.level == 1
    assert receive_by_interrupt(uart, line, len(text)) == text


def test_rts_that_falls_holds_up_the_line(uart: Serial) -> None:
    linux_opens(uart)
    uart.feed(b"a" * 20)
    uart.write(MCR, 1, serial.MCR_DTR | serial.MCR_OUT2)  # uart_throttle()
    assert receive(uart) == b"a" * 16  # what was in the FIFO
    time.sleep(10 * serial.PAUSE_NS / 1e9)
    assert uart.read(IIR) & 0x0F == serial.IIR_NONE
    uart.write(MCR, 1, serial.MCR_DTR | serial.MCR_RTS | serial.MCR_OUT2)
    assert receive(uart) == b"a" * 4


def test_interrupt_line_falls_between_two_fifos_of_input(uart: Serial, line: Line) -> None:
    """An edge-triggered interrupt whose line never falls comes once."""
    linux_opens(uart)
    uart.feed(b"x" * 100)
    for _ in range(6):
        wait_until(lambda: line.level == 1)
        assert receive(uart) == b"x" * 16
        assert line.level == 0
    wait_until(lambda: line.level == 1)
    assert receive(uart) == b"x" * 4


def test_debugger_that_waits_for_a_key_gets_it_without_rts(uart: Serial) -> None:
    """kgdb's: serial8250_get_poll_char() of a port that no process has opened."""
    linux_probes(uart)
    uart.feed(b"$g#67")
    received = bytearray()
    for _ in range(5 * serial.POLLS):
        if uart.read(LSR) & serial.LSR_DR:
            received.append(uart.read(RBR))
    assert received == b"$g#67"


def test_guest_that_uses_interrupts_and_never_rts_gets_input(uart: Serial, line: Line) -> None:
    uart.write(MCR, 1, serial.MCR_OUT2)
    uart.write(IER, 1, serial.IER_RDI)
    uart.feed(b"k")
    assert line.level == 1
    assert receive(uart) == b"k"


def test_sender_waits_for_room_until_the_guest_reads(uart: Serial) -> None:
    uart.feed(b"x" * serial.INPUT_LIMIT)
    assert not uart.wait_for_room(0)
    waits = threading.Thread(target=uart.wait_for_room, args=(60,))
    waits.start()
    assert uart.read(LSR) & serial.LSR_DR
    waits.join(30)
    assert not waits.is_alive()
    assert uart.wait_for_room(0)


def test_break_is_not_held_up_by_what_waits(uart: Serial) -> None:
    linux_opens(uart)
    uart.write(MCR, 1, serial.MCR_OUT2)
    uart.feed(b"held")
    uart.send_break()
    assert uart.read(LSR) & (serial.LSR_DR | serial.LSR_BI) == serial.LSR_DR | serial.LSR_BI


def test_reading_an_empty_receiver_gives_zero(uart: Serial) -> None:
    assert uart.read(RBR) == 0


@pytest.mark.parametrize(("code", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
def test_fifo_trigger_level_decides_between_data_and_timeout(uart: Serial, code: int, level: int) -> None:
    uart.write(FCR, 1, serial.FCR_ENABLE | code << 6)
    uart.write(IER, 1, serial.IER_RDI)
    uart.feed(b"x" * level)
    assert uart.read(IIR) & 0x0F == serial.IIR_RDI
    uart.read(RBR)
    below = serial.IIR_TIMEOUT if level > 1 else serial.IIR_NONE
    assert uart.read(IIR) & 0x0F == below


def test_fcr_bits_other_than_enable_are_ignored_without_it(uart: Serial) -> None:
    uart.write(MCR, 1, serial.MCR_LOOP)
    uart.write(FCR, 1, serial.FCR_ENABLE)
    uart.write(THR, 1, ord("a"))
    uart.write(FCR, 1, serial.FCR_ENABLE | serial.FCR_CLEAR_RX)
    assert not uart.read(LSR) & serial.LSR_DR
    uart.write(FCR, 1, 0xC0)
    assert uart.read(IIR) & serial.IIR_FIFO == 0


def test_loopback_moves_data_and_overruns(uart: Serial, output: bytearray) -> None:
    uart.write(MCR, 1, serial.MCR_LOOP)
    uart.write(THR, 1, 0x55)
    assert uart.read(LSR) & serial.LSR_DR
    assert uart.read(RBR) == 0x55
    uart.write(FCR, 1, serial.FCR_ENABLE)
    for byte in range(17):
        uart.write(THR, 1, byte)
    assert uart.read(LSR) & (serial.LSR_DR | serial.LSR_OE) == serial.LSR_DR | serial.LSR_OE
    assert not uart.read(LSR) & serial.LSR_OE  # cleared by reading
    assert [uart.read(RBR) for _ in range(16)] == list(range(16))
    assert not uart.read(LSR) & serial.LSR_DR
    uart.close()
    assert output == b""


def test_line_input_waits_while_in_loopback_mode(uart: Serial) -> None:
    uart.write(MCR, 1, serial.MCR_LOOP)
    uart.feed(b"q")
    assert not uart.read(LSR) & serial.LSR_DR
    uart.write(MCR, 1, serial.MCR_RTS)
    assert receive(uart) == b"q"


def test_break_is_reported_once_with_a_zero_character(uart: Serial, line: Line) -> None:
    uart.write(MCR, 1, serial.MCR_OUT2)
    uart.write(FCR, 1, serial.FCR_ENABLE)
    uart.write(IER, 1, serial.IER_RLSI)
    uart.send_break()
    assert line.level == 1
    assert uart.read(IIR) & 0x0F == serial.IIR_RLSI
    assert uart.read(LSR) & (serial.LSR_DR | serial.LSR_BI) == serial.LSR_DR | serial.LSR_BI
    assert line.level == 0
    assert not uart.read(LSR) & serial.LSR_BI
    assert uart.read(RBR) == 0


def test_error_deep_in_the_fifo_shows_in_lsr_bit_7(uart: Serial) -> None:
    uart.write(FCR, 1, serial.FCR_ENABLE)
    uart.feed(b"a")
    assert uart.read(LSR) & serial.LSR_DR
    uart.send_break()
    assert uart.read(LSR) & (serial.LSR_FIFO_ERROR | serial.LSR_BI) == serial.LSR_FIFO_ERROR
    uart.read(RBR)
    assert uart.read(LSR) & serial.LSR_BI


def test_interrupt_priorities(uart: Serial) -> None:
    uart.write(IER, 1, 0x0F)
    uart.write(MCR, 1, serial.MCR_LOOP)  # modem inputs change: delta bits
    uart.write(THR, 1, 1)
    uart.write(THR, 1, 2)  # overrun
    assert uart.read(IIR) == serial.IIR_RLSI
    uart.read(LSR)
    assert uart.read(IIR) == serial.IIR_RDI
    uart.read(RBR)
    assert uart.read(IIR) == serial.IIR_THRI
    assert uart.read(IIR) == serial.IIR_MSI
    assert uart.read(MSR) & 0x0F
    assert uart.read(IIR) == serial.IIR_NONE
    assert uart.read(MSR) & 0x0F == 0


def test_divisor_latch_hides_data_and_ier(uart: Serial, output: bytearray) -> None:
    uart.write(LCR, 1, serial.LCR_DLAB | 3)
    uart.write(THR, 1, 0x34)
    uart.write(IER, 1, 0x12)
    assert (uart.read(RBR), uart.read(IER)) == (0x34, 0x12)
    assert uart.read(0, 2) == 0x1234
    uart.write(LCR, 1, 3)
    assert uart.read(IER) == 0
    uart.close()
    assert output == b""


def test_ring_indicator_sets_its_delta_on_the_trailing_edge_only(uart: Serial) -> None:
    uart.write(MCR, 1, serial.MCR_LOOP)
    uart.read(MSR)
    uart.write(MCR, 1, serial.MCR_LOOP | serial.MCR_OUT1)
    assert not uart.read(MSR) & serial.MSR_TERI
    uart.write(MCR, 1, serial.MCR_LOOP)
    assert uart.read(MSR) & serial.MSR_TERI


def test_save_and_restore_carry_unread_input_and_registers(uart: Serial) -> None:
    uart.write(FCR, 1, serial.FCR_ENABLE | 0x80)
    uart.write(IER, 1, serial.IER_RDI)
    uart.write(SCR, 1, 0x77)
    uart.feed(bytes(range(40)))
    state = uart.save()
    line = Line()
    other = Serial(None, line)
    other.restore(state)
    assert other.read(SCR) == 0x77
    assert other.read(IIR) == serial.IIR_FIFO | serial.IIR_RDI
    assert receive(other) == bytes(range(16))
    other.write(MCR, 1, serial.MCR_OUT2)
    assert receive_by_interrupt(other, line, 24) == bytes(range(16, 40))
    assert other.pending_input == 0
    other.close()
