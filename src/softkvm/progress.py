# SPDX-License-Identifier: Apache-2.0
"""How long work shows on a terminal what it does: steps with bars, or one line that changes."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm


class Progress(Protocol):
    """Told about one step after the other; fractions run from 0.0 to 1.0."""

    def step(self, label: str) -> None:
        """A new step begins; the one before is done."""

    def fraction(self, value: float) -> None:
        """How far the step is."""

    def done(self) -> None:
        """The last step is done."""

    def close(self) -> None:
        """Nothing more comes, be it that a step failed."""


class NoProgress:
    """Says nothing."""

    def step(self, label: str) -> None:
        """Nothing."""

    def fraction(self, value: float) -> None:
        """Nothing."""

    def done(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class StatusLine:
    """One line of a terminal whose text changes; nothing on anything else."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out if out is not None else sys.stderr
        self.shown = self._out.isatty()

    def show(self, text: str) -> None:
        """Put *text*, as much of it as fits, in the place of what was there."""
        if self.shown:
            self._out.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
            self._out.flush()

    def clear(self) -> None:
        """Take the line away."""
        self.show("")


class TerminalProgress:
    """A bar per step on a terminal; on anything else one line per step."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out if out is not None else sys.stderr
        self._bar: tqdm[Any] | None = None
        self._shown = 0.0

    def step(self, label: str) -> None:
        """Finish the bar and begin the next."""
        self.done()
        if not self._out.isatty():
            print(label, file=self._out, flush=True)
            return
        from tqdm import tqdm

        self._shown = 0.0
        columns, rows = shutil.get_terminal_size()  # 80 x 24 where the terminal does not know
        self._bar = tqdm(
            total=100,
            desc=label,
            file=self._out,
            ncols=columns,
            nrows=rows,
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}",
        )

    def fraction(self, value: float) -> None:
        """Move the bar, never backwards."""
        value = min(value, 1.0)
        if self._bar is not None and value > self._shown:
            self._bar.update((value - self._shown) * 100)
            self._shown = value

    def done(self) -> None:
        """Fill the bar and leave it."""
        if self._bar is not None:
            self.fraction(1.0)
            self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
