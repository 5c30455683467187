# SPDX-License-Identifier: Apache-2.0
"""The 8042 keyboard controller, with nothing plugged into it, and port 0x92, which does two of its jobs.

Guests use it to reset the machine (command 0xFE) and probe it for a keyboard and a mouse. Every probe is answered at
once: a command that waits for an answer that never comes costs Linux half a second.

Source: Intel 8042 as in the IBM PC AT technical reference, section "Keyboard controller"; PS/2 auxiliary commands as
in the IBM PS/2 hardware interface technical reference, "Keyboard and auxiliary device controller".
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

DATA_PORT: Final = 0x60
COMMAND_PORT: Final = 0x64
KEYBOARD_IRQ: Final = 1

STATUS_OBF: Final = 0x01  # output buffer full
STATUS_SYSTEM: Final = 0x04  # self-test passed
STATUS_COMMAND: Final = 0x08  # the last write was to the command port
STATUS_UNLOCKED: Final = 0x10
STATUS_AUX_OBF: Final = 0x20
STATUS_TIMEOUT: Final = 0x40

CONTROL_KEYBOARD_IRQ: Final = 0x01
CONTROL_SYSTEM: Final = 0x04
CONTROL_KEYBOARD_DISABLED: Final = 0x10
CONTROL_AUX_DISABLED: Final = 0x20

OUTPUT_PORT_RESET: Final = 0x01  # active low
OUTPUT_PORT_A20: Final = 0x02

SYSTEM_CONTROL_PORT_A: Final = 0x92
PORT_A_RESET: Final = 0x01
PORT_A_A20: Final = 0x02
_PORT_A_WRITABLE: Final = 0xCB  # lights, password lock, A20, reset; the watchdog's bit and the rest read zero

_SELF_TEST_PASSED: Final = 0x55
_NO_PASSWORD: Final = 0xF1
_INTERFACE_OK: Final = 0x00
_CLOCK_STUCK_LOW: Final = 0x01
_RESEND: Final = 0xFE


class Port:
    """One port of the controller: the ports between the two are not its own."""

    def __init__(self, controller: "I8042", offset: int) -> None:
        self._controller = controller
        self._offset = offset

    def read(self, offset: int, size: int) -> int:
        """Read the port."""
        return self._controller.read(self._offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the port."""
        self._controller.write(self._offset, size, value)


class I8042:
    """The controller. ``reset()`` is called when the guest pulls the reset line.

    ``data_port`` and ``command_port`` go on the bus at 0x60 and 0x64; ``read`` and ``write`` here take the offset
    from 0x60.
    """

    def __init__(
        self, reset: Callable[[], object] | None = None, set_irq: Callable[[int], object] | None = None
    ) -> None:
        self.data_port = Port(self, DATA_PORT - DATA_PORT)
        self.command_port = Port(self, COMMAND_PORT - DATA_PORT)
        self._reset_line = reset
        self._set_irq = set_irq
        self._lock = threading.Lock()
        self._ram = bytearray(32)
        self._ram[0] = CONTROL_SYSTEM | CONTROL_KEYBOARD_DISABLED | CONTROL_AUX_DISABLED
        self._status = STATUS_SYSTEM | STATUS_UNLOCKED
        self._output_port = OUTPUT_PORT_RESET | OUTPUT_PORT_A20
        self._answers: deque[tuple[int, int]] = deque()  # byte, status bits shown with it
        self._last = 0
        self._parameter_of: int | None = None  # the command that waits for a byte at port 0x60
        self._irq_level = 0
        # The controller's commands without a parameter: what each answers.
        self._commands: dict[int, Callable[[], int | None]] = {
            0xA4: lambda: _NO_PASSWORD,
            0xA7: lambda: self._control(CONTROL_AUX_DISABLED, 0),
            0xA8: lambda: self._control(0, CONTROL_AUX_DISABLED),
            0xA9: lambda: _CLOCK_STUCK_LOW,  # no auxiliary device
            0xAA: lambda: _SELF_TEST_PASSED,
            0xAB: lambda: _INTERFACE_OK,
            0xAD: lambda: self._control(CONTROL_KEYBOARD_DISABLED, 0),
            0xAE: lambda: self._control(0, CONTROL_KEYBOARD_DISABLED),
            0xC0: lambda: 0x80,  # input port: keyboard not locked
            0xD0: lambda: self._output_port,
        }
        # Commands that take a byte at the data port, and what it does there.
        self._parameters: dict[int, Callable[[int], None]] = {
            0xD1: self._write_output_port,
            0xD2: lambda value: self._answer(value, 0),
            # Without an auxiliary port the looped byte comes back as the keyboard's: Linux sees at once there is none.
            0xD3: lambda value: self._answer(value, 0),
            0xD4: lambda value: self._answer(_RESEND, STATUS_AUX_OBF | STATUS_TIMEOUT),
        }

    def read(self, offset: int, size: int = 1) -> int:
        """Port 0x60 is the output buffer, 0x64 the status."""
        with self._lock:
            if offset & 4:
                return self._status | (STATUS_OBF | self._answers[0][1] if self._answers else 0)
            if self._answers:
                self._last = self._answers.popleft()[0]
                # Each byte of the controller's makes an edge of its own.
                self._drive(0)
                self._update_irq()
            return self._last

    def write(self, offset: int, size: int, value: int) -> None:
        """Port 0x60 is for the keyboard or a command's parameter, 0x64 for commands."""
        value &= 0xFF
        reset = False
        with self._lock:
            if offset & 4:
                self._status |= STATUS_COMMAND
                reset = self._command(value)
            else:
                self._status &= ~STATUS_COMMAND
                reset = self._data(value)
            self._update_irq()
        if reset and self._reset_line is not None:
            self._reset_line()

    def _command(self, command: int) -> bool:
        """Carry out a command; True if it pulls the reset line."""
        self._parameter_of = None
        if command >= 0xF0:
            return not command & OUTPUT_PORT_RESET  # pulses the output port's lines whose bit is 0
        if 0x20 <= command <= 0x3F:
            self._answer(self._ram[command & 0x1F], 0)
        elif 0x60 <= command <= 0x7F or command in self._parameters:
            self._parameter_of = command
        elif command in self._commands:
            value = self._commands[command]()
            if value is not None:
                self._answer(value, 0)
        return False

    def _data(self, value: int) -> bool:
        """Take a byte at the data port; True if it pulls the reset line."""
        command, self._parameter_of = self._parameter_of, None
        if command is None:
            # To the keyboard, which is not there: the controller reports that the line timed out.
            self._control(0, CONTROL_KEYBOARD_DISABLED)
            self._answer(_RESEND, STATUS_TIMEOUT)
        elif command <= 0x7F:
            self._ram[command & 0x1F] = value
        else:
            self._parameters[command](value)
            return command == 0xD1 and not value & OUTPUT_PORT_RESET
        return False

    def _answer(self, value: int, status: int) -> None:
        if len(self._answers) < 16:
            self._answers.append((value & 0xFF, status))

    def _control(self, set_bits: int, clear_bits: int) -> None:
        self._ram[0] = (self._ram[0] | set_bits) & ~clear_bits

    def _write_output_port(self, value: int) -> None:
        self._output_port = value | OUTPUT_PORT_RESET

    def _update_irq(self) -> None:
        wanted = self._answers and not self._answers[0][1] & STATUS_AUX_OBF
        self._drive(int(bool(wanted and self._ram[0] & CONTROL_KEYBOARD_IRQ)))

    def _drive(self, level: int) -> None:
        if level != self._irq_level:
            self._irq_level = level
            if self._set_irq is not None:
                self._set_irq(level)

    def save(self) -> dict[str, Any]:
        """The controller's state."""
        with self._lock:
            return {
                "ram": bytes(self._ram),
                "status": self._status,
                "output_port": self._output_port,
                "answers": list(self._answers),
                "last": self._last,
                "parameter_of": self._parameter_of,
                "irq_level": self._irq_level,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        with self._lock:
            self._ram = bytearray(state["ram"])
            self._status = state["status"]
            self._output_port = state["output_port"]
            self._answers = deque((value, status) for value, status in state["answers"])
            self._last = state["last"]
            self._parameter_of = state["parameter_of"]
            self._irq_level = state["irq_level"]


class SystemControlPortA:
    """Port 0x92: the keyboard controller's two output lines without the wait, reset and A20.

    A20 is always on here, and its bit is storage. Source: IBM PS/2 Hardware Interface Technical Reference, "System
    control port A".
    """

    def __init__(self, reset: Callable[[], object] | None = None) -> None:
        self._reset_line = reset
        self._value = PORT_A_A20

    def read(self, offset: int, size: int = 1) -> int:
        """The bits last written."""
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """Bit 0 resets when it rises."""
        risen = value & ~self._value
        self._value = value & _PORT_A_WRITABLE
        if risen & PORT_A_RESET and self._reset_line is not None:
            self._reset_line()

    def save(self) -> dict[str, Any]:
        """The bits."""
        return {"value": self._value}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._value = state["value"]
