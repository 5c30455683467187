# SPDX-License-Identifier: Apache-2.0
"""Plain data as bytes, and back."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.vmm.errors import SnapshotError
from softkvm.vmm.snapshot import encoding

scalars = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.just("$bytes"), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(values)
def test_plain_data_comes_back(value: Any) -> None:
    assert encoding.decode(encoding.encode(value)) == value


@pytest.mark.parametrize("value", [1.5, object(), {1, 2}, {"a": {"b": 1j}}])
def test_other_data_is_refused_when_it_is_written(value: Any) -> None:
    with pytest.raises(TypeError, match="expected plain data"):
        encoding.encode(value)


@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_anything_else_is_refused_when_it_is_read(data: bytes) -> None:
    with contextlib.suppress(SnapshotError):
        encoding.decode(data)


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"$bytes": 5}', b'{"$bytes": "?"}', b'{"$items": [[{}, 1]]}'])
def test_forms_that_stand_for_nothing_are_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError):
        encoding.decode(data)
