# SPDX-License-Identifier: Apache-2.0
"""KVM clients under ``softkvm exec``, and the proof that it was its KVM: the host may have one as well."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

EXEC = (sys.executable, "-m", "softkvm.cli.main", "exec")

#: Longer than any case takes on a host that is busy.
TIMEOUT_S = 120

Completed = subprocess.CompletedProcess[str]


def requests_of(stats: Path) -> Counter[str]:
    """Return how often which request was made, from the file of ``--stats`` as text; none if there is no file."""
    counts: Counter[str] = Counter()
    for line in stats.read_text().splitlines() if stats.exists() else ():
        count, kind, name, *error = line.split()
        if kind != "exit" and name.startswith("KVM_") and not error:
            counts[name] += int(count)
    return counts


def assert_ours(stats: Path, *requests: str) -> None:
    """Make sure that a client, which has ended with exit(), has made these requests of softkvm's KVM."""
    made = requests_of(stats)
    for request in requests:
        assert made[request], f"{request} was not made of softkvm's KVM: {dict(made)}"


def run_client(
    command: Sequence[str | Path],
    stats: Path,
    *requests: str,
    under: Sequence[str | Path] = (),
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = TIMEOUT_S,
) -> Completed:
    """Run a command under ``softkvm exec``, itself under ``under``, and make sure that these were requests of its KVM.

    ``stats`` is a file to be written. Without ``requests`` nothing is made sure of. ``env`` is all of the environment,
    where it is given.
    """
    whole = [*under, *EXEC, "--stats", stats, *options, "--", *command]
    environment = os.environ if env is None else env
    done = subprocess.run(whole, check=False, capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd)
    if requests and done.returncode == 0:
        assert_ours(stats, *requests)
    return done
