# SPDX-License-Identifier: Apache-2.0
"""Model-specific registers whose behaviour the device cannot be asked for."""

from __future__ import annotations

import sys
import threading

from tests.support.tiny import Tiny

from softkvm.kvm.x86.tsc import TscSynchronizer


def test_the_patch_level_is_in_the_lower_half_as_on_amds_processors() -> None:
    tiny = Tiny()
    tiny.protected_mode().load(b"\x0f\x32\xf4", rcx=0x8B)  # rdmsr; hlt
    regs = tiny.run_to_halt()
    assert (regs.rdx, regs.rax) == (0, 0x0100_0065)
    assert tiny.kvm.get_msrs([0x8B]) == [0x0100_0065]
    tiny.close()


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
            offsets: list[int] = []
            barrier = threading.Barrier(4)

            def write(tsc: TscSynchronizer, barrier: threading.Barrier, offsets: list[int]) -> None:
                barrier.wait()
                offsets.append(tsc.write(5_000_000_000, 1_000_000))

            threads = [threading.Thread(target=write, args=(tsc, barrier, offsets)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(offsets)) == 1
    finally:
        sys.setswitchinterval(interval)
