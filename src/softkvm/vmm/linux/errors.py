# SPDX-License-Identifier: Apache-2.0
"""What goes wrong when a kernel is looked at."""

from __future__ import annotations


class KernelError(Exception):
    """There is no kernel in memory that tells of itself, or not of this; the message says what is missing."""
