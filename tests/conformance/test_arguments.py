# SPDX-License-Identifier: Apache-2.0
"""Arguments of every method: another type is a TypeError, a number that its field cannot hold an errno, in one line."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from tests.support.conformance import Guest, refused

from softkvm import abi, api

PROTOCOLS = {abi.File.SYSTEM: api.Kvm, abi.File.VM: api.Vm, abi.File.VCPU: api.Vcpu}


def parameters() -> Iterator[tuple[abi.File, str, inspect.Parameter]]:
    """Every parameter of every method that is a request."""
    for file, protocol in PROTOCOLS.items():
        for request in abi.requests_of(file):
            method = getattr(protocol, abi.method_name(request), None)
            if method is not None:
                for parameter in list(inspect.signature(method).parameters.values())[1:]:
                    yield file, abi.method_name(request), parameter


def good(parameter: inspect.Parameter) -> Any:
    """A value of the parameter's type."""
    annotation = str(parameter.annotation)
    if annotation.startswith("abi.kvm_"):
        return getattr(abi, annotation.removeprefix("abi."))()
    if annotation.startswith(("Sequence", "abi.MsrValues")):
        return []
    return b"" if annotation.startswith("bytes") else 0


PARAMETERS = list(parameters())
NUMBERS = [row for row in PARAMETERS if str(row[2].annotation).startswith("int")]
IDS = [f"{method}-{parameter.name}" for _, method, parameter in PARAMETERS]


@pytest.fixture
def call(guest: Guest) -> Callable[[abi.File, str, str, object], None]:
    """Calls a method with one argument as given and the others of the right type."""
    files = {abi.File.SYSTEM: guest.kvm, abi.File.VM: guest.vm, abi.File.VCPU: guest.cpu}

    def call(file: abi.File, method: str, name: str, value: object) -> None:
        declared = getattr(PROTOCOLS[file], method)
        takes = list(inspect.signature(declared).parameters.values())[1:]
        getattr(files[file], method)(*(value if p.name == name else good(p) for p in takes))

    return call


@pytest.mark.parametrize(("file", "method", "parameter"), PARAMETERS, ids=IDS)
def test_another_type_is_a_type_error_that_names_the_argument(
    call: Callable[..., None], file: abi.File, method: str, parameter: inspect.Parameter
) -> None:
    others = ["one", 1.5, object()]
    if str(parameter.annotation).startswith(("abi.kvm_", "Sequence", "int")):
        others.append(abi.kvm_dtable())  # holds memory, too
    for value in others:
        with pytest.raises(TypeError) as caught:
            call(file, method, parameter.name, value)
        text = str(caught.value)
        assert text.startswith(parameter.name), text
        assert "expected" in text
        assert "\n" not in text
        assert len(text) < 160, text


@pytest.mark.parametrize(("file", "method", "parameter"), NUMBERS, ids=lambda value: getattr(value, "name", str(value)))
def test_number_that_its_field_cannot_hold_is_an_errno(
    call: Callable[..., None], file: abi.File, method: str, parameter: inspect.Parameter
) -> None:
    expected = errno.EBADF if parameter.name.endswith("fd") else errno.EINVAL
    for number in (-1 << 40, -1 << 70, 1 << 70):
        text = refused(expected, partial(call, file, method, parameter.name, number))
        assert parameter.name in text


def test_numbers_may_be_of_any_integer_type(guest: Guest) -> None:
    class Eight:
        def __index__(self) -> int:
            return 8

    number: Any = Eight()
    assert guest.vm.check_extension(number) == guest.vm.check_extension(8)


def test_arguments_may_be_named_and_left_out(make: Callable[..., Guest]) -> None:
    guest = make(irqchip=True)
    guest.vm.irq_line(irq=5, level=0)
    guest.vm.create_pit2()


def test_missing_and_unknown_arguments_are_named(guest: Guest) -> None:
    vm: Any = guest.vm
    with pytest.raises(TypeError, match=r"irq_line_status\(\): missing a required argument: 'level'"):
        vm.irq_line_status(5)
    with pytest.raises(TypeError, match=r"irq_line_status\(\): .*'leve'"):
        vm.irq_line_status(5, 1, leve=1)
    with pytest.raises(TypeError, match=r"irq_line_status\(\): too many positional arguments"):
        vm.irq_line_status(5, 1, 2)


@pytest.mark.parametrize("entries", [[1], [abi.kvm_cpuid_entry2(), None]])
def test_entry_of_another_type_is_named(guest: Guest, entries: Any) -> None:
    with pytest.raises(TypeError, match=rf"entries\[{len(entries) - 1}\]=.*expected a kvm_cpuid_entry2"):
        guest.cpu.set_cpuid2(entries)


def test_msrs_are_numbers_of_32_and_64_bits(guest: Guest) -> None:
    refused(errno.EINVAL, lambda: guest.cpu.get_msrs([1 << 32]))
    refused(errno.EINVAL, lambda: guest.cpu.set_msrs({-1: 0}))
    refused(errno.EINVAL, lambda: guest.cpu.set_msrs([(0x10, 1 << 64)]))
    pairs: Any = [(1, 2, 3)]
    with pytest.raises(TypeError, match=r"msrs=.*expected values by index"):
        guest.cpu.set_msrs(pairs)


def test_range_of_a_filter_holds_numbers_and_bytes(guest: Guest) -> None:
    refused(errno.EINVAL, lambda: guest.vm.x86_set_msr_filter(0, [abi.MsrFilterRange(1, -1, 1, bytes(8))]))
    bits: Any = "\0" * 8
    with pytest.raises(TypeError, match=r"bitmap=.*expected bytes"):
        guest.vm.x86_set_msr_filter(0, [abi.MsrFilterRange(1, 0, 1, bits)])


def test_more_than_four_arguments_of_a_capability_are_einval(guest: Guest) -> None:
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_HALT_POLL, 0, 0, 0, 0, 0))
