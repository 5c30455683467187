# SPDX-License-Identifier: Apache-2.0
"""The KVM virtualization stack, for Python.

``softkvm.open()`` gives KVM written in Python on the software CPU; ``softkvm.open("/dev/kvm")`` gives the
same objects on the real device. Both speak the KVM API: :mod:`softkvm.api` has its classes,
:mod:`softkvm.abi` its structures and constants. ``softkvm.Machine`` is a whole machine for scripts
(docs/scripting.md), ``softkvm.drgn(machine)`` drgn on its kernel.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from softkvm.api import Kvm
    from softkvm.machine import Machine
    from softkvm.script.drgn_program import drgn

__all__ = ["Machine", "__version__", "drgn", "open"]

__version__ = "0.1.0"

SOFT = "soft"


def open(path: str | os.PathLike[str] | None = None) -> Kvm:
    """Open a KVM: the software one, or a device file.

    *path* is ``None`` or ``"soft"`` for KVM in Python on the software CPU, or a device like ``"/dev/kvm"``.
    Raises OSError if the device cannot be opened or is no KVM, ImportError if the software CPU is not built.
    """
    if path is None or path == SOFT:
        from softkvm.kvm import Kvm as SoftKvm

        return SoftKvm()
    from softkvm.devkvm import Kvm as DeviceKvm

    return cast("Kvm", DeviceKvm(os.fspath(path)))


def __getattr__(name: str) -> object:
    """Load what scripts use when it is first named: the rest needs none of it."""
    if name == "Machine":
        from softkvm.machine import Machine

        return Machine
    if name == "drgn":
        from softkvm.script.drgn_program import drgn

        return drgn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
