# SPDX-License-Identifier: Apache-2.0
"""Sequences of API calls with fields at their edges.

A call succeeds, or fails with an errno that its section of the KVM API document names and changes nothing;
it never raises anything else, and the process goes on.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.conformance import MEMORY_SIZE, Guest, watchdog
from tests.support.machines import KVMS

from softkvm import abi

EDGES = sorted({0, 1, 2, 3, *(n for bits in (7, 8, 15, 16, 31, 32, 47, 52, 63, 64) for n in (2**bits - 1, 2**bits))})
EDGE = st.sampled_from([n for n in EDGES if n < 1 << 64])
POKES = st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from([1, 1, 2, 4, 8]), EDGE), max_size=3)
Pokes = list[tuple[int, int, int]]


def poked(structure: ctypes.Structure, pokes: Pokes, size: int | None = None) -> Any:
    """Return a copy with numbers written to places in it; *size* limits where."""
    data = bytearray(bytes(structure))
    limit = size or len(data)
    for place, width, value in pokes:
        width = min(width, limit)
        offset = place % (limit // width) * width
        data[offset : offset + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
    return type(structure).from_buffer_copy(data)


class Operation(NamedTuple):
    """One kind of call: arguments are numbers and pokes; errnos are those documented."""

    call: Callable[[Guest, int, int, Pokes], Any]
    errnos: frozenset[int]


def _op(call: Callable[[Guest, int, int, Pokes], Any], *errnos: int) -> Operation:
    return Operation(call, frozenset(errnos))


def _chip(g: Guest, a: int, b: int, p: Pokes) -> None:
    g.vm.set_irqchip(poked(g.vm.get_irqchip(a % 3), p))


def _region(g: Guest, a: int, b: int, p: Pokes) -> None:
    base = abi.kvm_userspace_memory_region(
        slot=1 + a % 3, guest_phys_addr=0x20_0000, memory_size=0x4000, userspace_addr=g.address
    )
    g.vm.set_user_memory_region(poked(base, p, 24))  # not the host address: that would be our own memory


def _cpuid(g: Guest, a: int, b: int, p: Pokes) -> None:
    entries = g.cpu.get_cpuid2()
    if entries:
        entries[a % len(entries)] = poked(entries[a % len(entries)], p)
    g.cpu.set_cpuid2(entries)


def _immediate(g: Guest, a: int, b: int, p: Pokes) -> None:
    g.kvm_run.immediate_exit = 1
    try:
        g.cpu.run()
    finally:
        g.kvm_run.immediate_exit = 0


def _run(g: Guest, a: int, b: int, p: Pokes) -> None:
    with watchdog(g.cpu, 0.01):
        g.cpu.run()


def _routing(g: Guest, a: int, b: int, p: Pokes) -> None:
    entry = abi.kvm_irq_routing_entry(gsi=5, type=abi.KVM_IRQ_ROUTING_IRQCHIP)
    g.vm.set_gsi_routing([poked(entry, p)])


MSRS = (0x10, 0x1B, 0x3B, 0x174, 0x175, 0x1A0, 0x1D9, 0x200, 0x277, 0x2FF, 0x6E0, 0x80B, 0xC000_0080, 0xC000_0081)
PV_MSRS = (0x11, 0x12, *range(0x4B56_4D00, 0x4B56_4D09), 0xC000_0100, 0xC000_0102, 0xC001_0015, 0x1234_5678)

E = errno
OPERATIONS: dict[str, Operation] = {
    "set_regs": _op(lambda g, a, b, p: g.cpu.set_regs(poked(g.cpu.get_regs(), p))),
    "set_sregs": _op(lambda g, a, b, p: g.cpu.set_sregs(poked(g.cpu.get_sregs(), p)), E.EINVAL),
    "set_sregs2": _op(lambda g, a, b, p: g.cpu.set_sregs2(poked(g.cpu.get_sregs2(), p)), E.EINVAL),
    "set_fpu": _op(lambda g, a, b, p: g.cpu.set_fpu(poked(g.cpu.get_fpu(), p))),
    "set_xsave": _op(lambda g, a, b, p: g.cpu.set_xsave(poked(g.cpu.get_xsave(), p, 576)), E.EINVAL),
    "set_xcrs": _op(lambda g, a, b, p: g.cpu.set_xcrs(poked(g.cpu.get_xcrs(), p, 24)), E.EINVAL),
    "set_vcpu_events": _op(lambda g, a, b, p: g.cpu.set_vcpu_events(poked(g.cpu.get_vcpu_events(), p)), E.EINVAL),
    "set_debugregs": _op(lambda g, a, b, p: g.cpu.set_debugregs(poked(g.cpu.get_debugregs(), p)), E.EINVAL),
    "set_mp_state": _op(lambda g, a, b, p: g.cpu.set_mp_state(abi.kvm_mp_state(mp_state=a & 0xFF)), E.EINVAL),
    "set_lapic": _op(lambda g, a, b, p: g.cpu.set_lapic(poked(g.cpu.get_lapic(), p)), E.EINVAL),
    "set_irqchip": _op(_chip, E.EINVAL, E.ENXIO),
    "set_pit2": _op(lambda g, a, b, p: g.vm.set_pit2(poked(g.vm.get_pit2(), p)), E.ENXIO),
    "set_clock": _op(lambda g, a, b, p: g.vm.set_clock(poked(abi.kvm_clock_data(clock=a), p)), E.EINVAL),
    "set_user_memory_region": _op(_region, E.EINVAL, E.EEXIST),
    "get_dirty_log": _op(lambda g, a, b, p: g.vm.get_dirty_log(a & 0xFFFF_FFFF), E.EINVAL, E.ENOENT),
    "clear_dirty_log": _op(
        lambda g, a, b, p: g.vm.clear_dirty_log(a % 4, b & 0x40, a & 0xC0, b"\xff" * (b & 31)),
        E.EINVAL,
        E.ENOENT,
        E.EFAULT,
    ),
    "x86_set_msr_filter": _op(
        lambda g, a, b, p: g.vm.x86_set_msr_filter(
            a & 3, [abi.MsrFilterRange(b & 7, a & 0xFFFF_FFFF, b & 127, bytes(8))]
        ),
        E.EINVAL,
        E.EFAULT,
    ),
    "irq_line": _op(lambda g, a, b, p: g.vm.irq_line(a & 0xFFFF_FFFF, b & 0xFFFF_FFFF), E.ENXIO, E.EINVAL),
    "irq_line_status": _op(lambda g, a, b, p: g.vm.irq_line_status(a & 63, b & 1), E.ENXIO, E.EINVAL),
    "signal_msi": _op(
        lambda g, a, b, p: g.vm.signal_msi(poked(abi.kvm_msi(address_lo=0xFEE0_0000, data=a & 0xFFFF), p)), E.EINVAL
    ),
    "set_gsi_routing": _op(_routing, E.EINVAL),
    "interrupt": _op(lambda g, a, b, p: g.cpu.interrupt(a & 0xFFFF_FFFF), E.EINVAL, E.ENXIO, E.EEXIST),
    "nmi": _op(lambda g, a, b, p: g.cpu.nmi()),
    "set_guest_debug": _op(
        lambda g, a, b, p: g.cpu.set_guest_debug(poked(abi.kvm_guest_debug(control=a & 0xFF_FFFF), p)),
        E.EINVAL,
        E.EBUSY,
    ),
    "set_msrs": _op(lambda g, a, b, p: g.cpu.set_msrs({(*MSRS, *PV_MSRS)[a % 27]: b})),
    "get_msrs": _op(lambda g, a, b, p: g.cpu.get_msrs([a & 0xFFFF_FFFF, (*MSRS, *PV_MSRS)[b % 27]])),
    "set_cpuid2": _op(_cpuid, E.EINVAL, E.E2BIG),
    "translate": _op(lambda g, a, b, p: g.cpu.translate(a)),
    "set_tsc_khz": _op(lambda g, a, b, p: g.cpu.set_tsc_khz(a & 0xFFFF_FFFF), E.EINVAL),
    "vm_set_tsc_khz": _op(lambda g, a, b, p: g.vm.set_tsc_khz(a & 0xFFFF_FFFF), E.EINVAL),
    "unused_page_hints": _op(lambda g, a, b, p: g.vm.enable_cap(abi.KVM_CAP_UNUSED_PAGE_HINT, a & 15), E.EINVAL),
    "enable_cap": _op(lambda g, a, b, p: g.vm.enable_cap(a % 250, b), E.EINVAL, E.EEXIST, E.ENXIO, E.EPERM, E.ENOTTY),
    "enable_vcpu_cap": _op(lambda g, a, b, p: g.cpu.enable_cap(a % 250, b), E.EINVAL, E.ENOTTY),
    "check_extension": _op(lambda g, a, b, p: g.vm.check_extension(a & 0x7FFF_FFFF)),
    "create_vcpu": _op(lambda g, a, b, p: g.vm.create_vcpu(max(a & 0xFFFF, 250)).close(), E.EINVAL, E.EEXIST),
    "create_irqchip": _op(lambda g, a, b, p: g.vm.create_irqchip(), E.EINVAL, E.EEXIST),
    "create_pit2": _op(lambda g, a, b, p: g.vm.create_pit2(a & 0xFFFF_FFFF), E.EINVAL, E.EEXIST, E.ENOENT),
    "kvmclock_ctrl": _op(lambda g, a, b, p: g.cpu.kvmclock_ctrl(), E.EINVAL),
    "set_tss_addr": _op(lambda g, a, b, p: g.vm.set_tss_addr(a), E.EINVAL, E.EEXIST),
    "set_identity_map_addr": _op(lambda g, a, b, p: g.vm.set_identity_map_addr(a), E.EINVAL, E.EEXIST),
    "set_boot_cpu_id": _op(lambda g, a, b, p: g.vm.set_boot_cpu_id(a & 0xFFFF_FFFF), E.EBUSY),
    "immediate_exit": _op(_immediate, E.EINTR, E.EAGAIN, E.EINVAL),
    "run": _op(_run, E.EINTR, E.EAGAIN, E.EINVAL, E.EFAULT),
}

#: Calls in which the guest may go on before they fail.
NOT_COMPARED = {"run", "immediate_exit"}
_TIMER_COUNT = slice(0x390, 0x394)


def errno_of(call: Callable[[], object]) -> int:
    """Call; return the errno that it fails with, 0 for success."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


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


def check(kind: str, steps: list[tuple[str, int, int, Pokes]], *, irqchip: bool) -> None:
    with KVMS[kind]() as kvm, Guest(kvm, irqchip=irqchip) as guest:
        guest.real("90 e6e9 f4 ebfb")
        for name, a, b, pokes in steps:
            operation = OPERATIONS[name]
            before = snapshot(guest)
            error = errno_of(lambda: operation.call(guest, a, b, pokes))  # noqa: B023
            if error:
                said = errno.errorcode.get(error, str(error))
                assert error in operation.errnos, f"{name}: {said}"
                if name not in NOT_COMPARED:
                    assert snapshot(guest) == before, f"{name} failed with {said} and changed something"
    healthy(kind)


def healthy(kind: str) -> None:
    """Another machine still works."""
    with KVMS[kind]() as kvm, Guest(kvm) as guest:
        guest.real("b83412 f4")
        guest.expect(abi.KVM_EXIT_HLT)
        assert guest.cpu.get_regs().rax == 0x1234


@pytest.mark.parametrize("irqchip", [False, True], ids=["bare", "chips"])
@settings(max_examples=150)
@given(steps=STEPS)
def test_calls_fail_as_documented_and_change_nothing(irqchip: bool, steps: list[tuple[str, int, int, Pokes]]) -> None:
    check("soft", steps, irqchip=irqchip)


@settings(max_examples=20)
@given(steps=STEPS)
def test_the_device_obeys_the_same_properties(steps: list[tuple[str, int, int, Pokes]]) -> None:
    check("device", [step for step in steps if step[0] != "run"], irqchip=False)


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
