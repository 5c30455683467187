# SPDX-License-Identifier: Apache-2.0
"""The cases with one program in the guest, which is client or server.

The program connects to the host's control port, says what cases it has, and goes through them: both halves say NEXT or
SKIP before each. A case that fails ends the program, and what it has printed comes by another connection; it is started
again while there are cases left, and those that are done are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from softkvm.reports.result import Result, Status
from softkvm.vmm.vsock.api import Vsock
from softkvm.vmm.vsock.sockets import VsockListener
from softkvm.vsocktest.cases import Case, cases_of
from softkvm.vsocktest.control import CaseFailed, Control, ControlLost
from softkvm.vsocktest.half import DEFAULT_PORT, WAIT_S, Half

CLIENT: Final = "client"
SERVER: Final = "server"
MODES: Final = (CLIENT, SERVER)
NEXT, SKIP, COMPLETED = "NEXT", "SKIP", "COMPLETED"
NAMES_MAX: Final = 256
LOG_LINES: Final = 2000

Finished = Callable[[Result], None]


class GuestLost(Exception):
    """The guest is not what was expected of it, or has gone; the text says how."""


@dataclass(slots=True)
class Suite:
    """What a guest's program does with us."""

    vsock: Vsock
    listener: VsockListener
    mode: str
    """What the guest's half is."""
    program: str
    """What the guest's program is called in results."""
    finished: Finished
    picked: Callable[[str], bool]
    """Whether a case is wanted."""
    port: int = DEFAULT_PORT
    read_after_close: bool = True
    results: list[Result] = field(default_factory=list)
    _done: set[str] = field(default_factory=set)
    _names: list[str] = field(default_factory=list)
    _lacks: dict[str, str] = field(default_factory=dict)
    _pending: Result | None = None  # our half has done it; the guest's says so by its next word

    def run(self) -> list[Result]:
        """Go through all cases; GuestLost if the guest has not got as far."""
        while True:
            control = _connection(self.listener)
            word, _, rest = control.get().partition(" ")
            if word == "CASES":
                self._session(control, self._take_names(control, rest))
            elif word == "EXIT":
                if self._ended(control, rest):
                    return self.results
            else:
                raise GuestLost(f'the guest says "{word} {rest}", expected CASES or EXIT')

    def _take_names(self, control: Control, count: str) -> Sequence[str]:
        if not count.isdecimal() or int(count) > NAMES_MAX:
            raise GuestLost(f"the guest has {count} cases, expected up to {NAMES_MAX}")
        lines = [control.get().partition("\t") for _ in range(int(count))]
        self._names = [name for name, _, _ in lines]
        self._lacks = {name: why for name, _, why in lines if why}
        return self._names

    # -- a session: as far as the program gets

    def _session(self, control: Control, names: Sequence[str]) -> None:
        cases = cases_of(names)
        try:
            for name in names:
                self._case(control, name, cases.get(name))
            if control.get() == COMPLETED:
                control.put(COMPLETED)
        except ControlLost as lost:
            self._failed(str(lost))
        finally:
            control.close()

    def _case(self, control: Control, name: str, case: Case | None) -> None:
        wanted = name not in self._done and self.picked(name)
        why = self._lacks.get(name, "" if case is not None else "unknown to the host's half")
        control.put(NEXT if wanted and not why else SKIP)
        answer = control.get()
        self._passed()
        if not wanted:
            return
        if why or answer != NEXT or case is None:
            self._add(Result(self._title(name), Status.SKIP, why or "by the guest's half"), name)
            return
        self._do(control, name, case)

    def _do(self, control: Control, name: str, case: Case) -> None:
        """Our half."""
        result = self._pending = Result(self._title(name), Status.PASS)
        self._done.add(name)
        half = Half(self.vsock, control, self.port, read_after_close=self.read_after_close)
        begin = time.monotonic()
        try:
            (case.server if self.mode == CLIENT else case.client)(half)
        except CaseFailed as failure:
            result.status, result.reason = Status.FAIL, f"host: {failure}"
        except ControlLost as lost:
            result.status, result.reason = Status.FAIL, f"host: {lost}"
        except OSError as error:
            result.status, result.reason = Status.FAIL, f"host: {error.strerror or error}"
        finally:
            half.close()
            result.time_s = time.monotonic() - begin
        if result.status is Status.FAIL:
            raise ControlLost(result.reason)  # the guest's half waits for something: it is sent away

    def _passed(self) -> None:
        if self._pending is not None:
            self._add(self._pending)
            self._pending = None

    def _failed(self, why: str) -> None:
        """The program has ended, or will: in the case that is pending, if one is."""
        if self._pending is not None and self._pending.status is Status.PASS:
            self._pending.reason = why  # whether it is one says how the program ends

    def _ended(self, control: Control, status: str) -> bool:
        """The program's own word about its end; True if there is nothing left to do."""
        log = _take_log(control)
        pending, self._pending = self._pending, None
        failed = status != "0"
        if pending is not None:
            if failed:
                pending.status = Status.FAIL
                last = next((line for line in reversed(log) if line.strip()), "")
                reasons = [pending.reason, f"guest: {last}" if last else f"guest: exit status {status}"]
                pending.reason = "; ".join(reason for reason in reasons if reason)
                pending.log = "\n".join(log)
            else:
                pending.reason = ""
            self._add(pending)
        left = self._left()
        # A program that ends without having done anything new would do so for ever.
        again = failed and pending is not None and bool(left)
        control.put("AGAIN" if again else "DONE")
        control.close()
        if not again and left:
            raise GuestLost(
                f"the guest's program ended with status {status}: {' '.join(log[-1:]) or 'it says nothing'}"
            )
        return not again

    def _left(self) -> Collection[str]:
        return [name for name in self._names if name not in self._done and self.picked(name)]

    def _title(self, name: str) -> str:
        return f"{self.program} as {self.mode}: {name}"

    def _add(self, result: Result, name: str | None = None) -> None:
        if name is not None:
            self._done.add(name)
        self.results.append(result)
        self.finished(result)


def _connection(listener: VsockListener) -> Control:
    try:
        channel, _ = listener.accept()
    except OSError as error:
        raise GuestLost(f"the guest does not connect: {error.strerror or error}") from None
    channel.settimeout(2 * WAIT_S)
    return Control(channel)


def _take_log(control: Control) -> list[str]:
    log: list[str] = []
    while (line := control.get()) != "END":
        if len(log) < LOG_LINES:
            log.append(line.removeprefix("| "))
    return log


def take_report(listener: VsockListener) -> tuple[str, list[str]]:
    """Wait for a program's end; return its exit status and the lines that it has printed."""
    control = _connection(listener)
    word, _, status = control.get().partition(" ")
    if word != "EXIT":
        raise GuestLost(f'the guest says "{word}", expected EXIT')
    log = _take_log(control)
    control.put("DONE")
    control.close()
    return status, log
