# SPDX-License-Identifier: Apache-2.0
"""``softkvm trace record --pid``: tracing of a machine that runs already."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from softkvm.cli import EXIT_ERROR, EXIT_OK, CommandError
from softkvm.cli.arguments import seconds
from softkvm.cli.live import choose
from softkvm.cli.output import OutputFile, warn
from softkvm.live.asker import Asker, LiveError
from softkvm.trace.event import Event, parse
from softkvm.trace.save import told, write

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
    state = _State()
    with tempfile.TemporaryFile("w+b") as spool, _until_signalled() as ended:
        try:
            with Asker(process.pid) as asker:
                answer = asker.ask("trace", spool.fileno(), events=args.event, filters=args.filter)
                events = [parse(system, description) for system, description in answer["events"]]
                _wait(asker, ended, duration_s, state)
        except LiveError as error:
            raise CommandError(str(error), EXIT_ERROR) from None
        contents = io.BytesIO()
        write(contents, args.output, spool, _known(events), state.threads)
        replaced = os.path.isfile(args.output)
        file.write(contents.getvalue())
    if state.gone:
        warn(f"{process.name} {process.pid} has ended meanwhile: its last events are missing")
    warn(told(args.output, state.count, state.lost, replaced=replaced))
    return EXIT_OK


def _known(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.id)


@dataclass(slots=True)
class _State:
    """What has been recorded so far."""

    threads: dict[int, str] = field(default_factory=dict)
    count: int = 0
    lost: int = 0
    #: The machine has ended before the recording.
    gone: bool = False


def _wait(asker: Asker, ended: threading.Event, duration_s: float | None, state: _State) -> None:
    """Wait for the end, and note the threads that record, and how many events came and were lost."""
    end = None if duration_s is None else time.monotonic() + duration_s
    while True:
        left = _POLL_S if end is None else min(_POLL_S, end - time.monotonic())
        last = left <= 0 or ended.wait(left)
        try:
            answer = asker.ask("stop" if last else "threads")
        except LiveError:
            state.gone = True
            return
        state.threads.update({int(tid): name for tid, name in answer["threads"].items()})
        state.count, state.lost = int(answer["count"]), int(answer["lost"])
        if last:
            return
