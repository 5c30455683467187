# SPDX-License-Identifier: Apache-2.0
"""The mutation run: what it draws from, and how it counts."""

from __future__ import annotations

from scripts.mutants import ROOT, TARGETS, Mutant, _without_annotations, report


def test_every_target_and_its_tests_are_there() -> None:
    for module, tests in TARGETS.items():
        assert (ROOT / "src" / "softkvm" / module).is_file()
        assert all((ROOT / path).exists() for path in tests)


def test_a_change_of_annotations_alone_makes_no_other_program() -> None:
    code = "def f(a: int | None = 1) -> str:\n    b: int = a + 1\n    return str(b)\n"
    assert _without_annotations(code) == _without_annotations(code.replace("int | None", "int & None"))
    assert _without_annotations(code) == _without_annotations(code.replace("-> str", "-> bytes"))
    assert _without_annotations(code) != _without_annotations(code.replace("a + 1", "a - 1"))


def test_survivors_are_listed_and_counted_by_module() -> None:
    noticed, survivor = (Mutant("kvm/vm.py", "AddNot", line, "if a:", "if not a:", "code") for line in (3, 9))
    result = report([(noticed, True), (survivor, False)])
    assert result["noticed"] == 1
    assert result["modules"] == {"kvm/vm.py": {"mutants": 2, "noticed": 1}}
    assert [left["line"] for left in result["survivors"]] == [9]
