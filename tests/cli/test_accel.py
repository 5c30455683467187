# SPDX-License-Identifier: Apache-2.0
"""``--accel``: what is opened, and what is said about it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.machines import KVMS

import softkvm
from softkvm import api
from softkvm.cli import CommandError, accel
from softkvm.kvm import Kvm


@pytest.fixture
def soft_as_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], api.Kvm]:
    """Let KVM in Python stand in for the device, so that every host has one that works."""
    opened = softkvm.open

    def fake(path: str | None = None) -> api.Kvm:
        return opened()

    monkeypatch.setattr(softkvm, "open", fake)
    return opened


def test_device_that_is_missing_is_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "DEV_KVM", str(tmp_path / "kvm"))
    with pytest.raises(CommandError, match=r"--accel kvm: .*No such file") as caught:
        accel.open_kvm("kvm")
    assert caught.value.status == 1


def test_device_that_lacks_something_is_named(
    soft_as_device: Callable[[], api.Kvm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kvm, "check_extension", lambda self, cap: 0)
    with pytest.raises(CommandError, match=r"--accel kvm: /dev/kvm: lacks IRQCHIP, USER_MEMORY"):
        accel.open_kvm("kvm")


def test_auto_takes_a_device_where_a_guest_runs_and_says_so(
    soft_as_device: Callable[[], api.Kvm], capsys: pytest.CaptureFixture[str]
) -> None:
    assert accel.open_kvm("auto")[1] == "kvm"
    assert capsys.readouterr().err == "softkvm: running on /dev/kvm\n"


def test_auto_takes_the_software_cpu_where_none_runs_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    KVMS["soft"]().close()
    monkeypatch.setattr(accel, "DEV_KVM", str(tmp_path / "kvm"))
    assert accel.open_kvm("auto")[1] == "soft"
    (tmp_path / "kvm").touch()
    accel.open_kvm("auto")
    monkeypatch.setattr(softkvm, "open", lambda path=None: Kvm())
    monkeypatch.setattr(accel, "probe", lambda kvm: "is slow")
    accel.open_kvm("auto")
    lines = capsys.readouterr().err.splitlines()
    start = f"softkvm: running on the software CPU: {tmp_path}/kvm"
    assert lines == [f"{start}: No such file or directory", f"{start}: not a KVM device", f"{start} is slow"]
