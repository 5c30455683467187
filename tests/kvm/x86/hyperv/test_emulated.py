# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's hypercalls by way of KVM's emulator: with its prefix for forced emulation, or the other vendor's VMCALL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.support.conformance import Guest
from tests.support.hyperv import INPUT, HypervGuest, InvalidOpcode, Left
from tests.support.machines import open_soft

from softkvm import abi

FORCED = "0f0b6b766d"
VMCALL, VMMCALL = "0f01c1", "0f01d9"


@pytest.fixture
def hv() -> Iterator[HypervGuest]:
    """A guest whose KVM emulates what has the prefix."""
    with ExitStack() as stack:
        kvm = stack.enter_context(open_soft())
        kvm.params.force_emulation_prefix = True  # type: ignore[attr-defined]
        guest = HypervGuest(lambda **options: stack.enter_context(Guest(kvm, **options)))
        guest.enable_hypercalls()
        yield guest


@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL, FORCED + VMMCALL], ids=["vmcall", "vmmcall", "forced"])
def test_a_hypercall_is_done_whoever_carries_it_out(hv: HypervGuest, instruction: str) -> None:
    fast_flush = abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST | abi.HV_HYPERCALL_FAST_BIT | 2 << 32
    assert hv.execute(instruction, rcx=fast_flush, rdx=0, r8=1).rax == 2 << 32


@pytest.mark.parametrize("instruction", [VMMCALL, FORCED + VMMCALL], ids=["vmmcall", "forced"])
def test_userspaces_result_is_behind_the_instruction(hv: HypervGuest, instruction: str) -> None:
    with pytest.raises(Left) as left:
        hv.execute(instruction, rcx=abi.HVCALL_POST_MESSAGE, rdx=INPUT)
    assert left.value.reason == abi.KVM_EXIT_HYPERV
    hv.guest.kvm_run.hyperv.u.hcall.result = 0x55
    assert hv.finish().rax == 0x55


def test_a_hypercall_that_may_not_be_is_invalid_there_too(hv: HypervGuest) -> None:
    hv.enter_ring_3()
    with pytest.raises(InvalidOpcode):
        hv.execute(FORCED + VMMCALL, rcx=abi.HVCALL_NOTIFY_LONG_SPIN_WAIT)
