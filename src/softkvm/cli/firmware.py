# SPDX-License-Identifier: Apache-2.0
"""``--firmware``: a file, or the name of what the system's packages have."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from softkvm.cli import CommandError

KNOWN: Final = {
    "seabios": ("/usr/share/seabios/bios-256k.bin", "/usr/share/seabios/bios.bin", "/usr/share/qemu/bios-256k.bin"),
    "ovmf": ("/usr/share/ovmf/OVMF.fd", "/usr/share/qemu/OVMF.fd", "/usr/share/OVMF/OVMF.fd"),
}
"""Where distributions put them."""


def firmware_path(text: str) -> Path:
    """Return the file that --firmware means; CommandError for a name whose package is not there."""
    if text not in KNOWN:
        return Path(text)
    for place in map(Path, KNOWN[text]):
        if place.is_file():
            return place
    raise CommandError(f"--firmware {text}: none of {', '.join(KNOWN[text])} is there: install the package {text}")
