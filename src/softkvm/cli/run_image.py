# SPDX-License-Identifier: Apache-2.0
"""What ``softkvm run`` boots: chosen by its arguments, and opened."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.firmware import firmware_path
from softkvm.cli.output import warn
from softkvm.cli.run_command import AGENT_WORD
from softkvm.cli.run_console import is_virtio, where
from softkvm.cli.terminal import STDIO, terminal_kind
from softkvm.progress import NoProgress, TerminalProgress
from softkvm.vmm.boot.bzimage import Entry
from softkvm.vmm.boot.image import Deadline, Image
from softkvm.vmm.boot.loaders import Kind, recognize
from softkvm.vmm.boot.placement import Module
from softkvm.vmm.devices import ports, share
from softkvm.vmm.errors import ImageError, MachineError
from softkvm.vmm.guest import GuestUnavailable, demo_kernel, prepare

COMMAND_LINE = "console=ttyS0"


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What to boot."""

    kernel: Path
    initrd: tuple[str, ...]
    """What --initrd says: files, or for a Multiboot kernel lists of modules."""
    command_line: str | None
    """None: what the kind of kernel has by default."""
    raw: bool = False
    entry: Entry | None = None
    firmware: bool = False
    """*kernel* is a ROM, which boots from disks."""


def choose_image(args: Namespace) -> GuestImage:
    """Return what the arguments name, or the default guest, or the built-in demonstration."""
    if args.image is not None:
        if args.kernel is not None:
            raise CommandError(f"{args.image}: --kernel {args.kernel} is there, too")
        args.kernel = args.image
    if args.firmware is not None:
        for option in ("kernel", "initrd", "append", "entry"):
            if getattr(args, option):
                raise CommandError(f"--firmware boots from disks: it does not take --{option}")
        if args.command is not None:
            raise CommandError("--firmware boots from disks: a command runs in the default guest")
        return GuestImage(firmware_path(args.firmware), (), None, firmware=True)
    if args.command is not None:
        return _command_image(args)
    if args.kernel is not None:
        raw = args.kernel.startswith("flat:")
        if args.kernel == "flat:":
            raise CommandError("--kernel flat:FILE lacks the file")
        if raw and (args.initrd or args.append or args.entry):
            raise CommandError("--kernel flat:FILE takes neither --initrd nor --append nor --entry")
        entry = Entry(args.entry) if args.entry else None
        return GuestImage(Path(args.kernel.removeprefix("flat:")), tuple(args.initrd), args.append, raw, entry)
    for option in ("initrd", "entry"):
        if getattr(args, option):
            raise CommandError(f"--{option} needs --kernel")
    more = f" {args.append}" if args.append else ""
    try:
        guest = prepare(TerminalProgress())
        terminal = terminal_kind() if where(args.console) == STDIO else None
        size = f" softkvm.terminal={terminal}" if terminal else ""
        size += " softkvm.console=hvc0" if is_virtio(args.console) else ""
        return GuestImage(guest.kernel, (str(guest.initrd),), guest.command_line + size + _names(args) + more)
    except GuestUnavailable as error:
        warn(f"{error}; booting the built-in demonstration guest (--kernel and --initrd boot your own)")
    try:
        return GuestImage(demo_kernel(), (), COMMAND_LINE + more)
    except GuestUnavailable as error:
        raise CommandError(str(error), EXIT_ERROR) from None


def _command_image(args: Namespace) -> GuestImage:
    """Return the default guest, or another kernel with its file system, whose agent waits for a command."""
    try:
        guest = prepare(NoProgress() if args.quiet else TerminalProgress())
    except GuestUnavailable as error:
        raise CommandError(f"a command runs in the default guest: {error}", EXIT_ERROR) from None
    words = [
        guest.command_line,
        AGENT_WORD,
        *(["quiet"] if args.quiet else []),
        *([args.append] if args.append else []),
    ]
    kernel = guest.kernel if args.kernel is None else Path(args.kernel)
    entry = Entry(args.entry) if args.entry else None
    return GuestImage(kernel, (str(guest.initrd),), " ".join(words) + _names(args), False, entry)


def _names(args: Namespace) -> str:
    """Tell the default guest what to mount, and which ports there are.

    Linux shows tags of virtio-fs to programs from 6.9 on only, and ports come after their driver has.
    """
    if not args.share and not args.port:
        return ""
    from urllib.parse import quote

    names = [("share", spec.tag) for spec in map(share.parse, args.share)]
    names += [("port", spec.name) for spec in map(ports.parse, args.port)]
    return "".join(f" softkvm.{kind}={quote(name, safe='')}" for kind, name in names)


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """The files of a :class:`GuestImage`, opened."""

    kernel: Image | None
    """None: the firmware finds its own."""
    modules: list[Module]
    command_line: str


def open_images(image: GuestImage, limit: int, deadline: Deadline, files: contextlib.ExitStack) -> OpenedImage:
    """Open what *image* names; *files* closes it. Raises ImageError."""

    def opened(path: str | Path, name: str) -> Image:
        return files.enter_context(Image.open(Path(path), name, limit, deadline))

    if image.firmware:
        return OpenedImage(None, [], "")
    kernel = opened(image.kernel, "kernel")
    if image.raw:
        return OpenedImage(kernel, [], "")
    try:
        kernel, kind = recognize(kernel, limit, deadline)
    except ImageError as error:
        raise ImageError(name_file(error, image)) from None
    if kind is not Kind.MULTIBOOT:
        modules = [Module(opened(path, "initrd")) for path in image.initrd]
        return OpenedImage(kernel, modules, COMMAND_LINE if image.command_line is None else image.command_line)
    texts = [text for option in image.initrd for text in split_modules(option)]
    modules = [
        Module(opened(text.partition(" ")[0], "module"), text.encode("utf-8", "surrogateescape")) for text in texts
    ]
    return OpenedImage(kernel, modules, f"{image.kernel} {image.command_line or ''}".rstrip())


def split_modules(text: str) -> list[str]:
    """Return the modules that ``--initrd "FILE ARGUMENTS,FILE …"`` names, as QEMU has it: two commas stand for one."""
    parts = text.replace(",,", "\0").split(",")  # no argument of a process holds a NUL
    return [part.replace("\0", ",").lstrip() for part in parts]


def name_file(error: MachineError, image: GuestImage) -> str:
    """Put the file's name before what is wrong with it."""
    text = str(error)
    if isinstance(error, ImageError) and text.startswith(("kernel", "ELF", "flat", "boot protocol")):
        return f"{image.kernel}: {text}"
    return text
