# SPDX-License-Identifier: Apache-2.0
"""What is closed refuses every request of its protocol."""

from __future__ import annotations

import errno
import mmap
import threading

import pytest

import softkvm
from softkvm import abi
from softkvm.kvm import Vm
from softkvm.kvm.state import IN_GUEST_MODE, OUTSIDE_GUEST_MODE
from softkvm.kvm.tlb import request_flush


def test_a_vm_that_is_closed_makes_no_new_thread_or_mapping() -> None:
    kvm = softkvm.open()
    vm = kvm.create_vm()
    vm.create_irqchip()
    vm.close()
    for request in (lambda: vm.irqfd(0, 5), vm.create_pit2, lambda: vm.create_vcpu(0)):
        with pytest.raises(OSError) as info:
            request()
        assert info.value.errno == errno.EBADF


def test_a_request_that_a_close_has_overtaken_makes_nothing() -> None:
    # It had begun when another thread closed the VM, and waited for a lock of the close's.
    vm = softkvm.open().create_vm()
    assert isinstance(vm, Vm)
    vm.close()
    memory = mmap.mmap(-1, 4096)
    region = abi.kvm_userspace_memory_region(memory_size=4096, userspace_addr=1 << 20)
    for request in (
        lambda: Vm.create_vcpu(vm, 0),
        lambda: Vm.create_irqchip(vm),
        lambda: Vm.create_split_irqchip(vm, 24),
        lambda: Vm.create_pit2(vm),
        lambda: Vm.set_user_memory_region(vm, region, memory),
    ):
        with pytest.raises(OSError) as info:
            request()
        assert info.value.errno == errno.EBADF
    memory.close()


def test_memory_whose_slot_was_refused_is_not_held() -> None:
    with softkvm.open() as kvm, kvm.create_vm() as vm:
        assert isinstance(vm, Vm)
        memory = mmap.mmap(-1, 4096)
        own = vm.machine.alloc_page()  # an address that no slot may have, which is found late
        region = abi.kvm_userspace_memory_region(memory_size=4096, userspace_addr=own.address)
        with pytest.raises(OSError) as info:
            vm.set_user_memory_region(region, memory)
        memory.close()  # while the traceback is there
        assert info.value.errno == errno.EINVAL


class _Answers:
    """A vCPU in guest mode that flushes at once, and goes on in guest mode."""

    def __init__(self) -> None:
        self.mode = IN_GUEST_MODE
        self.stat_tlb_flush = 0
        self.cpu = self

    def make_request(self, request: int) -> None:
        self.stat_tlb_flush += 1

    def kick(self) -> None:
        pass


def test_a_flush_that_is_answered_before_one_looks_is_not_waited_for() -> None:
    vcpu = _Answers()
    flush = threading.Thread(target=request_flush, args=([vcpu],), daemon=True)
    flush.start()
    flush.join(10)
    waits = flush.is_alive()
    vcpu.mode = OUTSIDE_GUEST_MODE
    flush.join()
    assert not waits
