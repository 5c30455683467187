# SPDX-License-Identifier: Apache-2.0
"""``softkvm trace record --pid``: tracing of a machine that runs already."""

from __future__ import annotations

import contextlib
import io
import signal
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from types import FrameType

from softkvm.cli import EXIT_ERROR, EXIT_OK, CommandError
from softkvm.cli.arguments import seconds
from softkvm.cli.live import choose
from softkvm.cli.output import OutputFile, warn
from softkvm.live.asker import Asker, LiveError
from softkvm.trace.event import Event, parse
from softkvm.trace.save import write

_POLL_S = 0.3


@contextlib.contextmanager
def _until_signalled() -> Iterator[threading.Event]:
    """Have signals that end a command end the recording instead: what was recorded is wanted."""
    ended = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        ended.set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield ended
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def record(args: Namespace) -> int:
    """Record until a signal comes, --duration has passed, or the machine has ended."""
    duration_s = None if args.duration is None else seconds("--duration", args.duration)
    file = OutputFile("--output", args.output)
    process = choose(args.pid)
    threads: dict[int, str] = {}
    with tempfile.TemporaryFile("w+b") as spool, _until_signalled() as ended:
        try:
            with Asker(process.pid) as asker:
                answer = asker.ask("trace", spool.fileno(), events=args.event, filters=args.filter)
                events = [parse(system, description) for system, description in answer["events"]]
                lost = _wait(asker, ended, duration_s, threads)
        except LiveError as error:
            raise CommandError(str(error), EXIT_ERROR) from None
        contents = io.BytesIO()
        write(contents, args.output, spool, _known(events), threads)
        file.write(contents.getvalue())
    if lost:
        warn(f"{args.output}: {lost:,} events were lost: they came faster than they could be written")
    return EXIT_OK


def _known(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.id)


def _wait(asker: Asker, ended: threading.Event, duration_s: float | None, threads: dict[int, str]) -> int:
    """Wait for the end, and note the threads that record; returns how many events were lost."""
    end = None if duration_s is None else time.monotonic() + duration_s
    lost = 0
    while True:
        left = _POLL_S if end is None else min(_POLL_S, end - time.monotonic())
        last = left <= 0 or ended.wait(left)
        try:
            answer = asker.ask("stop" if last else "threads")
        except LiveError:  # the machine has ended
            return lost
        threads.update({int(tid): name for tid, name in answer["threads"].items()})
        lost = int(answer["lost"])
        if last:
            return lost
