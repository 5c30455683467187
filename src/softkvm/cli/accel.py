# SPDX-License-Identifier: Apache-2.0
"""What ``--accel`` names: KVM in Python on the software CPU, ``/dev/kvm``, or whichever of them works."""

from __future__ import annotations

import softkvm
from softkvm import api
from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.output import warn
from softkvm.vmm.probe import missing_capabilities, probe

SOFT, KVM, AUTO = "soft", "kvm", "auto"
DEV_KVM = "/dev/kvm"


def open_soft() -> api.Kvm:
    """Open KVM in Python; CommandError if its extension is not built."""
    try:
        return softkvm.open()
    except ImportError as error:
        raise CommandError(f"the software CPU is not built: {error}", EXIT_ERROR) from None


def open_device() -> api.Kvm:
    """Open ``/dev/kvm``; CommandError if that cannot be, or if it cannot have a machine of ours."""
    try:
        kvm = softkvm.open(DEV_KVM)
    except OSError as error:
        raise CommandError(f"--accel kvm: {DEV_KVM}: {error.strerror or error}", EXIT_ERROR) from None
    missing = missing_capabilities(kvm)
    if missing:
        kvm.close()
        raise CommandError(f"--accel kvm: {DEV_KVM}: lacks {', '.join(missing)}", EXIT_ERROR)
    return kvm


def open_kvm(accel: str) -> tuple[api.Kvm, str]:
    """Return the KVM that *accel* names, and which it is; for ``auto`` one line says so, and why."""
    if accel == SOFT:
        return open_soft(), SOFT
    if accel == KVM:
        return open_device(), KVM
    kvm, trouble = _open_probed()
    if kvm is not None:
        warn(f"running on {DEV_KVM}")
        return kvm, KVM
    warn(f"running on the software CPU: {DEV_KVM}{trouble}")
    return open_soft(), SOFT


def _open_probed() -> tuple[api.Kvm | None, str]:
    """Return ``/dev/kvm`` if a guest runs there, else None and what is wrong with it."""
    try:
        kvm = softkvm.open(DEV_KVM)
    except OSError as error:
        return None, f": {error.strerror or error}"
    trouble = probe(kvm)
    if trouble is None:
        return kvm, ""
    kvm.close()
    return None, f" {trouble}"
