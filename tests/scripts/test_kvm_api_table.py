# SPDX-License-Identifier: Apache-2.0
"""What docs/kvm-api.md says: what is there has a test, what isn't a reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scripts import kvm_api_table as table
from softkvm import abi


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str, str]]:
    """Name, state and test of each request and capability."""
    return list(_rows())


def _rows() -> Iterator[tuple[str, str, str]]:
    tests, _, _ = table.read_tests()
    for row in (*table.ioctl_rows(tests), *table.capability_rows(tests)):
        cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
        if cells[0].startswith("KVM_"):
            yield cells[0], cells[-2], cells[-1]


def test_every_request_and_capability_is_a_row(rows: list[tuple[str, str, str]]) -> None:
    names = {name for name, _, _ in rows}
    assert names >= (abi.REQUESTS | abi.X86_REQUESTS).keys()
    assert {"KVM_CAP_IRQCHIP", "KVM_CAP_X86_GUEST_MODE"} <= names


def test_what_is_there_names_a_test(rows: list[tuple[str, str, str]]) -> None:
    assert [name for name, state, test in rows if not state.startswith("no") and "::test_" not in test] == []


def test_what_is_not_there_has_a_reason(rows: list[tuple[str, str, str]]) -> None:
    assert [name for name, state, _ in rows if state == "no"] == []


def test_reasons_are_of_names_that_there_are() -> None:
    known = vars(abi).keys() | abi.REQUESTS.keys() | abi.X86_REQUESTS.keys()
    assert sorted(table.REASONS.keys() - known) == []


def test_what_is_there_has_no_reason_not_to_be(rows: list[tuple[str, str, str]]) -> None:
    assert [name for name, state, _ in rows if name in table.REASONS and not state.startswith("no")] == []
