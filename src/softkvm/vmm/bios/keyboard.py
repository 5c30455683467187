# SPDX-License-Identifier: Apache-2.0
"""Keys for INT 16h, from what a terminal sends on a serial line.

A key is its scan code in bits 15:8 and its ASCII code in bits 7:0. Sources: IBM PC AT Technical Reference, "Keyboard",
set 1 of the scan codes on a US keyboard; ECMA-48 and xterm's control sequences for what terminals send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

ROOM: Final = 15
"""Keys that the buffer of a PC's BIOS holds."""

_ESCAPE: Final = 0x1B
_ROWS: Final = (
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1E, "asdfghjkl;'`", 'ASDFGHJKL:"~'),
    (0x2B, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
)
_SPECIAL: Final = {0x1B: 0x01, 0x08: 0x0E, 0x09: 0x0F, 0x0D: 0x1C, 0x20: 0x39}
_SEQUENCES: Final = {
    b"[A": 0x4800,
    b"[B": 0x5000,
    b"[C": 0x4D00,
    b"[D": 0x4B00,
    b"[H": 0x4700,
    b"[F": 0x4F00,
    b"[2~": 0x5200,
    b"[3~": 0x5300,
    b"[5~": 0x4900,
    b"[6~": 0x5100,
    b"OP": 0x3B00,
    b"OQ": 0x3C00,
    b"OR": 0x3D00,
    b"OS": 0x3E00,
}
_LONGEST: Final = max(map(len, _SEQUENCES))


def _scan_codes() -> dict[int, int]:
    """Return the scan code for each ASCII code that a key has."""
    codes = dict(_SPECIAL)
    for first, plain, shifted in _ROWS:
        for index, pair in enumerate(zip(plain, shifted, strict=True)):
            codes.update((ord(character), first + index) for character in pair)
    for control in range(1, 27):  # with the Control key the letter's
        codes.setdefault(control, codes[control + 0x60])
    return codes


_SCAN_CODES: Final = _scan_codes()


class Keyboard:
    """The keys that wait; *receive* returns the next byte of the line, None if there is none."""

    def __init__(self, receive: Callable[[], int | None]) -> None:
        self._receive = receive
        self._keys: deque[int] = deque()

    def _fill(self) -> None:
        while len(self._keys) < ROOM:
            byte = self._receive()
            if byte is None:
                return
            if byte == 0x7F:  # a terminal's backspace key
                byte = 0x08
            if byte == _ESCAPE:
                self._sequence()
            else:
                self._keys.append(_SCAN_CODES.get(byte, 0) << 8 | byte)

    def _sequence(self) -> None:
        """Take what follows an escape character: a key that sends a sequence, or the plain keys."""
        text = b""
        while len(text) < _LONGEST:
            byte = self._receive()
            if byte is None:
                break
            text += bytes([byte])
            if text in _SEQUENCES:
                self._keys.append(_SEQUENCES[text])
                return
        self._keys.extend(_SCAN_CODES.get(byte, 0) << 8 | byte for byte in (_ESCAPE, *text))

    def peek(self) -> int | None:
        """Return the next key and keep it."""
        self._fill()
        return self._keys[0] if self._keys else None

    def take(self) -> int | None:
        """Return the next key."""
        self._fill()
        return self._keys.popleft() if self._keys else None

    def put(self, key: int) -> bool:
        """Add a key as if it had been struck; False if there is no room."""
        if len(self._keys) >= ROOM:
            return False
        self._keys.append(key)
        return True

    def save(self) -> list[int]:
        """The keys that wait."""
        return list(self._keys)

    def restore(self, state: list[int]) -> None:
        """Take over saved keys."""
        self._keys = deque(state)
