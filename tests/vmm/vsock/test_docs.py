# SPDX-License-Identifier: Apache-2.0
"""docs/vsock.md says what is so: its options are understood, its limits are the code's, its examples run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from softkvm.cli import vsock_test
from softkvm.cli.main import _Parser
from softkvm.vmm.devices.virtio_vsock import DEFAULT_CID, parse
from softkvm.vmm.vsock.api import Vsock
from softkvm.vmm.vsock.connection import BUFFER_SIZE, CLOSE_TIMEOUT_S, SMALL_BUFFER_SIZE
from softkvm.vmm.vsock.hub import BUDGET, CONNECTIONS
from softkvm.vmm.vsock.packet import CID_MAX
from softkvm.vmm.vsock.unix import PATH
from softkvm.vsocktest.cases import CASES

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "vsock.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^softkvm (\S+)(.*?)(?: +#.*)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("command", "rest"), COMMANDS, ids="".join)
def test_its_commands_are_understood(command: str, rest: str) -> None:
    words = shlex.split(rest)
    if command == "run":
        assert words[0] == "--vsock"
        parse(words[1] if len(words) > 1 else "")
    else:
        assert command == "vsock-test"
        parser = _Parser(prog="softkvm vsock-test", allow_abbrev=False)
        vsock_test.command.add_arguments(parser)
        args = parser.parse_args(words)
        vsock_test._picked(args)


def test_its_limits_are_the_codes() -> None:
    for text in (
        f"at most {PATH.most} bytes",
        f"3 to {CID_MAX} (default: {DEFAULT_CID},",
        f"waits {CLOSE_TIMEOUT_S:g} s",
        f"{CONNECTIONS.most:,} connections",
        f"{BUDGET.most >> 20} MiB",
        f"{BUFFER_SIZE >> 10} KiB each, {SMALL_BUFFER_SIZE >> 10} KiB",
        f"ours, {len(CASES)} cases",
    ):
        assert text in PAGE.replace("\n", " "), text


def test_its_examples_run(vsock: Vsock, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "docs/vsock.md", "exec"), {"machine": SimpleNamespace(vsock=vsock)})
        assert capsys.readouterr().out == "b'hello'\n"


def test_the_list_is_that_of_the_guests_half() -> None:
    source = (Path(__file__).resolve().parents[3] / "guests" / "vsock_test" / "main.c").read_text()
    order = source[source.index("order[] = {") :]
    names = re.findall(r'^\t"(.*)",$', order[: order.index("};")], re.MULTILINE)
    assert names == [case.name for case in CASES]
