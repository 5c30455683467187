# SPDX-License-Identifier: Apache-2.0
"""Sequences of API calls with fields at their edges.

A call succeeds, or fails with an errno that its section of the KVM API document names and changes nothing;
it never raises anything else, and the process goes on.
"""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.api_calls import EDGE, OPERATIONS, POKES, Pokes, errno_of, poked
from tests.support.conformance import MEMORY_SIZE, Guest, watchdog
from tests.support.machines import KVMS

from softkvm import abi

#: Calls in which the guest may go on before they fail.
NOT_COMPARED = {"vcpu.run", "vcpu.run at once", "vcpu.run with any page"}
#: What a kernel says that was built without a request, or is older.
_NOT_THERE = {errno.ENOTTY, errno.EINVAL}
#: Requests that no sequence has, and why.
LEFT_OUT = {
    "device.set_device_attr": "KVM has no devices of its own on x86 (KVM_CREATE_DEVICE is ENODEV)",
    "device.get_device_attr": "likewise",
    "device.has_device_attr": "likewise",
}
_TIMER_COUNT = slice(0x390, 0x394)


def snapshot(guest: Guest) -> list[bytes]:
    """Everything that can be read of the vCPU and the chips, without what time changes."""
    cpu = guest.cpu
    cpu.get_mp_state()  # the kernel takes a pending INIT here,
    cpu.get_vcpu_events()  # and loads a pending exception's payload here
    state = [
        bytes(get())
        for get in (
            cpu.get_regs,
            cpu.get_sregs,
            cpu.get_fpu,
            cpu.get_xsave,
            cpu.get_xcrs,
            cpu.get_vcpu_events,
            cpu.get_debugregs,
            cpu.get_mp_state,
        )
    ]
    try:
        lapic = bytearray(bytes(cpu.get_lapic()))
        lapic[_TIMER_COUNT] = bytes(4)
        state += [bytes(lapic), *(bytes(guest.vm.get_irqchip(n)) for n in range(3))]
    except OSError:
        pass
    return state


STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), EDGE | st.integers(0, 255), EDGE | st.integers(0, 255), POKES),
    min_size=1,
    max_size=12,
)


def check(kind: str, steps: list[tuple[str, int, int, Pokes]], *, irqchip: bool, type: int = 0) -> None:
    with KVMS[kind]() as kvm, Guest(kvm, irqchip=irqchip, type=type) as guest:
        guest.real("90 e6e9 f4 ebfb")
        for name, a, b, pokes in steps:
            operation = OPERATIONS[name]
            before = snapshot(guest)
            error = errno_of(lambda: operation.call(guest, a, b, pokes))  # noqa: B023
            if error:
                said = errno.errorcode.get(error, str(error))
                assert error in operation.errnos | (_NOT_THERE if kind == "device" else set()), f"{name}: {said}"
                if name not in NOT_COMPARED:
                    assert snapshot(guest) == before, f"{name} failed with {said} and changed something"
    healthy(kind)


def healthy(kind: str) -> None:
    """Another machine still works."""
    with KVMS[kind]() as kvm, Guest(kvm) as guest:
        guest.real("b83412 f4")
        guest.expect(abi.KVM_EXIT_HLT)
        assert guest.cpu.get_regs().rax == 0x1234


def test_every_request_is_in_the_sequences() -> None:
    """A request that is added to the API has to be tried at its edges."""
    requests = {
        f"{file.name.lower()}.{abi.method_name(name)}"
        for file in abi.File
        if file.name is not None
        for name, request in abi.requests_of(file).items()
        if request.argument is not None
    }
    tried = {name.partition(" ")[0] for name in OPERATIONS}
    assert requests - tried == set(LEFT_OUT)
    assert not tried - requests


@pytest.mark.parametrize(
    ("irqchip", "type"), [(False, 0), (True, 0), (True, abi.KVM_X86_SW_PROTECTED_VM)], ids=["bare", "chips", "private"]
)
@settings(max_examples=150)
@given(steps=STEPS)
def test_calls_fail_as_documented_and_change_nothing(
    irqchip: bool, type: int, steps: list[tuple[str, int, int, Pokes]]
) -> None:
    check("soft", steps, irqchip=irqchip, type=type)


@settings(max_examples=3)
@given(a=EDGE | st.integers(0, 255), b=EDGE | st.integers(0, 255), pokes=POKES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_request_fails_as_documented(name: str, a: int, b: int, pokes: Pokes) -> None:
    """A few of each in any case: sequences are drawn, and may lack one."""
    check("soft", [(name, a, b, pokes)], irqchip=bool(a & 1))


@settings(max_examples=20)
@given(steps=STEPS)
def test_the_device_obeys_the_same_properties(steps: list[tuple[str, int, int, Pokes]]) -> None:
    check("device", [step for step in steps if step[0] not in NOT_COMPARED], irqchip=False)


@settings(max_examples=100)
@given(data=st.binary(min_size=1, max_size=64), pokes=POKES, long=st.booleans())
def test_any_code_in_any_state_ends_in_an_exit_or_a_kick(data: bytes, pokes: Pokes, long: bool) -> None:
    with KVMS["soft"]() as kvm, Guest(kvm) as guest:
        (guest.long if long else guest.real)(data + b"\xf4")
        sregs = poked(guest.cpu.get_sregs(), pokes)
        assert errno_of(lambda: guest.cpu.set_sregs(sregs)) in (0, errno.EINVAL)
        for _ in range(4):
            with watchdog(guest.cpu, 0.02):
                error = errno_of(guest.cpu.run)
            assert error in (0, errno.EINTR, errno.EFAULT, errno.EINVAL)
            if error:
                break
            assert guest.kvm_run.exit_reason in abi.EXIT_REASON_NAMES
        assert len(guest.memory) == MEMORY_SIZE
    healthy("soft")
