# SPDX-License-Identifier: Apache-2.0
"""The suite covers the API, and the table of docs/kvm-api.md can be made from it."""

from pathlib import Path

import pytest
from scripts.kvm_api_table import COMMAND, ioctls, main, read_tests

from softkvm import abi, api
from softkvm.kvm.x86.capabilities import check_extension

DOCS = Path(__file__).parents[2] / "docs" / "kvm-api.md"


def test_every_method_of_the_api_has_a_conformance_test() -> None:
    tests, _, _ = read_tests()
    methods = {
        name
        for protocol in (api.Kvm, api.Vm, api.Vcpu)
        for base in protocol.__mro__
        if base.__module__.startswith("softkvm.api")
        for name in vars(base)
        if not name.startswith("_")
    } - {"close", "host_unmapped_ranges"}  # the latter is what a kernel knows by itself: tests/kvm/memory has it
    uncovered = methods - set(tests)
    assert not uncovered


def test_every_capability_that_is_there_has_a_conformance_test() -> None:
    tests, _, _ = read_tests()
    there = {name for name, cap in vars(abi).items() if name.startswith("KVM_CAP_") and check_extension(cap)}
    assert not there - set(tests)


def test_every_row_of_the_table_is_a_request() -> None:
    names = ioctls()
    assert {"KVM_RUN", "KVM_CREATE_VM", "KVM_GET_XSAVE2"} <= set(names)
    assert abi.method_name("KVM_GET_REGS") == "get_regs"


def test_the_table_names_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    text = capsys.readouterr().out
    assert COMMAND in text
    assert "| KVM_RUN | yes: `Vcpu.run` |" in text


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    assert DOCS.read_text() == capsys.readouterr().out, f"a capability, a request or a test has changed: {COMMAND}"
