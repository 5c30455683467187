# SPDX-License-Identifier: Apache-2.0
"""``softkvm run --config FILE`` and ``--dry-run``: the same options in a file; the machine without its start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.cli import CommandError
from softkvm.cli.configuration import expand
from softkvm.cli.main import _Parser, load_command

SOFTKVM = (sys.executable, "-m", "softkvm.cli.main")


def parser() -> _Parser:
    parser = _Parser(prog="softkvm run", allow_abbrev=False)
    load_command("softkvm.cli.run").add_arguments(parser)
    return parser


def read(path: Path, text: str, *arguments: str) -> dict[str, Any]:
    path.write_text(text)
    expanded, command = expand(parser(), ["--config", str(path), *arguments], None)
    return {**vars(parser().parse_intermixed_args(expanded)), "command": command}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "machine.toml"


def test_every_kind_of_option(file: Path) -> None:
    args = read(
        file,
        """
        # a machine
        kernel = "bzImage"
        initrd = ["one", "two"]
        mem = 512
        vcpus = 2
        timeout = 1.5
        reboot = true
        pin_memory = true
        detach = false
        cpu-quota = "50"
        disk = ["a.img,ro", "b.img"]
        vsock = true
        rng = false
        command = ["sh", "-c", "true"]
        """,
    )
    assert args["kernel"] == "bzImage" and args["initrd"] == ["one", "two"]
    assert (args["mem"], args["vcpus"], args["timeout"], args["cpu_quota"]) == ("512", "2", "1.5", "50")
    assert args["reboot"] is True and args["pin_memory"] is True and args["detach"] is False
    assert args["disk"] == ["a.img,ro", "b.img"] and args["vsock"] == [""] and args["rng"] == []
    assert args["command"] == ["sh", "-c", "true"]


def test_other_names_are_kvmtools_and_qemus() -> None:
    args = parser().parse_intermixed_args(["--smp", "3", "--memory", "64M", "-d", "a", "--disk", "b", "-d", "c"])
    assert (args.vcpus, args.mem, args.disk) == ("3", "64M", ["a", "b", "c"])
    assert parser().parse_intermixed_args(["--cpus", "2"]).vcpus == "2"
    args = parser().parse_intermixed_args([])
    assert (args.vcpus, args.mem, args.disk) == ("1", "256M", [])


def test_the_command_line_comes_after_the_file(file: Path) -> None:
    args = read(file, 'mem = 512\nreboot = true\ndisk = "a"\n', "-m", "1G", "--no-reboot", "--disk", "b")
    assert (args["mem"], args["reboot"], args["disk"]) == ("1G", False, ["a", "b"])
    assert expand(parser(), [f"--config={file}"], ["mine"])[1] == ["mine"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mem = 512\nkernal = 'x'\n", "machine.toml:2: kernal: there is no such option; did you mean kernel?"),
        ("\n\n'xyzzy' = 1", "machine.toml:3: xyzzy: there is no such option"),
        ("\n[disk]\nfile = 1\n", "machine.toml:2: disk: expected a text, a number or a list of them"),
        ("mem = [1, 2]\n", "machine.toml:1: mem: expected one value, got a list"),
        ("mem = true\n", "machine.toml:1: mem: expected a text or a number"),
        ("mem = 2026-01-01\n", "machine.toml:1: mem: expected a text or a number"),
        ("reboot = 1\n", "machine.toml:1: reboot: expected true or false"),
        ("detach = 'yes'\n", "machine.toml:1: detach: expected true or false"),
        ("command = 'ls'\n", "machine.toml:1: command: expected a list of texts"),
        ("command = []\n", "machine.toml:1: command: expected a list of texts"),
        ("config = 'other'\n", "machine.toml:1: config: there is no such option"),
        ("help = true\n", "machine.toml:1: help: there is no such option"),
        ("no-reboot = true\n", "machine.toml:1: no-reboot: there is no such option; did you mean reboot?"),
        ("mem = \n", "machine.toml: Invalid value (at line 1, column 7)"),
        ("mem = 1\nmem = 2\n", "machine.toml: Cannot overwrite a value (at line 2, column 8)"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(file: Path, text: str, words: str) -> None:
    with pytest.raises(CommandError) as error:
        read(file, text)
    assert words in str(error.value)
    assert error.value.status == 2


def test_the_example_of_the_guide(file: Path) -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guide.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    args = read(file, example)
    assert (args["mem"], args["reboot"], args["command"]) == ("1G", True, ["sh", "-c", "exit 3"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "missing", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(CommandError, match=words):
            expand(parser(), ["--config", str(path)], None)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"#" * (1 << 21))
    (tmp_path / "deep").write_text("a = " + "[" * 100_000)
    for name in ("binary", "large", "deep"):
        with pytest.raises(CommandError) as error:
            expand(parser(), ["--config", str(tmp_path / name)], None)
        assert str(tmp_path / name) in str(error.value)


_PARSER = parser()


@given(
    st.text(max_size=60) | st.lists(st.sampled_from(["mem", "=", "1", "\n", "[", "]", '"', "disk", ","])).map("".join)
)
def test_any_text_is_options_or_one_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        expand(_PARSER, ["--config", str(path)], None)
    except CommandError:
        return


def softkvm(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SOFTKVM, "run", *args], capture_output=True, text=True, timeout=60, check=False)


def test_a_dry_run_prints_the_machine_and_starts_nothing(file: Path, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xeb\xfe")
    file.write_text(
        f'kernel = "flat:{tmp_path / "image"}"\nvcpus = 2\nmem = "4G"\nrng = true\nvsock = "transport=mmio"\n'
    )
    done = softkvm("--config", file, "--dry-run", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["vcpus"], told["accel"], told["command_line"]) == (2, "soft", None)
    assert [ram["end"] - ram["start"] + 1 for ram in told["memory"]] == [3 << 30, 1 << 30]
    assert {"start": 0x3F8, "end": 0x3FF, "name": "com1"} in told["ports"]
    assert told["pci"][0]["address"] == "00:00.0"
    assert {one["name"]: one["transport"] for one in told["virtio"]} == {"rng0": "pci", "vsock0": "mmio"}
    text = softkvm("--config", file, "--dry-run").stdout
    assert "vCPUs         2\n" in text and "virtio        rng0: type 4 on pci, queues " in text
    wrong = softkvm("--config", file, "--dry-run", "--vsock", "cid=1")
    assert wrong.returncode == 2 and wrong.stdout == ""


def test_of_a_file_too_what_is_wrong_is_one_line(file: Path) -> None:
    file.write_text("vcpus = 99\n")
    done = softkvm("--config", file)
    assert (done.returncode, done.stderr) == (2, "softkvm: --vcpus 99: expected a number from 1 to 16\n")
    done = softkvm("--config")
    assert (done.returncode, done.stderr) == (2, "softkvm: --config: expected one argument\n")
