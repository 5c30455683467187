# SPDX-License-Identifier: Apache-2.0
"""The tests of the KVM API with the driver of ``/dev/kvm``, as a client: what passes directly passes there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.client.conftest import EXEC, TIMEOUT_S

ROOT = Path(__file__).resolve().parents[2]


def test_conformance_passes_as_a_client(tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "device", "tests/conformance")
    done = subprocess.run(
        [*EXEC, "--stats", str(stats), "--", *pytest],
        check=False, capture_output=True, text=True, timeout=2 * TIMEOUT_S, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None and int(found[1]) > 500
    assert "KVM_RUN" in stats.read_text()  # it was our KVM, whatever the host has
