# SPDX-License-Identifier: Apache-2.0
"""The files that a client's descriptors are of, and how long what is behind them lives.

As the kernel has it: a VM is there until its own file and those of all its vCPUs are closed. A file is closed when the
client's open file description is gone (``cpu/python/src/client/files.rs``), which a mapping keeps as a descriptor does.
"""

from __future__ import annotations

import os
from typing import Any

from softkvm import _softcpu, abi
from softkvm.client import dispatch


class File:
    """An open file of the KVM API; the class is the system's."""

    kind = abi.File.SYSTEM

    def __init__(self, object: Any) -> None:
        self.object = object
        self.name = self.kind.name or ""

    def open(self, fd: int, *, cloexec: bool = True) -> int:
        """Make the client's descriptor of a memfd, ``fd``."""
        return _softcpu.client_file(self, fd, cloexec)

    def ioctl(self, request: int, argument: int) -> int:
        """Do a request; raises OSError."""
        return dispatch.serve(self.object, self.kind, request, argument)[2]

    def release(self) -> None:
        """The client has closed it."""
        self.object.close()


def open_memfd(file: File, name: str, *, cloexec: bool = True) -> int:
    """Make the client's descriptor of a file that has no contents."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        return file.open(fd, cloexec=cloexec)
    finally:
        os.close(fd)


class SystemFile(File):
    """``/dev/kvm``."""

    def ioctl(self, request: int, argument: int) -> int:
        """KVM_CREATE_VM makes a file; the others are the table's."""
        if request == abi.KVM_CREATE_VM:
            return open_memfd(VmFile(self.object.create_vm(argument)), "kvm-vm")
        return super().ioctl(request, argument)


class VmFile(File):
    """A virtual machine."""

    kind = abi.File.VM

    def __init__(self, vm: Any) -> None:
        super().__init__(vm)
        self._users = 1

    def ioctl(self, request: int, argument: int) -> int:
        """KVM_CREATE_VCPU makes a file; the others are the table's."""
        if request == abi.KVM_CREATE_VCPU:
            vcpu = self.object.create_vcpu(argument)
            self._users += 1
            return VcpuFile(vcpu, self).open(vcpu.shared_fd)
        return super().ioctl(request, argument)

    def release(self) -> None:
        """One of those who need the VM is gone."""
        self._users -= 1
        if not self._users:
            self.object.close()


class VcpuFile(File):
    """A vCPU, which its descriptor has the shared pages of."""

    kind = abi.File.VCPU

    def __init__(self, vcpu: Any, vm: VmFile) -> None:
        super().__init__(vcpu)
        self._vm = vm
        self.run = vcpu.run

    def release(self) -> None:
        """The vCPU goes, and the VM may."""
        self.object.close()
        self._vm.release()
