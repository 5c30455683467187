# SPDX-License-Identifier: Apache-2.0
"""The tests of the KVM API with the driver of ``/dev/kvm``, as a client: what passes directly passes there."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from tests.support.clients import TIMEOUT_S, run_client

ROOT = Path(__file__).resolve().parents[2]


def test_conformance_passes_as_a_client(tmp_path: Path) -> None:
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "device", "tests/conformance")
    # The thread that `softkvm stat` asks stays when a VM goes; these tests look that none does.
    environment = os.environ | {"SOFTKVM_LIVE": "0"}
    done = run_client(pytest, tmp_path / "stats", "KVM_RUN", env=environment, cwd=ROOT, timeout=2 * TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None and int(found[1]) > 500
