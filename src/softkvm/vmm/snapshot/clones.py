# SPDX-License-Identifier: Apache-2.0
"""Many machines from one snapshot: processes that share what it takes to have one, and the snapshot's memory.

A process with everything imported and the snapshot open forks one for each clone. The clone makes its machine, whose
memory is the snapshot's file, copied page by page as it is written. So each has little of its own; nothing of one is
seen by another, and one that dies takes no other with it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.closing import Closing
from softkvm.vmm.errors import SnapshotError

CLONES: Final = Size("clones of a snapshot", 1000, SnapshotError, least=1, effect="SnapshotError", where=__name__)
_PR_SET_PDEATHSIG: Final = 1
_END_S: Final = 5.0

Body = Callable[[int, Callable[[], None]], int]
"""What a clone's process does: gets its number from 1 on and what it calls once it runs; returns its exit status."""


@dataclass(slots=True)
class Clone:
    """A clone's process."""

    number: int
    pid: int
    pidfd: int
    status: int | None = None
    """As :func:`os.waitstatus_to_exitcode` has it; None while it runs."""


class Clones(Closing):
    """*count* processes that each do *body*.

    To be made by a process with one thread: forks of others have locks that nobody gives back (SnapshotError).
    """

    def __init__(self, count: int, body: Body) -> None:
        CLONES.check(count)
        self._check_threads()
        self.clones: list[Clone] = []
        self._ready, write = os.pipe2(os.O_CLOEXEC)
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()
        gc.freeze()  # a collection in a clone would write to every object, and have its page copied
        parent = os.getpid()
        try:
            for number in range(1, count + 1):
                pid = os.fork()
                if pid == 0:
                    self._be(number, body, write, parent)
                self.clones.append(Clone(number, pid, os.pidfd_open(pid)))
        except OSError as error:
            self.close()
            raise SnapshotError(f"clone {len(self.clones) + 1}: {error.strerror}") from None
        finally:
            gc.unfreeze()
            os.close(write)

    @staticmethod
    def _check_threads() -> None:
        threads = os.listdir("/proc/self/task")
        if len(threads) > 1:
            raise SnapshotError(f"clones are forked by a process with one thread: this one has {len(threads)}")

    def _be(self, number: int, body: Body, write: int, parent: int) -> None:
        """Be clone *number*: never returns."""
        status = 1
        try:
            # Nobody would end the clones of a process that was killed.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                return
            os.close(self._ready)
            for other in self.clones:
                os.close(other.pidfd)
            gc.disable()

            def runs() -> None:
                os.write(write, b".")
                os.close(write)  # when nobody has it any more, all run or have ended

            status = body(number, runs)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait_ready(self, timeout_s: float) -> int:
        """Wait until all clones run, have ended, or the time is over; return how many have said that they run."""
        deadline = time.monotonic() + timeout_s
        ready = 0
        while ready < len(self.clones):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._ready], [], [], left_s)[0]:
                break
            data = os.read(self._ready, len(self.clones))
            if not data:
                break
            ready += len(data)
        return ready

    def wait(self) -> list[int]:
        """Wait for the end of all; return their exit statuses, negative for a signal."""
        for clone in self.clones:
            if clone.status is None:
                _, status = os.waitpid(clone.pid, 0)
                clone.status = os.waitstatus_to_exitcode(status)
        return [clone.status or 0 for clone in self.clones]

    def signal(self, number: int) -> None:
        """Send a signal to all that run."""
        for clone in self.clones:
            if clone.status is None:
                try:
                    signal.pidfd_send_signal(clone.pidfd, number)
                except ProcessLookupError:
                    continue

    def close(self) -> None:
        """End what still runs: with SIGTERM, and then for good."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + _END_S
        for clone in self.clones:
            if clone.status is None:
                left_s = max(deadline - time.monotonic(), 0)
                if not select.select([clone.pidfd], [], [], left_s)[0]:
                    signal.pidfd_send_signal(clone.pidfd, signal.SIGKILL)
        self.wait()
        for clone in self.clones:
            if clone.pidfd >= 0:
                os.close(clone.pidfd)
                clone.pidfd = -1
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1
