# SPDX-License-Identifier: Apache-2.0
"""A small Debian system on a disk: packages by mmdebstrap, a file system by mke2fs, root or not.

The whole disk is one ext4 file system. Its kernel and its initial RAM disk lie beside it, for a boot without firmware,
with a file for ``softkvm run --config``. What mmdebstrap makes is an archive; what is ours comes on top of it where the
file system's tree is put together, under fakeroot where we are not root: so owners are right, and no mount is needed.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from softkvm.abi.sizes import Size

PACKAGES: Final = (
    "systemd-sysv", "udev", "dbus", "openssh-server", "linux-image-cloud-amd64", "initramfs-tools", "iproute2", "kmod",
)  # fmt: skip
"""What is installed besides the essential packages."""

MIN_SIZE: Final = 512 << 20
DEFAULT_SIZE: Final = 2 << 30
SSH_PORT: Final = 2222
COMMAND_LINE: Final = "console=ttyS0 root=/dev/vda rw"

_IMAGE: Final = Size("bytes of a Debian image", 1 << 40, None, least=MIN_SIZE, effect="ImageFailed", where=__name__)
_LEFT_OUT: Final = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_KERNEL: Final = re.compile(r"(?:\./)?boot/(vmlinuz|initrd\.img)-[^/]+")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.:-]{0,127}")
_AGENT: Final = "usr/local/sbin/softkvm-agent"

_UNIT: Final = f"""\
[Unit]
Description=softkvm's agent (vsock)

[Service]
ExecStartPre=-/sbin/modprobe vmw_vsock_virtio_transport
ExecStart=/{_AGENT}
Restart=on-failure
RestartSec=5

[Install]
WantedBy=multi-user.target
"""
_NETWORK: Final = """\
[Match]
Type=ether

[Network]
DHCP=yes
"""
_WANTS: Final = "etc/systemd/system/multi-user.target.wants"


class ImageFailed(Exception):
    """No image could be made; one line."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The image that is wanted; ImageFailed for what cannot be one."""

    path: Path
    size: int = DEFAULT_SIZE
    suite: str = "stable"
    mirror: str = ""
    packages: tuple[str, ...] = ()
    host_name: str = "debian"
    ssh_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _IMAGE.allows(self.size):
            raise ImageFailed(f"size {self.size >> 20}M: expected at least {MIN_SIZE >> 20}M")
        if not _HOST_NAME.fullmatch(self.host_name):
            raise ImageFailed(f"host name {self.host_name[:80]}: expected up to 63 letters, digits and '-'")
        if not re.fullmatch(r"[a-z][a-z0-9.-]{0,62}", self.suite):
            raise ImageFailed(f"suite {self.suite[:80]}: expected a name such as bookworm")
        for package in self.packages:
            if not _PACKAGE.fullmatch(package):
                raise ImageFailed(f"package {package[:80]}: expected a name such as vim")

    @property
    def beside(self) -> dict[str, Path]:
        """The files beside it."""
        return {kind: self.path.with_name(f"{self.path.name}.{kind}") for kind in ("vmlinuz", "initrd", "toml")}


def missing_tools() -> list[str]:
    """Return Debian's packages of programs that are not there."""
    needed = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "tar": "tar"}
    if os.geteuid() != 0:
        needed["fakeroot"] = "fakeroot"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [package for program, package in needed.items() if shutil.which(program, path=path) is None]


def create(wanted: Wanted, say: Callable[[str], object] = lambda text: None) -> None:
    """Make the image and what lies beside it, complete or not at all; *say* is told what is going on.

    ImageFailed if a program is missing or fails, OSError if there is no room.
    """
    missing = missing_tools()
    if missing:
        raise ImageFailed(f"this needs {' and '.join(missing)}: apt-get install {' '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix=f".{wanted.path.name}.", dir=wanted.path.parent or ".") as work_name:
        work = Path(work_name)
        base, ours, root = work / "base.tar", work / "ours.tar", work / "root"
        say("packages (some minutes)")
        _run(_mmdebstrap(wanted, base), work / "log")
        say("kernel and initial RAM disk")
        try:
            made = _take_kernel(base, work)
            _write_ours(wanted, base, ours)
        except tarfile.TarError as error:
            raise ImageFailed(f"the archive of the packages is damaged: {error}") from None
        say("file system")
        root.mkdir()
        image = work / "image"
        script = 'tar -xf "$1" -C "$3" && tar -xf "$2" -C "$3" && exec mke2fs -q -t ext4 -L root -d "$3" "$4" "$5"'
        shell: list[str | Path] = ["sh", "-c", script, "sh", base, ours, root, image, f"{wanted.size >> 10}k"]
        fakeroot: list[str | Path] = [] if os.geteuid() == 0 else ["fakeroot"]
        _run(fakeroot + shell, work / "log")
        (work / "toml").write_text(_configuration(wanted))
        made = {**made, "toml": work / "toml"}
        for kind, path in wanted.beside.items():
            os.replace(made[kind], path)
        os.replace(image, wanted.path)


def _mmdebstrap(wanted: Wanted, base: Path) -> list[str | Path]:
    packages = ",".join((*PACKAGES, *wanted.packages))
    options = [f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT]
    mirror = [wanted.mirror] if wanted.mirror else []
    return ["mmdebstrap", "--variant=minbase", f"--include={packages}", *options, wanted.suite, base, *mirror]


def _run(arguments: Sequence[str | Path], log: Path) -> None:
    """Run a program; what it says is kept for its failure."""
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"}
    with log.open("wb") as output:
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in said if line.startswith(("E:", "error", "mke2fs", "tar:"))] or said
        raise ImageFailed(f"{arguments[0]} failed: {errors[-1] if errors else f'status {done.returncode}'}")


def _take_kernel(base: Path, work: Path) -> dict[str, Path]:
    """Take the kernel and its initial RAM disk out of the archive."""
    made = {"vmlinuz": work / "vmlinuz", "initrd": work / "initrd"}
    found = set()
    with tarfile.open(base) as archive:
        for member in archive:
            match = _KERNEL.fullmatch(member.name)
            source = archive.extractfile(member) if match and member.isfile() else None
            if match is not None and source is not None:
                kind = "vmlinuz" if match[1] == "vmlinuz" else "initrd"
                with source, made[kind].open("wb") as target:
                    shutil.copyfileobj(source, target)
                found.add(kind)
    if found != set(made):
        raise ImageFailed("the packages have brought no kernel with an initial RAM disk")
    return made


def _shadow(base: Path) -> bytes:
    """Return the passwords, root's empty: at the console it needs none, and ssh refuses an empty one."""
    with tarfile.open(base) as archive:
        for name in ("./etc/shadow", "etc/shadow"):
            try:
                source = archive.extractfile(name)
            except KeyError:
                continue
            if source is not None:
                return re.sub(rb"^root:[^:]*:", b"root::", source.read(), flags=re.MULTILINE)
    raise ImageFailed("the packages have brought no passwords")


def _write_ours(wanted: Wanted, base: Path, ours: Path) -> None:
    """Write the archive of what comes on top of the packages."""
    texts = {
        "etc/hostname": f"{wanted.host_name}\n",
        "etc/hosts": f"127.0.0.1 localhost\n127.0.1.1 {wanted.host_name}\n::1 localhost ip6-localhost\n",
        "etc/fstab": "LABEL=root / ext4 errors=remount-ro 0 1\n",
        "etc/resolv.conf": "nameserver 10.0.2.3\n",
        "etc/systemd/network/80-dhcp.network": _NETWORK,
        "etc/systemd/system/softkvm-agent.service": _UNIT,
    }
    links = {
        f"{_WANTS}/systemd-networkd.service": "/lib/systemd/system/systemd-networkd.service",
        f"{_WANTS}/softkvm-agent.service": "/etc/systemd/system/softkvm-agent.service",
    }
    agent = resources.files(__package__).joinpath("data", "agent")
    with tarfile.open(ours, "w") as archive:

        def add(name: str, data: bytes, mode: int = 0o644) -> None:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            archive.addfile(member, io.BytesIO(data))

        for name, text in texts.items():
            add(name, text.encode())
        add("etc/shadow", _shadow(base), 0o640)
        if agent.is_file():
            add(_AGENT, agent.read_bytes(), 0o755)
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
        if wanted.ssh_keys:
            directory = tarfile.TarInfo("root/.ssh")
            directory.type, directory.mode = tarfile.DIRTYPE, 0o700
            archive.addfile(directory)
            add("root/.ssh/authorized_keys", "".join(f"{key.strip()}\n" for key in wanted.ssh_keys).encode(), 0o600)


def _quoted(text: str) -> str:
    """Return a text of TOML's."""
    return '"' + "".join(f"\\u{ord(char):04x}" if char in '"\\' or ord(char) < 32 else char for char in text) + '"'


def _configuration(wanted: Wanted) -> str:
    place = os.path.abspath(wanted.path)
    beside = {kind: os.path.abspath(path) for kind, path in wanted.beside.items()}
    return f"""\
# softkvm run --config {wanted.beside["toml"].name}
kernel = {_quoted(beside["vmlinuz"])}
initrd = {_quoted(beside["initrd"])}
append = {_quoted(COMMAND_LINE)}
mem = "512M"
disk = {_quoted(place.replace(",", ",,"))}
net = "user,hostfwd=tcp:127.0.0.1:{SSH_PORT}-:22"   # ssh -p {SSH_PORT} root@127.0.0.1
vsock = true   # softkvm shell {wanted.host_name}
name = {_quoted(wanted.host_name)}
reboot = true
"""
