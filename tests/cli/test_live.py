# SPDX-License-Identifier: Apache-2.0
"""The list of running machines: whole where no terminal is, a line each where one is."""

from softkvm.cli.live import listed
from softkvm.live.asker import Process

COMMAND = "/a/long/way/to/python /a/long/way/to/softkvm run --kernel bzImage --vcpus 2 --mem 512M --timeout 60"


def test_commands_are_whole() -> None:
    lines = listed([Process(17, "softkvm", COMMAND)])
    assert lines[-1] == f"17   softkvm  {COMMAND}"
    assert len(lines[1]) == 80 < len(lines[-1])


def test_lines_are_as_long_as_the_terminal_is_wide() -> None:
    lines = listed([Process(17, "softkvm", COMMAND)], 40)
    assert max(map(len, lines)) == 40 and lines[-1] == f"17   softkvm  {COMMAND}"[:40]


def test_control_characters_in_a_command_stay_one_line() -> None:
    assert listed([Process(17, "x", "a\nb\x1b[2J")])[-1] == r"17   x     a\nb\x1b[2J"
