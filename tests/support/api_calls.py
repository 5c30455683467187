# SPDX-License-Identifier: Apache-2.0
"""Every request of the KVM API as something to call with any numbers, and the errnos that it may fail with.

A row's name is the file's and the method's: ``vm.irqfd``. Its arguments are two numbers and *pokes*: numbers written to
places in a structure (:func:`poked`).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st
from tests.support.conformance import Guest, watchdog

from softkvm import abi

EDGES = sorted({0, 1, 2, 3, *(n for bits in (7, 8, 15, 16, 31, 32, 47, 52, 63, 64) for n in (2**bits - 1, 2**bits))})
EDGE = st.sampled_from([n for n in EDGES if n < 1 << 64])
POKES = st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from([1, 1, 2, 4, 8]), EDGE), max_size=3)
Pokes = list[tuple[int, int, int]]
Call = Callable[[Guest, int, int, Pokes], Any]

U32 = 0xFFFF_FFFF


def poked(structure: ctypes.Structure, pokes: Pokes, size: int | None = None) -> Any:
    """Return a copy with numbers written to places in it; *size* limits where."""
    data = bytearray(bytes(structure))
    limit = size or len(data)
    for place, width, value in pokes:
        width = min(width, limit)
        offset = place % (limit // width) * width
        data[offset : offset + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
    return type(structure).from_buffer_copy(data)


def errno_of(call: Callable[[], object]) -> int:
    """Call; return the errno that it fails with, 0 for success."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


class Operation(NamedTuple):
    """One kind of call, and the errnos that are documented."""

    call: Call
    errnos: frozenset[int]


def _op(call: Call, *errnos: int) -> Operation:
    return Operation(call, frozenset(errnos))


# --- files -------------------------------------------------------------------------------------------------


class _Descriptors:
    """Descriptors to give: two eventfds, of which events go nowhere, one of a file, and such as are not open."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def __getitem__(self, number: int) -> int:
        if not self.fds:
            self.fds = [os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK), os.memfd_create("file")]
        choices = [*self.fds, -1, 1 << 20, 0x7FFF_FFFF, -(1 << 31)]
        return choices[number % len(choices)]


FDS = _Descriptors()


def _close(fd: int) -> None:
    os.close(fd)


# --- structures --------------------------------------------------------------------------------------------


def _region(g: Guest, a: int, b: int, p: Pokes) -> None:
    base = abi.kvm_userspace_memory_region(
        slot=1 + a % 3, guest_phys_addr=0x20_0000, memory_size=0x4000, userspace_addr=g.address
    )
    g.vm.set_user_memory_region(poked(base, p, 24))  # not the host address: that would be our own memory


def _region2(g: Guest, a: int, b: int, p: Pokes) -> None:
    base = abi.kvm_userspace_memory_region2(
        slot=1 + a % 3, guest_phys_addr=0x20_0000, memory_size=0x4000, userspace_addr=g.address
    )
    region = poked(base, p, 24)
    if region.flags & abi.KVM_MEM_GUEST_MEMFD:
        region.guest_memfd, region.guest_memfd_offset = FDS[b] & U32, b & ~0xFFF
    g.vm.set_user_memory_region2(region)


def _guest_memfd(g: Guest, a: int, b: int, p: Pokes) -> None:
    _close(g.vm.create_guest_memfd(poked(abi.kvm_create_guest_memfd(size=a), p)))


def _attributes(g: Guest, a: int, b: int, p: Pokes) -> None:
    base = abi.kvm_memory_attributes(address=a & 0xF_F000, size=0x4000, attributes=abi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
    g.vm.set_memory_attributes(poked(base, p))


def _pre_fault(g: Guest, a: int, b: int, p: Pokes) -> None:
    g.cpu.pre_fault_memory(poked(abi.kvm_pre_fault_memory(gpa=a & 0xF_F000, size=0x4000), p))


def _chip(g: Guest, a: int, b: int, p: Pokes) -> None:
    g.vm.set_irqchip(poked(g.vm.get_irqchip(a % 3), p))


def _routing(g: Guest, a: int, b: int, p: Pokes) -> None:
    entry = abi.kvm_irq_routing_entry(gsi=5, type=a % 6 if 8 < a < 256 else abi.KVM_IRQ_ROUTING_IRQCHIP)
    g.vm.set_gsi_routing([poked(entry, p)] * (b % 3))


def _irqfd(g: Guest, a: int, b: int, p: Pokes) -> None:
    flags = b >> 1 & (abi.KVM_IRQFD_FLAG_DEASSIGN | abi.KVM_IRQFD_FLAG_RESAMPLE) if b < 256 else b & U32
    g.vm.irqfd(FDS[a], a & U32 if b & 1 else 5, flags, FDS[b >> 3])


def _ioeventfd(g: Guest, a: int, b: int, p: Pokes) -> None:
    match = b if b & 1 else None
    g.vm.ioeventfd(FDS[a], a if b & 2 else 0x3000_0000, b & U32 if b > 255 else b >> 2 & 15, match, a >> 4 & 15)


def _hyperv_eventfd(g: Guest, a: int, b: int, p: Pokes) -> None:
    g.vm.hyperv_eventfd(a & U32, FDS[b], b & U32 if b > 255 else b >> 3 & 1)


def _xen_config(g: Guest, a: int, b: int, p: Pokes) -> None:
    base = abi.kvm_xen_hvm_config(flags=b & U32 if b > 255 else b & 0xA2, msr=a & U32)
    g.vm.xen_hvm_config(poked(base, p))


def _host_address(g: Guest, number: int) -> int:
    """A host's address that is guest memory, or nobody's."""
    return (0, g.address + 0x3000, g.address + 0x3008, g.address + 0x3FC1, 4096, 1 << 47, 1 << 63)[number % 7]


def _xen_hvm_attr(g: Guest, a: int, b: int, p: Pokes) -> None:
    base = abi.kvm_xen_hvm_attr(type=a & 0xFFFF if a > 255 else a & 7)
    base.u.pad[0] = b
    if base.type == abi.KVM_XEN_ATTR_TYPE_EVTCHN:
        base.u.evtchn.type, base.u.evtchn.flags = abi.EVTCHNSTAT_interdomain, a >> 3 & 7
        base.u.evtchn.deliver.port.port = b >> 2 & 3
        base.u.evtchn.deliver.port.priority = abi.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
    attr = poked(base, p)
    if attr.type == abi.KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA:
        attr.u.shared_info.hva = _host_address(g, b)
    elif attr.type == abi.KVM_XEN_ATTR_TYPE_EVTCHN and not attr.u.evtchn.deliver.port.port:
        attr.u.evtchn.deliver.eventfd.fd = FDS[b]
    g.vm.xen_hvm_set_attr(attr)


def _xen_vcpu_attr(g: Guest, a: int, b: int, p: Pokes) -> None:
    base = abi.kvm_xen_vcpu_attr(type=a & 0xFFFF if a > 255 else a % 11)
    base.u.pad[0] = b
    if base.type == abi.KVM_XEN_VCPU_ATTR_TYPE_TIMER:
        timer = abi.kvm_xen_attr_timer(b & U32, abi.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL, a >> 4)
        base.u.timer = timer
    attr = poked(base, p)
    if attr.type == abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA:
        attr.u.hva = _host_address(g, b)
    g.cpu.xen_vcpu_set_attr(attr)


def _xen_event(g: Guest, a: int, b: int, p: Pokes) -> None:
    priority = abi.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
    g.vm.xen_hvm_evtchn_send(poked(abi.kvm_irq_routing_xen_evtchn(a & U32, b & 1, priority), p))


def _stats(holder: Any) -> None:
    fd = holder.get_stats_fd()
    try:
        assert len(os.pread(fd, 1 << 16, 0)) > ctypes.sizeof(abi.kvm_stats_header)
    finally:
        _close(fd)


def _filter(g: Guest, a: int, b: int, p: Pokes) -> None:
    events = [value for _, _, value in p] * (b % 200)
    g.vm.set_pmu_event_filter(a & U32 if a > 255 else a & 1, events, b & U32, a >> 8 & U32 if a > 255 else a >> 1 & 1)


def _cpuid2(g: Guest, a: int, b: int, p: Pokes) -> None:
    entries = g.cpu.get_cpuid2()
    if entries:
        entries[a % len(entries)] = poked(entries[a % len(entries)], p)
    g.cpu.set_cpuid2(entries * (1 + b % 2))


def _cpuid(g: Guest, a: int, b: int, p: Pokes) -> None:
    g.cpu.set_cpuid([poked(abi.kvm_cpuid_entry(function=a & U32, eax=b & U32), p)] * (b % 300))


def _signal_mask(g: Guest, a: int, b: int, p: Pokes) -> None:
    g.cpu.set_signal_mask(None if b & 1 else a.to_bytes(8, "little")[: 8 - b % 3 * 2])


def _msr_filter(g: Guest, a: int, b: int, p: Pokes) -> None:
    part = abi.MsrFilterRange(b & 7, a & U32, b & 127, bytes(8))
    g.vm.x86_set_msr_filter(a & 3, [part] * (1 if b & 128 else b % 18))


def _events(g: Guest, a: int, b: int, p: Pokes) -> None:
    g.cpu.set_vcpu_events(poked(g.cpu.get_vcpu_events(), p))


def _nested(g: Guest, a: int, b: int, p: Pokes) -> None:
    g.cpu.set_nested_state(poked(g.cpu.get_nested_state(), p))


# --- KVM_RUN -----------------------------------------------------------------------------------------------


def _immediate(g: Guest, a: int, b: int, p: Pokes) -> None:
    g.kvm_run.immediate_exit = 1
    try:
        g.cpu.run()
    finally:
        g.kvm_run.immediate_exit = 0


def _run(g: Guest, a: int, b: int, p: Pokes) -> None:
    with watchdog(g.cpu, 0.01):
        g.cpu.run()


def _run_with_any_page(g: Guest, a: int, b: int, p: Pokes) -> None:
    """What a client writes to the page that it shares with KVM is an input, too: all of it."""
    run = g.kvm_run
    page = poked(run, p)
    page.immediate_exit = 1 if b & 3 else 0
    page.kvm_valid_regs, page.kvm_dirty_regs = a & (U32 if a > 255 else 7), b & (U32 if b > 255 else 7)
    ctypes.memmove(ctypes.addressof(run), bytes(page), ctypes.sizeof(page))
    try:
        with watchdog(g.cpu, 0.01):
            g.cpu.run()
    finally:
        run.immediate_exit = 0
        run.kvm_valid_regs = run.kvm_dirty_regs = 0
        run.request_interrupt_window = 0


# --- the table ---------------------------------------------------------------------------------------------

MSRS = (0x10, 0x1B, 0x3B, 0x174, 0x175, 0x1A0, 0x1D9, 0x200, 0x277, 0x2FF, 0x6E0, 0x80B, 0xC000_0080, 0xC000_0081)
PV_MSRS = (0x11, 0x12, *range(0x4B56_4D00, 0x4B56_4D09), 0xC000_0100, 0xC000_0102, 0xC001_0015, 0x1234_5678)
_MSRS = (*MSRS, *PV_MSRS, 0xE1, 0x17A, 0x400, 0x40F, 0xC001_0004, 0xC001_0200, 0x4000_0000, 0x4000_0080)

E = errno
OPERATIONS: dict[str, Operation] = {
    # the system
    "system.get_api_version": _op(lambda g, a, b, p: g.kvm.get_api_version()),
    "system.create_vm": _op(lambda g, a, b, p: g.kvm.create_vm(a).close(), E.EINVAL),
    "system.check_extension": _op(lambda g, a, b, p: g.kvm.check_extension(a)),
    "system.get_vcpu_mmap_size": _op(lambda g, a, b, p: g.kvm.get_vcpu_mmap_size()),
    "system.get_msr_index_list": _op(lambda g, a, b, p: g.kvm.get_msr_index_list()),
    "system.get_msr_feature_index_list": _op(lambda g, a, b, p: g.kvm.get_msr_feature_index_list()),
    "system.get_supported_cpuid": _op(lambda g, a, b, p: g.kvm.get_supported_cpuid()),
    "system.get_emulated_cpuid": _op(lambda g, a, b, p: g.kvm.get_emulated_cpuid()),
    "system.get_supported_hv_cpuid": _op(lambda g, a, b, p: g.kvm.get_supported_hv_cpuid(), E.ENOTTY),
    "system.x86_get_mce_cap_supported": _op(lambda g, a, b, p: g.kvm.x86_get_mce_cap_supported()),
    "system.get_msrs": _op(lambda g, a, b, p: g.kvm.get_msrs([a & U32, _MSRS[b % len(_MSRS)]] * (b % 130)), E.E2BIG),
    "system.get_device_attr": _op(lambda g, a, b, p: g.kvm.get_device_attr(a & U32, b), E.ENXIO),
    "system.has_device_attr": _op(lambda g, a, b, p: g.kvm.has_device_attr(a & U32, b), E.ENXIO),
    # a VM
    "vm.check_extension": _op(lambda g, a, b, p: g.vm.check_extension(a)),
    "vm.set_user_memory_region": _op(_region, E.EINVAL, E.EEXIST),
    "vm.set_user_memory_region2": _op(_region2, E.EINVAL, E.EEXIST, E.EBADF),
    "vm.create_guest_memfd": _op(_guest_memfd, E.EINVAL, E.ENOTTY, E.ENOMEM, E.EFBIG),
    "vm.set_memory_attributes": _op(_attributes, E.EINVAL, E.ENOTTY),
    "vm.create_vcpu": _op(lambda g, a, b, p: g.vm.create_vcpu(max(a & 0xFFFF, 250)).close(), E.EINVAL, E.EEXIST),
    "vm.create_device": _op(lambda g, a, b, p: _close(g.vm.create_device(64 + (a & 0xFFFF), b & U32)), E.ENODEV),
    "vm.create_irqchip": _op(lambda g, a, b, p: g.vm.create_irqchip(), E.EINVAL, E.EEXIST),
    "vm.create_pit": _op(lambda g, a, b, p: g.vm.create_pit(), E.EEXIST, E.ENOENT),
    "vm.create_pit2": _op(lambda g, a, b, p: g.vm.create_pit2(a & U32), E.EINVAL, E.EEXIST, E.ENOENT),
    "vm.get_pit": _op(lambda g, a, b, p: g.vm.get_pit(), E.ENXIO),
    "vm.set_pit": _op(lambda g, a, b, p: g.vm.set_pit(poked(g.vm.get_pit(), p)), E.ENXIO),
    "vm.get_pit2": _op(lambda g, a, b, p: g.vm.get_pit2(), E.ENXIO),
    "vm.set_pit2": _op(lambda g, a, b, p: g.vm.set_pit2(poked(g.vm.get_pit2(), p)), E.ENXIO),
    "vm.reinject_control": _op(lambda g, a, b, p: g.vm.reinject_control(a & 0xFF), E.ENXIO),
    "vm.get_irqchip": _op(lambda g, a, b, p: g.vm.get_irqchip(a & U32), E.EINVAL, E.ENXIO),
    "vm.set_irqchip": _op(_chip, E.EINVAL, E.ENXIO),
    "vm.irq_line": _op(lambda g, a, b, p: g.vm.irq_line(a & U32, b & U32), E.ENXIO, E.EINVAL),
    "vm.irq_line_status": _op(lambda g, a, b, p: g.vm.irq_line_status(a & 63, b & 1), E.ENXIO, E.EINVAL),
    "vm.set_gsi_routing": _op(_routing, E.EINVAL),
    "vm.signal_msi": _op(
        lambda g, a, b, p: g.vm.signal_msi(poked(abi.kvm_msi(address_lo=0xFEE0_0000, data=a & 0xFFFF), p)), E.EINVAL
    ),
    "vm.irqfd": _op(_irqfd, E.EINVAL, E.EBADF, E.EBUSY, E.EAGAIN),
    "vm.ioeventfd": _op(_ioeventfd, E.EINVAL, E.EBADF, E.EEXIST, E.ENOENT, E.ENOSPC),
    "vm.hyperv_eventfd": _op(_hyperv_eventfd, E.EINVAL, E.EBADF, E.EEXIST, E.ENOENT),
    "vm.xen_hvm_config": _op(_xen_config, E.EINVAL),
    "vm.xen_hvm_set_attr": _op(_xen_hvm_attr, E.EINVAL, E.ENOENT, E.EFAULT, E.EEXIST, E.EBADF),
    "vm.xen_hvm_get_attr": _op(lambda g, a, b, p: g.vm.xen_hvm_get_attr(a & 0xFFFF), E.ENOENT),
    "vm.xen_hvm_evtchn_send": _op(_xen_event, E.EINVAL, E.EFAULT),
    "vm.register_coalesced_mmio": _op(
        lambda g, a, b, p: g.vm.register_coalesced_mmio(a, b & U32, a >> 4 & 3), E.EINVAL, E.ENOSPC
    ),
    "vm.unregister_coalesced_mmio": _op(
        lambda g, a, b, p: g.vm.unregister_coalesced_mmio(a, b & U32, a >> 4 & 3), E.EINVAL
    ),
    "vm.get_dirty_log": _op(lambda g, a, b, p: g.vm.get_dirty_log(a & U32), E.EINVAL, E.ENOENT, E.ENXIO),
    "vm.clear_dirty_log": _op(
        lambda g, a, b, p: g.vm.clear_dirty_log(a % 4, b & 0x40, a & 0xC0, b"\xff" * (b & 31)),
        E.EINVAL,
        E.ENOENT,
        E.ENXIO,
        E.EFAULT,
    ),
    "vm.reset_dirty_rings": _op(lambda g, a, b, p: g.vm.reset_dirty_rings(), E.EINVAL),
    "vm.get_stats_fd": _op(lambda g, a, b, p: _stats(g.vm)),
    "vm.set_nr_mmu_pages": _op(lambda g, a, b, p: g.vm.set_nr_mmu_pages(a), E.EINVAL),
    "vm.get_nr_mmu_pages": _op(lambda g, a, b, p: g.vm.get_nr_mmu_pages(), E.ENOTTY),
    "vm.set_tss_addr": _op(lambda g, a, b, p: g.vm.set_tss_addr(a), E.EINVAL, E.EEXIST),
    "vm.set_identity_map_addr": _op(lambda g, a, b, p: g.vm.set_identity_map_addr(a), E.EINVAL, E.EEXIST),
    "vm.set_boot_cpu_id": _op(lambda g, a, b, p: g.vm.set_boot_cpu_id(a & U32), E.EBUSY),
    "vm.get_clock": _op(lambda g, a, b, p: g.vm.get_clock()),
    "vm.set_clock": _op(lambda g, a, b, p: g.vm.set_clock(poked(abi.kvm_clock_data(clock=a), p)), E.EINVAL),
    "vm.get_tsc_khz": _op(lambda g, a, b, p: g.vm.get_tsc_khz()),
    "vm.set_tsc_khz": _op(lambda g, a, b, p: g.vm.set_tsc_khz(a & U32), E.EINVAL),
    "vm.x86_set_msr_filter": _op(_msr_filter, E.EINVAL, E.EFAULT),
    "vm.set_pmu_event_filter": _op(_filter, E.EINVAL, E.E2BIG),
    "vm.enable_cap": _op(
        lambda g, a, b, p: g.vm.enable_cap(a % 250, b), E.EINVAL, E.EEXIST, E.ENXIO, E.EPERM, E.ENOTTY, E.E2BIG
    ),
    # a vCPU
    "vcpu.get_regs": _op(lambda g, a, b, p: g.cpu.get_regs()),
    "vcpu.set_regs": _op(lambda g, a, b, p: g.cpu.set_regs(poked(g.cpu.get_regs(), p))),
    "vcpu.get_sregs": _op(lambda g, a, b, p: g.cpu.get_sregs()),
    "vcpu.set_sregs": _op(lambda g, a, b, p: g.cpu.set_sregs(poked(g.cpu.get_sregs(), p)), E.EINVAL),
    "vcpu.get_sregs2": _op(lambda g, a, b, p: g.cpu.get_sregs2()),
    "vcpu.set_sregs2": _op(lambda g, a, b, p: g.cpu.set_sregs2(poked(g.cpu.get_sregs2(), p)), E.EINVAL),
    "vcpu.get_fpu": _op(lambda g, a, b, p: g.cpu.get_fpu()),
    "vcpu.set_fpu": _op(lambda g, a, b, p: g.cpu.set_fpu(poked(g.cpu.get_fpu(), p))),
    "vcpu.get_xsave": _op(lambda g, a, b, p: g.cpu.get_xsave()),
    "vcpu.get_xsave2": _op(lambda g, a, b, p: g.cpu.get_xsave2()),
    "vcpu.set_xsave": _op(lambda g, a, b, p: g.cpu.set_xsave(poked(g.cpu.get_xsave(), p, 576)), E.EINVAL),
    "vcpu.get_xcrs": _op(lambda g, a, b, p: g.cpu.get_xcrs()),
    "vcpu.set_xcrs": _op(lambda g, a, b, p: g.cpu.set_xcrs(poked(g.cpu.get_xcrs(), p, 24)), E.EINVAL),
    "vcpu.get_vcpu_events": _op(lambda g, a, b, p: g.cpu.get_vcpu_events()),
    "vcpu.set_vcpu_events": _op(_events, E.EINVAL),
    "vcpu.get_debugregs": _op(lambda g, a, b, p: g.cpu.get_debugregs()),
    "vcpu.set_debugregs": _op(lambda g, a, b, p: g.cpu.set_debugregs(poked(g.cpu.get_debugregs(), p)), E.EINVAL),
    "vcpu.get_mp_state": _op(lambda g, a, b, p: g.cpu.get_mp_state()),
    "vcpu.set_mp_state": _op(lambda g, a, b, p: g.cpu.set_mp_state(abi.kvm_mp_state(mp_state=a & 0xFF)), E.EINVAL),
    "vcpu.get_lapic": _op(lambda g, a, b, p: g.cpu.get_lapic(), E.EINVAL),
    "vcpu.set_lapic": _op(lambda g, a, b, p: g.cpu.set_lapic(poked(g.cpu.get_lapic(), p)), E.EINVAL),
    "vcpu.get_nested_state": _op(lambda g, a, b, p: g.cpu.get_nested_state(), E.EINVAL),
    "vcpu.set_nested_state": _op(_nested, E.EINVAL),
    "vcpu.get_msrs": _op(lambda g, a, b, p: g.cpu.get_msrs([a & U32, _MSRS[b % len(_MSRS)]] * (b % 130)), E.E2BIG),
    "vcpu.set_msrs": _op(lambda g, a, b, p: g.cpu.set_msrs([(_MSRS[a % len(_MSRS)], b)] * (1 + a % 260)), E.E2BIG),
    "vcpu.get_cpuid2": _op(lambda g, a, b, p: g.cpu.get_cpuid2()),
    "vcpu.set_cpuid2": _op(_cpuid2, E.EINVAL, E.E2BIG),
    "vcpu.set_cpuid": _op(_cpuid, E.EINVAL, E.E2BIG),
    "vcpu.get_supported_hv_cpuid": _op(lambda g, a, b, p: g.cpu.get_supported_hv_cpuid(), E.ENOTTY),
    "vcpu.translate": _op(lambda g, a, b, p: g.cpu.translate(a)),
    "vcpu.interrupt": _op(lambda g, a, b, p: g.cpu.interrupt(a & U32), E.EINVAL, E.ENXIO, E.EEXIST),
    "vcpu.nmi": _op(lambda g, a, b, p: g.cpu.nmi()),
    "vcpu.smi": _op(lambda g, a, b, p: g.cpu.smi(), E.ENOTTY),
    "vcpu.set_guest_debug": _op(
        lambda g, a, b, p: g.cpu.set_guest_debug(poked(abi.kvm_guest_debug(control=a & 0xFF_FFFF), p)),
        E.EINVAL,
        E.EBUSY,
    ),
    "vcpu.get_tsc_khz": _op(lambda g, a, b, p: g.cpu.get_tsc_khz(), E.EIO),
    "vcpu.set_tsc_khz": _op(lambda g, a, b, p: g.cpu.set_tsc_khz(a & U32), E.EINVAL),
    "vcpu.kvmclock_ctrl": _op(lambda g, a, b, p: g.cpu.kvmclock_ctrl(), E.EINVAL),
    "vcpu.set_signal_mask": _op(_signal_mask, E.EINVAL),
    "vcpu.tpr_access_reporting": _op(lambda g, a, b, p: g.cpu.tpr_access_reporting(a & U32, b & U32), E.EINVAL),
    "vcpu.set_vapic_addr": _op(lambda g, a, b, p: g.cpu.set_vapic_addr(a), E.EINVAL),
    "vcpu.x86_setup_mce": _op(lambda g, a, b, p: g.cpu.x86_setup_mce(a), E.EINVAL),
    "vcpu.x86_set_mce": _op(
        lambda g, a, b, p: g.cpu.x86_set_mce(poked(abi.kvm_x86_mce(status=a, mcg_status=b, bank=a & 31), p)), E.EINVAL
    ),
    "vcpu.pre_fault_memory": _op(_pre_fault, E.EINVAL, E.ENOENT, E.EFAULT, E.EINTR, E.EOPNOTSUPP, E.ENOTTY),
    "vcpu.get_stats_fd": _op(lambda g, a, b, p: _stats(g.cpu)),
    "vcpu.set_device_attr": _op(lambda g, a, b, p: g.cpu.set_device_attr(a & U32, b & 3, a), E.ENXIO),
    "vcpu.get_device_attr": _op(lambda g, a, b, p: g.cpu.get_device_attr(a & U32, b), E.ENXIO),
    "vcpu.has_device_attr": _op(lambda g, a, b, p: g.cpu.has_device_attr(a & U32, b), E.ENXIO),
    "vcpu.xen_vcpu_set_attr": _op(_xen_vcpu_attr, E.EINVAL, E.ENOENT, E.EFAULT),
    "vcpu.xen_vcpu_get_attr": _op(lambda g, a, b, p: g.cpu.xen_vcpu_get_attr(a & 0xFFFF), E.ENOENT, E.EINVAL),
    "vcpu.enable_cap": _op(lambda g, a, b, p: g.cpu.enable_cap(a % 250, b), E.EINVAL, E.ENOTTY),
    "vcpu.run": _op(_run, E.EINTR, E.EAGAIN, E.EINVAL, E.EFAULT),
    # what has a part of its own
    "vm.enable_cap unused pages": _op(
        lambda g, a, b, p: g.vm.enable_cap(abi.KVM_CAP_UNUSED_PAGE_HINT, a & 15), E.EINVAL
    ),
    "vm.enable_cap rings": _op(
        lambda g, a, b, p: g.vm.enable_cap(abi.KVM_CAP_DIRTY_LOG_RING + (b & 1) * 31, a), E.EINVAL, E.E2BIG
    ),
    "vcpu.run at once": _op(_immediate, E.EINTR, E.EAGAIN, E.EINVAL),
    "vcpu.run with any page": _op(_run_with_any_page, E.EINTR, E.EAGAIN, E.EINVAL, E.EFAULT),
}
