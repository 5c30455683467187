# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Generated examples are bounded and repeatable: the same ones each time.
settings.register_profile(
    "softkvm",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.load_profile("softkvm")


def pytest_configure() -> None:
    """Undo what a background job or nohup hands down: commands leave ignored signals ignored, and tests send them."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


#: Threads that end by themselves get so long for it.
_THREADS_END_IN_S = 10.0


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    """Fail a test, however it ended, that leaves a thread behind: a running guest slows down all that follow."""
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + _THREADS_END_IN_S
    while left := [thread for thread in threading.enumerate() if thread not in before]:
        if time.monotonic() > end:
            pytest.fail(f"threads left behind: {', '.join(sorted(thread.name for thread in left))}")
        left[0].join(0.05)
