# SPDX-License-Identifier: Apache-2.0
"""The options of commands that may record KVM's tracepoints meanwhile: which, and when."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager

from softkvm.cli import CommandError


def add_selection(parser: ArgumentParser) -> None:
    """Add ``--trace-event`` and ``--trace-filter``."""
    add = parser.add_argument
    add("--trace-event", metavar="GLOB", action="append", default=[], help="tracepoints to record (default: all)")
    add("--trace-filter", metavar="[EVENT:]CONDITION", action="append", default=[], help="record those alone")


@contextmanager
def selecting() -> Iterator[None]:
    """Have what selects tracepoints by those options name the option that is wrong, as a CommandError."""
    from softkvm.kvm import trace

    try:
        yield
    except trace.TraceError as error:
        option = "--trace-filter" if isinstance(error, trace.FilterError) else "--trace-event"
        raise CommandError(f"{option}: {error}") from None
