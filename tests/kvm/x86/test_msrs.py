# SPDX-License-Identifier: Apache-2.0
"""Model-specific registers whose behaviour the device cannot be asked for."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import cast

import pytest
from tests.support.tiny import Tiny

from softkvm import abi
from softkvm.kvm import Kvm, Vcpu
from softkvm.kvm.params import Params
from softkvm.kvm.x86.msrs import get_msr, set_msr
from softkvm.kvm.x86.tsc import TscSynchronizer


def test_the_patch_level_is_in_the_lower_half_as_on_amds_processors() -> None:
    tiny = Tiny()
    tiny.protected_mode().load(b"\x0f\x32\xf4", rcx=0x8B)  # rdmsr; hlt
    regs = tiny.run_to_halt()
    assert (regs.rdx, regs.rax) == (0, 0x0100_0065)
    assert tiny.kvm.get_msrs([0x8B]) == [0x0100_0065]
    tiny.close()


def test_feature_msrs_are_those_of_kvm_amd() -> None:
    """DE_CFG, the patch level, IA32_ARCH_CAPABILITIES and IA32_PERF_CAPABILITIES (Linux 6.1)."""
    with Kvm() as kvm:
        assert set(kvm.get_msr_feature_index_list()) == {0xC001_1029, 0x8B, 0x10A, 0x345}
        assert kvm.get_msrs([0xC001_1029, 0x345, 0x174]) == [2, 0], "LFENCE serializes, there are no counters"
    with Kvm(Params(ignore_msrs=True)) as kvm:
        assert kvm.get_msrs([0x174, 0x8B]) == [0, 0x0100_0065]


def test_a_guest_cannot_make_lfence_not_serialize() -> None:
    tiny = Tiny()
    tiny.protected_mode().load(b"\x0f\x30\xf4", rcx=0xC001_1029, rax=2, rdx=0)  # wrmsr; hlt
    tiny.run_to_halt()
    tiny.load(b"\x0f\x30\xf4", rcx=0xC001_1029, rax=0, rdx=0)
    assert tiny.run() == abi.KVM_EXIT_SHUTDOWN, "#GP without an IDT"
    tiny.close()


@pytest.mark.parametrize(("msr", "feature"), [(0xC001_0140, (0x8000_0001, "ecx", 9)), (0xDA0, (0xD, "eax", 3))])
def test_registers_come_with_their_feature(msr: int, feature: tuple[int, str, int]) -> None:
    """OSVW's and IA32_XSS; the host has the latter in any case."""
    function, register, bit = feature
    for there in (False, True):
        with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            indexed = function == 0xD
            entry = abi.kvm_cpuid_entry2(function=function, index=int(indexed), flags=int(indexed))
            setattr(entry, register, there << bit)
            vcpu.set_cpuid2([entry])
            assert (get_msr(vcpu, msr, host=False) is not None) == there
            assert set_msr(vcpu, msr, 0, host=False) == there
            assert len(vcpu.get_msrs([msr])) == (there or indexed)


def test_the_host_may_restore_the_tsc_ratio_that_there_is_without_scaling() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        ratio = 0xC000_0104
        assert ratio in kvm.get_msr_index_list()
        assert vcpu.get_msrs([ratio]) == [1 << 32]
        assert [vcpu.set_msrs({ratio: value}) for value in (1 << 32, 0, 1)] == [1, 1, 0]
        assert get_msr(vcpu, ratio, host=False) is None


def test_what_the_lfence_register_is_set_to_it_keeps() -> None:
    tiny = Tiny()
    de_cfg = 0xC001_1029
    assert tiny.vcpu.get_msrs([de_cfg]) == [2]
    assert tiny.vcpu.set_msrs({de_cfg: 0}) == 1
    assert tiny.vcpu.get_msrs([de_cfg]) == [0]
    assert tiny.vcpu.set_msrs({de_cfg: 4}) == 0
    tiny.close()


def test_counters_written_to_the_same_value_on_several_threads_agree() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            tsc = TscSynchronizer()
            vcpu = cast(Vcpu, SimpleNamespace(tsc_khz=1_000_000, tsc_ratio=1 << 32))
            offsets: list[int] = []
            barrier = threading.Barrier(4)

            def write(tsc: TscSynchronizer, vcpu: Vcpu, barrier: threading.Barrier, offsets: list[int]) -> None:
                barrier.wait()
                offsets.append(tsc.write(vcpu, 5_000_000_000))

            threads = [threading.Thread(target=write, args=(tsc, vcpu, barrier, offsets)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(offsets)) == 1
    finally:
        sys.setswitchinterval(interval)
