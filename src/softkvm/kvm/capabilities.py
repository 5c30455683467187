# SPDX-License-Identifier: Apache-2.0
"""The capabilities that every architecture's KVM reports; the table of an architecture goes on from it."""

from __future__ import annotations

import errno
import os
from typing import Final

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.kvm.memory.dirty_ring import KVM_DIRTY_RING_MAX_BYTES
from softkvm.kvm.memory.memslots import KVM_ADDRESS_SPACE_NUM, KVM_USER_MEM_SLOTS

#: As Linux is configured by default (CONFIG_KVM_MAX_NR_VCPUS), and its highest id plus one (KVM_VCPU_ID_RATIO).
KVM_MAX_VCPUS: Final = 1024
KVM_MAX_VCPU_IDS: Final = 4 * KVM_MAX_VCPUS
VCPU_IDS: Final = Size("ids of vCPUs", KVM_MAX_VCPU_IDS, errno.EINVAL, where=__name__)
#: Routes of one VM, and so the most pins that userspace's interrupt controllers can have.
KVM_MAX_IRQ_ROUTES: Final = 4096

GENERAL_CAPABILITIES: Final[dict[int, int]] = {
    abi.KVM_CAP_IRQCHIP: 1,
    abi.KVM_CAP_USER_MEMORY: 1,
    abi.KVM_CAP_NR_VCPUS: min(os.sysconf("SC_NPROCESSORS_ONLN"), KVM_MAX_VCPUS),  # recommended: one a processor
    abi.KVM_CAP_MAX_VCPUS: KVM_MAX_VCPUS,
    abi.KVM_CAP_MAX_VCPU_ID: KVM_MAX_VCPU_IDS,
    abi.KVM_CAP_NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
    abi.KVM_CAP_MULTI_ADDRESS_SPACE: KVM_ADDRESS_SPACE_NUM,
    abi.KVM_CAP_COALESCED_MMIO: abi.KVM_COALESCED_MMIO_PAGE_OFFSET,
    abi.KVM_CAP_COALESCED_PIO: 1,
    abi.KVM_CAP_BINARY_STATS_FD: 1,
    abi.KVM_CAP_MP_STATE: 1,
    abi.KVM_CAP_SYNC_MMU: 1,
    abi.KVM_CAP_DESTROY_MEMORY_REGION_WORKS: 1,
    abi.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: 1,
    abi.KVM_CAP_IRQ_ROUTING: KVM_MAX_IRQ_ROUTES,
    abi.KVM_CAP_SIGNAL_MSI: 1,
    abi.KVM_CAP_INTERNAL_ERROR_DATA: 1,
    abi.KVM_CAP_SYSTEM_EVENT_DATA: 1,
    abi.KVM_CAP_DEVICE_CTRL: 1,
    abi.KVM_CAP_READONLY_MEM: 1,
    abi.KVM_CAP_IMMEDIATE_EXIT: 1,
    abi.KVM_CAP_ENABLE_CAP_VM: 1,
    abi.KVM_CAP_CHECK_EXTENSION_VM: 1,
    abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: (abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | abi.KVM_DIRTY_LOG_INITIALLY_SET),
    abi.KVM_CAP_DIRTY_LOG_RING: KVM_DIRTY_RING_MAX_BYTES,
    abi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: KVM_DIRTY_RING_MAX_BYTES,
    abi.KVM_CAP_HALT_POLL: 1,
    abi.KVM_CAP_IRQFD: 1,
    abi.KVM_CAP_IRQFD_RESAMPLE: 1,
    abi.KVM_CAP_IOEVENTFD: 1,
    abi.KVM_CAP_IOEVENTFD_NO_LENGTH: 1,
    abi.KVM_CAP_IOEVENTFD_ANY_LENGTH: 1,
}
