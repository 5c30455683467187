# SPDX-License-Identifier: Apache-2.0
"""Preparing the default guest with a stand-in for apt, and once with the real one."""

import errno
import fcntl
import hashlib
import os
import pwd
import shutil
import stat
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from tests.support.debs import package, tar

from softkvm.progress import NoProgress
from softkvm.vmm.guest import GuestUnavailable, apt, cache_directory, cached, default, initramfs, prepare

KERNEL_DEB = "linux-image-6.1.0-9-cloud-amd64_6.1_amd64.deb"
BUSYBOX_DEB = "busybox-static_1.35_amd64.deb"

FAKE_APT_GET = """#!/bin/sh
case "$*" in
*--print-uris*) exec cat "$FAKE/uris" ;;
*update*) echo run >> "$FAKE/updates" ;;
*download*linux-image*) cp "$FAKE"/linux-image*.deb . ;;
*download*) cp "$FAKE"/busybox*.deb . ;;
esac
"""
FAKE_APT_CACHE = """#!/bin/sh
for last; do :; done
case $last in
linux-image-cloud-amd64) printf 'Package: %s\\nDepends: linux-image-6.1.0-9-cloud-amd64 (= 6.1)\\n' $last ;;
linux-image-6*) echo "Package: $last" ;;
*) exit 100 ;;
esac
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of packages that a stand-in for apt serves, and an empty cache."""
    import lzma

    root = tmp_path / "fake"
    root.mkdir()
    package(root / KERNEL_DEB, lzma.compress(tar({"./boot/System.map": b"", "./boot/vmlinuz-6.1": b"kernel"})))
    package(root / BUSYBOX_DEB, lzma.compress(tar({"./bin/busybox": b"\x7fELF box"})))
    (root / "uris").write_text("'x:/y' name.deb 12 MD5Sum:0\n")
    for name, text in (("apt-get", FAKE_APT_GET), ("apt-cache", FAKE_APT_CACHE)):
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    monkeypatch.setenv("FAKE", str(root))
    monkeypatch.setenv("PATH", f"{root}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def leftovers() -> list[str]:
    return sorted(path.name for path in cache_directory().iterdir() if path.name.startswith(".work"))


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory() == Path("/x/softkvm/guest")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored
    assert cache_directory() == Path.home() / ".cache/softkvm/guest"


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_home_comes_from_the_user_database_where_the_environment_has_none(
    monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert cache_directory() == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache/softkvm/guest"

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(GuestUnavailable, match="no home directory"):
        prepare()


class Steps(NoProgress):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def step(self, label: str) -> None:
        self.told.append(label)

    def done(self) -> None:
        self.told.append("done")


def test_step_that_fails_is_not_shown_as_done(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    steps = Steps()
    with pytest.raises(GuestUnavailable):
        prepare(steps)
    assert "done" not in steps.told


def test_waiting_for_another_process_is_said(fake: Path) -> None:
    prepare()
    steps = Steps()
    with (cache_directory() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.5, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        prepare(steps, force=True)
    assert steps.told[0] == "waiting for another softkvm that prepares the guest"
    assert steps.told[-1] == "done"


def test_prepared_once_then_taken_from_the_cache(fake: Path) -> None:
    assert cached() is None
    guest = prepare()
    assert guest.kernel.read_bytes() == b"kernel"
    assert b"\x7fELF box" in guest.initrd.read_bytes()
    assert (guest.kernel_package, guest.busybox_package) == (KERNEL_DEB, BUSYBOX_DEB)
    assert prepare() == guest == cached()
    assert (fake / "updates").read_text() == "run\n"
    assert leftovers() == []


def test_force_downloads_again(fake: Path) -> None:
    prepare()
    prepare(force=True)
    assert (fake / "updates").read_text() == "run\nrun\n"


def test_a_damaged_cache_is_made_anew(fake: Path) -> None:
    guest = prepare()
    guest.kernel.write_bytes(b"half of a ker")
    assert cached() is None
    assert prepare().kernel.read_bytes() == b"kernel"
    (manifest,) = cache_directory().glob("guest*.json")
    manifest.write_text("[" * 100_000)
    assert cached() is None


def test_a_new_init_needs_no_download(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare()
    monkeypatch.setattr(initramfs, "scripts", lambda: {"init": b"#!/bin/sh\necho new\n"})
    new = prepare()
    assert b"echo new" in new.initrd.read_bytes()
    assert new.kernel.read_bytes() == b"kernel"
    assert (fake / "updates").read_text() == "run\n"


def test_versions_of_softkvm_have_a_guest_each_until_one_is_unused_for_long(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = prepare()
    before = initramfs.scripts
    monkeypatch.setattr(initramfs, "scripts", lambda: {"init": b"#!/bin/sh\necho new\n"})
    new = prepare()
    assert old.initrd.exists()
    assert cached() == new
    monkeypatch.setattr(initramfs, "scripts", before)
    assert cached() == old
    for manifest in cache_directory().glob("guest*.json"):
        os.utime(manifest, (0, 0))
    assert cached() == old  # which is noted
    monkeypatch.setattr(initramfs, "scripts", lambda: {"init": b"#!/bin/sh\necho newer\n"})
    prepare()
    assert old.initrd.exists()
    assert not new.initrd.exists()


def test_checksum_of_the_package_list_is_checked(fake: Path) -> None:
    (fake / "uris").write_text(f"'x:/y' name.deb 12 SHA256:{hashlib.sha256(b'other').hexdigest()}\n")
    with pytest.raises(GuestUnavailable, match="damaged"):
        prepare()
    assert cached() is None
    assert leftovers() == []


def test_apt_failing_is_one_line_with_its_reason(fake: Path) -> None:
    (fake / "apt-get").write_text("#!/bin/sh\necho 'W: x' >&2\necho 'E: Could not resolve the mirror' >&2\nexit 100\n")
    with pytest.raises(GuestUnavailable) as caught:
        prepare()
    assert str(caught.value) == "apt-get update failed: Could not resolve the mirror"


def test_apt_hanging_is_one_line_and_ends_it(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake / "apt-get").write_text('#!/bin/sh\necho $$ > "$FAKE/pid"\nsleep 1000\n')
    monkeypatch.setattr(apt, "STALL_S", 0.5)
    with pytest.raises(GuestUnavailable, match="apt-get update made no progress"):
        prepare()
    pid = int((fake / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_disk_filling_up_below_apt_is_one_line(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake / "apt-get").write_text("#!/bin/sh\nsleep 1000\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, used=10, free=0))
    with pytest.raises(GuestUnavailable, match="no room for the default guest"):
        prepare()
    assert leftovers() == []


def test_no_apt_is_one_line(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(GuestUnavailable, match="there is no apt-get here"):
        prepare()


def test_sources_without_the_kernel_are_one_line(fake: Path) -> None:
    (fake / "apt-cache").write_text("#!/bin/sh\nexit 100\n")
    with pytest.raises(GuestUnavailable, match="linux-image-cloud-amd64"):
        prepare()


def test_a_package_without_the_kernel_is_one_line(fake: Path) -> None:
    import lzma

    package(fake / KERNEL_DEB, lzma.compress(tar({"./boot/other": b""})))
    with pytest.raises(GuestUnavailable, match=KERNEL_DEB):
        prepare()


def test_full_disk_is_one_line_and_leaves_the_old_guest(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = prepare()

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(default, "_write_synced", full)
    with pytest.raises(GuestUnavailable, match=r"no room for the default guest in .*: No space left on device"):
        prepare(force=True)
    assert cached() == old
    assert leftovers() == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_unusable_cache_directory_is_one_line(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/full")
    with pytest.raises(GuestUnavailable, match="cannot be kept in /dev/full"):
        prepare()


def test_what_a_killed_process_left_is_removed(fake: Path) -> None:
    stale = cache_directory() / ".work-old"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"x")
    prepare()
    assert leftovers() == []


def test_scripts_are_valid_shell(tmp_path: Path) -> None:
    import subprocess

    scripts = initramfs.scripts()
    scripts.pop(initramfs.AGENT, None)
    for script in scripts.values():
        assert script.startswith(b"#!/bin/sh\n")
        subprocess.run(["sh", "-n"], input=script, check=True)
    assert initramfs.INIT_REACHED in scripts["init"].decode()
    assert initramfs.RUN_ENDED in scripts["init"].decode()


@pytest.mark.network
def test_the_real_default_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest that every other test boots: prepared in the user's own cache, so downloaded once."""
    try:
        guest = prepare()
    except GuestUnavailable as error:
        if os.environ.get("SOFTKVM_CI"):
            raise
        pytest.skip(str(error))
    data = guest.kernel.read_bytes()
    assert data[0x202:0x206] == b"HdrS"  # the Linux boot protocol's signature
    assert stat.S_ISREG(guest.initrd.stat().st_mode)
    assert guest.initrd.read_bytes()[:6] == b"070701"
