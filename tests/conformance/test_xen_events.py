# SPDX-License-Identifier: Apache-2.0
"""Xen's event channels: the shared page, upcalls, routes, ports, timers, polls (KVM API, KVM_XEN_HVM_*)."""

import errno
import os
import struct
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
from tests.support.conformance import MEMORY_SIZE, Guest, refused
from tests.support.hyperv import INPUT, Left
from tests.support.threads import beside, running, until
from tests.support.xen import ALL, HYPERCALL_MSR, MASK, PAGE, PENDING, PRIO_2LEVEL, SHARED_INFO, VCPU_INFO, XenGuest

from softkvm import abi

Make = Callable[..., Guest]
VECTOR = 0x51
IF = abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF
NO_FRAME = abi.KVM_XEN_INVALID_GFN
SPIN = "ebfe"
_EVTCHN = abi.KVM_XEN_ATTR_TYPE_EVTCHN
_INFO = abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO
_TIMER = abi.KVM_XEN_VCPU_ATTR_TYPE_TIMER


@pytest.fixture
def xen(make: Make) -> XenGuest:
    """One vCPU with all that there is, in 64-bit mode, and upcalls by a vector of the VM's."""
    guest = XenGuest(make, needs=ALL, flags=abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | abi.KVM_XEN_HVM_CONFIG_EVTCHN_SEND)
    guest.share(vector=VECTOR)
    return guest


def _now(xen: XenGuest) -> int:
    return int(xen.guest.vm.get_clock().clock)


# --- the shared page ---------------------------------------------------------------------------------------


def test_the_page_has_the_wall_clock_where_the_guests_width_says(xen: XenGuest) -> None:
    assert xen.guest.vm.check_extension(abi.KVM_CAP_XEN_HVM) & ALL == ALL
    memory = xen.guest.memory
    for long_mode, at, high in ((1, 0xC00, 0xC0C), (0, 0x900, 0x924)):
        xen.guest.write(SHARED_INFO + 0x900, bytes(0x400))
        xen.set_hvm(abi.KVM_XEN_ATTR_TYPE_LONG_MODE, long_mode=long_mode)
        assert xen.get_hvm(abi.KVM_XEN_ATTR_TYPE_LONG_MODE).long_mode == long_mode
        version, low, nanoseconds = struct.unpack_from("<III", memory, SHARED_INFO + at)
        (seconds_high,) = struct.unpack_from("<I", memory, SHARED_INFO + high)
        boot = (seconds_high << 32 | low) + nanoseconds / 1e9
        assert version == 2
        assert abs(boot - (time.time() - _now(xen) / 1e9)) < 1


def test_the_hypercall_page_tells_the_guests_width(xen: XenGuest) -> None:
    xen.set_hvm(abi.KVM_XEN_ATTR_TYPE_LONG_MODE, long_mode=0)
    xen.wrmsr(HYPERCALL_MSR, PAGE)
    assert xen.get_hvm(abi.KVM_XEN_ATTR_TYPE_LONG_MODE).long_mode == 1


def test_the_page_is_named_by_frame_or_host_address(xen: XenGuest) -> None:
    by_frame, by_hva = abi.KVM_XEN_ATTR_TYPE_SHARED_INFO, abi.KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA
    assert xen.get_hvm(by_frame).shared_info.gfn == SHARED_INFO >> 12
    assert xen.get_hvm(by_hva).shared_info.hva == 0
    address = xen.guest.address + SHARED_INFO
    xen.set_hvm(by_hva, shared_info__hva=address)
    assert xen.get_hvm(by_frame).shared_info.gfn == NO_FRAME
    assert xen.get_hvm(by_hva).shared_info.hva == address
    xen.send(7)
    assert xen.pending == [7]
    xen.set_hvm(by_hva, shared_info__hva=0)
    assert xen.get_hvm(by_hva).shared_info.hva == 0
    refused(errno.EINVAL, partial(xen.send, 8))
    xen.set_hvm(by_frame, shared_info__gfn=SHARED_INFO >> 12)
    xen.set_hvm(by_frame, shared_info__gfn=NO_FRAME)
    refused(errno.EINVAL, partial(xen.send, 8))
    assert xen.pending == [7]


def test_a_page_without_memory_is_refused(xen: XenGuest) -> None:
    by_frame, by_hva = abi.KVM_XEN_ATTR_TYPE_SHARED_INFO, abi.KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA
    for gfn in (MEMORY_SIZE >> 12, 1 << 40):
        refused(errno.EFAULT, partial(xen.set_hvm, by_frame, shared_info__gfn=gfn))
    for hva in (xen.guest.address + SHARED_INFO + 8, 1 << 63, 4096 << 51):
        refused(errno.EINVAL, partial(xen.set_hvm, by_hva, shared_info__hva=hva))
    refused(errno.EFAULT, partial(xen.set_hvm, by_hva, shared_info__hva=4096))
    xen.guest.region(1, 0x4000_0000, 4096, flags=abi.KVM_MEM_READONLY)
    refused(errno.EFAULT, partial(xen.set_hvm, by_frame, shared_info__gfn=0x4_0000))


def test_attributes_that_there_are_not_are_enoent(xen: XenGuest) -> None:
    vm, cpu = xen.guest.vm, xen.guest.cpu
    for type in (7, 0xFFFF):
        refused(errno.ENOENT, partial(vm.xen_hvm_set_attr, abi.kvm_xen_hvm_attr(type=type)))
        refused(errno.ENOENT, partial(vm.xen_hvm_get_attr, type))
    for type in (10, 0xFFFF):
        refused(errno.ENOENT, partial(cpu.xen_vcpu_set_attr, abi.kvm_xen_vcpu_attr(type=type)))
        refused(errno.ENOENT, partial(cpu.xen_vcpu_get_attr, type))
    refused(errno.ENOENT, partial(vm.xen_hvm_get_attr, _EVTCHN))


def test_vectors_and_numbers_round_trip(xen: XenGuest) -> None:
    for vector in (0, 0x10, 0xFF):
        xen.set_hvm(abi.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, vector=vector)
        assert xen.get_hvm(abi.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR).vector == vector
        xen.set_vcpu(abi.KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, vector=vector)
        assert xen.get_vcpu(abi.KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR).vector == vector
    for vector in (1, 0xF):
        refused(errno.EINVAL, partial(xen.set_hvm, abi.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, vector=vector))
        refused(errno.EINVAL, partial(xen.set_vcpu, abi.KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, vector=vector))
    assert xen.get_vcpu(abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID).vcpu_id == 0
    xen.set_vcpu(abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, vcpu_id=3)
    assert xen.get_vcpu(abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID).vcpu_id == 3
    refused(errno.EINVAL, partial(xen.set_vcpu, abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, vcpu_id=1 << 31))


def test_the_version_is_answered_once_it_is_known(xen: XenGuest) -> None:
    with pytest.raises(Left):
        xen.call(abi.HYPERVISOR_xen_version, abi.XENVER_version)
    xen.finish()
    xen.set_hvm(abi.KVM_XEN_ATTR_TYPE_XEN_VERSION, xen_version=4 << 16 | 17)
    assert xen.get_hvm(abi.KVM_XEN_ATTR_TYPE_XEN_VERSION).xen_version == 0x40011
    assert xen.call(abi.HYPERVISOR_xen_version, abi.XENVER_version) == 0x40011
    with pytest.raises(Left):
        xen.call(abi.HYPERVISOR_xen_version, 1)


# --- event channels ----------------------------------------------------------------------------------------


def test_an_event_marks_port_word_and_vcpu(xen: XenGuest) -> None:
    for port in (1, 66, 4095):
        xen.clear()
        xen.send(port)
        assert (xen.pending, xen.info()) == ([port], (1, [port // 64]))
    xen.clear()
    xen.guest.write(SHARED_INFO + MASK, b"\2")
    xen.send(1)
    assert (xen.pending, xen.info()) == ([1], (0, [])), "masked"
    xen.guest.write(SHARED_INFO + MASK, b"\0")
    xen.send(1)
    assert xen.info() == (0, []), "pending already"


def test_a_32_bit_guests_ports_are_1024_in_words_of_32(make: Make) -> None:
    xen = XenGuest(make, needs=ALL)
    xen.share(long_mode=0)
    xen.send(1023)
    assert xen.bits(0x800, 128) == [1023]
    assert xen.guest.memory[VCPU_INFO] == 1
    assert xen.bits(4, 4, base=VCPU_INFO) == [31]
    refused(errno.EINVAL, partial(xen.send, 1024))
    refused(errno.EINVAL, partial(xen.route, 40, 1024))
    xen.guest.write(SHARED_INFO + 0x880, b"\4")
    xen.guest.write(VCPU_INFO, bytes(8))
    xen.send(2)
    assert xen.guest.memory[VCPU_INFO] == 0, "masked"


def test_events_that_there_are_not_are_einval(xen: XenGuest) -> None:
    for port in (0, 4096, 1 << 31):
        refused(errno.EINVAL, partial(xen.send, port))
    refused(errno.EINVAL, partial(xen.send, 1, vcpu=7))
    refused(errno.EINVAL, partial(xen.guest.vm.xen_hvm_evtchn_send, abi.kvm_irq_routing_xen_evtchn()))
    refused(errno.EINVAL, partial(xen.send, 1, priority=0))
    refused(errno.EINVAL, partial(xen.route, 40, 4096))
    refused(errno.EINVAL, partial(xen.route, 40, 1, priority=0))
    assert not xen.pending


def test_an_event_waits_for_its_vcpus_information(xen: XenGuest) -> None:
    xen.set_vcpu(_INFO, gpa=abi.KVM_XEN_INVALID_GPA)
    assert xen.get_vcpu(_INFO).gpa == abi.KVM_XEN_INVALID_GPA
    xen.send(70)
    assert (xen.pending, xen.info()) == ([70], (0, []))
    xen.execute("90")
    assert xen.info() == (0, [])
    xen.set_vcpu(_INFO, gpa=VCPU_INFO)
    xen.execute("90")
    assert xen.info() == (1, [1])


def test_a_vcpus_information_lies_in_one_page(xen: XenGuest) -> None:
    hva = abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA
    refused(errno.EINVAL, partial(xen.set_vcpu, _INFO, gpa=VCPU_INFO + 4096 - 63))
    refused(errno.EFAULT, partial(xen.set_vcpu, _INFO, gpa=MEMORY_SIZE))
    refused(errno.EINVAL, partial(xen.set_vcpu, hva, hva=xen.guest.address + 4096 - 63))
    refused(errno.EFAULT, partial(xen.set_vcpu, hva, hva=4096))
    assert xen.get_vcpu(_INFO).gpa == VCPU_INFO
    odd = VCPU_INFO + 0x101
    xen.set_vcpu(_INFO, gpa=odd)
    xen.send(64)
    assert xen.guest.memory[odd] == 1
    assert xen.bits(8, 8, base=odd) == [1]
    xen.clear()
    xen.set_vcpu(hva, hva=xen.guest.address + VCPU_INFO)
    assert (xen.get_vcpu(_INFO).gpa, xen.get_vcpu(hva).hva) == (NO_FRAME, xen.guest.address + VCPU_INFO)
    xen.send(64)
    assert xen.info() == (1, [1])
    xen.set_vcpu(hva, hva=0)
    assert xen.get_vcpu(hva).hva == 0


def test_a_line_may_lead_to_a_port(xen: XenGuest) -> None:
    vm = xen.guest.vm
    xen.route(40, 15)
    assert vm.irq_line_status(40, 1) == 1
    assert vm.irq_line_status(40, 1) == 0, "pending already"
    assert vm.irq_line_status(40, 0) < 0, "it has no level"
    assert (xen.pending, xen.info()) == ([15], (1, [0]))
    xen.route(40, 15, vcpu=7)  # which may come later
    xen.clear()
    assert vm.irq_line_status(40, 1) < 0
    fd = os.eventfd(0)
    xen.route(41, 16)
    vm.irqfd(fd, 41)
    os.eventfd_write(fd, 1)
    until(lambda: xen.pending == [16])
    vm.irqfd(fd, 41, abi.KVM_IRQFD_FLAG_DEASSIGN)
    os.close(fd)


# --- upcalls -----------------------------------------------------------------------------------------------


def test_an_upcall_is_there_for_as_long_as_its_flag(xen: XenGuest) -> None:
    xen.start("90" * 4 + "e6ea" + SPIN, rflags=abi.X86_EFLAGS_FIXED)
    xen.guest.write(VCPU_INFO, b"\1")
    assert not xen.acknowledges(xen.finish(), VECTOR), "interrupts are disabled"
    xen.start("fb9090" + SPIN)
    for _ in range(2):
        xen.guest.write(VCPU_INFO, b"\1")
        assert xen.acknowledges(xen.finish(), VECTOR)
        assert xen.guest.memory[VCPU_INFO] == 0
    assert not xen.vectors(), "no local APIC has to do with it"


def test_an_event_interrupts_and_wakes(xen: XenGuest) -> None:
    xen.start("fb" + SPIN)
    with running(xen.guest.cpu) as thread:
        xen.send(5)
        assert thread.wait() is None
    assert xen.acknowledges(xen.guest.cpu.get_regs(), VECTOR)
    xen.clear()
    xen.start("fbf4" + SPIN)
    with running(xen.guest.cpu) as thread:
        time.sleep(0.05)  # most probably it has halted by then
        xen.send(5)
        assert thread.wait() is None
    assert xen.acknowledges(xen.guest.cpu.get_regs(), VECTOR)


def test_what_the_guest_writes_itself_is_seen_behind_its_next_exit(xen: XenGuest) -> None:
    flag = VCPU_INFO.to_bytes(4, "little").hex()
    code = f"c60425{flag}01 31c9 0fa2 fb9090 {SPIN}"  # mov byte [flag], 1; xor ecx, ecx; cpuid; sti; nop; nop
    xen.start(code.replace(" ", ""), rax=0)
    assert xen.acknowledges(xen.finish(), VECTOR)


def test_a_vcpus_own_vector_goes_to_its_local_apic(xen: XenGuest) -> None:
    xen.enable_apic()
    xen.set_vcpu(abi.KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, vector=0x61)
    xen.set_hvm(abi.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, vector=0)
    xen.send(5)
    assert xen.vectors() == [0x61]
    assert xen.info() == (1, [0])


def test_no_vector_is_no_interrupt(xen: XenGuest) -> None:
    xen.set_hvm(abi.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, vector=0)
    xen.send(5)
    assert not xen.acknowledges(xen.execute("fb9090"), VECTOR)


def test_every_vcpu_has_its_own_events(make: Make) -> None:
    xen = XenGuest(make, needs=ALL, vcpus=2)
    xen.share(vector=VECTOR)
    xen.send(64, vcpu=1)
    assert (xen.info(0), xen.info(1)) == ((0, []), (1, [1]))


# --- what the guest sends ----------------------------------------------------------------------------------


def _port(xen: XenGuest, send_port: int, port: int = 0, *, type: int = abi.EVTCHNSTAT_interdomain, **more: int) -> None:
    fields = {
        "evtchn__send_port": send_port,
        "evtchn__type": type,
        "evtchn__deliver__port__port": port,
        "evtchn__deliver__port__vcpu": more.pop("vcpu", 0),
        "evtchn__deliver__port__priority": more.pop("priority", PRIO_2LEVEL),
        "evtchn__flags": more.pop("flags", 0),
    }
    xen.set_hvm(_EVTCHN, **fields)


def _eventfd(xen: XenGuest, send_port: int, fd: int, **more: int) -> None:
    fields = {"evtchn__send_port": send_port, "evtchn__type": abi.EVTCHNSTAT_interdomain}
    xen.set_hvm(_EVTCHN, **fields, evtchn__deliver__eventfd__fd=fd, **more)


def _sends(xen: XenGuest, port: int) -> int:
    xen.guest.write(INPUT, port.to_bytes(4, "little"))
    return xen.call(abi.HYPERVISOR_event_channel_op, abi.EVTCHNOP_send, INPUT)


def test_a_guest_sends_to_its_own_ports_and_to_eventfds(xen: XenGuest) -> None:
    _port(xen, 127, 15)
    _port(xen, 3, 3, type=abi.EVTCHNSTAT_ipi)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    _eventfd(xen, 197, fd)
    assert _sends(xen, 127) == 0
    assert (xen.pending, xen.info()) == ([15], (1, [0]))
    assert _sends(xen, 127) == 0
    xen.clear()
    assert _sends(xen, 3) == 0
    assert xen.pending == [3]
    xen.guest.write(SHARED_INFO + PENDING, bytes(8))
    xen.guest.write(SHARED_INFO + MASK, b"\x08")
    assert _sends(xen, 3) == 0, "that it is masked is its own affair"
    assert _sends(xen, 197) == 0
    assert os.eventfd_read(fd) == 1
    with pytest.raises(Left):
        _sends(xen, 4)
    assert xen.guest.kvm_run.xen.u.hcall.input == abi.HYPERVISOR_event_channel_op
    xen.finish()
    assert xen.call(abi.HYPERVISOR_event_channel_op, abi.EVTCHNOP_send, 1 << 47) == -errno.EFAULT
    with pytest.raises(Left):
        xen.call(abi.HYPERVISOR_event_channel_op, abi.EVTCHNOP_send + 1, INPUT)
    os.close(fd)


def test_ports_are_assigned_once_and_given_back(xen: XenGuest) -> None:
    _port(xen, 10, 11)
    refused(errno.EEXIST, partial(_port, xen, 10, 11))
    _port(xen, 10, flags=abi.KVM_XEN_EVTCHN_DEASSIGN)
    refused(errno.ENOENT, partial(_port, xen, 10, flags=abi.KVM_XEN_EVTCHN_DEASSIGN))
    _port(xen, 10, 11)
    _port(xen, 12, 13)
    _port(xen, 0, flags=abi.KVM_XEN_EVTCHN_RESET)
    for port in (10, 12):
        with pytest.raises(Left):
            _sends(xen, port)
        xen.finish()


def test_an_update_changes_the_vcpu_alone(make: Make) -> None:
    xen = XenGuest(make, needs=ALL, vcpus=2)
    xen.share()
    update = abi.KVM_XEN_EVTCHN_UPDATE
    refused(errno.ENOENT, partial(_port, xen, 10, 70, vcpu=1, flags=update))
    _port(xen, 10, 70)
    refused(errno.EINVAL, partial(_port, xen, 10, 71, flags=update))
    refused(errno.EINVAL, partial(_port, xen, 10, 70, flags=update, type=abi.EVTCHNSTAT_ipi))
    refused(errno.EINVAL, partial(_port, xen, 10, 70, flags=update, priority=0))
    _port(xen, 10, 70, vcpu=1, flags=update)
    assert _sends(xen, 10) == 0
    assert (xen.info(0), xen.info(1)) == ((0, []), (1, [1]))
    fd = os.eventfd(0)
    _eventfd(xen, 20, fd)
    refused(errno.EINVAL, partial(_eventfd, xen, 20, fd, evtchn__flags=update))
    os.close(fd)


def test_impossible_ports_are_einval(xen: XenGuest) -> None:
    for send_port in (0, 4096):
        refused(errno.EINVAL, partial(_port, xen, send_port, 1))
    for type in (0, 1, 3, 4, 6):
        refused(errno.EINVAL, partial(_port, xen, 1, 1, type=type))
    refused(errno.EINVAL, partial(_port, xen, 1, 2, type=abi.EVTCHNSTAT_ipi))
    refused(errno.EINVAL, partial(_port, xen, 1, 4096))
    refused(errno.EINVAL, partial(_port, xen, 1, 2, priority=0))
    refused(errno.EINVAL, partial(_port, xen, 1, 2, flags=8))
    refused(errno.EBADF, partial(_eventfd, xen, 1, 1 << 20))
    read, write = os.pipe()
    refused(errno.EINVAL, partial(_eventfd, xen, 1, read))
    os.close(read)
    os.close(write)


# --- timers ------------------------------------------------------------------------------------------------


def _set_timer(xen: XenGuest, expires_ns: int, *, port: int = 13, priority: int = PRIO_2LEVEL) -> None:
    xen.set_vcpu(_TIMER, timer__port=port, timer__priority=priority, timer__expires_ns=expires_ns)


def test_a_timer_makes_its_port_pending_at_its_time(xen: XenGuest) -> None:
    refused(errno.EINVAL, partial(_set_timer, xen, 0, priority=0))
    _set_timer(xen, 0)
    timer = xen.get_vcpu(_TIMER).timer
    assert (timer.port, timer.priority, timer.expires_ns) == (13, PRIO_2LEVEL, 0)
    at = _now(xen) + 30_000_000
    _set_timer(xen, at)
    until(lambda: xen.pending)
    assert _now(xen) >= at
    assert xen.pending == [13]
    until(lambda: not xen.get_vcpu(_TIMER).timer.expires_ns)
    xen.clear()
    _set_timer(xen, 1)  # long ago
    assert xen.pending == [13]
    xen.clear()
    late = _now(xen) + 3_600_000_000_000
    _set_timer(xen, late)
    assert xen.get_vcpu(_TIMER).timer.expires_ns == late
    _set_timer(xen, 0)
    assert xen.get_vcpu(_TIMER).timer.expires_ns == 0
    assert not xen.pending


def test_a_guests_hypercalls_set_its_timer(xen: XenGuest) -> None:
    set_timer = abi.HYPERVISOR_set_timer_op
    with pytest.raises(Left):
        xen.call(set_timer, 1)  # no port: userspace's
    xen.finish()
    _set_timer(xen, 0)
    late = _now(xen) + 3_600_000_000_000
    assert xen.call(set_timer, late) == 0
    assert xen.get_vcpu(_TIMER).timer.expires_ns == late
    assert xen.call(set_timer, 0) == 0
    assert xen.get_vcpu(_TIMER).timer.expires_ns == 0
    for overflown in (1 << 63, _now(xen) + (1 << 51)):
        before = _now(xen)
        assert xen.call(set_timer, overflown) == 0
        expires = xen.get_vcpu(_TIMER).timer.expires_ns
        assert expires == 0 or before < expires < before + 60_000_000_000, "soon"
    _set_timer(xen, 0)
    xen.clear()
    assert xen.call(set_timer, 1) == 0
    assert xen.pending == [13]


def test_the_one_shot_timer_is_the_callers_own(xen: XenGuest) -> None:
    start, stop = abi.VCPUOP_set_singleshot_timer, abi.VCPUOP_stop_singleshot_timer
    vcpu_op = abi.HYPERVISOR_vcpu_op
    with pytest.raises(Left):
        xen.call(vcpu_op, start, 0, INPUT)
    xen.finish()
    _set_timer(xen, 0)
    late = _now(xen) + 3_600_000_000_000
    xen.guest.write(INPUT, struct.pack("<QQ", late, 0))
    assert xen.call(vcpu_op, start, 1, INPUT) == -errno.EINVAL
    assert xen.call(vcpu_op, start, 0, 1 << 47) == -errno.EFAULT
    assert xen.call(vcpu_op, start, 0, INPUT) == 0
    assert xen.get_vcpu(_TIMER).timer.expires_ns == late
    assert xen.call(vcpu_op, stop, 1) == -errno.EINVAL
    assert xen.call(vcpu_op, stop, 0) == 0
    assert xen.get_vcpu(_TIMER).timer.expires_ns == 0
    xen.set_vcpu(abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, vcpu_id=1)
    assert xen.call(vcpu_op, stop, 1) == 0
    with pytest.raises(Left):
        xen.call(vcpu_op, 3, 0, INPUT)


# --- SCHEDOP_* ---------------------------------------------------------------------------------------------


def _poll(xen: XenGuest, *ports: int, timeout_ns: int = 0) -> int:
    xen.guest.write(INPUT, struct.pack("<QI4xQ", INPUT + 64, len(ports), timeout_ns))
    xen.guest.write(INPUT + 64, struct.pack(f"<{len(ports)}I", *ports))
    return xen.call(abi.HYPERVISOR_sched_op, abi.SCHEDOP_poll, INPUT)


def test_a_poll_returns_at_once_for_a_pending_port(xen: XenGuest) -> None:
    xen.guest.write(SHARED_INFO + MASK, b"\xff" * 8)
    xen.send(13)
    assert _poll(xen, 13) == 0
    assert _poll(xen, 12, 13) == 0


@pytest.mark.parametrize("ports", [(13,), (12, 13)])
def test_a_poll_waits_for_a_port_masked_or_not(xen: XenGuest, ports: tuple[int, ...]) -> None:
    xen.guest.write(SHARED_INFO + MASK, b"\xff" * 8)
    _set_timer(xen, _now(xen) + 50_000_000)
    assert _poll(xen, *ports) == 0
    assert xen.pending == [13]
    xen.clear()
    xen.send(20)  # which takes the word of ports
    xen.guest.write(VCPU_INFO, bytes(16))
    _set_timer(xen, _now(xen) + 50_000_000)
    assert _poll(xen, *ports) == 0
    assert xen.pending == [13, 20]


def test_a_poll_waits_no_longer_than_it_says(xen: XenGuest) -> None:
    assert _poll(xen, 13, timeout_ns=20_000_000) == 0
    assert not xen.pending


def test_a_kick_ends_a_polls_kvm_run(xen: XenGuest) -> None:
    cpu = xen.guest.cpu
    xen.guest.write(INPUT, struct.pack("<QI4xQ", INPUT + 64, 1, 0) + struct.pack("<I", 13).rjust(44, b"\0"))
    kicking = threading.Timer(0.05, cpu.kick)
    with beside(kicking), pytest.raises(InterruptedError):
        while True:  # it may return before
            _poll(xen, 13)
            if not kicking.is_alive():
                cpu.kick()


def test_a_poll_of_what_there_is_not_is_refused(xen: XenGuest) -> None:
    assert _poll(xen, 4096) == -errno.EINVAL
    assert _poll(xen, *range(1, 130)) == -errno.EINVAL
    assert xen.call(abi.HYPERVISOR_sched_op, abi.SCHEDOP_poll, 1 << 47) == -errno.EFAULT
    xen.guest.write(INPUT, struct.pack("<QI4xQ", 1 << 47, 1, 0))
    assert xen.call(abi.HYPERVISOR_sched_op, abi.SCHEDOP_poll, INPUT) == -errno.EFAULT


def test_a_yield_is_kvms_and_the_rest_userspaces(xen: XenGuest) -> None:
    assert xen.call(abi.HYPERVISOR_sched_op, abi.SCHEDOP_yield) == 0
    with pytest.raises(Left):
        xen.call(abi.HYPERVISOR_sched_op, abi.SCHEDOP_block)
    xen.finish()
    xen.config(flags=abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL)
    assert _poll(xen, 13) == 0, "a yield, where KVM doesn't see all events"


def test_a_32_bit_guests_arguments_are_narrower(make: Make) -> None:
    """The timer's time is in two registers, a poll's structure has a short pointer."""
    xen = XenGuest(make, needs=ALL, flags=abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | abi.KVM_XEN_HVM_CONFIG_EVTCHN_SEND)
    xen.share(long_mode=0)
    guest = xen.guest

    def call(number: int, *params: int) -> int:
        guest.protected("0f01d9 e6ea")
        regs = guest.cpu.get_regs()
        regs.rax = number
        for name, value in zip(("rbx", "rcx", "rdx", "rsi", "rdi", "rbp"), params, strict=False):
            setattr(regs, name, value)
        guest.cpu.set_regs(regs)
        guest.expect(abi.KVM_EXIT_IO)
        rax = guest.cpu.get_regs().rax & 0xFFFF_FFFF
        return rax - (rax >> 31 << 32)

    _set_timer(xen, 0)
    late = _now(xen) + 3_600_000_000_000
    assert late >> 32
    assert call(abi.HYPERVISOR_set_timer_op, late & 0xFFFF_FFFF, late >> 32) == 0
    assert xen.get_vcpu(_TIMER).timer.expires_ns == late
    guest.write(INPUT, struct.pack("<QI", late + 1, 0))
    assert call(abi.HYPERVISOR_vcpu_op, abi.VCPUOP_set_singleshot_timer, 0, INPUT) == 0
    assert xen.get_vcpu(_TIMER).timer.expires_ns == late + 1
    guest.write(INPUT, struct.pack("<IIQI", INPUT + 16, 1, 20_000_000, 1023))
    assert call(abi.HYPERVISOR_sched_op, abi.SCHEDOP_poll, INPUT) == 0
    guest.write(INPUT + 16, struct.pack("<I", 1024))
    assert call(abi.HYPERVISOR_sched_op, abi.SCHEDOP_poll, INPUT) == -errno.EINVAL
    _port(xen, 5, 7)
    guest.write(INPUT, b"\5\0\0\0")
    assert call(abi.HYPERVISOR_event_channel_op, abi.EVTCHNOP_send, INPUT) == 0
    assert xen.bits(0x800, 128) == [7]


def test_other_rings_hypercalls_are_userspaces(xen: XenGuest) -> None:
    xen.start("0f01d9 e6ea".replace(" ", ""), rax=abi.HYPERVISOR_sched_op, rdi=abi.SCHEDOP_yield)
    xen.enter_ring_3()
    with pytest.raises(Left):
        xen.finish()
