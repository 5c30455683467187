# SPDX-License-Identifier: Apache-2.0
"""Images for a PC, by their kinds: what is put into memory besides, and where the first processor begins.

A machine that is restored needs none of it, and does not import it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from softkvm.vmm.boot import acpi, bzimage, firmware, flat, loaders, mptable, multiboot, payload, pvh
from softkvm.vmm.boot.image import Deadline, Image, Source
from softkvm.vmm.boot.loaders import Kind
from softkvm.vmm.boot.placement import Module
from softkvm.vmm.errors import ImageError

if TYPE_CHECKING:
    from softkvm.vmm.boards.pc import Pc


def load(
    board: Pc,
    kernel: Source | Image,
    initrd: Source | Image | None,
    command_line: str,
    modules: Sequence[Module],
    *,
    raw: bool,
    entry: bzimage.Entry | None,
    deadline: Deadline | None,
) -> None:
    """Put an image into memory; see :meth:`softkvm.vmm.boards.pc.Pc.load`."""
    if not isinstance(command_line, str):
        raise TypeError(f"command_line={command_line!r}: expected a str")
    vcpu = board.machine.vcpus[0].vcpu
    if "\0" in command_line:
        raise ImageError("command line holds a NUL character")
    with contextlib.ExitStack() as files:
        image = _opened(kernel, "kernel", board.memory.size, deadline, files)
        if initrd is not None:
            ramdisk = _opened(initrd, "initrd", board.memory.size, deadline, files)
            modules = [Module(ramdisk), *modules]
        if raw:
            flat.load(vcpu, board.memory, image, deadline)
            firmware.install(board.machine.vm, board.memory, pit=board.machine.config.pit)
            return
        image, kind = loaders.recognize(image, board.memory.size, deadline)
        if entry is not None and kind is not Kind.LINUX:
            raise ImageError(f"kernel is no Linux kernel: it has no entry {entry.value} to choose")
        arguments = command_line.encode("utf-8", "surrogateescape")
        modules = [module for module in modules if module.image.size or module.command_line]
        devices = board.virtio.described(hpet=board.machine.config.hpet)
        rsdp = acpi.write_tables(board.memory, range(board.machine.config.vcpus), devices)
        mptable.write_table(board.memory, range(board.machine.config.vcpus))
        if entry is bzimage.Entry.PVH:
            kernel_file = payload.vmlinux(image, board.memory.size, deadline)
            pvh.load(vcpu, board.memory, kernel_file, modules, arguments, rsdp, deadline)
        elif kind is Kind.LINUX:
            bzimage.load(vcpu, board.memory, image, modules, arguments, rsdp, entry=entry, deadline=deadline)
        elif kind is Kind.MULTIBOOT:
            multiboot.load(vcpu, board.memory, image, arguments, modules, deadline)
        elif kind is Kind.ELF:
            pvh.load(vcpu, board.memory, image, modules, arguments, rsdp, deadline)
        else:
            raise ImageError(loaders.describe_unknown(image))
        firmware.install(board.machine.vm, board.memory, pit=board.machine.config.pit)


def _opened(
    source: Source | Image, name: str, limit: int, deadline: Deadline | None, files: contextlib.ExitStack
) -> Image:
    """Return *source* as an image; *files* closes it, unless it is one already: then it is its owner's."""
    image = Image.of(source, name, limit, deadline)
    return image if image is source else files.enter_context(image)
