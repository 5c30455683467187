# SPDX-License-Identifier: Apache-2.0
"""Hypercalls and registers of Hyper-V's with whatever a guest makes of them: documented results, a healthy host."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.conformance import MEMORY_SIZE, Guest, describe
from tests.support.hyperv import EVENTS, INPUT, MESSAGES, TSC_PAGE, GeneralProtection, HypervGuest, Left
from tests.support.machines import open_soft

from softkvm import abi
from softkvm.kvm.x86.hyperv.hypercalls import HYPERCALLS
from softkvm.kvm.x86.hyperv.msrs import HV_MSRS

#: What the specification has for a call that fails (TLFS, appendix B), as far as KVM says it.
RESULTS = {
    abi.HV_STATUS_SUCCESS, abi.HV_STATUS_INVALID_HYPERCALL_CODE, abi.HV_STATUS_INVALID_HYPERCALL_INPUT,
    abi.HV_STATUS_INVALID_ALIGNMENT, abi.HV_STATUS_INVALID_PARAMETER, abi.HV_STATUS_ACCESS_DENIED,
    abi.HV_STATUS_OPERATION_DENIED, abi.HV_STATUS_INVALID_PORT_ID,
}  # fmt: skip
#: The second slot, which begins where the first ends: input may lie in both.
SECOND = 0x8_0000
FLUSHES = (2, 3, 0x13, 0x14)

U64 = st.integers(0, (1 << 64) - 1)
CONTROL = st.builds(
    lambda code, fast, var, rep, start, reserved: code | fast << 16 | var << 17 | rep << 32 | start << 48 | reserved,
    st.sampled_from([*sorted(HYPERCALLS), 0, 1, 0xBEEF]),
    st.integers(0, 1),
    st.sampled_from([0, 1, 2, 64, 0x3FF]),
    st.sampled_from([0, 1, 2, 11, 15, 16, 0xFFF]),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([0, 0, 0, 1 << 27, 1 << 63]),
)
ADDRESS = st.one_of(
    st.builds(
        lambda page, back: page - back, st.sampled_from([INPUT + 0x1000, SECOND, MEMORY_SIZE]), st.integers(0, 64)
    ),
    st.sampled_from([0, INPUT, 1 << 40, (1 << 52) - 8, (1 << 64) - 8]),
    U64,
)


#: The guest goes on from one example to the next.
SAME_GUEST = (HealthCheck.function_scoped_fixture,)


@pytest.fixture
def hv() -> Iterator[HypervGuest]:
    """Two virtual processors, memory in two slots."""
    with ExitStack() as stack:
        kvm = stack.enter_context(open_soft())

        def make(**options: object) -> Guest:
            guest = stack.enter_context(Guest(kvm, **options))  # type: ignore[arg-type]
            guest.region(0, 0, 0)
            guest.region(0, 0, SECOND)
            guest.region(1, SECOND, MEMORY_SIZE - SECOND, offset=SECOND)
            return guest

        guest = HypervGuest(make, vcpus=2)
        guest.enable_hypercalls()
        for vcpu in (0, 1):
            guest.enable_apic(vcpu)
        yield guest


def outcome(call: Callable[[], int | None]) -> int | Left | None:
    """What a call gives, or the exit that it left for."""
    try:
        return call()
    except Left as left:
        return left


@settings(max_examples=300, deadline=None, suppress_health_check=SAME_GUEST)
@given(control=CONTROL, ingpa=ADDRESS, outgpa=U64, seed=st.integers(0, 1 << 32), sparse=st.integers(0, 3))
def test_a_hypercall_has_a_documented_result(
    hv: HypervGuest, control: int, ingpa: int, outgpa: int, seed: int, sparse: int
) -> None:
    rng = random.Random(seed)
    words = [rng.choice([0, 1, 0x50, rng.getrandbits(64)]) for _ in range(64)]
    words[2:4] = sparse & 1, (1 << (control >> 17 & 0x3F)) - 1  # often as many banks as the header has
    data = b"".join(word.to_bytes(8, "little") for word in words)
    if ingpa + len(data) <= MEMORY_SIZE and ingpa >= INPUT and not ingpa >> 20:
        if not INPUT + 0x1000 <= ingpa + len(data) < 0x8_0000 or ingpa >= 0x2_5000:
            hv.guest.write(ingpa, data)
    code, rep = control & 0xFFFF, control >> 32 & 0xFFF
    result = outcome(lambda: hv.hypercall(control, ingpa, outgpa, xmm=words[:12]))
    if isinstance(result, Left):
        assert result.reason == abi.KVM_EXIT_HYPERV, describe(hv.guest.kvm_run)
        hv.guest.kvm_run.hyperv.u.hcall.result = 0x1234
        assert hv.finish().rax == 0x1234
        return
    assert result is not None and result & 0xFFFF in RESULTS
    done = result >> 32 & 0xFFF
    assert done == (rep if code in FLUSHES and result & 0xFFFF == 0 else 0)
    assert result & ~(0xFFFF | 0xFFF << 32) == 0


VALUES = st.one_of(
    U64, st.sampled_from([0, 1, 0xFFFF_FFFF, *(page | 1 for page in (MESSAGES, EVENTS, TSC_PAGE, 1 << 40))])
)
ACCESSES = st.lists(st.tuples(st.sampled_from(sorted(HV_MSRS)), st.one_of(st.none(), VALUES)), max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=SAME_GUEST)
@given(accesses=ACCESSES)
def test_registers_take_any_value_or_refuse_it(hv: HypervGuest, accesses: list[tuple[int, int | None]]) -> None:
    """And the guest goes on: what is pending when it is all over is an interrupt, a message or an exit."""
    for msr, value in accesses:
        with suppress(GeneralProtection):
            result = outcome(partial(hv.rdmsr, msr) if value is None else partial(hv.wrmsr, msr, value))
            if isinstance(result, Left):
                assert result.reason in (abi.KVM_EXIT_HYPERV, abi.KVM_EXIT_SYSTEM_EVENT)
    for timer in range(4):
        hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG + 2 * timer, 0)
    hv.enable_hypercalls()
    assert hv.fast(abi.HVCALL_NOTIFY_LONG_SPIN_WAIT) == abi.HV_STATUS_SUCCESS


@settings(max_examples=60, deadline=None, suppress_health_check=SAME_GUEST)
@given(seed=st.integers(0, 1 << 32), used=st.booleans(), sint=st.integers(0, 15), config=st.integers(0, 15))
def test_a_page_of_messages_may_hold_anything(hv: HypervGuest, seed: int, used: bool, sint: int, config: int) -> None:
    content = bytearray(random.Random(seed).randbytes(4096))
    if not used:
        content[256 * sint : 256 * sint + 4] = bytes(4)
    page = bytes(content)
    hv.wrmsr(abi.HV_X64_MSR_SIMP, MESSAGES | 1)
    hv.wrmsr(abi.HV_X64_MSR_SINT0 + sint, 0x71)
    hv.guest.write(MESSAGES, page)
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_COUNT, 1)
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG, config & ~abi.HV_STIMER_PERIODIC | sint << abi.HV_STIMER_SINT_SHIFT)
    after = bytes(hv.guest.memory[MESSAGES : MESSAGES + 4096])
    slot = slice(256 * sint, 256 * sint + 256)
    assert after[: slot.start] == page[: slot.start] and after[slot.stop :] == page[slot.stop :]
    changed = [at for at in range(256) if page[slot][at] != after[slot][at]]
    if not config & abi.HV_STIMER_ENABLE:
        assert not changed
    elif used:
        assert changed in ([], [5]), "a slot in use gets a flag"
    else:
        assert after[slot][:4] == abi.HVMSG_TIMER_EXPIRED.to_bytes(4, "little")
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG, 0)
    hv.wrmsr(abi.HV_X64_MSR_SINT0 + sint, abi.HV_SYNIC_SINT_MASKED)
