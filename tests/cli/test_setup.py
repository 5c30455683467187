# SPDX-License-Identifier: Apache-2.0
"""``softkvm setup``: the default guest, or a directory with what is in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.guests import linux_guest

SOFTKVM = (sys.executable, "-m", "softkvm.cli.main")

pytestmark = pytest.mark.network


def setup(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SOFTKVM, "setup", *args], capture_output=True, text=True, timeout=120, check=False)


def test_the_default_guest_and_a_root_directory(tmp_path: Path) -> None:
    guest = linux_guest()
    assert setup().stdout == f"kernel  {guest.kernel}\ninitrd  {guest.initrd}\n"
    root = tmp_path / "a" / "root"
    done = setup(root)
    assert (done.returncode, done.stdout) == (0, f"kernel  {guest.kernel}\nroot    {root}\n")
    assert os.access(root / "bin" / "sh", os.X_OK) and os.access(root / "init", os.X_OK)
    assert (
        subprocess.run([root / "bin" / "busybox", "echo", "runs"], capture_output=True, check=True).stdout == b"runs\n"
    )
    again = setup(root)
    assert (again.returncode, again.stderr) == (1, f"softkvm: {root}: Directory not empty\n")
    (tmp_path / "file").touch()
    assert setup(tmp_path / "file").returncode == 1
