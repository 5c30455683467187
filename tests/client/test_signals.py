# SPDX-License-Identifier: Apache-2.0
"""KVM_RUN under ``softkvm exec`` ends by signals and with threads as the kernel's does."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.clients import TIMEOUT_S, run_client


@pytest.mark.parametrize(
    "case",
    [
        "handler_before_open",
        "handler_after_first_run",
        "handler_by_other_functions",
        "restart_flag",
        "timer",
        "halted",
        "ignored",
        "siginfo",
    ],
)
def test_a_signal_whose_handler_runs_ends_kvm_run_with_eintr(holds: Callable[..., None], case: str) -> None:
    holds("signals", case)


def test_a_client_that_asks_for_its_handlers_gets_its_own(holds: Callable[..., None]) -> None:
    holds("signals", "handler_is_the_clients")


@pytest.mark.parametrize("case", ["mask_open_in_run", "mask_blocked_in_run", "mask_arguments"])
def test_a_vcpus_signal_mask_is_the_threads_while_it_runs(holds: Callable[..., None], case: str) -> None:
    holds("signals", case)


@pytest.mark.parametrize("case", ["immediate_exit_race", "immediate_exit_runs_nothing"])
def test_immediate_exit_that_a_handler_sets_ends_kvm_run_whenever_it_comes(
    holds: Callable[..., None], case: str
) -> None:
    holds("signals", case)


@pytest.mark.parametrize(
    "case",
    [
        "longjmp_out",
        "longjmp_out_of_anything",
        "thread_ends_in_handler",
        "cancel_deferred",
        "cancel_asynchronous",
    ],
)
def test_a_handler_that_does_not_return_and_a_cancelled_thread_leave_nothing_held(
    holds: Callable[..., None], case: str
) -> None:
    holds("signals", case)


@pytest.mark.parametrize("case", ["threads_end_while_others_run", "exit_under_a_guest", "main_thread_ends_first"])
def test_threads_and_the_process_end_while_guests_run(holds: Callable[..., None], case: str) -> None:
    holds("signals", case)


INTERRUPTED = """
#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
int main(void) {
    if (open("/dev/kvm", O_RDWR) < 0) err(1, "/dev/kvm");
    raise(SIGINT);
    return 7;
}
"""


@pytest.mark.parametrize("options", [(), ("-static",)])
@pytest.mark.parametrize("ignored", [False, True])
def test_sigint_does_what_it_does_without_kvm(tmp_path: Path, options: tuple[str, ...], ignored: bool) -> None:
    program, stats = tmp_path / "interrupted", tmp_path / "stats"
    compiler = ["cc", "-x", "c", "-o", str(program), *options, "-"]
    subprocess.run(compiler, check=True, input=INTERRUPTED, text=True, timeout=TIMEOUT_S)
    shell = ["sh", "-c", """trap '' INT; exec "$@" """, "sh"]
    done = run_client([program], stats, under=shell if ignored else ())
    assert (done.returncode, done.stderr) == (7 if ignored else -signal.SIGINT, "")
