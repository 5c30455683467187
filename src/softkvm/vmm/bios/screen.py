# SPDX-License-Identifier: Apache-2.0
"""The text screen of INT 10h: 80 columns, 25 rows at 0xB8000, and the same on a terminal at a serial line.

Cursor and page are in the BIOS data area. There is one mode, one page, and no display adapter with registers: a program
that writes to the screen's memory itself changes it there and is not seen on the line.

Source: IBM PC AT Technical Reference, "System BIOS", INT 10h; ECMA-48 for the terminal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.bios.call import Call
from softkvm.vmm.memory import GuestMemory

ADDRESS: Final = 0xB8000
COLUMNS: Final = 80
ROWS: Final = 25
TEXT_MODE: Final = 3
NORMAL: Final = 0x07

_STRING: Final = Size(
    "characters of INT 10h, AH=13h",
    0xFFFF,
    None,
    element=2,
    giver="guest",
    effect="the register has no more",
    where=__name__,
)

CURSOR: Final = 0x450  # in the BIOS data area: column, row of page 0
CURSOR_SHAPE: Final = 0x460

_BELL, _BACKSPACE, _LINE_FEED, _RETURN = 0x07, 0x08, 0x0A, 0x0D
_ANSI_COLOURS: Final = (0, 4, 2, 6, 1, 5, 3, 7)  # by the adapter's: blue and red change places


class Screen:
    """The screen of *memory*; *send* transmits to the terminal."""

    def __init__(self, memory: GuestMemory, send: Callable[[bytes], None]) -> None:
        self._memory = memory
        self._send = send
        self._terminal = (0, 0)  # row, column of its cursor
        self._attribute = NORMAL  # that it shows

    # -- INT 10h

    def service(self, call: Call) -> None:
        """INT 10h; a function that is not there changes nothing."""
        function = _FUNCTIONS.get(call.ah)
        if function is not None:
            function(self, call)

    def _set_mode(self, call: Call) -> None:
        """00h: text is the only mode; its memory is cleared unless AL bit 7 is set."""
        if not call.al & 0x80:
            self._fill(0, ROWS, 0, COLUMNS, NORMAL)
            self._show(b"\x1b[0m\x1b[2J\x1b[H", (0, 0))
            self._attribute = NORMAL
        self._move(0, 0)
        call.al = 0x30

    def _set_shape(self, call: Call) -> None:
        """01h."""
        self._memory.write(CURSOR_SHAPE, call.cx.to_bytes(2, "little"))

    def _set_cursor(self, call: Call) -> None:
        """02h."""
        self._move(call.dh, call.dl)

    def _get_cursor(self, call: Call) -> None:
        """03h."""
        call.dh, call.dl = self.cursor
        call.cx = int.from_bytes(self._memory.read(CURSOR_SHAPE, 2), "little")

    def _scroll_up(self, call: Call) -> None:
        """06h: AL lines, 0 for all, of the window CH, CL to DH, DL; new lines have BH."""
        self._scroll(call, 1)

    def _scroll_down(self, call: Call) -> None:
        """07h."""
        self._scroll(call, -1)

    def _read_cell(self, call: Call) -> None:
        """08h."""
        row, column = self.cursor
        call.al, call.ah = self._memory.read(self._address(row, column), 2)

    def _write_cells(self, call: Call) -> None:
        """09h: CX times the character AL with the attribute BL at the cursor, which stays."""
        self._write_repeated(call, call.bl)

    def _write_characters(self, call: Call) -> None:
        """0Ah: the same with the attributes that are there."""
        self._write_repeated(call, None)

    def _teletype(self, call: Call) -> None:
        """0Eh."""
        self.put(call.al)

    def _get_mode(self, call: Call) -> None:
        """0Fh."""
        call.ah, call.al, call.bh = COLUMNS, TEXT_MODE, 0

    def _write_string(self, call: Call) -> None:
        """13h: CX characters at ES:BP from row DH, column DL on; AL bit 1: with attributes, bit 0: moves the cursor."""
        before = self.cursor
        self._move(call.dh, call.dl)
        step = 2 if call.al & 2 else 1
        data = self._memory.read(call.es + call.bp, _STRING.cut(call.cx) * step)
        for at in range(0, len(data), step):
            self.put(data[at], data[at + 1] if step == 2 else call.bl)
        if not call.al & 1:
            self._move(*before)

    # -- the screen

    @property
    def cursor(self) -> tuple[int, int]:
        """Row and column."""
        column, row = self._memory.read(CURSOR, 2)
        return min(row, ROWS - 1), min(column, COLUMNS - 1)

    def text(self) -> str:
        """Return what the screen shows, a line per row."""
        cells = self._memory.read(ADDRESS, 2 * ROWS * COLUMNS)[::2].replace(b"\0", b" ").decode("cp437")
        return "\n".join(cells[at : at + COLUMNS].rstrip() for at in range(0, len(cells), COLUMNS))

    def put(self, character: int, attribute: int | None = None) -> None:
        """Write a character as a teletype does: the cursor moves, at the end of the screen all lines do."""
        row, column = self.cursor
        if character == _BELL:
            self._send(b"\a")
            return
        if character == _BACKSPACE:
            self._move(row, max(column - 1, 0))
            if column and self._terminal == (row, column):
                self._show(b"\b", (row, column - 1))
            return
        if character == _RETURN:
            self._move(row, 0)
            self._show(b"\r", (self._terminal[0], 0))
            return
        if character == _LINE_FEED:
            self._line_feed(row, column)
            return
        self._write(row, column, character, attribute)
        if column + 1 < COLUMNS:
            self._move(row, column + 1)
        else:
            self._show(b"\r", (row, 0))
            self._line_feed(row, 0)

    def _line_feed(self, row: int, column: int) -> None:
        if row + 1 < ROWS:
            self._move(row + 1, column)
        else:
            self._copy_rows(0, 1, ROWS - 1)
            self._fill(ROWS - 1, ROWS, 0, COLUMNS, NORMAL)
            self._move(row, column)
        if self._terminal[0] != row:
            self._goto(row, self._terminal[1])
        self._show(b"\n", (min(row + 1, ROWS - 1), self._terminal[1]))

    def _write_repeated(self, call: Call, attribute: int | None) -> None:
        row, column = self.cursor
        for at in range(row * COLUMNS + column, min(row * COLUMNS + column + call.cx, ROWS * COLUMNS)):
            self._write(*divmod(at, COLUMNS), call.al, attribute)

    def _write(self, row: int, column: int, character: int, attribute: int | None) -> None:
        """Put a character into a cell, and on the terminal."""
        address = self._address(row, column)
        if attribute is None:
            attribute = self._memory.read(address + 1, 1)[0]
        self._memory.write(address, bytes([character, attribute]))
        if self._terminal != (row, column):
            self._goto(row, column)
        self._colour(attribute)
        text = bytes([character]).decode("cp437") if character >= 0x20 and character != 0x7F else " "
        # a terminal's cursor stays at its last column until the next character: it is told where that goes
        self._show(text.encode(), (row, column + 1))

    def _scroll(self, call: Call, direction: int) -> None:
        top, left = min(call.ch, ROWS - 1), min(call.cl, COLUMNS - 1)
        bottom, right = min(call.dh, ROWS - 1), min(call.dl, COLUMNS - 1)
        height, width = bottom - top + 1, right - left + 1
        if height <= 0 or width <= 0:
            return
        lines = call.al if 0 < call.al < height else height
        rows = range(top, bottom + 1 - lines) if direction > 0 else range(bottom, top + lines - 1, -1)
        for row in rows:
            cells = self._memory.read(self._address(row + direction * lines, left), 2 * width)
            self._memory.write(self._address(row, left), cells)
        first = bottom + 1 - lines if direction > 0 else top
        self._fill(first, first + lines, left, right + 1, call.bh)
        if lines == height and width == COLUMNS and height == ROWS:
            self._colour(call.bh)
            self._show(b"\x1b[2J", self._terminal)
        else:
            self._redraw(top, bottom + 1, left, right + 1)

    def _redraw(self, top: int, bottom: int, left: int, right: int) -> None:
        """Show a window of the screen anew."""
        for row in range(top, bottom):
            for column in range(left, right):
                character, attribute = self._memory.read(self._address(row, column), 2)
                self._write(row, column, character, attribute)

    def _fill(self, top: int, bottom: int, left: int, right: int, attribute: int) -> None:
        for row in range(top, bottom):
            self._memory.write(self._address(row, left), bytes([0x20, attribute]) * (right - left))

    def _copy_rows(self, to: int, start: int, count: int) -> None:
        self._memory.write(self._address(to, 0), self._memory.read(self._address(start, 0), 2 * COLUMNS * count))

    def _address(self, row: int, column: int) -> int:
        return ADDRESS + 2 * (row * COLUMNS + column)

    def _move(self, row: int, column: int) -> None:
        self._memory.write(CURSOR, bytes([min(column, COLUMNS - 1), min(row, ROWS - 1)]))

    # -- the terminal

    def _show(self, data: bytes, cursor: tuple[int, int]) -> None:
        self._send(data)
        self._terminal = cursor

    def _goto(self, row: int, column: int) -> None:
        self._show(f"\x1b[{row + 1};{column + 1}H".encode(), (row, column))

    def _colour(self, attribute: int) -> None:
        if attribute == self._attribute:
            return
        self._attribute = attribute
        foreground, background = _ANSI_COLOURS[attribute & 7], _ANSI_COLOURS[attribute >> 4 & 7]
        bold = ";1" if attribute & 8 else ""
        plain = attribute == NORMAL
        self._send(b"\x1b[0m" if plain else f"\x1b[0{bold};{30 + foreground};{40 + background}m".encode())

    # -- snapshots

    def save(self) -> list[int]:
        """Where the terminal is: its cursor and attribute."""
        return [*self._terminal, self._attribute]

    def restore(self, state: list[int]) -> None:
        """Take over a saved state."""
        self._terminal = (state[0], state[1])
        self._attribute = state[2]


_FUNCTIONS: dict[int, Callable[[Screen, Call], None]] = {
    0x00: Screen._set_mode,
    0x01: Screen._set_shape,
    0x02: Screen._set_cursor,
    0x03: Screen._get_cursor,
    0x06: Screen._scroll_up,
    0x07: Screen._scroll_down,
    0x08: Screen._read_cell,
    0x09: Screen._write_cells,
    0x0A: Screen._write_characters,
    0x0E: Screen._teletype,
    0x0F: Screen._get_mode,
    0x13: Screen._write_string,
}
