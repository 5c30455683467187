# SPDX-License-Identifier: Apache-2.0
"""Plugins: the examples of docs/hacking.md as they stand there, and what is said of plugins that are none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HACKING = Path(__file__).resolve().parents[1] / "docs" / "hacking.md"
RUN = (sys.executable, "-m", "softkvm.cli.main", "run")
POWER_OFF = "ba0406 b80034 ef f4ebfd"


def example(name: str, directory: Path) -> Path:
    """Write the example *name* of the document to a file."""
    blocks = re.findall(r"^```python\n(# (\S+\.py)\n.*?)^```", HACKING.read_text(), re.MULTILINE | re.DOTALL)
    path = directory / name
    path.write_text(next(text for text, block in blocks if block == name))
    return path


def run(tmp_path: Path, code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "guest.bin").write_bytes(bytes.fromhex(code))
    return subprocess.run(
        [*RUN, *map(str, arguments), "--timeout", "60", f"flat:{tmp_path}/guest.bin"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_example_counts_cpuid_leaves_and_changes_one(tmp_path: Path) -> None:
    # mov eax, 0x40000000; cpuid; mov eax, ebx; four bytes of it
    code = "66b800000000 0fa2" + "66b800000040 0fa2 6689d8" + "baf803" + "ee 66c1e808" * 4 + POWER_OFF
    done = run(tmp_path, code, "--plugin", example("cpuid.py", tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "MyKV\nleaf 0x0: 1\nleaf 0x40000000: 1\n"


def test_example_of_a_paravirtual_msr_and_hypercall(tmp_path: Path) -> None:
    # mov ecx, the MSR; wrmsr 0x4140; rdmsr gives it back; vmcall 100 with RBX = 0x0101: sum 0x4241, "AB"
    wrmsr = "66b9f04d564b 66b840410000 6631d2 0f30 6631c0 0f32"
    hypercall = "66b864000000 66bb01010000 0f01d9"
    code = wrmsr + hypercall + "baf803 ee 66c1e808 ee" + POWER_OFF
    done = run(tmp_path, code, "--plugin", example("greeting.py", tmp_path))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "AB")


def test_example_of_a_mapping_policy(tmp_path: Path) -> None:
    # a byte to each of twelve pages from 0x20000 on: mov ax, 0x2000; mov cx, 12; mov ds, ax; mov [0], al; add ax, 256
    code = "b80020 b90c00 8ed8 a20000 050001 e2f6" + POWER_OFF
    done = run(tmp_path, code, "--plugin", example("touched.py", tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    match = re.fullmatch(r"(\d+) pages, in (\d+) regions\n", done.stdout)
    assert match
    pages, regions = map(int, match.groups())
    assert regions == 1
    assert 13 <= pages < 20  # the twelve, and that of the code


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory"),
        ("x = 1\n", "has no function softkvm_plugin(policy)"),
        ("def softkvm_plugin():\n    pass\n", "has no function softkvm_plugin(policy)"),
        ("def softkvm_plugin(policy):\n    policy.exit_handler[1]\n", "softkvm_plugin: AttributeError: "),
        ("def softkvm_plugin(policy):\n    {}[1]\n", "softkvm_plugin: KeyError: 1 (plugin.py:2)\n"),
        ("1 / 0\n", "ZeroDivisionError: division by zero (plugin.py:1)\n"),
        ("\nint('x', 99)\n", "ValueError: int() base must be >= 2 and <= 36, or 0 (plugin.py:2)\n"),
        ("import os\nos.stat('/no/such')\n", "FileNotFoundError: [Errno 2] No such file or directory: '/no/such'"),
        ("def\n", "SyntaxError: invalid syntax (plugin.py, line 1)\n"),
    ],
)
def test_file_that_is_no_plugin_is_one_line_and_status_2(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "plugin.py"
    if text is not None:
        path.write_text(text)
    done = run(tmp_path, POWER_OFF, "--plugin", path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"softkvm: --plugin {path}: {said}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_handler_that_raises_says_where(tmp_path: Path) -> None:
    plugin = tmp_path / "raises.py"
    plugin.write_text(
        "from softkvm.kvm.x86.svm import vmcb\n"
        "def softkvm_plugin(policy):\n"
        "    def handler(vcpu):\n"
        "        raise ValueError('boo')\n"
        "    policy.exit_handlers[vmcb.EXIT_IOIO] = handler\n"
    )
    done = run(tmp_path, POWER_OFF, "--plugin", plugin)
    assert done.returncode == 1
    assert done.stderr == "softkvm: internal error: vCPU 0: ValueError: boo (raises.py:4)\n"


RAISING = {
    "as it is loaded": ("1 / 0", 2, "--plugin {path}: ZeroDivisionError: division by zero"),
    "in softkvm_plugin": (
        "def softkvm_plugin(policy): 1 / 0",
        2,
        "--plugin {path}: softkvm_plugin: ZeroDivisionError: division by zero",
    ),
    "as a machine is made": (
        "def created(vm): 1 / 0\ndef softkvm_plugin(policy): policy.vm_created.append(created)",
        1,
        "internal error: ZeroDivisionError: division by zero",
    ),
    "on a vCPU's thread": (
        "def handler(vcpu): 1 / 0\ndef softkvm_plugin(policy): policy.exit_handlers[0x7b] = handler",
        1,
        "internal error: vCPU 0: ZeroDivisionError: division by zero",
    ),
    "at the end": (
        "def end(): 1 / 0\ndef softkvm_plugin(policy): policy.at_end.append(end)",
        1,
        "internal error: ZeroDivisionError: division by zero",
    ),
}


@pytest.mark.parametrize("when", RAISING)
def test_development_mode_shows_the_traceback_of_what_a_plugin_raises(tmp_path: Path, when: str) -> None:
    text, status, message = RAISING[when]
    plugin = tmp_path / "raises.py"
    plugin.write_text(text)
    line = f"softkvm: {message.format(path=plugin)} (raises.py:1)\n"
    plain = run(tmp_path, POWER_OFF, "--plugin", plugin)
    assert (plain.returncode, plain.stderr) == (status, line)
    (tmp_path / "guest.bin").write_bytes(bytes.fromhex(POWER_OFF))
    done = subprocess.run(
        [sys.executable, "-X", "dev", *RUN[1:], "--plugin", str(plugin), f"flat:{tmp_path}/guest.bin"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == status
    assert re.search(
        rf'^Traceback \(most recent call last\):\n(?:  .*\n)*  File "{re.escape(str(plugin))}", line 1, in .*\n'
        r"(?:  .*\n)*ZeroDivisionError: division by zero\n",
        done.stderr,
        re.MULTILINE,
    ), done.stderr
    assert done.stderr.endswith(line)


@pytest.mark.parametrize("reader", ["full", "gone"])
def test_report_that_standard_output_does_not_take_is_said_like_any_other(tmp_path: Path, reader: str) -> None:
    plugin = tmp_path / "long.py"
    plugin.write_text("def softkvm_plugin(policy): policy.at_end.append(lambda: print('x' * 100_000))")
    (tmp_path / "guest.bin").write_bytes(bytes.fromhex(POWER_OFF))
    command = [*RUN, "--plugin", str(plugin), f"flat:{tmp_path}/guest.bin"]
    if reader == "full":
        sink = os.open("/dev/full", os.O_WRONLY)
    else:
        other, sink = os.pipe()
        os.close(other)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.PIPE, text=True, timeout=120
    )  # fmt: skip
    os.close(sink)
    status, said = {"full": (1, "softkvm: standard output: No space left on device\n"), "gone": (141, "")}[reader]
    assert (done.returncode, done.stderr) == (status, said)
