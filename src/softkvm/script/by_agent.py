# SPDX-License-Identifier: Apache-2.0
"""Commands in the default guest by its agent: any number at once, and the console stays as it is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from softkvm.script.shell import CommandTimeout, Completed
from softkvm.vmm.guest.agent import Agent, AgentError, Channel, Done, Session

_LOOK_S: Final = 0.1
_SHOWN: Final = 2000  # bytes of output in an error
_OUTPUT_MOST: Final = 1 << 30


class AgentRunner:
    """Runs commands by the agent that *connect* leads to (``machine.vsock.connect``).

    *look* is called now and then meanwhile, and what it raises ends the waiting, and the command.
    """

    def __init__(self, connect: Callable[..., Channel], look: Callable[[], object]) -> None:
        self._connect = connect
        self._look = look

    def run(self, command: str, timeout_s: float, input: bytes) -> Completed:
        """Run *command* by the guest's shell; return how it ended.

        CommandTimeout after *timeout_s*, with which the command ends; AgentError if the agent, or the machine, goes.
        """
        running = _Running(self._connect, command, input)
        deadline = time.monotonic() + timeout_s
        try:
            while not running.ended.wait(_LOOK_S):
                self._look()
                if time.monotonic() > deadline:
                    shown = running.text[-_SHOWN:].encode("utf-8", "replace").decode()
                    raise CommandTimeout(
                        f"{command!r} takes longer than {timeout_s:g} s; its output ends with:\n{shown}"
                    )
        finally:
            running.abandon()
        if isinstance(running.how, BaseException):
            raise running.how
        assert running.how is not None
        return Completed(command, running.how.status, running.text)


class _Running:
    """A command under way, on threads of its own: a guest that stands keeps even its beginning waiting."""

    def __init__(self, connect: Callable[..., Channel], command: str, input: bytes) -> None:
        self.ended = threading.Event()
        self.how: Done | BaseException | None = None
        self._connect = connect
        self._command = command
        self._input = input
        self._output = bytearray()
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._main, name="guest command", daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        """What it has written."""
        return self._output.decode("utf-8", "surrogateescape")

    def abandon(self) -> None:
        """End the connection, and with it the command if it runs."""
        with self._lock:
            self._abandoned = True
            if self._channel is not None:
                self._channel.close()
        self._thread.join()

    def _open(self, *arguments: Any, **more: Any) -> Channel:
        channel = self._connect(*arguments, **more)
        with self._lock:
            self._channel = channel
            if self._abandoned:
                channel.close()
        return channel

    def _main(self) -> None:
        try:
            with Agent(self._open).start(["sh", "-c", f"exec 2>&1\n{self._command}"]) as session:
                feeder = threading.Thread(target=_feed, args=(session, self._input), name="guest input", daemon=True)
                feeder.start()
                try:
                    self.how = session.serve(self._take, self._take)
                finally:
                    session.close()
                    feeder.join()
        except BaseException as error:
            self.how = error
        finally:
            self.ended.set()

    def _take(self, data: bytes) -> None:
        if len(self._output) + len(data) > _OUTPUT_MOST:
            raise AgentError(f"{self._command!r} writes more than {_OUTPUT_MOST} bytes")
        self._output.extend(data)


def _feed(session: Session, input: bytes) -> None:
    with contextlib.suppress(AgentError):
        session.write(input)
        session.end_input()
