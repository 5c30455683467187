# SPDX-License-Identifier: Apache-2.0
"""Pictures of measurements, by matplotlib, which is asked for only then (``pip install softkvm[plot]``)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Final

FORMATS: Final = ("png", "svg")


class PlotError(Exception):
    """No picture can be drawn here; the message says what is missing."""


def bars(title: str, unit: str, groups: Mapping[str, Mapping[str, float]], form: str) -> bytes:
    """Return a picture of horizontal bars on a logarithmic scale, as a file of the format *form*.

    *groups* has series by name, and each series its bars' lengths by their names. PlotError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError("pictures need matplotlib: pip install matplotlib") from None
    names = list(dict.fromkeys(name for series in groups.values() for name in series))
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(names) * max(len(groups), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 0.8 / max(len(groups), 1)
    for n, (label, series) in enumerate(groups.items()):
        places = [names.index(name) + (n - (len(groups) - 1) / 2) * height for name in series]
        drawn = axes.barh(places, list(series.values()), height=height * 0.9, label=label)
        axes.bar_label(drawn, [f" {value:,.3g}" for value in series.values()])
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel(unit)
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    if len(groups) > 1:
        axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format=form, dpi=120)
    return out.getvalue()
