# SPDX-License-Identifier: Apache-2.0
"""What is closed refuses every request of its protocol."""

from __future__ import annotations

import errno

import pytest

import softkvm
from softkvm import api
from softkvm.kvm.system import KVM_REQUESTS
from softkvm.kvm.vcpu_ioctls import VCPU_REQUESTS
from softkvm.kvm.vm import VM_REQUESTS


@pytest.mark.parametrize(
    ("protocol", "requests"), [(api.Kvm, KVM_REQUESTS), (api.Vm, VM_REQUESTS), (api.Vcpu, VCPU_REQUESTS)]
)
def test_every_method_of_a_protocol_is_a_request_or_harmless(protocol: type, requests: tuple[str, ...]) -> None:
    harmless = {"kick", "kvm_run", "shared"}
    assert {name for name in vars(protocol) if not name.startswith("_")} - harmless == set(requests)


def test_a_vm_that_is_closed_makes_no_new_thread_or_mapping() -> None:
    kvm = softkvm.open()
    vm = kvm.create_vm()
    vm.create_irqchip()
    vm.close()
    for request in (lambda: vm.irqfd(0, 5), vm.create_pit2, lambda: vm.create_vcpu(0)):
        with pytest.raises(OSError) as info:
            request()
        assert info.value.errno == errno.EBADF
