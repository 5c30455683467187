# SPDX-License-Identifier: Apache-2.0
"""The built-in demonstration guest: a bare-metal program of ours (``guests/demo``) that comes with the package."""

from pathlib import Path

from softkvm.vmm.guest.errors import GuestUnavailable


def demo_kernel() -> Path:
    """Return the path of the demonstration guest, an ELF image with a PVH entry point.

    Raises GuestUnavailable in a source tree where ``make guests`` has not built it.
    """
    path = Path(__file__).parent / "data" / "demo.elf"
    if not path.is_file():
        raise GuestUnavailable("the demonstration guest is not built: run `make guests` in the source tree")
    return path
