# SPDX-License-Identifier: Apache-2.0
"""Copying a running guest by its dirty log, while its mappings are taken away: nothing written is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from tests.support.threads import running, until
from tests.support.tiny import MIB, Memory, Tiny

from softkvm import abi

GPA = 32 * MIB
SIZE = 4 * MIB
PAGE = 4096


@contextmanager
def _writers(tiny: Tiny) -> Iterator[None]:
    """Run every vCPU on a loop that increments words all over the slot, each in its own half of a page."""
    # L: inc dword [rbx]; add rbx, 0x3010; cmp rbx, rsi; jb L; sub rbx, rdi; jmp L
    code = bytes.fromhex("ff03 4881c310300000 4839f3 72f2 4829fb ebed")
    for n, vcpu in enumerate(tiny.vcpus):
        tiny.vcpu = vcpu
        tiny.long_mode()
        vcpu.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_RUNNABLE))
        tiny.load(code, rbx=GPA + n * 8, rsi=GPA + SIZE - PAGE, rdi=SIZE - PAGE)
    with ExitStack() as threads:
        others = [threads.enter_context(running(vcpu)) for vcpu in tiny.vcpus]
        yield
    assert all(isinstance(other.error, InterruptedError) for other in others)


@pytest.mark.parametrize("zap", [False, True])
def test_a_copy_made_by_the_dirty_log_is_exact(zap: bool) -> None:
    tiny = Tiny(irqchip=True, vcpus=2)
    source = Memory(SIZE)
    copy = bytearray(SIZE)
    tiny.slot(1, GPA, SIZE, source.address)

    def copy_dirty() -> int:
        bits = int.from_bytes(tiny.vm.get_dirty_log(1), "little")
        count = bits.bit_count()
        while bits:
            at = ((bits & -bits).bit_length() - 1) * PAGE
            copy[at : at + PAGE] = source.view[at : at + PAGE]
            bits &= bits - 1
        return count

    with _writers(tiny):
        time.sleep(0.05)  # large leaves, dirty
        tiny.slot(1, GPA, SIZE, source.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
        copy[:] = source.view
        for round_number in range(20):
            until(copy_dirty)
            if zap:
                tiny.vm.zap_gfn_range((GPA >> 12) + 17 * round_number, 300)
            time.sleep(0.01)
    copy_dirty()
    assert bytes(copy) == bytes(source.view)
    assert copy_dirty() == 0
    tiny.close()
