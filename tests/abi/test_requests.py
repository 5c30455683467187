# SPDX-License-Identifier: Apache-2.0
"""The table of requests and the protocols of the API say the same."""

from __future__ import annotations

import pytest

from softkvm import abi, api

FILES = [(abi.File.SYSTEM, api.Kvm), (abi.File.VM, api.Vm), (abi.File.VCPU, api.Vcpu)]

#: What the protocols have beside requests.
NOT_REQUESTS = {
    *("call_soon", "close", "cpu_clock", "host_unmapped_ranges"),
    *("kick", "kvm_run", "shared", "shared_fd", "stats"),
}


def methods(protocol: type) -> set[str]:
    """Return the public names of a protocol and of those it extends."""
    return {name for base in protocol.__mro__ if base is not object for name in vars(base) if not name.startswith("_")}


@pytest.mark.parametrize(("file", "protocol"), FILES)
def test_every_method_of_a_protocol_is_a_request_and_every_request_with_an_argument_a_method(
    file: abi.File, protocol: type
) -> None:
    requests = {
        abi.method_name(name) for name, request in abi.requests_of(file).items() if request.argument is not None
    }
    assert methods(protocol) - NOT_REQUESTS == requests


def test_no_two_requests_of_one_file_have_one_number() -> None:
    for file, _ in FILES:
        numbers = list(abi.requests_of(file).values())
        assert len(set(numbers)) == len(numbers)


def test_a_table_that_is_too_short_grows_to_what_the_kernel_says() -> None:
    argument = abi.KVM_GET_SUPPORTED_CPUID.argument
    assert argument is not None
    table = argument.pack()
    table.nent = 1000
    assert len(argument.grown(table).entries) == 1000
    table = argument.grown(table)
    table.nent = 2
    assert len(argument.unpack(table, 0)) == 2


def test_a_bitmap_that_is_too_short_is_efault() -> None:
    argument = abi.KVM_CLEAR_DIRTY_LOG.argument
    assert argument is not None
    with pytest.raises(OSError, match="bitmap of 7 bytes, expected 8"):
        argument.pack(0, 0, 64, bytes(7))
