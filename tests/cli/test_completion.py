# SPDX-License-Identifier: Apache-2.0
"""What shells are given to complete the command line with."""

import shutil
import subprocess

import pytest

from softkvm.cli import completion
from softkvm.cli.main import COMMANDS, main


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_script_has_every_command_and_is_valid(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "plugin" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)


def test_bash_completes_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    main(["completion", "bash"])
    script = capsys.readouterr().out
    tail = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_softkvm; printf "%s\\n" "${COMPREPLY[@]}"'
    for words, expected in (("softkvm un", "unittests"), ("softkvm run --pl", "--plugin")):
        text = f"{script}\nCOMP_WORDS=({words})\n{tail}\n"
        done = subprocess.run([bash], input=text, capture_output=True, text=True, timeout=60, check=False)
        assert expected in done.stdout.split(), done


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "softkvm: completion needs the package shtab: pip install shtab\n"
