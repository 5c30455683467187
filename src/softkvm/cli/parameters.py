# SPDX-License-Identifier: Apache-2.0
"""Setting what ``--param NAME=VALUE`` says, for commands that open the KVM themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import softkvm
from softkvm import api
from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.arguments import param_values
from softkvm.unittests.config import SuiteError
from softkvm.unittests.runner import DEVICES, set_params


def assign_params(kvm: api.Kvm, values: Mapping[str, str]) -> None:
    """Set the parameters of a KVM; CommandError for a name or a value that is none, and for ``/dev/kvm``."""
    try:
        set_params(kvm, values)
    except SuiteError as error:
        raise CommandError(f"--param {error}") from None


def open_with_params(accel: str, texts: Sequence[str]) -> api.Kvm:
    """Open the KVM that *accel* names and set what the ``--param`` options say. CommandError if either cannot be."""
    values = param_values(texts)
    try:
        kvm = softkvm.open(DEVICES[accel])
    except ImportError as error:
        raise CommandError(f"the software CPU is not built: {error}", EXIT_ERROR) from None
    except OSError as error:
        raise CommandError(f"--accel {accel}: {DEVICES[accel]}: {error.strerror or error}", EXIT_ERROR) from None
    try:
        assign_params(kvm, values)
    except CommandError:
        kvm.close()
        raise
    return kvm
