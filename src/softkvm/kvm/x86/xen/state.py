# SPDX-License-Identifier: Apache-2.0
"""State of Xen's interfaces: a VM's (``struct kvm_xen``) and a vCPU's (``struct kvm_vcpu_xen``). Data.

What happens to it is in the modules that take it.
"""

from __future__ import annotations

import threading

from softkvm import abi


class XenVm:
    """One VM's; ``lock`` serialises changes, as requests and vCPUs' threads make some."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        #: What KVM_XEN_HVM_CONFIG said last. The rest is there once it has named an MSR.
        self.config = abi.kvm_xen_hvm_config()
        #: The guest's structures are those of 64-bit guests.
        self.long_mode = False

    @property
    def intercepts_hypercalls(self) -> bool:
        """Whether hypercalls are Xen's, and the page for them is KVM's."""
        return bool(self.config.msr and self.config.flags & abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL)
