# SPDX-License-Identifier: Apache-2.0
"""What the measurements of memory refuse, those that have the same options alike."""

from __future__ import annotations

import pytest

from softkvm.cli.main import main

BOTH = [
    (["--memory", "1M"], "--memory 1M: expected a size such as 256M or 2G, a multiple of 2M"),
    (["--memory", "900T"], "this host has"),
    (["--vcpus", "0"], "--vcpus 0: expected a number from 1 to 256"),
    (["--write-percent", "101"], "--write-percent 101: expected a number from 0 to 100"),
    (["--plot", "x.gif"], "--plot x.gif: expected a name that ends with .png or .svg"),
    (["--json", "/nowhere/x"], "--json /nowhere/x: No such file or directory"),
]
OWN = {
    "dirty-log": [(["--memory", "0"], "0 KiB of memory for each vCPU: expected 2 MiB")],
    "demand-paging": [(["--delay", "-1"], "--delay -1: expected a number from 0 to 1000000")],
}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [(name, *case) for name, own in OWN.items() for case in (*BOTH, *own)],
)
def test_bad_usage_is_one_line_and_status_2(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", name, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
