# SPDX-License-Identifier: Apache-2.0
"""Networks behind a virtio-net device: a user-mode stack that needs no rights, and the host's tap devices.

``link`` is the seam: a device is a :class:`~softkvm.vmm.net.link.Link`, what lies behind it a
:class:`~softkvm.vmm.net.link.Backend`. Neither knows how the other works.
"""
