# SPDX-License-Identifier: Apache-2.0
"""The requests that KVM has on x86, beside those of every architecture (:mod:`softkvm.abi.requests`)."""

from __future__ import annotations

import ctypes
import errno
import reprlib
from array import array
from collections.abc import Sequence
from ctypes import c_uint32, c_uint64
from typing import Any

from softkvm.abi import checks
from softkvm.abi._layout import flexible
from softkvm.abi.arguments import (
    Argument,
    Gives,
    Memory,
    Nothing,
    Number,
    Takes,
    Unread,
    Value,
    bitmap,
    fields,
    gives_table,
    keep,
    read_structure,
    takes_table,
)
from softkvm.abi.checks import kvm_error
from softkvm.abi.irq import kvm_irq_level, kvm_irq_routing_xen_evtchn
from softkvm.abi.requests import IO, IOR, IOW, IOWR, SYSTEM, VCPU, VM, requests_in
from softkvm.abi.x86 import request_sizes
from softkvm.abi.x86.irqchip import (
    kvm_hyperv_eventfd,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_reinject_control,
)
from softkvm.abi.x86.msr import (
    KVM_MSR_FILTER_MAX_BITMAP_SIZE,
    MsrFilterRange,
    MsrValues,
    kvm_msr_entry,
    kvm_msr_filter,
    kvm_msr_list,
    kvm_msrs,
    msr_bitmap_bytes,
    msr_pairs,
)
from softkvm.abi.x86.nested import kvm_nested_state
from softkvm.abi.x86.processor import (
    KVM_PMU_EVENT_ALLOW,
    KVM_PMU_EVENT_DENY,
    KVM_PMU_EVENT_FLAGS_VALID_MASK,
    kvm_clock_data,
    kvm_cpuid,
    kvm_cpuid2,
    kvm_cpuid_entry,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_fpu,
    kvm_guest_debug,
    kvm_pmu_event_filter,
    kvm_regs,
    kvm_sregs,
    kvm_sregs2,
    kvm_tpr_access_ctl,
    kvm_vapic_addr,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcrs,
    kvm_xsave,
)
from softkvm.abi.x86.xen import kvm_xen_hvm_attr, kvm_xen_hvm_config, kvm_xen_vcpu_attr

_U32 = checks.limits(c_uint32)
_U64 = checks.limits(c_uint64)


class GetMsrs(Argument):
    """KVM_GET_MSRS: a sequence of indices; the values of as many as could be read."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """Numbers of 32 bits."""
        (name,) = names
        indices = checks.sequence(name, args[0], "numbers")
        return (checks.numbers(lambda n: f"{name}[{n}]", indices, "I"),)

    def pack(self, indices: Sequence[int]) -> Any:
        """A table of indices without values."""
        table: Any = flexible(self.structure, kvm_msr_entry, len(indices))(nmsrs=len(indices))
        for entry, index in zip(table.entries, indices, strict=True):
            entry.index = index
        return table

    def unpack(self, packed: Any, value: int) -> list[int]:
        """The values of the first ``value`` MSRs."""
        return [entry.data for entry in packed.entries[:value]]

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """The indices."""
        return ([entry & _INDEX for entry in read_msrs(memory, value)[::2]],)

    def give(self, memory: Memory, value: int, result: Any) -> int:
        """The values, beside their indices; how many there are."""
        entries = array("Q", read_msrs(memory, value)[: 2 * len(result)])
        entries[1::2] = array("Q", result)
        memory.write(value + ctypes.sizeof(kvm_msrs), entries)
        return len(result)


class SetMsrs(Value):
    """KVM_SET_MSRS: values by index, or pairs; the method returns how many were set."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """Pairs of a number of 32 bits and one of 64."""
        try:
            pairs = [(index, value) for index, value in msr_pairs(args[0])]
        except (TypeError, ValueError):
            given = reprlib.repr(args[0])
            raise TypeError(f"{names[0]}={given}, expected values by index, or (index, value) pairs") from None
        indices = checks.numbers(lambda n: "index", [index for index, _ in pairs], "I")
        values = checks.numbers(lambda n: f"MSR {indices[n]:#x}", [value for _, value in pairs], "Q")
        return (list(zip(indices, values, strict=True)),)

    def pack(self, msrs: MsrValues) -> Any:
        """A table of indices and values."""
        pairs = msr_pairs(msrs)
        table: Any = flexible(self.structure, kvm_msr_entry, len(pairs))(nmsrs=len(pairs))
        for entry, (index, data) in zip(table.entries, pairs, strict=True):
            entry.index = index
            entry.data = data
        return table

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """Pairs."""
        entries = read_msrs(memory, value)
        return ([(entry & _INDEX, data) for entry, data in zip(entries[::2], entries[1::2], strict=True)],)


#: The index in an entry's first quadword; the rest of it is reserved.
_INDEX = _U32[1]


def read_msrs(memory: Memory, address: int) -> Sequence[int]:
    """Return copies of the entries of a ``kvm_msrs`` in a client's memory, two quadwords each: index, data."""
    size = request_sizes.NMSRS.bytes(read_structure(memory, kvm_msrs, address).nmsrs)
    if not size:
        return ()
    data = memory.read(address + ctypes.sizeof(kvm_msrs), size)
    return memoryview(data).cast("Q").tolist()


class MsrFilter(Argument):
    """KVM_X86_SET_MSR_FILTER: ``(flags, ranges)``."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """A number, and ranges with numbers and bytes in them; EINVAL for too many."""
        flags = checks.number(names[0], args[0], *_U32)
        ranges = checks.sequence(names[1], args[1], "MsrFilterRange")
        request_sizes.FILTER_RANGES.check(len(ranges))
        accepted = []
        for part in ranges:
            checks.structure(names[1], part, MsrFilterRange)
            numbers = {name: checks.number(name, getattr(part, name), *_U32) for name in ("flags", "base", "nmsrs")}
            bits = part.bitmap if isinstance(part.bitmap, Unread) else checks.data("bitmap", part.bitmap)
            accepted.append(part._replace(bitmap=bits, **numbers))
        return flags, accepted

    def pack(self, flags: int, ranges: Sequence[MsrFilterRange]) -> Any:
        """The structure with the addresses of the bitmaps."""
        msr_filter = self.structure(flags=flags)
        bitmaps = []
        for part, entry in zip(ranges, msr_filter.ranges, strict=False):
            bits = bitmap(bytes(part.bitmap), msr_bitmap_bytes(part.nmsrs), KVM_MSR_FILTER_MAX_BITMAP_SIZE)
            bitmaps.append(bits)
            entry.flags, entry.base, entry.nmsrs = part.flags, part.base, part.nmsrs
            entry.bitmap = ctypes.addressof(bits)
        keep(msr_filter, *bitmaps)
        return msr_filter

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """The flags, and the ranges that have MSRs."""
        given = read_structure(memory, self.structure, value)
        ranges = [
            MsrFilterRange(part.flags, part.base, part.nmsrs, Unread(memory, part.bitmap, msr_bitmap_bytes(part.nmsrs)))
            for part in given.ranges
            if part.nmsrs
        ]
        return given.flags, ranges


class PmuEventFilter(Argument):
    """KVM_SET_PMU_EVENT_FILTER: ``(action, events, fixed_counter_bitmap, flags)``."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """Numbers of 32 bits, and a sequence of numbers of 64."""
        action, events, *rest = args
        action = checks.number(names[0], action, *_U32)
        events = checks.numbers(lambda n: f"events[{n}]", checks.sequence(names[1], events, "numbers"), "Q")
        return (
            action,
            events,
            *(checks.number(name, value, *_U32) for name, value in zip(names[2:], rest, strict=False)),
        )

    def pack(self, action: int, events: Sequence[int], fixed_counter_bitmap: int = 0, flags: int = 0) -> Any:
        """The structure with its events behind."""
        table: Any = flexible(self.structure, ctypes.c_uint64, len(events), "events")(
            action=action, nevents=len(events), fixed_counter_bitmap=fixed_counter_bitmap, flags=flags
        )
        table.events[:] = events
        return table

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """The header's fields, and the events; what is wrong with the header is said before the events are read."""
        given = read_structure(memory, self.structure, value)
        check_pmu_event_filter(given.action, given.nevents, given.flags)
        size = request_sizes.PMU_EVENTS.bytes(given.nevents)
        data = memory.read(value + ctypes.sizeof(self.structure), size) if size else b""
        return given.action, memoryview(data).cast("Q").tolist(), given.fixed_counter_bitmap, given.flags


def check_pmu_event_filter(action: int, nevents: int, flags: int) -> None:
    """Raise EINVAL for an unknown action or flags, E2BIG for too many events."""
    if action not in (KVM_PMU_EVENT_ALLOW, KVM_PMU_EVENT_DENY):
        raise kvm_error(errno.EINVAL, f"action={action}, expected KVM_PMU_EVENT_ALLOW or KVM_PMU_EVENT_DENY")
    if flags & ~KVM_PMU_EVENT_FLAGS_VALID_MASK:
        raise kvm_error(errno.EINVAL, f"flags={flags:#x}, expected KVM_PMU_EVENT_FLAG_MASKED_EVENTS or 0")
    request_sizes.PMU_EVENTS.check(nevents)


class GivesXsave(Gives):
    """KVM_GET_XSAVE2: as many bytes as KVM_CAP_XSAVE2 says, 4096 unless the process has asked for more state (AMX)."""

    def pack(self) -> Any:
        """Room for every component that there is, so that the kernel never writes beyond it."""
        return (ctypes.c_uint8 * request_sizes.XSAVE_BYTES.most)()

    def unpack(self, packed: Any, value: int) -> Any:
        """The structure, which has all components but AMX's."""
        return self.structure.from_buffer_copy(packed)


class GetNestedState(Gives):
    """KVM_GET_NESTED_STATE: the header; its ``size`` says how much room there is, and then how much is needed."""

    def pack(self) -> Any:
        """Room for what any processor's nested guest needs."""
        most = request_sizes.NESTED_ROOM.most
        room = (ctypes.c_uint8 * most)()
        self.structure.from_buffer(room).size = most
        return room

    def unpack(self, packed: Any, value: int) -> Any:
        """The header."""
        return self.structure.from_buffer_copy(packed)

    def give(self, memory: Memory, value: int, result: Any) -> int:
        """The header; E2BIG with the size alone where there is less room."""
        at = value + self.structure.size.offset
        room = read_structure(memory, c_uint32, at).value
        if not request_sizes.NESTED_BYTES.allows(result.size, room=room):
            memory.write(at, c_uint32(result.size))
            raise kvm_error(errno.E2BIG, f"size={room}, expected {result.size}")
        memory.write(value, result)
        return 0


# --- the system ------------------------------------------------------------------------------------------

KVM_GET_MSR_INDEX_LIST = IOWR(0x02, kvm_msr_list, SYSTEM, gives_table(c_uint32, "nmsrs", "indices", tells=True))
KVM_GET_SUPPORTED_CPUID = IOWR(0x05, kvm_cpuid2, SYSTEM, gives_table(kvm_cpuid_entry2, "nent"))
KVM_GET_EMULATED_CPUID = IOWR(0x09, kvm_cpuid2, SYSTEM, gives_table(kvm_cpuid_entry2, "nent"))
KVM_GET_MSR_FEATURE_INDEX_LIST = IOWR(0x0A, kvm_msr_list, SYSTEM, gives_table(c_uint32, "nmsrs", "indices", tells=True))
KVM_X86_GET_MCE_CAP_SUPPORTED = IOR(0x9D, c_uint64, SYSTEM, Gives)
KVM_GET_MSRS = IOWR(0x88, kvm_msrs, SYSTEM | VCPU, GetMsrs)
KVM_GET_SUPPORTED_HV_CPUID = IOWR(0xC1, kvm_cpuid2, SYSTEM | VCPU, gives_table(kvm_cpuid_entry2, "nent"))

# --- a VM ------------------------------------------------------------------------------------------------

KVM_SET_NR_MMU_PAGES = IO(0x44, VM, Number)
KVM_GET_NR_MMU_PAGES = IO(0x45, VM, Value)
KVM_SET_TSS_ADDR = IO(0x47, VM, Number)
KVM_SET_IDENTITY_MAP_ADDR = IOW(0x48, c_uint64, VM, Takes)
KVM_GET_IRQCHIP = IOWR(0x62, kvm_irqchip, VM, fields("chip_id", gives="*"))
KVM_SET_IRQCHIP = IOR(0x63, kvm_irqchip, VM, Takes)
KVM_CREATE_PIT = IO(0x64, VM, Nothing)
KVM_GET_PIT = IOWR(0x65, kvm_pit_state, VM, Gives)
KVM_SET_PIT = IOR(0x66, kvm_pit_state, VM, Takes)
KVM_IRQ_LINE_STATUS = IOWR(0x67, kvm_irq_level, VM, fields("irq", "level", gives="status"))
KVM_REINJECT_CONTROL = IO(0x71, VM, fields("pit_reinject", structure=kvm_reinject_control))
KVM_CREATE_PIT2 = IOW(0x77, kvm_pit_config, VM, fields("flags"))
KVM_SET_BOOT_CPU_ID = IO(0x78, VM, Number)
KVM_XEN_HVM_CONFIG = IOW(0x7A, kvm_xen_hvm_config, VM, Takes)
KVM_SET_CLOCK = IOW(0x7B, kvm_clock_data, VM, Takes)
KVM_GET_CLOCK = IOR(0x7C, kvm_clock_data, VM, Gives)
KVM_GET_PIT2 = IOR(0x9F, kvm_pit_state2, VM, Gives)
KVM_SET_PIT2 = IOW(0xA0, kvm_pit_state2, VM, Takes)
KVM_SET_PMU_EVENT_FILTER = IOW(0xB2, kvm_pmu_event_filter, VM, PmuEventFilter)
KVM_HYPERV_EVENTFD = IOW(0xBD, kvm_hyperv_eventfd, VM, fields("conn_id", "fd", "flags"))
KVM_X86_SET_MSR_FILTER = IOW(0xC6, kvm_msr_filter, VM, MsrFilter)
KVM_XEN_HVM_GET_ATTR = IOWR(0xC8, kvm_xen_hvm_attr, VM, fields("type", gives="*"))
KVM_XEN_HVM_SET_ATTR = IOW(0xC9, kvm_xen_hvm_attr, VM, Takes)
KVM_XEN_HVM_EVTCHN_SEND = IOW(0xD0, kvm_irq_routing_xen_evtchn, VM, Takes)

# --- a vCPU ----------------------------------------------------------------------------------------------

KVM_SET_TSC_KHZ = IO(0xA2, VM | VCPU, Number)
KVM_GET_TSC_KHZ = IO(0xA3, VM | VCPU, Value)
KVM_GET_REGS = IOR(0x81, kvm_regs, VCPU, Gives)
KVM_SET_REGS = IOW(0x82, kvm_regs, VCPU, Takes)
KVM_GET_SREGS = IOR(0x83, kvm_sregs, VCPU, Gives)
KVM_SET_SREGS = IOW(0x84, kvm_sregs, VCPU, Takes)
KVM_SET_MSRS = IOW(0x89, kvm_msrs, VCPU, SetMsrs)
KVM_SET_CPUID = IOW(0x8A, kvm_cpuid, VCPU, takes_table(kvm_cpuid_entry, "nent", most=(256, errno.E2BIG)))
KVM_GET_FPU = IOR(0x8C, kvm_fpu, VCPU, Gives)
KVM_SET_FPU = IOW(0x8D, kvm_fpu, VCPU, Takes)
KVM_GET_LAPIC = IOR(0x8E, kvm_lapic_state, VCPU, Gives)
KVM_SET_LAPIC = IOW(0x8F, kvm_lapic_state, VCPU, Takes)
KVM_SET_CPUID2 = IOW(0x90, kvm_cpuid2, VCPU, takes_table(kvm_cpuid_entry2, "nent", most=(256, errno.E2BIG)))
KVM_GET_CPUID2 = IOWR(0x91, kvm_cpuid2, VCPU, gives_table(kvm_cpuid_entry2, "nent"))
KVM_TPR_ACCESS_REPORTING = IOWR(0x92, kvm_tpr_access_ctl, VCPU, fields("enabled", "flags"))
KVM_SET_VAPIC_ADDR = IOW(0x93, kvm_vapic_addr, VCPU, fields("vapic_addr"))
KVM_NMI = IO(0x9A, VCPU, Nothing)
KVM_SET_GUEST_DEBUG = IOW(0x9B, kvm_guest_debug, VCPU, Takes)
KVM_X86_SETUP_MCE = IOW(0x9C, c_uint64, VCPU, Takes)
KVM_X86_SET_MCE = IOW(0x9E, kvm_x86_mce, VCPU, Takes)
KVM_GET_VCPU_EVENTS = IOR(0x9F, kvm_vcpu_events, VCPU, Gives)
KVM_SET_VCPU_EVENTS = IOW(0xA0, kvm_vcpu_events, VCPU, Takes)
KVM_GET_DEBUGREGS = IOR(0xA1, kvm_debugregs, VCPU, Gives)
KVM_SET_DEBUGREGS = IOW(0xA2, kvm_debugregs, VCPU, Takes)
KVM_GET_XSAVE = IOR(0xA4, kvm_xsave, VCPU, Gives)
KVM_SET_XSAVE = IOW(0xA5, kvm_xsave, VCPU, Takes)
KVM_GET_XCRS = IOR(0xA6, kvm_xcrs, VCPU, Gives)
KVM_SET_XCRS = IOW(0xA7, kvm_xcrs, VCPU, Takes)
KVM_KVMCLOCK_CTRL = IO(0xAD, VCPU, Nothing)
KVM_SMI = IO(0xB7, VCPU, Nothing)
KVM_GET_NESTED_STATE = IOWR(0xBE, kvm_nested_state, VCPU, GetNestedState)
KVM_SET_NESTED_STATE = IOW(0xBF, kvm_nested_state, VCPU, Takes)
KVM_XEN_VCPU_GET_ATTR = IOWR(0xCA, kvm_xen_vcpu_attr, VCPU, fields("type", gives="*"))
KVM_XEN_VCPU_SET_ATTR = IOW(0xCB, kvm_xen_vcpu_attr, VCPU, Takes)
KVM_GET_SREGS2 = IOR(0xCC, kvm_sregs2, VCPU, Gives)
KVM_SET_SREGS2 = IOW(0xCD, kvm_sregs2, VCPU, Takes)
KVM_GET_XSAVE2 = IOR(0xCF, kvm_xsave, VCPU, GivesXsave)

#: The requests that x86 adds, by name.
X86_REQUESTS = requests_in(globals())
