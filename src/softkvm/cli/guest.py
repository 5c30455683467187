# SPDX-License-Identifier: Apache-2.0
"""``softkvm guest``: prepare the default Linux guest."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.output import say
from softkvm.progress import NoProgress, TerminalProgress
from softkvm.vmm.guest import Guest, GuestUnavailable, cache_directory, cached, prepare

EPILOG = """\
The guest is Debian's cloud kernel and busybox with a small init of ours. Both come from the system's package
sources by apt-get, with lists and caches of softkvm's own: nothing needs root and nothing on the system changes.
It is kept in $XDG_CACHE_HOME/softkvm/guest (~/.cache/softkvm/guest).

On its kernel command line:
  softkvm.run="cmd; cmd"   run commands in place of the shell, then power off

exit status: 0; 1 if it cannot be had; 2 usage: bad arguments; 128 + n ended by signal n
"""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="download and build it anew")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--path", action="store_true", help="print the directory of the prepared guest, prepare nothing unless --force"
    )
    output.add_argument("--json", action="store_true", help="print what was prepared as JSON")


def _as_dict(guest: Guest) -> dict[str, str]:
    return {
        "kernel": str(guest.kernel),
        "initrd": str(guest.initrd),
        "command_line": guest.command_line,
        "kernel_package": guest.kernel_package,
        "busybox_package": guest.busybox_package,
    }


def _run(args: Namespace) -> int:
    try:
        guest = _find(args)
    except GuestUnavailable as error:
        raise CommandError(f"{error}; `softkvm run --kernel FILE --initrd FILE` boots your own", EXIT_ERROR) from None
    if args.path:
        say(str(guest.kernel.parent))
    elif args.json:
        say(json.dumps(_as_dict(guest), indent=2))
    else:
        say(f"kernel  {guest.kernel}  ({guest.kernel_package})")
        say(f"initrd  {guest.initrd}  ({guest.busybox_package})")
    return EXIT_OK


def _find(args: Namespace) -> Guest:
    """Return the guest, prepared where that is wanted."""
    if not args.path or args.force:
        return prepare(NoProgress() if args.json else TerminalProgress(), force=args.force)
    guest = cached()
    if guest is None:
        raise CommandError(f"no guest is prepared in {cache_directory()}: run `softkvm guest`", EXIT_ERROR)
    return guest


command = Command(_add_arguments, _run, "Prepare the default Linux guest.", EPILOG)
