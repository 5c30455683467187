# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin, by pytest's own pytester: in a process of its own, as a user has it."""

from __future__ import annotations

import pytest
from tests.support.examples import examples
from tests.support.guests import linux_guest

pytest_plugins = ["pytester"]

TESTS = """
    import pytest

    def test_guest(guest):
        assert guest.run("uname -s").output == "Linux\\n"
        guest.run("echo left > /tmp/behind", check=True)

    def test_guest_is_fresh(guest):
        assert guest.run("cat /tmp/behind").status != 0

    def test_console_is_shown(guest):
        guest.run("echo from the guest")
        assert False

    @pytest.mark.softkvm(vcpus=2, memory=128)
    def test_machine(machine):
        assert len(machine.vcpus) == 2
        assert not machine.vmm.started_ns
        assert machine.vmm.config.memory_size == 128 << 20

    @pytest.mark.softkvm(3)
    def test_positional(machine):
        pass
"""


@pytest.mark.guest
def test_fixtures_are_machines_and_consoles_are_in_reports(pytester: pytest.Pytester) -> None:
    linux_guest()
    example = next(text for _, text in examples("scripting.md") if "def test_" in text)
    pytester.makepyfile(test_own=TESTS, test_example=example)
    result = pytester.runpytest_subprocess("-q", "--strict-markers", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=5, failed=1, errors=1)
    output = result.stdout.str()
    assert output.count("console of <Machine: 1 vCPUs, 256 MiB, running>") == 1
    assert "from the guest" in output
    assert "takes arguments by name" in output


def test_the_fixtures_are_listed_with_what_they_are(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("--fixtures", "-q")
    result.stdout.fnmatch_lines(["guest -- *", "*default guest, running*"])
    result = pytester.runpytest_subprocess("--markers")
    result.stdout.fnmatch_lines(["*@pytest.mark.softkvm(*"])
