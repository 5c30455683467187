# SPDX-License-Identifier: Apache-2.0
"""Files of results: complete or not at all, whatever they are written to."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from softkvm.cli import CommandError
from softkvm.cli.output import OutputFile, one_line


def test_file_appears_complete_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "out"
    file = OutputFile("--json", str(path))
    assert os.listdir(tmp_path) == []
    file.write("größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert os.listdir(tmp_path) == ["out"]


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    file = OutputFile("--json", str(path))

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    with pytest.raises(CommandError, match=r"^--json .*/out: No space left on device$") as caught:
        file.write("new")
    assert caught.value.status == 1
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_mode_is_kept_and_a_symbolic_link_leads_on(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    OutputFile("--json", str(tmp_path / "link")).write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o600


def test_pipe_is_written_to_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    file = OutputFile("--stats", str(pipe))
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    file.write("all of it")
    reader.join(10)
    assert received == ["all of it"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_device_is_written_to_not_replaced() -> None:
    master, slave = os.openpty()
    name = os.ttyname(slave)
    OutputFile("--stats", name).write("x")
    assert os.read(master, 1) == b"x"
    assert stat.S_ISCHR(os.stat(name).st_mode)
    os.close(master)
    os.close(slave)


def test_dash_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    OutputFile("--json", "-").write("{}\n")
    assert capsys.readouterr().out == "{}\n"


@pytest.mark.parametrize(("name", "reason"), [("", "Is a directory"), ("no/x", "No such file"), ("f/x", "Not a dir")])
def test_what_cannot_be_written_is_said_at_once(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(CommandError, match=f"--json {tmp_path / name}: {reason}") as caught:
        OutputFile("--json", str(tmp_path / name))
    assert caught.value.status == 2


def test_control_characters_of_names_are_written_out() -> None:
    assert one_line("a\nb\x1b[2Jü\udcff") == r"a\nb\x1b[2Jü\udcff"
