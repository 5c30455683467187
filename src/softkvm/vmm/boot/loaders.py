# SPDX-License-Identifier: Apache-2.0
"""Which loader takes an image."""

from __future__ import annotations

from enum import Enum

from softkvm.vmm.boot import bzimage, elf, multiboot
from softkvm.vmm.boot.image import Deadline, Image

OTHER_ARCHITECTURES = (
    (56, b"ARM\x64", "an arm64 Image"),
    (48, b"RISCV\0\0\0", "a RISC-V Image"),
)
_EXPECTED = "expected a Linux kernel, an ELF file with a PVH note or a Multiboot image"


class Kind(Enum):
    """What an image is to the loaders."""

    LINUX = "Linux kernel"
    MULTIBOOT = "Multiboot image"
    ELF = "ELF file"
    UNKNOWN = "unknown"


def kind_of(image: Image) -> Kind:
    """Return what *image* is. A Multiboot header goes before a PVH note, as in QEMU."""
    if bzimage.is_bzimage(image):
        return Kind.LINUX
    if multiboot.find_header(image):
        return Kind.MULTIBOOT
    return Kind.ELF if elf.is_elf(image) else Kind.UNKNOWN


def recognize(image: Image, limit: int, deadline: Deadline | None = None) -> tuple[Image, Kind]:
    """Return *image*, expanded if it is compressed, and what it is.

    Raises ImageError if it is a damaged gzip file or one of more than *limit* bytes.
    """
    kind = kind_of(image)
    if kind is Kind.UNKNOWN:
        expanded = image.expanded(limit, deadline)
        if expanded is not image:
            return expanded, kind_of(expanded)
    return image, kind


def describe_unknown(image: Image) -> str:
    """Say what a file is that no loader takes."""
    head = image.read(0, 64)
    for offset, magic, what in OTHER_ARCHITECTURES:
        if head[offset : offset + len(magic)] == magic:
            return f"kernel is {what}: {_EXPECTED}"
    if not image.size:
        return "kernel is empty"
    return f"kernel has an unknown format: {_EXPECTED}"
