# SPDX-License-Identifier: Apache-2.0
"""Pictures of measurements, by matplotlib, which is asked for only then (``pip install softkvm[plot]``)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS: Final = ("png", "svg")


class PlotError(Exception):
    """No picture can be drawn here; the message says what is missing."""


def _number(value: float, _position: object = None) -> str:
    """Return a figure as the tables have it, never with an exponent: three digits, more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _limits(values: list[float]) -> tuple[float, float]:
    """Return the ends of a logarithmic axis: a whole decade below the least, room for a label behind the greatest."""
    least, greatest = math.log10(min(values, default=1)), math.log10(max(values, default=1))
    first = math.ceil(least) - 1
    return 10.0**first, 10 ** (greatest + 0.15 * (greatest - first))


def bars(title: str, unit: str, groups: Mapping[str, Mapping[str, float]], form: str) -> bytes:
    """Return a picture of horizontal bars on a logarithmic scale, as a file of the format *form*.

    *groups* has series by name, and each series its bars' lengths by their names. PlotError without matplotlib.
    """
    names = list(dict.fromkeys(name for series in groups.values() for name in series))
    figure = _figure(8, 1.2 + 0.45 * len(names) * max(len(groups), 1))
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes = figure.subplots()
    height = 0.8 / max(len(groups), 1)
    for n, (label, series) in enumerate(groups.items()):
        places = [names.index(name) + (n - (len(groups) - 1) / 2) * height for name in series]
        drawn = axes.barh(places, list(series.values()), height=height * 0.9, label=label)
        axes.bar_label(drawn, [f" {_number(value)}" for value in series.values()])
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(*_limits([value for series in groups.values() for value in series.values() if value > 0]))
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(unit)
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    if len(groups) > 1:
        axes.legend()
    return _file(figure, form)


class Panel(NamedTuple):
    """A diagram of lines: (x, y) of each by its name, and a level that is drawn across, if there is one."""

    title: str
    across: str
    up: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    level: tuple[str, float] | None = None
    marked: bool = False
    """Whether the points are shown."""


def panels(title: str, drawn: Sequence[Panel], form: str) -> bytes:
    """Return a picture of diagrams, one below the other, as a file of the format *form*; PlotError as above."""
    figure = _figure(8, 3.5 * len(drawn))
    figure.suptitle(title)
    places: Any = figure.subplots(len(drawn), 1, squeeze=False)
    for axes, panel in zip(places[:, 0], drawn, strict=True):
        for name, points in panel.lines.items():
            axes.plot([x for x, _ in points], [y for _, y in points], "o-" if panel.marked else "-", label=name)
        if panel.level is not None:
            axes.axhline(panel.level[1], color="black", linestyle="--", label=panel.level[0])
        axes.set_title(panel.title)
        axes.set_xlabel(panel.across)
        axes.set_ylabel(panel.up)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return _file(figure, form)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _file(figure: Figure, form: str) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format=form, dpi=120)
    return out.getvalue()
