# SPDX-License-Identifier: Apache-2.0
"""Virtio: queues, what all devices have in common, and the transports that show them to a guest.

Devices are ``vmm/devices/virtio_<name>.py``. Source: Virtual I/O Device (VIRTIO) version 1.3; names are its own.
"""
