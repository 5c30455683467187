# SPDX-License-Identifier: Apache-2.0
"""``softkvm shell``: programs in the guest of a machine that runs, by another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.guests import linux_guest

SOFTKVM = (sys.executable, "-m", "softkvm.cli.main")
FAR_S = 240


def softkvm(*args: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SOFTKVM, *args], capture_output=True, text=True, timeout=FAR_S, check=False, input=input)


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_bad_arguments() -> None:
    assert softkvm("shell", "--port", "-1").returncode == 2
    assert softkvm("shell", "--env", "=x").returncode == 2
    assert softkvm("shell", "--").stderr == "softkvm: expected a command behind --\n"
    nobody = softkvm("shell", "nobody", "--", "true")
    assert (nobody.returncode, "no machine of this name runs" in nobody.stderr) == (1, True)


@pytest.mark.guest
@pytest.mark.network
@pytest.mark.timeout(600)
def test_programs_in_a_running_guest(tmp_path: Path) -> None:
    linux_guest()
    done = softkvm("run", "--detach", "--name", "one", "--vsock", "--timeout", "240")
    assert done.returncode == 0, done.stderr
    try:
        done = softkvm("shell", "one", "--port", "77", "--", "true")
        assert done.returncode == 1
        while (done := softkvm("shell", "one", "--", "true")).returncode == 1:
            assert "port 1023 of the guest's: Connection " in done.stderr, done.stderr  # timed out, or reset by peer
        done = softkvm("shell", "one", "--cwd", "/tmp", "--env", "A=b", input="pwd; echo $A; echo err >&2; exit 4\n")
        assert (done.returncode, done.stdout, done.stderr) == (4, "/tmp\nb\n", "err\n")
        done = softkvm("shell", "--", "no-such-program")
        assert (done.returncode, done.stderr) == (127, "softkvm: no-such-program: No such file or directory\n")
        data = os.urandom(100_000).hex()
        assert softkvm("shell", "--", "cat", input=data).stdout == data
    finally:
        (machine,) = json.loads(softkvm("list", "--json").stdout)
        assert softkvm("stop", "--force", machine["name"]).returncode == 0
