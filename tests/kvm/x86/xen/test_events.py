# SPDX-License-Identifier: Apache-2.0
"""Event channels under load, with a virtualized local APIC and without; and what a guest without them has."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from itertools import count

import pytest
from tests.support.threads import beside, running, until
from tests.support.tiny import DATA, Tiny

from softkvm import abi
from softkvm.kvm import Params
from softkvm.kvm.x86.irqchip.kernel import KernelIrqchip
from softkvm.kvm.x86.svm.exits import EXIT_HANDLERS
from softkvm.kvm.x86.xen.upcall import XenIrqchip

SHARED, INFO, COUNTS = DATA, DATA + 0x1000, DATA + 0x2000
PENDING, MASK = SHARED + 0x800, SHARED + 0xA00
HANDLER = 0x2000
VECTOR = 0x51
PRIO = abi.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
FLAGS = abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | abi.KVM_XEN_HVM_CONFIG_EVTCHN_SEND


def absolute(code: str, address: int) -> bytes:
    """An instruction with a 32-bit absolute address behind."""
    return bytes.fromhex(code) + address.to_bytes(4, "little")


#: As an operating system does it: no upcall, no word, then take each port of the first word, and count it.
_HANDLE = (
    bytes.fromhex("50 51")  # push rax; push rcx
    + absolute("c60425", INFO) + b"\0"  # mov byte [INFO], 0
    + bytes.fromhex("31c0") + absolute("48870425", INFO + 8)  # xor eax, eax; xchg [INFO + 8], rax
    # 1: mov rax, [PENDING]; bsf rcx, rax; jz 2f; lock btr qword [PENDING], rcx; inc dword [COUNTS + rcx * 4]; jmp 1b
    + absolute("488b0425", PENDING)
    + bytes.fromhex("480fbcc8 7413") + absolute("f0480fb30c25", PENDING) + absolute("ff048d", COUNTS)
    + bytes.fromhex("eb df")
    + bytes.fromhex("59 58 48cf")  # 2: pop rcx; pop rax; iretq
)  # fmt: skip


@pytest.fixture(params=[False, True], ids=["plain", "avic"])
def tiny(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    machine = Tiny(irqchip=True, params=Params(avic=request.param)).long_mode()
    share(machine)
    machine.gate64(VECTOR, HANDLER)
    machine.memory.write(HANDLER, _HANDLE)
    yield machine
    machine.close()


def share(tiny: Tiny) -> None:
    """Xen's interfaces, with upcalls by the VM's vector."""
    vm = tiny.vm
    vm.xen_hvm_config(abi.kvm_xen_hvm_config(msr=0x4000_0200, flags=FLAGS))
    for type, field, value in (
        (abi.KVM_XEN_ATTR_TYPE_LONG_MODE, "long_mode", 1),
        (abi.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, "vector", VECTOR),
    ):
        attr = abi.kvm_xen_hvm_attr(type=type)
        setattr(attr.u, field, value)
        vm.xen_hvm_set_attr(attr)
    page = abi.kvm_xen_hvm_attr(type=abi.KVM_XEN_ATTR_TYPE_SHARED_INFO)
    page.u.shared_info.gfn = SHARED >> 12
    vm.xen_hvm_set_attr(page)
    info = abi.kvm_xen_vcpu_attr(type=abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO)
    info.u.gpa = INFO
    tiny.vcpu.xen_vcpu_set_attr(info)


def send(tiny: Tiny, port: int) -> None:
    tiny.vm.xen_hvm_evtchn_send(abi.kvm_irq_routing_xen_evtchn(port, 0, PRIO))


def counted(tiny: Tiny, port: int) -> int:
    return int.from_bytes(tiny.memory.read(COUNTS + 4 * port, 4), "little")


def test_who_has_none_of_it_is_asked_nothing() -> None:
    tiny = Tiny(irqchip=True, params=Params(avic=False))
    assert tiny.vcpu._loop[5] is EXIT_HANDLERS
    assert type(tiny.vm.chips) is KernelIrqchip
    assert not tiny.vcpu.steal_enabled
    tiny.long_mode()
    share(tiny)
    assert type(tiny.vm.chips) is XenIrqchip
    tiny.load(b"\xf4")
    with running(tiny.vcpu):
        until(lambda: tiny.vcpu._loop[5] is not EXIT_HANDLERS)
    tiny.vm.xen_hvm_config(abi.kvm_xen_hvm_config())
    with running(tiny.vcpu):
        until(lambda: tiny.vcpu._loop[5] is EXIT_HANDLERS)
    assert not tiny.vcpu.steal_enabled
    tiny.close()


@pytest.mark.parametrize(
    "code", ["fb ebfe", "fb f4 ebfd", "fb b800000000 31c9 0fa2 ebf5"], ids=["spin", "hlt", "exits"]
)
def test_no_event_is_lost_and_none_comes_twice(tiny: Tiny, code: str) -> None:
    tiny.load(bytes.fromhex(code))
    ports = (1, 2, 40, 63)
    sent = dict.fromkeys(ports, 0)
    with running(tiny.vcpu):
        for _ in range(50):
            for port in ports:
                send(tiny, port)
                sent[port] += 1
                until(lambda: counted(tiny, port) == sent[port])  # noqa: B023
    assert {port: counted(tiny, port) for port in ports} == sent


def test_senders_side_by_side_lose_nothing(tiny: Tiny) -> None:
    """An event that is pending already is one with the next: what counts is that all are taken in the end."""
    tiny.load(bytes.fromhex("fb f4 ebfd"))
    fd = os.eventfd(0)
    entry = abi.kvm_irq_routing_entry(gsi=40, type=abi.KVM_IRQ_ROUTING_XEN_EVTCHN)
    entry.u.xen_evtchn.port, entry.u.xen_evtchn.priority = 3, PRIO
    tiny.vm.set_gsi_routing([entry])
    tiny.vm.irqfd(fd, 40)

    def sender(port: int) -> None:
        for _ in range(200):
            send(tiny, port)

    threads = [threading.Thread(target=sender, args=(port,)) for port in (1, 2)]
    with running(tiny.vcpu):
        with beside(*threads):
            for _ in range(200):
                os.eventfd_write(fd, 1)
        until(lambda: all(counted(tiny, port) for port in (1, 2, 3)))
        until(lambda: not any(tiny.memory.read(PENDING, 8)) and not tiny.memory.read(INFO, 1)[0])
    os.close(fd)


def test_a_poller_is_woken_by_each_event_of_its_port(tiny: Tiny) -> None:
    """With interrupts disabled: only the poll itself can end."""
    polls = DATA + 0x3000
    tiny.memory.write(polls, struct.pack("<QI4xQI", polls + 24, 1, 0, 5))
    # 1: mov eax, sched_op; mov edi, SCHEDOP_poll; mov esi, polls; vmmcall; lock btr qword [PENDING], 5; jnc 1b
    # inc dword [COUNTS]; jmp 1b
    body = bytes.fromhex("b81d000000 bf03000000 be") + polls.to_bytes(4, "little") + bytes.fromhex("0f01d9")
    body += absolute("f0480fba3425", PENDING) + b"\5"
    body += bytes([0x73, 256 - len(body) - 2])
    body += absolute("ff0425", COUNTS)
    body += bytes([0xEB, 256 - len(body) - 2])
    tiny.load(body, rflags=2)
    events = count(1)
    with running(tiny.vcpu):
        for masked in (b"\xff", b"\0") * 20:
            tiny.memory.write(MASK, masked)
            tiny.memory.write(INFO + 8, bytes(8))
            send(tiny, 5)
            number = next(events)
            until(lambda: counted(tiny, 0) == number)  # noqa: B023
    assert tiny.vcpu.stat_halt_exits == 0


def test_what_one_vm_has_another_goes_on_with(tiny: Tiny) -> None:
    """Pending ports are in memory; attributes are read from one and set in the other."""
    tiny.load(bytes.fromhex("fa ebfe"))
    send(tiny, 1)
    other = Tiny(irqchip=True).long_mode()
    share(other)
    other.gate64(VECTOR, HANDLER)
    other.memory.write(HANDLER, _HANDLE)
    other.memory.write(DATA, tiny.memory.read(DATA, 0x2000))
    other.load(bytes.fromhex("fb f4 ebfd"))
    with running(other.vcpu):
        until(lambda: counted(other, 1) == 1)
    other.close()


def test_pages_that_kvm_writes_are_dirty(tiny: Tiny) -> None:
    """The shared page, too, of which the kernel leaves it to userspace to know."""
    tiny.slot(0, 0, tiny.memory.size, tiny.memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    tiny.vm.get_dirty_log(0)
    send(tiny, 1)
    log = int.from_bytes(tiny.vm.get_dirty_log(0), "little")
    assert {page for page in range(512) if log >> page & 1} == {SHARED >> 12, INFO >> 12}


def test_a_page_whose_slot_goes_is_looked_up_anew(tiny: Tiny) -> None:
    backing = tiny.memory.address + SHARED
    size = tiny.memory.size
    tiny.slot(0, 0, 0, 0)
    with pytest.raises(OSError, match="shared_info"):
        send(tiny, 1)
    tiny.slot(0, 0, SHARED, tiny.memory.address)
    tiny.slot(1, SHARED, 0x1000, backing + 0x4000)
    tiny.slot(2, SHARED + 0x1000, size - SHARED - 0x1000, backing + 0x1000)
    send(tiny, 1)
    assert tiny.memory.read(PENDING + 0x4000, 1) == b"\2"
    assert tiny.memory.read(PENDING, 1) == b"\0"
    assert tiny.memory.read(INFO, 1) == b"\1"


def test_what_could_not_be_marked_is_marked_when_its_memory_has_come(tiny: Tiny) -> None:
    size = tiny.memory.size
    tiny.slot(0, 0, 0, 0)
    tiny.slot(0, 0, INFO, tiny.memory.address)
    tiny.slot(1, INFO + 0x1000, size - INFO - 0x1000, tiny.memory.address + INFO + 0x1000)
    send(tiny, 1)
    assert tiny.vcpu.xen.pending_sel == 1
    tiny.load(bytes.fromhex("fb f4 ebfd"))
    with running(tiny.vcpu):
        until(lambda: tiny.vcpu.stat_halt_exits)
        tiny.slot(2, INFO, 0x1000, tiny.memory.address + INFO)
        until(lambda: counted(tiny, 1) == 1)
    assert tiny.vcpu.xen.pending_sel == 0
