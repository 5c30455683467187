# SPDX-License-Identifier: Apache-2.0
import pytest

from softkvm import abi
from softkvm.selftests.table import expected, key, read


def test_every_program_stands_in_the_table_once_and_every_skip_has_a_reason() -> None:
    table = expected()
    assert not set(table.skips) & set(table.needs)
    assert all(skip.reason and skip.says for skip in table.skips.values())
    assert all(need.reason for need in table.needs.values())


def test_needs_are_capabilities_by_their_names() -> None:
    table = read({"need": [{"capability": "KVM_CAP_X86_SMM", "reason": "r", "programs": ["a", "b"]}]})
    assert table.needs["a"].number == table.needs["b"].number == abi.KVM_CAP_X86_SMM
    with pytest.raises(ValueError, match="KVM_CAP_NONE"):
        read({"need": [{"capability": "KVM_CAP_NONE", "reason": "r", "programs": ["a"]}]})


def test_a_table_that_is_misspelt_is_refused() -> None:
    with pytest.raises(ValueError, match="skips"):
        read({"skips": []})


def test_a_program_is_the_same_in_the_directory_of_newer_kernels() -> None:
    table = read({"slow": [{"limit_s": 7, "programs": ["x86_64/amx_test"]}]})
    assert table.slow[key("x86/amx_test")] == table.slow[key("x86_64/amx_test")] == 7
