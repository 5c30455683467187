# SPDX-License-Identifier: Apache-2.0
"""``softkvm guest`` with a guest in the cache and without."""

import json
from pathlib import Path

import pytest

from softkvm.cli.main import main
from softkvm.vmm.guest import Guest, GuestUnavailable

GUEST = Guest(Path("/c/linux-1/vmlinuz"), Path("/c/linux-1/initrd"), "console=ttyS0", "linux.deb", "busybox.deb")


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Replaces the preparation; the list gets the value of force of each call."""
    calls: list[bool] = []

    def prepare(progress: object, *, force: bool = False) -> Guest:
        calls.append(force)
        return GUEST

    monkeypatch.setattr("softkvm.cli.guest.prepare", prepare)
    return calls


def test_prints_where_the_guest_is(prepared: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest"]) == 0
    assert "/c/linux-1/vmlinuz  (linux.deb)" in capsys.readouterr().out
    assert prepared == [False]


def test_json(prepared: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", "--force", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kernel"] == "/c/linux-1/vmlinuz"
    assert shown["busybox_package"] == "busybox.deb"
    assert prepared == [True]


def test_path_prepares_nothing(
    prepared: list[bool], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["guest", "--path"]) == 1
    assert f"no guest is prepared in {tmp_path}/softkvm/guest" in capsys.readouterr().err
    monkeypatch.setattr("softkvm.cli.guest.cached", lambda: GUEST)
    assert main(["guest", "--path"]) == 0
    assert capsys.readouterr().out == "/c/linux-1\n"
    assert prepared == []


def test_unavailable_is_one_line_that_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(progress: object, *, force: bool = False) -> Guest:
        raise GuestUnavailable("there is no apt-get here")

    monkeypatch.setattr("softkvm.cli.guest.prepare", prepare)
    assert main(["guest"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no apt-get" in error
    assert "--kernel" in error
