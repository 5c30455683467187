# SPDX-License-Identifier: Apache-2.0
"""What the measurements of ``softkvm bench`` have in common on the command line."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import Any, TypeVar

from softkvm.bench import plot
from softkvm.cli import EXIT_ERROR, EXIT_OK, CommandError
from softkvm.cli.arguments import add_param, file_name
from softkvm.cli.output import STDOUT, OutputFile, say
from softkvm.progress import StatusLine
from softkvm.unittests.runner import DEVICES

R = TypeVar("R")


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


def picture_format(name: str) -> str:
    """Return the format of a picture by its name."""
    form = name.rpartition(".")[2].lower()
    if form not in plot.FORMATS:
        raise CommandError(f"--plot {name}: expected a name that ends with .png or .svg")
    return form


def carry_out(
    args: Namespace,
    measure: Callable[[Callable[[str], None]], R],
    *,
    failure: type[Exception],
    render: Callable[[R], str],
    as_json: Callable[[R], Any],
    draw: Callable[[R, str], bytes],
) -> int:
    """Measure, print, write files; return the exit status.

    *measure* gets what shows its progress, and raises *failure* for what is no fault of the KVM's. *draw* makes a
    picture of a format.
    """
    form = picture_format(args.plot) if args.plot else ""
    files = {option: OutputFile(f"--{option}", name) for option in ("json", "plot") if (name := getattr(args, option))}
    line = StatusLine()
    try:
        report = measure(line.show)
    except OSError as error:
        raise CommandError(f"--accel {args.accel}: {error.strerror}", EXIT_ERROR) from None
    except failure as error:
        raise CommandError(str(error), EXIT_ERROR) from None
    finally:
        line.clear()
    if args.json != STDOUT:
        say(render(report))
    if "json" in files:
        files["json"].write(json.dumps(as_json(report), indent=2) + "\n")
    if "plot" in files:
        try:
            files["plot"].write(draw(report, form))
        except plot.PlotError as error:
            raise CommandError(f"--plot {args.plot}: {error}", EXIT_ERROR) from None
    return EXIT_OK
