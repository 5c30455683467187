# SPDX-License-Identifier: Apache-2.0
"""``softkvm version``: versions of softkvm, of the KVMs there are, and of the host."""

from __future__ import annotations

import json
import os
import platform
from argparse import ArgumentParser, Namespace
from typing import Any

import softkvm
from softkvm.cli import EXIT_OK, Command
from softkvm.cli.accel import DEV_KVM
from softkvm.cli.output import say
from softkvm.live.server import PROTOCOL

EPILOG = """\
exit status: 0; 2 usage: bad arguments
"""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _api(device: str | None) -> str:
    """Return the version of a KVM's API, or why it cannot be had."""
    try:
        with softkvm.open() if device is None else softkvm.open(device) as kvm:
            return str(kvm.get_api_version())
    except ImportError as error:
        return f"not built: {error}"
    except OSError as error:
        return error.strerror or str(error)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""


def versions() -> dict[str, Any]:
    """Return them."""
    system = os.uname()
    return {
        "softkvm": softkvm.__version__,
        "control_protocol": PROTOCOL,
        "kvm_api_soft": _api(None),
        "kvm_api_device": _api(DEV_KVM),
        "python": platform.python_version(),
        "host": f"{system.sysname} {system.release} {system.machine}",
        "processor": _processor(),
    }


def _run(args: Namespace) -> int:
    found = versions()
    if args.json:
        say(json.dumps(found))
        return EXIT_OK
    told = {
        "softkvm": "softkvm",
        "control_protocol": "control protocol",
        "kvm_api_soft": "KVM API, KVM in Python",
        "kvm_api_device": f"KVM API, {DEV_KVM}",
        "python": "Python",
        "host": "host",
        "processor": "processor",
    }
    width = max(map(len, told.values()))
    say("\n".join(f"{told[name].ljust(width)}  {value}" for name, value in found.items()))
    return EXIT_OK


command = Command(_add_arguments, _run, "Versions of softkvm, of the KVMs and of the host.", EPILOG)
