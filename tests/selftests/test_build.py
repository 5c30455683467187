# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from softkvm.selftests.build import BuildError, programs


def test_the_makefile_says_which_programs_there_are_on_x86(build: Path) -> None:
    found = programs(build)
    assert [program.name for program in found] == [
        "x86_64/good",
        "x86_64/bad",
        "x86_64/skips",
        "killed",
        "endless",
        "x86_64/unbuilt",
    ]
    assert [program.name for program in found if not program.built] == ["x86_64/unbuilt"]


def test_lists_of_newer_kernels_are_read(build: Path) -> None:
    (build / "Makefile.kvm").write_text(
        "TEST_GEN_PROGS_COMMON = killed\nTEST_GEN_PROGS_x86 = $(TEST_GEN_PROGS_COMMON) \\\n\tx86_64/good\n"
    )
    assert [program.name for program in programs(build)] == ["killed", "x86_64/good"]


def test_a_directory_that_is_no_build_is_told_apart_from_one_that_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="expected tools/testing/selftests/kvm"):
        programs(tmp_path)
    (tmp_path / "Makefile").write_text("TEST_GEN_PROGS_x86_64 += x86_64/a\n")
    with pytest.raises(BuildError, match="run make there"):
        programs(tmp_path)
