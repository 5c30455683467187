# SPDX-License-Identifier: Apache-2.0
"""Errors of the KVM API: ``OSError`` with the errno that the API document gives."""

from __future__ import annotations

import os


def kvm_error(code: int, message: str) -> OSError:
    """Return the ``OSError`` for errno ``code``; ``message`` names field, value and expectation."""
    return OSError(code, f"{os.strerror(code)}: {message}")
