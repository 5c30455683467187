# SPDX-License-Identifier: Apache-2.0
"""Entries on QEMU: the command line that the suite's programs need, and what its ends mean."""

import ast
import functools
import time
from pathlib import Path

import pytest
from tests.support.fake_qemu import Reply, calls, fake_qemu

from softkvm import qemu
from softkvm.unittests import Entry, Result, Settings, Status, SuiteError
from softkvm.unittests.qemu import command, run_entry
from softkvm.unittests.suite import SuiteRun

SETTINGS = Settings("tcg")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A suite whose images nothing reads."""
    x86 = tmp_path / "suite" / "x86"
    x86.mkdir(parents=True)
    (x86 / "unittests.cfg").write_text("[x]\nfile = x.flat\n")
    (x86 / "x.flat").write_bytes(b"")
    return x86.parent


def run(directory: Path, reply: Reply, entry: Entry | None = None, settings: Settings = SETTINGS) -> Result:
    program = fake_qemu(directory, {"x": reply})
    return run_entry(directory, entry or Entry("x", "x.flat", test_args="x"), settings, program=str(program))


def value_of(words: list[str], option: str) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == option]


def test_command_line_has_the_devices_the_arguments_and_the_entrys_options_last() -> None:
    entry = Entry("x", "x.flat", smp="2", test_args="'a b'", qemu_params="-machine pit=off -cpu max,+vmx")
    words = command("/q", Path("/s/x86/x.flat"), entry)
    assert words[0] == "/q"
    assert value_of(words, "-device") == ["pc-testdev", "isa-debug-exit,iobase=0xf4,iosize=0x4", "pci-testdev"]
    assert value_of(words, "-accel") == ["tcg"]
    assert value_of(words, "-kernel") == ["/s/x86/x.flat"]
    assert value_of(words, "-smp") == ["2"]
    assert value_of(words, "-append") == ["a b"]
    assert value_of(words, "-serial") == ["stdio"]
    assert {"-no-reboot", "-nodefaults"} <= set(words)
    assert words[-4:] == ["-machine", "pit=off", "-cpu", "max,+vmx"]


def test_arguments_that_cannot_be_read_are_an_error() -> None:
    with pytest.raises(SuiteError, match=r"\[x\]"):
        command("/q", Path("/x"), Entry("x", "x.flat", qemu_params="-cpu 'max"))


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ((1, "SUMMARY: 3 tests\n", ""), "PASS x (3 tests)"),
        ((3, "FAIL: one\nSUMMARY: 3 tests, 1 unexpected failures\n", ""), "FAIL x (3 tests, 1 unexpected failures)"),
        ((77, "SUMMARY: 1 tests, 1 skipped\n", ""), "SKIP x (1 tests, 1 skipped)"),
        ((127, "said\n", ""), "FAIL x (aborted)"),
        ((0, "said\n", ""), "FAIL x (QEMU ended with status 0)"),
        ((1, "", "qemu: CPU model 'host' requires KVM"), "FAIL x (qemu: CPU model 'host' requires KVM)"),
    ],
)
def test_exit_status_is_the_programs_unless_it_never_started(directory: Path, reply: Reply, line: str) -> None:
    assert run(directory, reply).line == line


def test_one_that_hangs_is_killed_at_its_limit_and_keeps_its_output(directory: Path) -> None:
    started = time.monotonic()
    result = run(directory, (None, "about to hang\n", ""), settings=Settings("tcg", timeout_s=1))
    assert result.line == "FAIL x (timeout; duration=1s)"
    assert result.log == "about to hang\n"
    assert (result.timeout_s, result.suite_timeout_s) == (1, 90)
    assert time.monotonic() - started < 30


def test_what_qemu_lacks_is_named(directory: Path) -> None:
    result = run(directory, (1, "ran\n", "qemu: warning: TCG doesn't support requested feature: pcid"))
    assert result.ignored == ["qemu: warning: TCG doesn't support requested feature: pcid"]


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (Entry("x", "x.flat", accel="kvm"), "SKIP x (kvm only)"),
        (Entry("x", "x.flat", arch="i386"), "SKIP x (needs i386 build)"),
        (Entry("x", "y.flat"), "SKIP x (y.flat is not built)"),
        (Entry("x", "x.flat", groups=("nodefault",)), "SKIP x (test marked as manual run only)"),
    ],
)
def test_what_the_suite_would_not_run_is_skipped(directory: Path, entry: Entry, line: str) -> None:
    assert run(directory, (1, "", ""), entry).line == line


def test_environment_is_a_module(directory: Path) -> None:
    run(directory, (1, "ran\n", ""), settings=Settings("tcg", environment={"NR_CPUS": "2"}))
    (call,) = calls(directory / "qemu-system-x86_64")
    assert len(value_of(ast.literal_eval(call), "-initrd")) == 1


def test_program_that_is_not_there_is_a_failure_with_its_name(directory: Path) -> None:
    result = run_entry(directory, Entry("x", "x.flat"), SETTINGS, program="/nowhere/qemu")
    assert result.line == "FAIL x (/nowhere/qemu: No such file or directory)"


def test_suite_run_schedules_it_as_it_does_ours(directory: Path) -> None:
    program = fake_qemu(directory, {"x": (1, "SUMMARY: 1 tests\n", "")})
    entries = [Entry(name, "x.flat", test_args="x") for name in "abc"]
    results = SuiteRun(directory, entries, SETTINGS, 2, run=functools.partial(run_entry, program=str(program))).run()
    assert [(result.name, result.status, result.accel) for result in results] == [
        (name, Status.PASS, "tcg") for name in "abc"
    ]


def test_find_takes_a_path_or_looks_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake_qemu(tmp_path, {})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert qemu.find() == str(program)
    assert qemu.find(str(program)) == str(program)
    assert qemu.find("/nowhere/qemu") is None
    assert qemu.version(str(program)) == "QEMU emulator version 0 (a stand-in)"


@pytest.mark.guest
def test_our_own_program_passes_on_qemu(suite: Path) -> None:
    program = qemu.find()
    if program is None:
        pytest.skip("no qemu-system-x86_64")
    result = run_entry(suite, Entry("pass", "probe.flat", test_args="pass"), SETTINGS, program=program)
    assert result.line == "PASS pass (2 tests, 1 skipped)"
