# SPDX-License-Identifier: Apache-2.0
"""The user-mode network: a small internet in this process, whose connections sockets of the host's continue.

``stack`` takes frames and has the parts: ``policy`` says what the guest may reach, ``connections`` and ``tcp`` are TCP,
``udp`` has flows, ``icmp`` errors and echoes, ``dhcp`` and ``dns`` servers, ``neighbours`` ARP and IPv6's discovery,
``forward`` ports of the host's that lead to the guest.
"""
