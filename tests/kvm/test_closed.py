# SPDX-License-Identifier: Apache-2.0
"""What is closed refuses every request of its protocol."""

from __future__ import annotations

import errno

import pytest

import softkvm


def test_a_vm_that_is_closed_makes_no_new_thread_or_mapping() -> None:
    kvm = softkvm.open()
    vm = kvm.create_vm()
    vm.create_irqchip()
    vm.close()
    for request in (lambda: vm.irqfd(0, 5), vm.create_pit2, lambda: vm.create_vcpu(0)):
        with pytest.raises(OSError) as info:
            request()
        assert info.value.errno == errno.EBADF
