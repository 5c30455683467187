# SPDX-License-Identifier: Apache-2.0
"""The userspace ABI of KVM: structures, request numbers, capabilities, exit reasons, paravirtual interface.

Names, fields, sizes and offsets are those of ``<linux/kvm.h>``, ``<asm/kvm.h>``, ``<asm/kvm_para.h>`` and
``<asm/processor-flags.h>`` for x86. This package re-exports all of its modules: a client writes
``abi.kvm_regs`` and ``abi.KVM_EXIT_MMIO``.
"""

from softkvm.abi._layout import flexible as flexible
from softkvm.abi.capabilities import *  # noqa: F403
from softkvm.abi.ioctl import *  # noqa: F403
from softkvm.abi.irq import *  # noqa: F403
from softkvm.abi.memory import *  # noqa: F403
from softkvm.abi.msr import *  # noqa: F403
from softkvm.abi.nested import *  # noqa: F403
from softkvm.abi.para import *  # noqa: F403
from softkvm.abi.processor_flags import *  # noqa: F403
from softkvm.abi.run import *  # noqa: F403
from softkvm.abi.x86 import *  # noqa: F403
