# SPDX-License-Identifier: Apache-2.0
"""Virtio sockets: the host's ends of connections with the guest, whatever carries their packets.

``packet`` is what a packet looks like, ``connection`` one end of a connection, ``hub`` all of a device's; ``sockets``,
``aio`` and ``unix`` are who uses them. The device is ``vmm/devices/virtio_vsock.py``.
Source: VIRTIO 1.3, section 5.10; where that is silent Linux's ``net/vmw_vsock``, since its sockets are the peers.
"""
