# SPDX-License-Identifier: Apache-2.0
"""What the interpreter in a client's process begins with: everything imported, KVM ready to be opened."""

from __future__ import annotations

import softkvm
from softkvm import _softcpu
from softkvm.client.files import SystemFile, open_memfd


def open_system(cloexec: int) -> int:
    """Open ``/dev/kvm``; returns the client's descriptor."""
    return open_memfd(SystemFile(softkvm.open()), "kvm", cloexec=bool(cloexec))


def unmapping(address: int, size: int) -> None:
    """Memory of the client's is about to go."""


def at_exit() -> None:
    """The client's process is about to end."""


#: The address of what the preloaded library calls.
core = _softcpu.client_core(open_system, unmapping, at_exit)
