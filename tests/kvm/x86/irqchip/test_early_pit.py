# SPDX-License-Identifier: Apache-2.0
"""A PIT that is asked for before the irqchip, as kvmtool did before 2024 and kernels before 6.9 allow."""

import errno

import pytest

from softkvm import abi
from softkvm.kvm import Kvm


def test_a_pit_before_the_irqchip_is_there_with_it() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_pit2(abi.KVM_PIT_SPEAKER_DUMMY)
        with pytest.raises(OSError) as second:
            vm.create_pit2()
        assert second.value.errno == errno.EEXIST
        vm.create_irqchip()
        assert vm.get_pit2().channels[0].count in (0, 0x10000)
        with pytest.raises(OSError) as third:
            vm.create_pit2()
        assert third.value.errno == errno.EEXIST


def test_a_pit_is_enoent_where_no_pic_can_come() -> None:
    with Kvm() as kvm:
        with kvm.create_vm() as vm:
            vm.create_vcpu(0)
            with pytest.raises(OSError) as without:
                vm.create_pit2()
        with kvm.create_vm() as vm:
            vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24)
            with pytest.raises(OSError) as split:
                vm.create_pit()
    assert (without.value.errno, split.value.errno) == (errno.ENOENT, errno.ENOENT)
