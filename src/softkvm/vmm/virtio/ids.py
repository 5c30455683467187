# SPDX-License-Identifier: Apache-2.0
"""Virtio's numbers: device types (section 5), status (2.1), feature bits (6), flags of queues (2.7, 2.8)."""

from __future__ import annotations

from typing import Final

# device types
VIRTIO_ID_NET: Final = 1
VIRTIO_ID_BLOCK: Final = 2
VIRTIO_ID_CONSOLE: Final = 3
VIRTIO_ID_RNG: Final = 4
VIRTIO_ID_BALLOON: Final = 5
VIRTIO_ID_9P: Final = 9
VIRTIO_ID_VSOCK: Final = 19
VIRTIO_ID_FS: Final = 26

VIRTIO_VENDOR: Final = 0x1AF4
"""PCI vendor of virtio devices, and the subsystem's."""

# device status
ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
DEVICE_NEEDS_RESET: Final = 64
FAILED: Final = 128

# feature bits of queues and transports
VIRTIO_F_RING_INDIRECT_DESC: Final = 28
VIRTIO_F_RING_EVENT_IDX: Final = 29
VIRTIO_F_VERSION_1: Final = 32
VIRTIO_F_ACCESS_PLATFORM: Final = 33
VIRTIO_F_RING_PACKED: Final = 34
VIRTIO_F_IN_ORDER: Final = 35
VIRTIO_F_NOTIFICATION_DATA: Final = 38
VIRTIO_F_RING_RESET: Final = 40

# descriptors, of either ring
VIRTQ_DESC_F_NEXT: Final = 1
VIRTQ_DESC_F_WRITE: Final = 2
VIRTQ_DESC_F_INDIRECT: Final = 4
VIRTQ_DESC_F_AVAIL: Final = 1 << 7
VIRTQ_DESC_F_USED: Final = 1 << 15

# split rings
VIRTQ_AVAIL_F_NO_INTERRUPT: Final = 1
VIRTQ_USED_F_NO_NOTIFY: Final = 1

# packed rings: event suppression
RING_EVENT_FLAGS_ENABLE: Final = 0
RING_EVENT_FLAGS_DISABLE: Final = 1
RING_EVENT_FLAGS_DESC: Final = 2

# interrupt status: ISR of PCI, InterruptStatus of MMIO
INTERRUPT_QUEUE: Final = 1
INTERRUPT_CONFIG: Final = 2

QUEUE_SIZE_MAX: Final = 32768


def bit(*features: int) -> int:
    """Return the mask of feature bits."""
    return sum(1 << feature for feature in features)
