# SPDX-License-Identifier: Apache-2.0
"""What the measurements of ``softkvm bench`` have in common on the command line."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import Any

from softkvm.cli.arguments import add_param, file_name
from softkvm.unittests.runner import DEVICES


def add_measurement(
    measurements: Any, name: str, run: Callable[[Namespace], int], *, description: str, epilog: str
) -> ArgumentParser:
    """Add one to those of ``softkvm bench``; *run* does it."""
    command: ArgumentParser = measurements.add_parser(
        name,
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(measure=run)
    return command


def add_kvm_and_files(command: ArgumentParser, *, plot: bool = False) -> None:
    """Add the options that say on which KVM, and what is written; with *plot*, pictures too."""
    option = command.add_argument
    option("--accel", choices=tuple(DEVICES), default="soft", help="soft: KVM in Python (default); kvm: /dev/kvm")
    add_param(command)
    option("--json", metavar="FILE", type=file_name, help="write everything as JSON; -: instead of the table")
    if plot:
        option("--plot", metavar="FILE", type=file_name, help="draw a picture: FILE.png or FILE.svg")
