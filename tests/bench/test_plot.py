# SPDX-License-Identifier: Apache-2.0
"""Pictures of measurements: their figures are those of the tables."""

import pytest

pytest.importorskip("matplotlib")

from softkvm.bench import plot


def texts(picture: bytes) -> list[str]:
    """Return what is written in a picture, which matplotlib names beside the outlines of its letters."""
    return [line.strip()[5:-4] for line in picture.decode().splitlines() if line.strip().startswith("<!-- ")]


def test_figures_are_written_as_in_the_tables() -> None:
    written = texts(plot.bars("t", "pages in a second", {"": {"none": 215807.0, "missing": 34707.2}}, "svg"))
    assert {"215,807", "34,707"} <= {text.strip() for text in written}
    assert not any("e+" in text or "times" in text or "^" in text for text in written)


def test_small_figures_have_three_digits() -> None:
    written = {text.strip() for text in texts(plot.bars("t", "ms", {"": {"a": 0.0808, "b": 7.7123}}, "svg"))}
    assert {"0.0808", "7.71"} <= written


def test_the_least_bar_has_a_length() -> None:
    for least in (1.0, 10.0, 34707.0, 0.01):
        start, end = plot._limits([least, least * 3])
        assert start < least < least * 3 < end
