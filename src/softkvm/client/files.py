# SPDX-License-Identifier: Apache-2.0
"""The files that a client's descriptors are of, and how long what is behind them lives.

As the kernel has it: a VM is there until its own file and those of all its vCPUs are closed. A file is closed when the
client's open file description is gone (``cpu/python/src/client/files.rs``), which a mapping keeps as a descriptor does.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Sequence
from typing import Any

from softkvm import _softcpu, abi
from softkvm.client import dispatch
from softkvm.client.trace import Recorder
from softkvm.kvm import procfs

_numbers = itertools.count()
_vms: set[Any] = set()


def unmapping(address: int, size: int) -> None:
    """Memory of the client's is about to go: take it from the VMs that have it."""
    # Not by tuple(): the garbage that its allocation may collect runs code, and another thread makes a VM meanwhile.
    for vm in _vms.copy():
        vm.host_unmapped(address, size)


class File:
    """An open file of the KVM API."""

    kind: abi.File
    nature: int
    """What its descriptors are to the client: ``KIND_*`` of ``client/src/lib.rs``."""
    name: str

    def __init__(self, object: Any, recorder: Recorder | None) -> None:
        self.object = object
        self.services = dispatch.services(self.kind)
        self.recorder = recorder
        if recorder is not None:
            self.ioctl = self.recorded_ioctl  # type: ignore[method-assign]

    #: The errno of a request that its kind has not: as the kernel has it, that is not the same for all.
    unknown = errno.ENOTTY
    #: How the client's descriptor is open.
    access = os.O_RDWR

    def open(self, fd: int, flags: int | None = None) -> int:
        """Make the client's descriptor of a memfd, ``fd``; with its own flags of open(), or these.

        If there can be none the client has never had the file, and it is released.
        """
        flags = self.access | os.O_CLOEXEC if flags is None else flags
        try:
            return _softcpu.client_file(self, fd, flags, procfs.directory())
        except OSError:
            self.release()
            raise

    def ioctl(self, request: int, argument: int) -> int:
        """Do a request; raises OSError."""
        make = self.makers.get(request)
        if make is not None:
            value: int = make(self, argument)
            return value
        return dispatch.serve(self.object, self.services, request, argument, self.unknown)[1]

    #: What requests for new files do; the others are the table's.
    makers: dict[int, Any] = {}

    def recorded_ioctl(self, request: int, argument: int) -> int:
        """Do a request and note it."""
        recorder = self.recorder
        assert recorder is not None
        name = dispatch.request_name(request)
        args: Sequence[Any] = ()
        try:
            make = self.makers.get(request)
            if make is not None:
                args = (argument,)
                value: int = make(self, argument)
                recorder.done(self.name, name, args, value)
                return value
            args = dispatch.arguments(self.services, request, argument)
            result, value = dispatch.serve(self.object, self.services, request, argument, self.unknown)
        except OSError as error:
            recorder.failed(self.name, name, args, error)
            raise
        recorder.done(self.name, name, args, value, result)
        return value

    def release(self) -> None:
        """The client has closed it."""
        self.object.close()


def open_memfd(file: File, name: str, flags: int | None = None) -> int:
    """Make the client's descriptor of a file that has no contents; see :meth:`File.open`."""
    try:
        fd = _softcpu.own_descriptor(os.memfd_create(name, os.MFD_CLOEXEC))
    except OSError:
        file.release()
        raise
    try:
        return file.open(fd, flags)
    finally:
        _softcpu.close_own_descriptor(fd)


class SystemFile(File):
    """``/dev/kvm``."""

    kind = abi.File.SYSTEM
    nature = 1
    unknown = errno.EINVAL
    name = "kvm"

    def create_vm(self, argument: int) -> int:
        """KVM_CREATE_VM."""
        return open_memfd(VmFile(self.object.create_vm(argument), self.recorder), "kvm-vm")

    makers = {abi.KVM_CREATE_VM: create_vm}


class VmFile(File):
    """A virtual machine."""

    kind = abi.File.VM
    nature = 2

    def __init__(self, vm: Any, recorder: Recorder | None) -> None:
        super().__init__(vm, recorder)
        self.name = f"vm{next(_numbers)}"
        self._users = 1
        _softcpu.client_guest(vm.machine.has_region_function, True)
        _vms.add(vm)

    def create_vcpu(self, argument: int) -> int:
        """KVM_CREATE_VCPU."""
        vcpu = self.object.create_vcpu(argument)
        self.use()
        return VcpuFile(vcpu, self).open(vcpu.shared_fd)

    def get_stats_fd(self, argument: int) -> int:
        """KVM_GET_STATS_FD."""
        return StatisticsFile(self.object, self).descriptor()

    def create_guest_memfd(self, argument: int) -> int:
        """KVM_CREATE_GUEST_MEMFD."""
        _, fd = dispatch.serve(self.object, self.services, abi.KVM_CREATE_GUEST_MEMFD, argument, self.unknown)
        try:
            return GuestMemfdFile(self.object, self.recorder).open(fd, os.O_RDWR)
        finally:
            _softcpu.close_own_descriptor(fd)

    makers = {
        abi.KVM_CREATE_VCPU: create_vcpu,
        abi.KVM_GET_STATS_FD: get_stats_fd,
        abi.KVM_CREATE_GUEST_MEMFD: create_guest_memfd,
    }

    def use(self) -> None:
        """One more needs the VM."""
        self._users += 1

    def release(self) -> None:
        """One of those who need the VM is gone."""
        self._users -= 1
        if not self._users:
            _vms.discard(self.object)
            _softcpu.client_guest(self.object.machine.has_region_function, False)
            self.object.close()


class VcpuFile(File):
    """A vCPU, which its descriptor has the shared pages of."""

    kind = abi.File.VCPU
    nature = 3
    unknown = errno.EINVAL

    def __init__(self, vcpu: Any, vm: VmFile) -> None:
        super().__init__(vcpu, vm.recorder)
        self.name = f"vcpu{vcpu.vcpu_id}"
        self._vm = vm
        self.run = vcpu.run if self.recorder is None else self.recorded_run

    def mapped(self, address: int, size: int, offset: int, protection: int, shared: bool) -> None:
        """The client has mapped the shared pages; raises what mmap() fails with."""
        self.object.shared_fd_mapped(address, size, offset, protection, shared=shared)

    def get_stats_fd(self, argument: int) -> int:
        """KVM_GET_STATS_FD."""
        return StatisticsFile(self.object, self._vm).descriptor()

    makers = {abi.KVM_GET_STATS_FD: get_stats_fd}

    def recorded_run(self) -> None:
        """KVM_RUN, noted."""
        recorder = self.recorder
        assert recorder is not None
        try:
            self.object.run()
        except OSError as error:
            recorder.failed(self.name, "KVM_RUN", (), error)
            raise
        recorder.done(self.name, "KVM_RUN", (), 0, run=self.object.kvm_run)

    def release(self) -> None:
        """The vCPU goes, and the VM may."""
        self.object.close()
        self._vm.release()


class GuestMemfdFile(File):
    """Memory for a VM's guest, which knows it by its inode: the descriptor is all that there is to it."""

    kind = abi.File(0)
    nature = 5
    name = "guest_memfd"

    def release(self) -> None:
        """Slots that have it keep it."""


class StatisticsFile(File):
    """The statistics of a VM or a vCPU, brought up to date before the client reads them."""

    kind = abi.File(0)
    nature = 4
    name = "statistics"
    access = os.O_RDONLY

    def __init__(self, object: Any, vm: VmFile) -> None:
        super().__init__(object, vm.recorder)
        self._fd = _softcpu.own_descriptor(object.get_stats_fd())
        self._vm = vm
        vm.use()

    def descriptor(self) -> int:
        """Make the client's descriptor."""
        return self.open(self._fd)

    def refresh(self) -> None:
        """The client is about to read."""
        self.object.refresh_stats_fd(self._fd)

    def release(self) -> None:
        """The file goes, and the VM may."""
        _softcpu.close_own_descriptor(self._fd)
        self._vm.release()
