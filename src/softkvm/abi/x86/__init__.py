# SPDX-License-Identifier: Apache-2.0
"""The ABI's x86 part: ``<asm/kvm.h>``, ``<asm/kvm_para.h>``, ``<asm/processor-flags.h>``, Hyper-V's TLFS, Xen."""

from softkvm.abi.x86.hyperv import *  # noqa: F403
from softkvm.abi.x86.irqchip import *  # noqa: F403
from softkvm.abi.x86.msr import *  # noqa: F403
from softkvm.abi.x86.nested import *  # noqa: F403
from softkvm.abi.x86.para import *  # noqa: F403
from softkvm.abi.x86.processor import *  # noqa: F403
from softkvm.abi.x86.processor_flags import *  # noqa: F403
from softkvm.abi.x86.requests import *  # noqa: F403
from softkvm.abi.x86.run import *  # noqa: F403
from softkvm.abi.x86.xen import *  # noqa: F403
