# SPDX-License-Identifier: Apache-2.0
"""What a client's descriptor is, follows its number: closed, copied over and used again, by whatever call."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize("case", ["copies", "raw_close", "vm_is_closed_first", "numbers_are_used_again"])
def test_of_a_dynamic_client(case: str, holds: Callable[..., None]) -> None:
    holds("descriptors", case)
