# SPDX-License-Identifier: Apache-2.0
"""A Debian image: what comes on top of the packages, who owns it, and that nothing is left of what fails."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from softkvm.vmm.guest import debian
from softkvm.vmm.guest.debian import ImageFailed, Wanted, create

SOFTKVM = (sys.executable, "-m", "softkvm.cli.main")
SIZE = 512 << 20

TOOLS = ("mke2fs", "debugfs", "e2fsck", *(() if os.geteuid() == 0 else ("fakeroot",)))
needs_tools = pytest.mark.skipif(
    any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None for name in TOOLS),
    reason=f"{', '.join(TOOLS)}: not all of them are there",
)


def archive(names: dict[str, bytes]) -> bytes:
    """An archive as mmdebstrap makes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in names.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o640
            member.uid = 42 if name.endswith("shadow") else 0
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


WHOLE = {
    "./boot/vmlinuz-6.1": b"kernel",
    "./boot/initrd.img-6.1": b"initrd",
    "./etc/shadow": b"root:*:19000:0:99999:7:::\nsshd:!:19000::::::\n",
    "./bin/tool": b"tool",
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for mmdebstrap: says with what it was called, and gives what is in the file ``archive``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script = programs / "mmdebstrap"
    script.write_text(f"""\
#!/bin/sh
printf '%s\\n' "$@" > {tmp_path}/arguments
for one; do
    case $one in *.tar) target=$one ;; esac
done
if [ -e {tmp_path}/failure ]; then
    echo 'I: working'
    cat {tmp_path}/failure
    exit 3
fi
cp {tmp_path}/archive "$target"
""")
    script.chmod(0o755)
    (tmp_path / "archive").write_bytes(archive(WHOLE))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}:/usr/sbin")
    (tmp_path / "images").mkdir()
    return tmp_path


def look(image: Path, command: str) -> str:
    done = subprocess.run(["debugfs", "-R", command, image], capture_output=True, text=True, check=True)
    return done.stdout


@needs_tools
def test_an_image_and_what_lies_beside_it(packages: Path) -> None:
    image = packages / "images" / 'a "b",c.img'
    said: list[str] = []
    create(Wanted(image, SIZE, "bookworm", "", ("vim",), "host-1", ("ssh-ed25519 AAAA me",)), said.append)
    assert said == ["packages (some minutes)", "kernel and initial RAM disk", "file system"]
    arguments = (packages / "arguments").read_text().splitlines()
    assert arguments[0] == "--variant=minbase" and "systemd-sysv" in arguments[1] and arguments[1].endswith(",vim")
    assert arguments[-2] == "bookworm"
    assert image.stat().st_size == SIZE
    assert subprocess.run(["e2fsck", "-fn", image], capture_output=True, check=False).returncode == 0
    assert look(image, "cat /etc/hostname") == "host-1\n"
    assert look(image, "cat /etc/shadow").splitlines()[0] == "root::19000:0:99999:7:::"
    assert look(image, "cat /bin/tool") == "tool"
    assert look(image, "cat /root/.ssh/authorized_keys") == "ssh-ed25519 AAAA me\n"
    keys = look(image, "stat /root/.ssh/authorized_keys")
    assert "Mode:  0600" in keys and "User:     0" in keys
    assert "Mode:  0700" in look(image, "stat /root/.ssh")
    assert "Mode:  0755" in look(image, "stat /usr/local/sbin/softkvm-agent")
    assert "/lib/systemd/system/systemd-networkd.service" in look(
        image, "stat /etc/systemd/system/multi-user.target.wants/systemd-networkd.service"
    )
    beside = Wanted(image).beside
    assert beside["vmlinuz"].read_bytes() == b"kernel" and beside["initrd"].read_bytes() == b"initrd"
    options = tomllib.loads(beside["toml"].read_text())
    assert options["kernel"] == str(beside["vmlinuz"]) and options["initrd"] == str(beside["initrd"])
    assert options["disk"] == str(image).replace(",", ",,") and options["name"] == "host-1"
    assert sorted(path.name for path in image.parent.iterdir()) == sorted(
        [image.name, *(path.name for path in beside.values())]
    )


@needs_tools
@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"./etc/shadow": WHOLE["./etc/shadow"]}, "no kernel with an initial RAM disk"),
        ({name: data for name, data in WHOLE.items() if "initrd" not in name}, "no kernel with an initial RAM disk"),
        ({name: data for name, data in WHOLE.items() if "shadow" not in name}, "no passwords"),
    ],
)
def test_packages_that_are_not_enough_leave_nothing(packages: Path, names: dict[str, bytes], words: str) -> None:
    (packages / "archive").write_bytes(archive(names))
    with pytest.raises(ImageFailed, match=words):
        create(Wanted(packages / "images" / "x.img", SIZE))
    assert list((packages / "images").iterdir()) == []


@needs_tools
def test_what_a_program_says_of_its_failure_is_told(packages: Path) -> None:
    (packages / "failure").write_text("E: no such suite\nI: removing\n")
    with pytest.raises(ImageFailed, match=r"^mmdebstrap failed: E: no such suite$"):
        create(Wanted(packages / "images" / "x.img", SIZE))
    (packages / "failure").unlink()
    for damaged in (b"", b"no archive", archive(WHOLE)[:700]):
        (packages / "archive").write_bytes(damaged)
        with pytest.raises(ImageFailed, match=r"is damaged|have brought"):
            create(Wanted(packages / "images" / "x.img", SIZE))
    assert list((packages / "images").iterdir()) == []


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(ImageFailed, match=r"apt-get install mmdebstrap e2fsprogs tar"):
        create(Wanted(tmp_path / "x.img"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"size": 1 << 20}, "size 1M: expected at least 512M"),
        ({"host_name": "a b"}, "host name a b"),
        ({"host_name": "x" * 64}, "host name x"),
        ({"host_name": ""}, "host name"),
        ({"suite": "--help"}, "suite --help"),
        ({"packages": ("vim;rm",)}, "package vim;rm"),
        ({"packages": ("--x",)}, "package --x"),
    ],
)
def test_images_that_cannot_be(more: dict[str, object], words: str) -> None:
    with pytest.raises(ImageFailed) as error:
        Wanted(Path("x"), **more)  # type: ignore[arg-type]
    assert words in str(error.value)


def test_the_command_refuses_before_it_begins(tmp_path: Path) -> None:
    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*SOFTKVM, "image", "create", *args], capture_output=True, text=True, check=False)

    (tmp_path / "there").touch()
    for args, words in (
        ([tmp_path / "there"], "File exists; --force replaces it"),
        ([tmp_path / "no" / "x"], "there is no directory"),
        ([tmp_path / "x", "--size", "1M"], "expected at least 512M"),
        ([tmp_path / "x", "--ssh-key", tmp_path / "no"], "--ssh-key: No such file or directory"),
    ):
        done = run(*args)
        assert (done.returncode, words in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr
    assert stat.S_ISREG((tmp_path / "there").stat().st_mode)
    assert debian.MIN_SIZE == SIZE
