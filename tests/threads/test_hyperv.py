# SPDX-License-Identifier: Apache-2.0
"""Thread 15, Hyper-V's interfaces: processors that run at the same time flush, interrupt and count time for each other.

Its constants, in order and each once: tests/abi/test_hyperv.py. One processor alone: tests/conformance/test_hyperv.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from tests.support.conformance import Guest, watchdog
from tests.support.hyperv import HYPERCALL_PAGE, HypervGuest
from tests.support.machines import open_soft

from softkvm import abi

Make = Callable[..., Guest]
LIMIT_S = 30
#: A page that the second processor reads, at 1 GiB, and its page table.
WINDOW, WINDOW_TABLE, OLD, NEW = 0x4000_0000, 0x30000, 0x31000, 0x32000
DIRECTORY = 0x10000 + 3 * 0x1000


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes guests on the software side."""
    with ExitStack() as stack:
        kvm = stack.enter_context(open_soft())
        yield lambda **options: stack.enter_context(Guest(kvm, **options))


@contextmanager
def running(hv: HypervGuest, vcpu: int) -> Iterator[threading.Thread]:
    """Let a vCPU run on a thread of its own until it leaves."""
    cpu = hv.guest.vcpus[vcpu]

    def main() -> None:
        with watchdog(cpu, LIMIT_S) as barked:
            try:
                cpu.run()
            except InterruptedError:
                assert barked.is_set()

    thread = threading.Thread(target=main)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(LIMIT_S + 5)
        assert not thread.is_alive()


def map_window(hv: HypervGuest, page: int) -> None:
    """Let the window be another page."""
    hv.guest.write(WINDOW_TABLE, (page | 7).to_bytes(8, "little"))


@pytest.mark.parametrize("listed", [False, True], ids=["all", "list"])
def test_a_flush_is_seen_by_a_processor_that_runs(make: Make, listed: bool) -> None:
    """The other one reads without an exit; once the hypercall has returned it must not see the old page again."""
    hv = HypervGuest(make, vcpus=2)
    hv.enable_hypercalls()
    hv.guest.write(DIRECTORY, (WINDOW_TABLE | 7).to_bytes(8, "little"))
    map_window(hv, OLD)
    hv.guest.write(OLD, b"\x01")
    hv.guest.write(NEW, b"\x02")
    # mov al, [rbx]; mov [0x33000], al; cmp al, 2; jne back; out 0xea, al; hlt
    hv.start("8a03 880425 00300300 3c02 75f3 e6ea f4", vcpu=1, rbx=WINDOW)
    with running(hv, 1) as thread:
        while hv.guest.memory[0x33000] != 1:
            assert thread.is_alive()
            time.sleep(0.001)
        map_window(hv, NEW)
        if listed:
            assert hv.fast(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, 0, 0, 0b10, WINDOW, rep=1) == 1 << 32
        else:
            assert hv.fast(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 0, 0b10) == 0
    assert hv.guest.vcpus[1].kvm_run.exit_reason == abi.KVM_EXIT_IO
    assert hv.guest.memory[0x33000] == 2


def test_processors_wake_each_other_by_hypercalls(make: Make) -> None:
    """Ping and pong: each halts until the other's IPI, a thousand times, and none is lost."""
    hv = HypervGuest(make, vcpus=2)
    hv.enable_hypercalls()
    for vcpu in (0, 1):
        hv.enable_apic(vcpu)
    # handler: mov ecx, HV_X64_MSR_EOI; xor eax, eax; xor edx, edx; wrmsr; inc rbx; iretq
    hv.handler(0x60, bytes.fromhex("b970000040 31c0 31d2 0f30 48ffc3 48cf"))
    rounds = 1000
    send = (
        "48c7c1"
        + (abi.HVCALL_SEND_IPI | abi.HV_HYPERCALL_FAST_BIT).to_bytes(4, "little").hex()  # mov rcx, control
        + "ba60000000"  # mov edx, vector
        + "4d89c8"  # mov r8, r9: the other one
        + "b800300000 ffd0"  # mov eax, page; call rax
    )
    assert HYPERCALL_PAGE == 0x3000
    wait = "fa 4c39d3 7304 fb f4 ebf6 fb 49ffc2"  # until rbx >= r10: cli; cmp; jae +4; sti; hlt; jmp -10; sti; inc r10
    count = "49ffcb"  # dec r11
    for vcpu, parts in ((0, (send, wait)), (1, (wait, send))):
        body = bytes.fromhex("".join(parts) + count)
        back = b"\x0f\x85" + (-(len(body) + 6) & 0xFFFF_FFFF).to_bytes(4, "little")
        code = body + back + bytes.fromhex("e6ea f4")
        hv.start(code, vcpu=vcpu, rflags=0x202, rbx=0, r9=0b10 >> vcpu, r10=1, r11=rounds)
    with running(hv, 0), running(hv, 1):
        pass
    for cpu in hv.guest.vcpus:
        assert cpu.kvm_run.exit_reason == abi.KVM_EXIT_IO
        assert cpu.get_regs().rbx == rounds


def test_timers_interrupt_processors_that_never_leave(make: Make) -> None:
    """Each counts twenty periods of a millisecond in a loop without exits; no period is early."""
    hv = HypervGuest(make, vcpus=2)
    hv.handler(0x72, bytes.fromhex("b970000040 31c0 31d2 0f30 48ffc3 48cf"))
    config = abi.HV_STIMER_ENABLE | abi.HV_STIMER_PERIODIC | abi.HV_STIMER_DIRECT_MODE | 0x72 << 4
    for vcpu in (0, 1):
        hv.enable_apic(vcpu)
        hv.wrmsr(abi.HV_X64_MSR_STIMER0_COUNT, 10_000, vcpu=vcpu)
        hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG, config, vcpu=vcpu)
        hv.start("4883fb14 75fa e6ea f4", vcpu=vcpu, rflags=0x202, rbx=0)  # cmp rbx, 20; jne back
    start = hv.guest.vcpus[0].get_msrs([abi.HV_X64_MSR_TIME_REF_COUNT])[0]
    with running(hv, 0), running(hv, 1):
        pass
    end = hv.guest.vcpus[0].get_msrs([abi.HV_X64_MSR_TIME_REF_COUNT])[0]
    for cpu in hv.guest.vcpus:
        assert cpu.kvm_run.exit_reason == abi.KVM_EXIT_IO
        assert cpu.get_regs().rbx == 20
    assert end - start >= 18 * 10_000, "the first may be under way, and the last one's handler be late"
