# SPDX-License-Identifier: Apache-2.0
"""A stand-in for ``qemu-system-x86_64``: answers by the guest's command line, as told."""

import sys
from pathlib import Path

_SCRIPT = """\
#!{python}
import sys
replies = {replies!r}
if "--version" in sys.argv:
    print("QEMU emulator version 0 (a stand-in)")
    sys.exit(0)
words = sys.argv[1:]
append = words[words.index("-append") + 1] if "-append" in words else ""
with open({log!r}, "a") as log:
    log.write(repr(words) + "\\n")
status, text, error = replies.get(append, (1, "", "stand-in: no such guest"))
sys.stdout.write(text)
sys.stdout.flush()
if error:
    sys.stderr.write(error + "\\n")
if status is None:
    import time
    time.sleep(1000)
sys.exit(status)
"""

Reply = tuple[int | None, str, str]
"""Exit status (None: it hangs), standard output, standard error."""


def fake_qemu(directory: Path, replies: dict[str, Reply]) -> Path:
    """Write the program into *directory* and return its path; what it was called with goes to ``calls`` beside it."""
    path = directory / "qemu-system-x86_64"
    path.write_text(_SCRIPT.format(python=sys.executable, replies=replies, log=str(directory / "calls")))
    path.chmod(0o755)
    return path


def calls(path: Path) -> list[str]:
    """The command lines that the program was called with, without ``--version``."""
    log = path.parent / "calls"
    return log.read_text().splitlines() if log.exists() else []
