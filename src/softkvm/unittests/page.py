# SPDX-License-Identifier: Apache-2.0
"""The HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from softkvm.unittests.result import Result


def html_page(results: Sequence[Result], accel: str) -> str:
    return ""
