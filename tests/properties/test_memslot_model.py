# SPDX-License-Identifier: Apache-2.0
"""Sequences of KVM_SET_USER_MEMORY_REGION against a model of the rules (KVM API 4.35)."""

import ctypes
import errno
import mmap
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.machines import KVMS

from softkvm import abi, api

PAGE = 4096
SLOTS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Slot:
    """One call's arguments; *host* is an offset in the test's memory."""

    slot: int
    gpa: int
    size: int
    host: int
    flags: int


def expected(slots: dict[int, Slot], call: Slot, slot_count: int) -> int:
    """Return the errno that the rules give, 0 for success."""
    if call.flags & ~(abi.KVM_MEM_LOG_DIRTY_PAGES | abi.KVM_MEM_READONLY):
        return errno.EINVAL
    if call.size % PAGE or call.gpa % PAGE or call.host % PAGE or call.slot >= slot_count:
        return errno.EINVAL
    if call.size and call.gpa + call.size >= 1 << 64:
        return errno.EINVAL
    old = slots.get(call.slot)
    if not call.size:
        return 0 if old else errno.EINVAL
    if old:
        if call.host != old.host or call.size != old.size or (call.flags ^ old.flags) & abi.KVM_MEM_READONLY:
            return errno.EINVAL
        if call.gpa == old.gpa:
            return 0
    for other in slots.values():
        if other.slot != call.slot and other.gpa < call.gpa + call.size and call.gpa < other.gpa + other.size:
            return errno.EEXIST
    if call.gpa + call.size > 1 << 52:
        return errno.EINVAL
    return 0


def apply(slots: dict[int, Slot], call: Slot) -> None:
    """Change the model as a successful call does."""
    if call.size:
        slots[call.slot] = call
    else:
        del slots[call.slot]


CALLS = st.builds(
    Slot,
    slot=st.sampled_from((*SLOTS, *SLOTS, 0x7FFF, 0xFFFF)),
    gpa=st.one_of(
        st.integers(0, 12).map(lambda n: n * PAGE),
        st.sampled_from([1, PAGE - 1, 1 << 52, (1 << 64) - PAGE, (1 << 64) - 2 * PAGE]),
    ),
    size=st.one_of(st.sampled_from([0, 0, PAGE, 2 * PAGE, 4 * PAGE]), st.sampled_from([1, PAGE - 1, PAGE + 1])),
    host=st.sampled_from([0, 0, 0, PAGE, 4 * PAGE, 1]),
    flags=st.sampled_from([0, 0, 0, 1, 2, 3, 4, 0x8000_0000]),
)


def region(base: int, call: Slot) -> abi.kvm_userspace_memory_region:
    return abi.kvm_userspace_memory_region(
        slot=call.slot,
        flags=call.flags,
        guest_phys_addr=call.gpa,
        memory_size=call.size,
        userspace_addr=base + call.host,
    )


def outcome(vm: api.Vm, request: abi.kvm_userspace_memory_region) -> int:
    try:
        vm.set_user_memory_region(request)
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.mark.parametrize("kind", list(KVMS))
@settings(max_examples=60)
@given(calls=st.lists(CALLS, min_size=1, max_size=20))
def test_memory_slots_follow_the_rules(kind: str, calls: list[Slot]) -> None:
    memory = mmap.mmap(-1, 16 * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    model: dict[int, Slot] = {}
    with KVMS[kind]() as kvm, kvm.create_vm() as vm:
        slot_count = vm.check_extension(abi.KVM_CAP_NR_MEMSLOTS)
        for call in calls:
            want = expected(model, call, slot_count)
            assert outcome(vm, region(base, call)) == want, (call, model)
            if not want:
                apply(model, call)
        # What the model holds is there, and nothing else: the same slots again succeed, the others cannot be deleted.
        for slot in SLOTS:
            if slot in model:
                assert outcome(vm, region(base, model[slot])) == 0
                assert outcome(vm, region(base, replace(model[slot], size=0))) == 0
            else:
                assert outcome(vm, region(base, Slot(slot, 0, 0, 0, 0))) == errno.EINVAL
