# SPDX-License-Identifier: Apache-2.0
"""Xen's structures anywhere, with anything in them, and hypercalls with any arguments.

A guest makes hypercalls with numbers at their edges, while another vCPU scribbles over the shared page, ``vcpu_info``,
runstate and what the arguments point to, and userspace moves all of those and sends events. Each hypercall has a result
or is userspace's; KVM writes nowhere but into the structures; neighbours stay well.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties.test_guest_fuzz import IRQ_HANDLER, install
from tests.properties.test_guest_structures import (
    PAGES,
    ROM_BACKING,
    SCRIBBLER,
    UNTOUCHED_END,
    address,
    prepare,
    scribbling,
)
from tests.support.api_calls import errno_of
from tests.support.conformance import GDT, PAGE, Guest, describe
from tests.support.fences import Fenced, Neighbour
from tests.support.machines import KVMS
from tests.support.threads import beside

from softkvm import abi

CALLS = 150
TOTAL_EXITS = 1000
RESULTS = 0x6_0000
DONE = 0x81
PRIO = abi.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
FLAGS = abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | abi.KVM_XEN_HVM_CONFIG_EVTCHN_SEND
MSR = 0x4000_0200
#: Number, and the first arguments of those that KVM knows.
HYPERCALLS = (
    (abi.HYPERVISOR_xen_version, abi.XENVER_version),
    (abi.HYPERVISOR_event_channel_op, abi.EVTCHNOP_send),
    (abi.HYPERVISOR_sched_op, abi.SCHEDOP_yield),
    (abi.HYPERVISOR_sched_op, abi.SCHEDOP_poll),
    (abi.HYPERVISOR_vcpu_op, abi.VCPUOP_set_singleshot_timer),
    (abi.HYPERVISOR_vcpu_op, abi.VCPUOP_stop_singleshot_timer),
    (abi.HYPERVISOR_set_timer_op, 1),
    (0x3F, 0),
)
_REGISTERS = ("48bf", "48be", "48ba", "49ba", "49b8", "49b9")  # mov rdi, rsi, rdx, r10, r8, r9


def _number(rng: random.Random) -> int:
    return rng.choice([0, 1, PAGES + rng.randrange(16 * PAGE), address(rng) % (1 << 64), rng.getrandbits(64)])


def program(rng: random.Random) -> bytes:
    """Code that makes hypercalls, each counted in memory once it has a result."""
    code = b""
    for n in range(CALLS):
        number, first = rng.choice(HYPERCALLS)
        given = [first if rng.random() < 0.8 else _number(rng), *(_number(rng) for _ in range(5))]
        if rng.random() < 0.1:  # the page: mov ecx, MSR; wrmsr
            value = address(rng) % (1 << 64)
            call = b"\xb9" + MSR.to_bytes(4, "little") + b"\xb8" + (value & 0xFFFF_FFFF).to_bytes(4, "little")
            call += b"\xba" + (value >> 32).to_bytes(4, "little") + b"\x0f\x30"
        else:
            call = b"".join(
                bytes.fromhex(opcode) + value.to_bytes(8, "little")
                for opcode, value in zip(_REGISTERS, given, strict=True)
            )
            call += b"\xfb\xb8" + number.to_bytes(4, "little") + b"\x0f\x01\xd9"  # sti; mov eax, number; vmmcall
        call += bytes.fromhex("c60425") + (RESULTS + n).to_bytes(4, "little") + b"\x01"
        code += bytes.fromhex("4c8d3d") + len(call).to_bytes(4, "little") + call  # lea r15, [rip + len]: behind a #GP
        code += b"\xe6\x80" if rng.random() < 0.3 else b""
    return code + bytes([0xE6, DONE, 0xF4])


def structure(rng: random.Random, guest: Fenced) -> tuple[int, int]:
    """Where a structure may be asked for: a guest-physical address, and a host's that is the guest's, or nobody's."""
    gpa = rng.choice([abi.KVM_XEN_INVALID_GPA, address(rng) % (1 << 64), PAGES + rng.randrange(16) * PAGE])
    return gpa, rng.choice([0, guest.address + (PAGES | gpa & 0xFFFF), 4096, 1 << 47])


def move(rng: random.Random, guest: Fenced, cpu_too: bool) -> None:
    """Userspace has a structure elsewhere, or makes an event."""
    gpa, hva = structure(rng, guest)
    vm = guest.vm
    kind = rng.randrange(9)
    hvm, vcpu = abi.kvm_xen_hvm_attr(), abi.kvm_xen_vcpu_attr()
    if kind <= 2:
        vm.xen_hvm_evtchn_send(abi.kvm_irq_routing_xen_evtchn(rng.choice([1, 13, 66, 1024, 4095]), 0, PRIO))
    elif kind == 3:
        hvm.type = abi.KVM_XEN_ATTR_TYPE_LONG_MODE
        hvm.u.long_mode = rng.randrange(2)
        vm.xen_hvm_set_attr(hvm)
    elif kind == 4:
        hvm.type = abi.KVM_XEN_ATTR_TYPE_SHARED_INFO
        hvm.u.shared_info.gfn = abi.KVM_XEN_INVALID_GFN if gpa == abi.KVM_XEN_INVALID_GPA else gpa >> 12
        vm.xen_hvm_set_attr(hvm)
    elif kind == 5:
        hvm.type = abi.KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA
        hvm.u.shared_info.hva = hva & -PAGE
        vm.xen_hvm_set_attr(hvm)
    elif cpu_too:
        vcpu.type = rng.choice(
            [
                abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
                abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO,
                abi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
                abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA,
            ]
        )
        vcpu.u.gpa = hva if vcpu.type == abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA else gpa
        guest.cpu.xen_vcpu_set_attr(vcpu)


def configure(guest: Fenced) -> None:
    """Xen's interfaces, an upcall's vector, ports, a timer; structures where they belong, at first."""
    vm = guest.vm
    vm.xen_hvm_config(abi.kvm_xen_hvm_config(msr=MSR, flags=FLAGS))
    for type, value in (
        (abi.KVM_XEN_ATTR_TYPE_LONG_MODE, 1),
        (abi.KVM_XEN_ATTR_TYPE_SHARED_INFO, PAGES >> 12),
        (abi.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, 0x60),
        (abi.KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG, 1),
    ):
        attr = abi.kvm_xen_hvm_attr(type=type)
        attr.u.pad[0] = value
        vm.xen_hvm_set_attr(attr)
    attr = abi.kvm_xen_hvm_attr(type=abi.KVM_XEN_ATTR_TYPE_EVTCHN)
    attr.u.evtchn.send_port, attr.u.evtchn.type = 1, abi.EVTCHNSTAT_interdomain
    attr.u.evtchn.deliver.port = abi.kvm_xen_attr_evtchn_port(66, 0, PRIO)
    vm.xen_hvm_set_attr(attr)
    timer = abi.kvm_xen_vcpu_attr(type=abi.KVM_XEN_VCPU_ATTR_TYPE_TIMER)
    timer.u.timer = abi.kvm_xen_attr_timer(13, PRIO, 1)
    guest.cpu.xen_vcpu_set_attr(timer)


@contextmanager
def moving(guest: Fenced, seed: int) -> Iterator[None]:
    """Let another thread of userspace's do what needs no vCPU, over and over."""
    rng, stop = random.Random(seed), threading.Event()

    def run() -> None:
        while not stop.is_set():
            errno_of(lambda: move(rng, guest, cpu_too=False))
            guest.cpu.kick()  # out of a poll, too, that nobody else ends
            stop.wait(0.002)

    with beside(threading.Thread(target=run)):
        try:
            yield
        finally:
            stop.set()


def drive(guest: Fenced, rng: random.Random) -> None:
    """Run to the program's end."""
    exits = 0
    while exits < TOTAL_EXITS:
        try:
            guest.cpu.run()
        except InterruptedError:
            continue
        exits += 1
        run = guest.kvm_run
        assert run.exit_reason in (abi.KVM_EXIT_IO, abi.KVM_EXIT_XEN), describe(run)
        if run.exit_reason == abi.KVM_EXIT_XEN:
            run.xen.u.hcall.result = rng.getrandbits(64)
        elif run.io.port == DONE:
            return
        errno_of(lambda: move(rng, guest, cpu_too=True))
    raise AssertionError(f"not at its end after {TOTAL_EXITS} exits")


@settings(max_examples=12)
@given(seed=st.integers(0, 1 << 32))
def test_structures_and_arguments_of_any_kind_harm_nobody(seed: int) -> None:
    rng = random.Random(seed)
    with ExitStack() as stack:
        neighbour = stack.enter_context(Neighbour())
        kvm = stack.enter_context(KVMS["soft"]())
        guest = stack.enter_context(Fenced(kvm, irqchip=True, vcpus=2))
        prepare(guest, rng, hyperv=False)
        install(guest, program(rng))
        guest.write(GDT + 16, (0x00CF_9300_0000_FFFF).to_bytes(8, "little"))  # the stack that IRETQ loads
        # The flag may lie anywhere, and stay set: and dword [rsp + 16], ~X86_EFLAGS_IF; iretq
        guest.write(IRQ_HANDLER, bytes.fromhex("81642410fffdffff 48cf"))
        configure(guest)
        before = bytes(guest.memory[ROM_BACKING:UNTOUCHED_END])
        below = bytes(guest.memory[SCRIBBLER + PAGE : PAGES])
        with scribbling(guest, seed), moving(guest, seed + 1):
            drive(guest, rng)
        assert any(guest.memory[RESULTS : RESULTS + CALLS])
        assert bytes(guest.memory[ROM_BACKING:UNTOUCHED_END]) == before, "KVM wrote where there is no structure"
        assert bytes(guest.memory[SCRIBBLER + PAGE : PAGES]) == below
        assert guest.intact()
    assert neighbour.sums
    assert set(neighbour.sums) == {neighbour.total}
    healthy()


def healthy() -> None:
    """Another machine still works."""
    with KVMS["soft"]() as kvm, Guest(kvm) as guest:
        guest.real("b83412 f4")
        guest.expect(abi.KVM_EXIT_HLT)
