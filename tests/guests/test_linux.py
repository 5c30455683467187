# SPDX-License-Identifier: Apache-2.0
"""An unmodified Linux boots to its shell on the software CPU, works, and powers off."""

import hashlib
import re

import pytest
from tests.support.guests import booted, linux_guest
from tests.support.machines import open_soft

from softkvm.vmm.guest.initramfs import INIT_REACHED, PROMPT, RUN_ENDED
from softkvm.vmm.outcome import End

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

BOOT_S = 240


@pytest.mark.parametrize("vcpus", [1, 2])
def test_boots_to_a_working_shell(vcpus: int) -> None:
    guest = linux_guest()
    with booted(open_soft(), guest.kernel, guest.initrd, guest.command_line, vcpus=vcpus) as (machine, console):
        console.expect(INIT_REACHED, BOOT_S)
        prompt = re.escape(PROMPT) + r"\S*# "
        console.expect(prompt, BOOT_S)

        def shell(command: str) -> str:
            console.send(command + "\n")
            return console.expect(rf"(?s){re.escape(command)}\r\n(.*?){prompt}", 60)[1]

        assert re.search(r"Linux softkvm \S+-amd64 .* x86_64 GNU/Linux", shell("uname -a"))
        assert shell("nproc").split()[0] == str(vcpus)
        assert "AuthenticAMD" in shell("cat /proc/cpuinfo | head")
        assert "5.67" in shell("awk 'BEGIN { print 1.89 * 3 }'")  # floating point in user space
        total_kib = int(re.search(r"MemTotal: +(\d+)", shell("cat /proc/meminfo | head -1"))[1])  # type: ignore[index]
        assert 200_000 < total_kib <= 256 * 1024
        # A shell of its own says "begun": by then its process group is the terminal's foreground, which takes Ctrl-C.
        console.send("sh -c 'echo begun; sleep 1000'\n")
        console.expect(r"^begun\r\n", 30)
        console.send("\x03")  # job control: Ctrl-C ends the command, not the shell
        console.expect(prompt, 30)
        console.send("exit\n")
        outcome = machine.wait(60)
        text = console.text
    assert outcome.end is End.POWER_OFF, text[-2000:]
    assert not re.search(r"BUG:|Oops|WARNING: CPU|Call Trace|rcu.*stall|soft lockup", text), text


def test_input_that_comes_before_the_shell_is_its_input() -> None:
    """As ``echo 'uname -r; exit' | softkvm run``: more than the port and the terminal hold, most before init."""
    guest = linux_guest()
    lines = [f"line {n}" for n in range(2000)]
    script = "\n".join(["stty -echo", "cat > /tmp/copy <<END", *lines, "END", "md5sum /tmp/copy; exit", ""])
    with booted(open_soft(), guest.kernel, guest.initrd, guest.command_line) as (machine, console):
        console.send(script)
        outcome = machine.wait(BOOT_S)
        text = console.text
    assert outcome.end is End.POWER_OFF, text[-2000:]
    copy = "".join(f"{line}\n" for line in lines)
    assert hashlib.md5(copy.encode()).hexdigest() in text


def test_size_of_the_terminal_reaches_the_guest() -> None:
    guest = linux_guest()
    line = f"{guest.command_line} quiet softkvm.terminal=xterm-256color:43x132"
    with booted(open_soft(), guest.kernel, guest.initrd, line) as (_machine, console):
        prompt = re.escape(PROMPT) + r"\S*# "
        console.expect(prompt, BOOT_S)
        console.send("stty size; echo $TERM\n")
        console.expect(r"^43 132\r\nxterm-256color\r\n", 30)
        console.expect(prompt, 30)
        console.send("resize; stty size\n")
        console.expect(r"\x1b\[6n", 30)
        console.send("\x1b[30;100R")  # what a terminal answers: its cursor is in the far corner
        console.expect(r"30 100\r\n", 30)


def test_commands_of_the_command_line() -> None:
    guest = linux_guest()
    line = f'{guest.command_line} quiet softkvm.run="echo sum $((40 + 2)); false"'
    with booted(open_soft(), guest.kernel, guest.initrd, line) as (machine, console):
        outcome = machine.wait(BOOT_S)
        text = console.text
    assert outcome.end is End.POWER_OFF, text[-2000:]
    assert "sum 42" in text
    assert f"{RUN_ENDED} 1" in text
