# SPDX-License-Identifier: Apache-2.0
"""The system descriptor: ``/dev/kvm``."""

from __future__ import annotations

import errno
import os
from typing import cast

from softkvm import abi, api
from softkvm.devkvm.ioctl import Descriptor, add_requests, call
from softkvm.devkvm.vm import Vm


class Kvm(Descriptor):
    """:class:`softkvm.api.Kvm` on a device file."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open *path*. Raises OSError: of ``open()``; ENOTTY if it is no KVM; ENOTSUP for another API version."""
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        try:
            version = call(self.fd, abi.KVM_GET_API_VERSION)
        except OSError as error:
            self.close()
            raise OSError(error.errno, "not a KVM device", path) from None
        if version != abi.KVM_API_VERSION:
            self.close()
            message = f"KVM API version {version}, expected {abi.KVM_API_VERSION}"
            raise OSError(errno.ENOTSUP, message, path)

    def create_vm(self, type: int = 0) -> api.Vm:
        """KVM_CREATE_VM."""
        mmap_size = call(self.fd, abi.KVM_GET_VCPU_MMAP_SIZE)
        return cast("api.Vm", Vm(call(self.fd, abi.KVM_CREATE_VM, type), mmap_size))


add_requests(Kvm, abi.File.SYSTEM, api.Kvm)
