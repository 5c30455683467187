# SPDX-License-Identifier: Apache-2.0
"""A vCPU descriptor."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from threading import get_native_id
from typing import Any

from softkvm import abi
from softkvm.devkvm.ioctl import (
    Descriptor,
    enable_cap,
    get,
    get_cpuid,
    get_msrs,
    ioctl_pointer,
    ioctl_value,
)
from softkvm.devkvm.kick import install_handler, signal_thread
from softkvm.devkvm.stats import read_stats

_IMMEDIATE_EXIT = abi.kvm_run.immediate_exit.offset  # type: ignore[attr-defined]


class Vcpu(Descriptor):
    """:class:`softkvm.api.Vcpu` on a descriptor of KVM_CREATE_VCPU."""

    def __init__(self, fd: int, mmap_size: int) -> None:
        super().__init__(fd)
        self._lock = threading.Lock()
        install_handler()
        self._map = mmap.mmap(fd, mmap_size)
        self.shared = memoryview(self._map)
        self.kvm_run = abi.kvm_run.from_buffer(self._map)
        libc = ctypes.CDLL(None, use_errno=True)
        self._ioctl = libc.ioctl
        self._ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
        self._kicked = False
        self._immediate_exit = 0  # the client's own value while a kick occupies the field
        self._native_id = 0  # the thread that is in run(), or 0

    def run(self) -> None:
        self._native_id = get_native_id()
        result = self._ioctl(self.fd, abi.KVM_RUN, 0)
        self._native_id = 0
        if result < 0:
            self._run_failed(ctypes.get_errno())

    def _run_failed(self, error: int) -> None:
        """Take back a kick's immediate_exit, then raise the error of KVM_RUN."""
        if error == errno.EINTR:
            with self._lock:
                if self._kicked:
                    self._kicked = False
                    self.shared[_IMMEDIATE_EXIT] = self._immediate_exit
        raise OSError(error, os.strerror(error))

    def kick(self) -> None:
        with self._lock:
            if self.fd < 0:  # closed: there is nobody to end
                return
            if not self._kicked:
                self._kicked = True
                self._immediate_exit = self.shared[_IMMEDIATE_EXIT]
            # immediate_exit catches a thread that is on its way into the kernel, the signal one that is inside
            self.shared[_IMMEDIATE_EXIT] = 1
            native_id = self._native_id
            if native_id:
                signal_thread(native_id)

    def close(self) -> None:
        with self._lock:
            super().close()
            if hasattr(self, "kvm_run"):
                del self.kvm_run
                self.shared.release()

    def stats(self) -> dict[str, int]:
        """KVM_GET_STATS_FD: the kernel's counters for this vCPU, by the kernel's names."""
        return read_stats(self.fd)

    def get_regs(self) -> abi.kvm_regs:
        return get(self.fd, abi.KVM_GET_REGS, abi.kvm_regs)

    def set_regs(self, regs: abi.kvm_regs) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_REGS, regs)

    def get_sregs(self) -> abi.kvm_sregs:
        return get(self.fd, abi.KVM_GET_SREGS, abi.kvm_sregs)

    def set_sregs(self, sregs: abi.kvm_sregs) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_SREGS, sregs)

    def get_sregs2(self) -> abi.kvm_sregs2:
        return get(self.fd, abi.KVM_GET_SREGS2, abi.kvm_sregs2)

    def set_sregs2(self, sregs: abi.kvm_sregs2) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_SREGS2, sregs)

    def get_fpu(self) -> abi.kvm_fpu:
        return get(self.fd, abi.KVM_GET_FPU, abi.kvm_fpu)

    def set_fpu(self, fpu: abi.kvm_fpu) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_FPU, fpu)

    def get_xsave(self) -> abi.kvm_xsave:
        return get(self.fd, abi.KVM_GET_XSAVE, abi.kvm_xsave)

    def set_xsave(self, xsave: abi.kvm_xsave) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_XSAVE, xsave)

    def get_xcrs(self) -> abi.kvm_xcrs:
        return get(self.fd, abi.KVM_GET_XCRS, abi.kvm_xcrs)

    def set_xcrs(self, xcrs: abi.kvm_xcrs) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_XCRS, xcrs)

    def get_msrs(self, indices: Sequence[int]) -> list[int]:
        return get_msrs(self.fd, indices)

    def set_msrs(self, msrs: Mapping[int, int]) -> int:
        table: Any = abi.flexible(abi.kvm_msrs, abi.kvm_msr_entry, len(msrs))(nmsrs=len(msrs))
        for entry, (index, data) in zip(table.entries, msrs.items(), strict=True):
            entry.index = index
            entry.data = data
        return ioctl_pointer(self.fd, abi.KVM_SET_MSRS, table)

    def x86_setup_mce(self, mcg_cap: int) -> None:
        ioctl_pointer(self.fd, abi.KVM_X86_SETUP_MCE, ctypes.c_uint64(mcg_cap))

    def x86_set_mce(self, event: abi.kvm_x86_mce) -> None:
        ioctl_pointer(self.fd, abi.KVM_X86_SET_MCE, event)

    def get_lapic(self) -> abi.kvm_lapic_state:
        return get(self.fd, abi.KVM_GET_LAPIC, abi.kvm_lapic_state)

    def set_lapic(self, lapic: abi.kvm_lapic_state) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_LAPIC, lapic)

    def get_mp_state(self) -> abi.kvm_mp_state:
        return get(self.fd, abi.KVM_GET_MP_STATE, abi.kvm_mp_state)

    def set_mp_state(self, state: abi.kvm_mp_state) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_MP_STATE, state)

    def get_vcpu_events(self) -> abi.kvm_vcpu_events:
        return get(self.fd, abi.KVM_GET_VCPU_EVENTS, abi.kvm_vcpu_events)

    def set_vcpu_events(self, events: abi.kvm_vcpu_events) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_VCPU_EVENTS, events)

    def get_debugregs(self) -> abi.kvm_debugregs:
        return get(self.fd, abi.KVM_GET_DEBUGREGS, abi.kvm_debugregs)

    def set_debugregs(self, debugregs: abi.kvm_debugregs) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_DEBUGREGS, debugregs)

    def set_cpuid2(self, entries: Sequence[abi.kvm_cpuid_entry2]) -> None:
        count = len(entries)
        table: Any = abi.flexible(abi.kvm_cpuid2, abi.kvm_cpuid_entry2, count)(nent=count)
        table.entries[:] = entries
        ioctl_pointer(self.fd, abi.KVM_SET_CPUID2, table)

    def get_cpuid2(self) -> list[abi.kvm_cpuid_entry2]:
        return get_cpuid(self.fd, abi.KVM_GET_CPUID2)

    def interrupt(self, irq: int) -> None:
        ioctl_pointer(self.fd, abi.KVM_INTERRUPT, abi.kvm_interrupt(irq=irq))

    def nmi(self) -> None:
        ioctl_value(self.fd, abi.KVM_NMI)

    def smi(self) -> None:
        ioctl_value(self.fd, abi.KVM_SMI)

    def set_guest_debug(self, debug: abi.kvm_guest_debug) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_GUEST_DEBUG, debug)

    def translate(self, linear_address: int) -> abi.kvm_translation:
        translation = abi.kvm_translation(linear_address=linear_address)
        ioctl_pointer(self.fd, abi.KVM_TRANSLATE, translation)
        return translation

    def set_tsc_khz(self, khz: int) -> None:
        ioctl_value(self.fd, abi.KVM_SET_TSC_KHZ, khz)

    def get_tsc_khz(self) -> int:
        return ioctl_value(self.fd, abi.KVM_GET_TSC_KHZ)

    def kvmclock_ctrl(self) -> None:
        ioctl_value(self.fd, abi.KVM_KVMCLOCK_CTRL)

    def enable_cap(self, cap: int, *args: int) -> None:
        enable_cap(self.fd, cap, args)

    def set_signal_mask(self, sigset: bytes | None) -> None:
        if sigset is None:
            ioctl_value(self.fd, abi.KVM_SET_SIGNAL_MASK)
            return
        size = len(sigset)
        mask: Any = abi.flexible(abi.kvm_signal_mask, ctypes.c_uint8, size, "sigset")(len=size)
        mask.sigset[:] = sigset
        ioctl_pointer(self.fd, abi.KVM_SET_SIGNAL_MASK, mask)
