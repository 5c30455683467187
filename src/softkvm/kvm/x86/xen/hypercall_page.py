# SPDX-License-Identifier: Apache-2.0
"""KVM_XEN_HVM_CONFIG, and the MSR that it names: a guest writes there where it wants its hypercall page.

KVM fills the page with what it intercepts, or with one that userspace brought along (the form before
KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL). As from Linux 6.15 on, and in the stable kernels since, the host's writes of the
MSR place nothing.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.guest_memory import write_guest
from softkvm.kvm.memory.pages import PAGE_SIZE
from softkvm.kvm.x86.xen.shared_info import set_long_mode

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.xen.state import XenVm

_PERMITTED: Final = (
    abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
    | abi.KVM_XEN_HVM_CONFIG_EVTCHN_SEND
    | abi.KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE
)
_ENTRY_SIZE: Final = 32


def check_config(config: abi.kvm_xen_hvm_config) -> None:
    """Raise EINVAL for unknown flags, and for pages of userspace's where KVM makes the page."""
    if config.flags & ~_PERMITTED:
        raise kvm_error(errno.EINVAL, f"flags={config.flags:#x}, expected INTERCEPT_HCALL, EVTCHN_SEND, TSC_UNSTABLE")
    blobs = (config.blob_addr_32, config.blob_addr_64, config.blob_size_32, config.blob_size_64)
    if config.flags & abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL and any(blobs):
        raise kvm_error(errno.EINVAL, "KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL: the hypercall page is KVM's, without a blob")


def write_msr(vcpu: Vcpu, index: int, data: int) -> bool:
    """WRMSR by the guest of the MSR that places the page; False if it is refused: filtered, or for #GP.

    EFAULT of KVM_RUN where userspace's page is not there.
    """
    if vcpu.msr_filter is not None and not vcpu.msr_filter.allows(index, abi.KVM_MSR_FILTER_WRITE):
        return False
    xen = vcpu.vm.xen
    number, gpa = data & PAGE_SIZE - 1, data & -PAGE_SIZE
    long_mode = bool(vcpu.efer & abi.EFER_LMA)
    with xen.lock:
        if long_mode != xen.long_mode and not set_long_mode(vcpu.vm, long_mode):
            return False
        page = _own_page(number) if xen.intercepts_hypercalls else _userspaces_page(xen, number)
    return page is not None and write_guest(vcpu.vm, gpa, page)


def _own_page(number: int) -> bytes | None:
    """Return the one page: for each hypercall ``mov eax, number``, VMMCALL, RET, and INT3 up to the next."""
    if number:
        return None
    entries = (b"\xb8" + n.to_bytes(4, "little") + b"\x0f\x01\xd9\xc3" for n in range(PAGE_SIZE // _ENTRY_SIZE))
    return b"".join(entry.ljust(_ENTRY_SIZE, b"\xcc") for entry in entries)


def _userspaces_page(xen: XenVm, number: int) -> bytes | None:
    config = xen.config
    size = config.blob_size_64 if xen.long_mode else config.blob_size_32
    address = config.blob_addr_64 if xen.long_mode else config.blob_addr_32
    if number >= size:
        return None
    address = address + number * PAGE_SIZE & (1 << 64) - 1
    try:
        return _softcpu.read_memory(address, PAGE_SIZE)
    except (OSError, OverflowError):
        raise kvm_error(errno.EFAULT, f"the page at {address:#x} of KVM_XEN_HVM_CONFIG is not there") from None
