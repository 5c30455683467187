# SPDX-License-Identifier: Apache-2.0
"""pytest-timeout's signal, SIGALRM by ITIMER_REAL, in tests that need it for themselves."""

from __future__ import annotations

import pytest

OWN_ALARM = pytest.mark.timeout(method="thread")
"""Marks tests that set the process's timer or SIGALRM's handler: the time limit is watched by a thread instead."""
