# SPDX-License-Identifier: Apache-2.0
"""KVM, the hypervisor, in Python: what Linux has in ``virt/kvm`` and ``arch/x86/kvm``, with the kernel's names.

It runs guests on the software CPU (:mod:`softkvm._softcpu`) through VMCB and VMRUN, and is driven through the
classes of :mod:`softkvm.api`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from softkvm.kvm.params import Params

if TYPE_CHECKING:
    from softkvm.kvm.x86.system import Kvm
    from softkvm.kvm.x86.trace import TRACEPOINTS
    from softkvm.kvm.x86.vcpu_ioctls import VcpuIoctls as Vcpu
    from softkvm.kvm.x86.vm import Vm

__all__ = ["TRACEPOINTS", "Kvm", "Params", "Vcpu", "Vm"]

#: Loaded when they are asked for: who wants parameters alone, as every start of a client, waits for nothing else.
_CLASSES: Final = {
    "Kvm": ("softkvm.kvm.x86.system", "Kvm"),
    "Vcpu": ("softkvm.kvm.x86.vcpu_ioctls", "VcpuIoctls"),
    "Vm": ("softkvm.kvm.x86.vm", "Vm"),
    "TRACEPOINTS": ("softkvm.kvm.x86.trace", "TRACEPOINTS"),
}


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _CLASSES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value
