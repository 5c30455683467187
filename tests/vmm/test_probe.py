# SPDX-License-Identifier: Apache-2.0
"""A KVM that runs a guest passes; what one that doesn't is said to do follows from how far the guest came."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
from tests.support.machines import open_soft

from softkvm import abi, api
from softkvm.vmm import probe as module
from softkvm.vmm.probe import probe


def test_software_kvm_passes() -> None:
    with open_soft() as kvm:
        assert probe(kvm, timeout_s=60) is None


class Proxy:
    """An object of the KVM API with some methods replaced."""

    def __init__(self, wrapped: Any, **replaced: Any) -> None:
        self._wrapped = wrapped
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._wrapped, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self._wrapped.close()


def kvm_whose_vcpu(behave: Callable[[Any, memoryview], None]) -> api.Kvm:
    """A KVM where KVM_RUN calls *behave* with the vCPU and the guest's memory."""
    kvm = open_soft()

    def create_vm() -> Any:
        vm = kvm.create_vm()
        memory: list[memoryview] = []
        stopped = threading.Event()

        def attach(region: abi.kvm_userspace_memory_region, owner: Any) -> None:
            start = region.userspace_addr - ctypes.addressof(ctypes.c_char.from_buffer(owner))
            memory.append(memoryview(owner)[start : start + region.memory_size])

        def create_vcpu(number: int) -> Any:
            vcpu = vm.create_vcpu(number)

            def run() -> None:
                behave(vcpu, memory[0])
                memory.clear()
                if not vcpu.kvm_run.exit_reason:
                    assert stopped.wait(60)
                    raise InterruptedError(errno.EINTR, "kicked")

            return Proxy(vcpu, run=run, kick=stopped.set)

        return Proxy(vm, set_user_memory_region=attach, create_vcpu=create_vcpu)

    return cast("api.Kvm", Proxy(kvm, create_vm=create_vm))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (0, "cannot run 64-bit code"),
        (1, "is slow: 5,000,000 instructions took more than 1 s"),
        (2, "delivers no timer interrupt"),
        (3, "does not come back from an interrupt"),
        (99, "destroys its guest's memory"),
    ],
)
def test_guest_that_does_not_get_on_tells_how_far_it_came(stage: int, said: str) -> None:
    def stop_at(vcpu: Any, memory: memoryview) -> None:
        memory[module._STAGE] = stage

    assert probe(kvm_whose_vcpu(stop_at), timeout_s=0.1) == said


def test_other_exits_are_named() -> None:
    def fail(vcpu: Any, memory: memoryview) -> None:
        vcpu.kvm_run.exit_reason = abi.KVM_EXIT_INTERNAL_ERROR

    assert probe(kvm_whose_vcpu(fail)) == "cannot run 64-bit code: KVM_EXIT_INTERNAL_ERROR"


def test_capabilities_and_errors_are_named() -> None:
    def refuse() -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    kvm: Any = Proxy(open_soft(), check_extension=lambda cap: cap != abi.KVM_CAP_PIT2)
    assert probe(kvm) == "lacks PIT2"
    kvm = Proxy(open_soft(), create_vm=refuse)
    assert probe(kvm) == "refuses a guest: Operation not permitted"
