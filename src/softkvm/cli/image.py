# SPDX-License-Identifier: Apache-2.0
"""``softkvm image create``: a small Debian system on a disk."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.arguments import file_name, size
from softkvm.cli.output import say, warn
from softkvm.vmm.guest.debian import SSH_PORT, ImageFailed, Wanted, create

EPILOG = f"""\
softkvm image create debian.img
softkvm run --config debian.img.toml
ssh -p {SSH_PORT} root@127.0.0.1
softkvm shell debian

The image is one ext4 file system; beside it lie its kernel, its initial RAM disk, and a file for --config. Root needs
no password at the console, and by ssh one of --ssh-key. Debian's packages mmdebstrap and e2fsprogs are needed; without
root also fakeroot, and either user namespaces with uidmap, or fakechroot (mmdebstrap's modes).

exit status: 0; 1 if it cannot be made; 2 usage: bad arguments; 128 + n ended by signal n
"""


def _add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("create", help="make an image").add_argument
    add("file", metavar="FILE", type=file_name, help="the image to make")
    add("--size", metavar="SIZE", default="2G", help="of the disk, which takes only what is used (default: 2G)")
    add("--suite", metavar="NAME", help="Debian's release (default: this system's, or stable)")
    add("--mirror", metavar="URL", default="", help="where packages come from (default: mmdebstrap's)")
    add("--include", metavar="PACKAGE,…", action="append", default=[], help="more packages")
    add("--hostname", metavar="NAME", default="debian", help="the system's name (default: debian)")
    add(
        "--ssh-key",
        metavar="FILE",
        type=file_name,
        action="append",
        default=[],
        help="a public key that may log in as root (default: those in ~/.ssh)",
    )
    add("--force", action="store_true", help="replace an image that is there")


def _suite() -> str:
    """Return this system's release, if it is Debian's."""
    try:
        with open("/etc/os-release") as file:
            values = dict(line.rstrip().replace('"', "").partition("=")[::2] for line in file if "=" in line)
    except OSError:
        return "stable"
    return values.get("VERSION_CODENAME", "stable") if values.get("ID") == "debian" else "stable"


def _keys(files: list[str]) -> tuple[str, ...]:
    paths = [Path(file) for file in files] or sorted(Path(os.path.expanduser("~/.ssh")).glob("id_*.pub"))
    try:
        keys = [line for path in paths for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise CommandError(f"--ssh-key: {reason}") from None
    return tuple(keys)


def _run(args: Namespace) -> int:
    path = Path(args.file)
    if path.exists() and not args.force:
        raise CommandError(f"{path}: File exists; --force replaces it")
    if not path.parent.is_dir():
        raise CommandError(f"{path}: there is no directory {path.parent}")
    packages = tuple(name for text in args.include for name in text.split(",") if name)
    try:
        wanted = Wanted(
            path,
            size("--size", args.size),
            args.suite or _suite(),
            args.mirror,
            packages,
            args.hostname,
            _keys(args.ssh_key),
        )
    except ImageFailed as error:
        raise CommandError(str(error)) from None
    try:
        create(wanted, warn)
    except ImageFailed as error:
        raise CommandError(str(error), EXIT_ERROR) from None
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}", EXIT_ERROR) from None
    say(f"image   {path}")
    for kind, beside in wanted.beside.items():
        say(f"{kind.ljust(7)} {beside}")
    return EXIT_OK


command = Command(_add_arguments, _run, "Make a small Debian system on a disk.", EPILOG)
