# SPDX-License-Identifier: Apache-2.0
"""KVM, the hypervisor, in Python: what Linux has in ``virt/kvm`` and ``arch/x86/kvm``, with the kernel's names.

It runs guests on the software CPU (:mod:`softkvm._softcpu`) through VMCB and VMRUN, and is driven through the
classes of :mod:`softkvm.api`.
"""

from __future__ import annotations

from softkvm.kvm.params import Params
from softkvm.kvm.x86.system import Kvm
from softkvm.kvm.x86.vcpu_ioctls import VcpuIoctls as Vcpu
from softkvm.kvm.x86.vm import Vm

__all__ = ["Kvm", "Params", "Vcpu", "Vm"]
