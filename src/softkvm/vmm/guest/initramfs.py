# SPDX-License-Identifier: Apache-2.0
"""The default guest's initial file system: busybox and an init script of ours."""

from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Final

from softkvm.vmm.guest.cpio import CpioWriter

DIRECTORIES: Final = (
    "bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "etc/udhcpc", "proc", "root", "run", "sbin", "sys", "tmp", "usr",
    "usr/bin", "usr/sbin", "mnt",
)  # fmt: skip

# What init needs before it mounted devtmpfs (Linux, Documentation/admin-guide/devices.txt).
DEVICES: Final = (
    ("dev/console", "c", 5, 1, 0o600),
    ("dev/null", "c", 1, 3, 0o666),
    ("dev/ttyS0", "c", 4, 64, 0o600),
)

FILES: Final = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/hostname": "softkvm\n",
    "etc/profile": "export PS1='\\u@\\h:\\w# ' TERM=${TERM:-vt100}\n",
}

INIT_REACHED: Final = "softkvm: init reached"
"""The line that init prints first."""

RUN_ENDED: Final = "softkvm: run ended with status"
"""What begins the line that init prints when the commands of ``softkvm.run="..."`` are done; their status follows."""

PROMPT: Final = "root@softkvm:"
"""What begins the interactive shell's prompt."""


SCRIPTS: Final = {
    "init": "init.sh",
    "etc/acpi/PWRF/00000080": "power_button.sh",
    "etc/udhcpc/default.script": "udhcpc.sh",
    "usr/bin/resize": "resize.sh",
}
"""Programs of ours: their place in the guest, and the file beside this module."""


AGENT: Final = "usr/bin/softkvm-agent"
"""The agent's place in the guest; it is built by ``make guests``."""


def scripts() -> dict[str, bytes]:
    """Return our programs by their place in the guest; the kernel starts ``/init``."""
    files = resources.files(__package__)
    found = {path: files.joinpath(name).read_bytes() for path, name in SCRIPTS.items()}
    agent = files.joinpath("data", "agent")
    return {**found, AGENT: agent.read_bytes()} if agent.is_file() else found


def write_directory(root: Path, busybox: bytes) -> None:
    """Write what :func:`build` archives into the directory *root*, but device files; OSError if that cannot be."""
    for path in DIRECTORIES:
        (root / path).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "bin/busybox").write_bytes(busybox)
    (root / "bin/busybox").chmod(0o755)
    (root / "bin/sh").symlink_to("busybox")
    for path, text in FILES.items():
        (root / path).write_text(text)
    for path, script in scripts().items():
        (root / path).write_bytes(script)
        (root / path).chmod(0o755)


def build(busybox: bytes) -> bytes:
    """Return an uncompressed initramfs that holds ``busybox`` (a static executable) and :func:`scripts`.

    It is not compressed: the guest would spend more on unpacking than the host on reading it.
    """
    out = BytesIO()
    archive = CpioWriter(out)
    for path in DIRECTORIES:
        archive.directory(path, 0o1777 if path == "tmp" else 0o755)
    for path, kind, major, minor, mode in DEVICES:
        archive.device(path, kind, major, minor, mode)
    archive.file("bin/busybox", busybox, 0o755)
    archive.symlink("bin/sh", "busybox")
    for path, text in FILES.items():
        archive.file(path, text.encode())
    for path, script in scripts().items():
        archive.file(path, script, 0o755)
    archive.close()
    return out.getvalue()
