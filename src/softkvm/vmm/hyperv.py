# SPDX-License-Identifier: Apache-2.0
"""A machine that is a partition of Hyper-V's for its guest: CPUID leaves, and what KVM leaves to us (TLFS; KVM API, 5).

KVM has the clocks, timers, interrupts and flushes; ports of messages and events are whose device they belong to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from ctypes import sizeof
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from softkvm import abi, api
from softkvm.abi.sizes import Size
from softkvm.vmm.errors import MachineError

if TYPE_CHECKING:
    from softkvm.vmm.memory import GuestMemory

_PAYLOAD: Final = Size(
    "payload_size of HVCALL_POST_MESSAGE",
    abi.HV_MESSAGE_PAYLOAD_BYTE_COUNT,
    None,
    giver="guest",
    effect="HV_STATUS_INVALID_HYPERCALL_INPUT",
    where=__name__,
)

#: Where KVM's own leaves are while Hyper-V's have their place.
KVM_LEAVES: Final = 0x40000100

#: What a guest has no use for here: the debugger, nested virtualization, and calls that need a root partition.
_LEFT_OUT: Final = (
    abi.HYPERV_CPUID_SYNDBG_VENDOR_AND_MAX_FUNCTIONS,
    abi.HYPERV_CPUID_SYNDBG_INTERFACE,
    abi.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES,
    abi.HYPERV_CPUID_NESTED_FEATURES,
)
#: A guest that may ask for the invariant TSC takes that for its clock, in place of the page that goes on elsewhere.
_NO_MSRS: Final = abi.HV_ACCESS_TSC_INVARIANT
_NO_CALLS: Final = abi.HV_DEBUGGING | abi.HV_ENABLE_EXTENDED_HYPERCALLS
_NO_FEATURES: Final = abi.HV_X64_GUEST_DEBUGGING_AVAILABLE | abi.HV_FEATURE_DEBUG_MSRS_AVAILABLE


def enable(vcpu: api.Vcpu, vm: api.Vm) -> None:
    """Let a vCPU have the interfaces that userspace asks for; MachineError if this KVM has none."""
    if not vm.check_extension(abi.KVM_CAP_HYPERV_CPUID):
        raise MachineError("this KVM has no Hyper-V interfaces (KVM_CAP_HYPERV_CPUID)")
    vcpu.enable_cap(abi.KVM_CAP_HYPERV_SYNIC2, 0)


def hyperv_cpuid(
    entries: Sequence[abi.kvm_cpuid_entry2], offered: Sequence[abi.kvm_cpuid_entry2], *, keep_kvm: bool = False
) -> list[abi.kvm_cpuid_entry2]:
    """Return *entries* with the leaves *offered* (KVM_GET_SUPPORTED_HV_CPUID) in place of KVM's own.

    KVM's move behind them with *keep_kvm*; a Linux that finds them there prefers them.
    """
    result = []
    for entry in entries:
        if entry.function in (abi.KVM_CPUID_SIGNATURE, abi.KVM_CPUID_FEATURES):
            if not keep_kvm:
                continue
            entry = abi.kvm_cpuid_entry2.from_buffer_copy(entry)
            entry.function += KVM_LEAVES - abi.KVM_CPUID_SIGNATURE
            if entry.function == KVM_LEAVES:
                entry.eax = KVM_LEAVES + abi.KVM_CPUID_FEATURES - abi.KVM_CPUID_SIGNATURE
        result.append(entry)
    ours = [abi.kvm_cpuid_entry2.from_buffer_copy(entry) for entry in offered if entry.function not in _LEFT_OUT]
    for entry in ours:
        if entry.function == abi.HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS:
            entry.eax = max(other.function for other in ours)
            vendor = abi.HYPERV_VENDOR
            entry.ebx, entry.ecx, entry.edx = (int.from_bytes(vendor[at : at + 4], "little") for at in (0, 4, 8))
        elif entry.function == abi.HYPERV_CPUID_FEATURES:
            entry.eax &= ~_NO_MSRS
            entry.ebx &= ~_NO_CALLS
            entry.edx &= ~_NO_FEATURES
    return result + ours


@dataclass(slots=True)
class SynicPages:
    """Where a virtual processor has its messages and event flags; 0: nowhere."""

    messages: int = 0
    events: int = 0


MessagePort = Callable[[abi.hv_post_message], int]
"""Takes a message that the guest posts; returns the hypercall's status."""
EventPort = Callable[[], int]
"""Takes an event that the guest signals; returns the hypercall's status."""


class Hyperv:
    """What KVM_EXIT_HYPERV is about: the SynICs' pages, and ports by the number of their connection."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._pages: dict[int, SynicPages] = {}
        self.message_ports: dict[int, MessagePort] = {}
        self.event_ports: dict[int, EventPort] = {}

    def pages(self, vp_index: int) -> SynicPages:
        """Return the pages of a virtual processor, as it has told of them."""
        return self._pages.get(vp_index, SynicPages())

    def reset(self) -> None:
        """No virtual processor has told of any page."""
        self._pages.clear()

    def save(self) -> dict[str, Any]:
        """Where the SynICs' pages are. Ports belong to their devices."""
        return {"pages": [[index, pages.messages, pages.events] for index, pages in sorted(self._pages.items())]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._pages = {index: SynicPages(messages, events) for index, messages, events in state["pages"]}

    def handle(self, vp_index: int, exit: abi.kvm_hyperv_exit) -> None:
        """Act on an exit of a virtual processor; the answer to a hypercall goes into *exit*."""
        if exit.type == abi.KVM_EXIT_HYPERV_SYNIC:
            synic = exit.u.synic
            on = synic.control & abi.HV_SYNIC_CONTROL_ENABLE
            self._pages[vp_index] = SynicPages(
                synic.msg_page & ~0xFFF if on and synic.msg_page & abi.HV_SYNIC_SIMP_ENABLE else 0,
                synic.evt_page & ~0xFFF if on and synic.evt_page & abi.HV_SYNIC_SIEFP_ENABLE else 0,
            )
        elif exit.type == abi.KVM_EXIT_HYPERV_HCALL:
            call = exit.u.hcall
            code = call.input & 0xFFFF
            if code == abi.HVCALL_POST_MESSAGE:
                call.result = self._post_message(call.input, call.params[0])
            elif code == abi.HVCALL_SIGNAL_EVENT:
                call.result = self._signal_event(call.params[0])
            else:
                call.result = abi.HV_STATUS_INVALID_HYPERCALL_CODE

    def _post_message(self, control: int, gpa: int) -> int:
        if control & abi.HV_HYPERCALL_FAST_BIT:
            return abi.HV_STATUS_INVALID_HYPERCALL_INPUT
        if gpa & 7:
            return abi.HV_STATUS_INVALID_ALIGNMENT
        with contextlib.suppress(IndexError):
            message = abi.hv_post_message.from_buffer_copy(self._memory.read(gpa, sizeof(abi.hv_post_message)))
            if not _PAYLOAD.allows(message.payload_size):
                return abi.HV_STATUS_INVALID_HYPERCALL_INPUT
            port = self.message_ports.get(message.connection_id & abi.KVM_HYPERV_CONN_ID_MASK)
            return abi.HV_STATUS_INVALID_CONNECTION_ID if port is None else port(message)
        return abi.HV_STATUS_INSUFFICIENT_MEMORY

    def _signal_event(self, connection: int) -> int:
        """KVM has read the number, wherever the guest had it."""
        port = self.event_ports.get(connection & abi.KVM_HYPERV_CONN_ID_MASK)
        return abi.HV_STATUS_INVALID_CONNECTION_ID if port is None else port()
