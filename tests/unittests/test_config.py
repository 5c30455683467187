# SPDX-License-Identifier: Apache-2.0
import time
from pathlib import Path

import pytest

from softkvm.unittests import config
from softkvm.unittests.config import SuiteError, expand, parse
from softkvm.unittests.runner import Settings, skip_reason, timeout_of


def test_entry_with_every_key() -> None:
    (entry,) = parse(
        "[one]\nfile = a.flat\nsmp = 2\ntest_args = 'x y'\nextra_params = -m 1g\narch = x86_64\n"
        "groups = a b\naccel = kvm\ntimeout = 30\ncheck = /p=Y\n# smp = 4\nmachine = pc\n"
    )
    assert (entry.name, entry.file, entry.smp, entry.test_args) == ("one", "a.flat", "2", "'x y'")
    assert (entry.qemu_params, entry.arch, entry.groups) == ("-m 1g", "x86_64", ("a", "b"))
    assert (entry.accel, entry.timeout, entry.check, entry.machine) == ("kvm", "30", "/p=Y", "pc")


def test_value_between_three_quotes_goes_over_lines() -> None:
    (entry,) = parse('[one]\nfile = a.flat\nqemu_params = """-cpu max \\\n -m 1g\n -smp 2"""\nsmp = 3\n')
    assert entry.qemu_params == "-cpu max  -m 1g\n -smp 2"
    assert entry.smp == "3"


def test_unknown_key_is_kept_to_be_named() -> None:
    (entry,) = parse("[one]\nfile = a.flat\ncolour = red\nkvmtool_params = -x\n")
    assert entry.unknown == ("colour = red",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[one]\nsmp = 2\n", "has no file"),
        ("[one]\nfile = a\n[one]\nfile = b\n", "given twice"),
        ('[one]\nfile = a\nqemu_params = """x\n', "is missing"),
    ],
)
def test_bad_configuration_is_named(text: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        parse(text)


def test_known_command_is_replaced_and_others_are_left_out() -> None:
    text, left = expand("10 `date +%s` `rm -rf /tmp/x`")
    assert abs(int(text.split()[1]) - time.time()) < 5
    assert left == ["`rm -rf /tmp/x`"]


@pytest.mark.parametrize(("text", "seconds"), [("", 90), ("30", 30), ("90s", 90), ("2m", 120), ("0", 0)])
def test_timeouts(text: str, seconds: float) -> None:
    entry = config.Entry("x", "x", timeout=text)
    assert timeout_of(entry, Settings("kvm")) == seconds
    assert timeout_of(entry, Settings("soft")) == seconds * 3
    assert timeout_of(entry, Settings("soft", timeout_scale=0.5)) == seconds / 2
    assert timeout_of(entry, Settings(timeout_s=7)) == 7


def test_timeout_that_is_no_time() -> None:
    with pytest.raises(SuiteError, match="expected seconds"):
        timeout_of(config.Entry("x", "x", timeout="soon"), Settings())


def test_directory_that_is_no_build(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="expected a build"):
        config.read(tmp_path)
    with pytest.raises(SuiteError, match="no such directory"):
        config.read(tmp_path / "x")


def test_the_x86_directory_itself_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "unittests.cfg").write_text("[a]\nfile = a.flat\n")
    assert config.find(tmp_path) == tmp_path


def test_what_a_build_is_for(tmp_path: Path) -> None:
    """An image's ELF file first, whose class is the fifth byte (ELF: EI_CLASS), then what ./configure noted."""
    programs = tmp_path / "x86"
    programs.mkdir()
    (programs / "unittests.cfg").write_text("[a]\nfile = a.flat\n")
    assert config.architecture(tmp_path) == "x86_64"
    (tmp_path / "config.mak").write_text("SRCDIR=/src\nARCH=i386\nARCH_NAME=i386\n")
    (programs / "old.elf").write_bytes(b"\x7fELF\x01\x01")
    (programs / "new.elf").write_bytes(b"\x7fELF\x02\x01")
    assert config.architecture(tmp_path) == config.architecture(programs) == "i386"
    assert config.architecture(tmp_path, "old.flat") == "i386"
    assert config.architecture(tmp_path, "new.flat") == "x86_64"
    assert config.architecture(tmp_path, "missing.flat") == "i386"


@pytest.mark.parametrize("text", ["", "ARCH\n", "ARCH=arm64\n", "\0\xff=\n"])
def test_a_build_whose_notes_say_nothing_is_taken_for_the_usual_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "x86").mkdir()
    (tmp_path / "x86" / "unittests.cfg").write_text("[a]\nfile = a.flat\n")
    (tmp_path / "config.mak").write_text(text, "latin-1")
    assert config.architecture(tmp_path) == "x86_64"


def test_entries_run_where_they_are_built_for(tmp_path: Path) -> None:
    (tmp_path / "unittests.cfg").write_text("[a]\nfile = a.flat\n")
    (tmp_path / "a.flat").touch()
    (tmp_path / "a.elf").write_bytes(b"\x7fELF\x01")
    assert skip_reason(tmp_path, config.Entry("a", "a.flat", arch="i386"), Settings(), "kvm") == ""
    assert skip_reason(tmp_path, config.Entry("a", "a.flat"), Settings(), "kvm") == ""
    assert skip_reason(tmp_path, config.Entry("a", "a.flat", arch="x86_64"), Settings(), "kvm") == "needs x86_64 build"
