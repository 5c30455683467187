# SPDX-License-Identifier: Apache-2.0
"""The userspace ABI of KVM: structures, requests, capabilities, exit reasons, paravirtual interface.

Names, fields, sizes and offsets are those of ``<linux/kvm.h>`` here and of an architecture's headers in its folder.
This package re-exports all of its modules, with x86 for the architecture: a client writes ``abi.kvm_regs`` and
``abi.KVM_EXIT_MMIO``.
"""

from softkvm.abi._layout import flexible as flexible
from softkvm.abi.capabilities import *  # noqa: F403
from softkvm.abi.device import *  # noqa: F403
from softkvm.abi.irq import *  # noqa: F403
from softkvm.abi.memory import *  # noqa: F403
from softkvm.abi.methods import check_requests as check_requests
from softkvm.abi.one_reg import *  # noqa: F403
from softkvm.abi.requests import *  # noqa: F403
from softkvm.abi.run import *  # noqa: F403
from softkvm.abi.stats import *  # noqa: F403
from softkvm.abi.vcpu import *  # noqa: F403
from softkvm.abi.x86 import *  # noqa: F403


def requests_of(file: File) -> dict[str, Request]:  # noqa: F405
    """Return the requests on a file, by name."""
    return {name: request for name, request in (REQUESTS | X86_REQUESTS).items() if request.files & file}  # noqa: F405
