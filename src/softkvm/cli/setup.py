# SPDX-License-Identifier: Apache-2.0
"""``softkvm setup``: prepare the default guest, or a directory that a guest may have for its root."""

from __future__ import annotations

import errno
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.arguments import file_name
from softkvm.cli.output import say
from softkvm.progress import TerminalProgress
from softkvm.vmm.guest import GuestUnavailable, prepare
from softkvm.vmm.guest.initramfs import write_directory

EPILOG = """\
Without DIRECTORY: the same as `softkvm guest`. With one, which is made and has to be empty: it gets what the default
guest has (busybox, its init), for a guest whose root it is. Device files are not in it: they need root, and the guest
mounts devtmpfs.

exit status: 0; 1 if it cannot be had; 2 usage: bad arguments; 128 + n ended by signal n
"""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIRECTORY", nargs="?", type=file_name, help="the root directory to make")


def _run(args: Namespace) -> int:
    try:
        guest = prepare(TerminalProgress())
    except GuestUnavailable as error:
        raise CommandError(str(error), EXIT_ERROR) from None
    if args.directory is None:
        say(f"kernel  {guest.kernel}\ninitrd  {guest.initrd}")
        return EXIT_OK
    root = Path(args.directory)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        write_directory(root, (guest.kernel.parent / "busybox").read_bytes())
    except OSError as error:
        raise CommandError(f"{root}: {error.strerror}", EXIT_ERROR) from None
    say(f"kernel  {guest.kernel}\nroot    {root}")
    return EXIT_OK


command = Command(_add_arguments, _run, "Prepare the default guest, or a root directory for one.", EPILOG)
