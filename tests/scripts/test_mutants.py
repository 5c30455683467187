# SPDX-License-Identifier: Apache-2.0
"""The mutation run: what it draws from, and how it counts."""

from __future__ import annotations

from typing import Any

from scripts.mutants import (
    ROOT,
    RUST_TARGETS,
    TARGETS,
    Mutant,
    _without_annotations,
    document,
    report,
    rust_results,
)


def test_every_target_and_its_tests_are_there() -> None:
    for module, tests in TARGETS.items():
        assert (ROOT / "src" / "softkvm" / module).is_file()
        assert all((ROOT / path).exists() for path in tests)
    assert all((ROOT / file).is_file() for file in RUST_TARGETS)


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


def _outcome(summary: str, line: int) -> dict[str, Any]:
    name = f"cpu/src/lib.rs:{line}:9: replace | with &"
    change = {"file": "cpu/src/lib.rs", "name": name, "genre": "BinaryOperator", "span": {"start": {"line": line}}}
    return {"summary": summary, "scenario": {"Mutant": change}}


def test_of_the_crate_those_count_that_compiled() -> None:
    summaries = ("CaughtMutant", "MissedMutant", "Timeout", "Unviable", "Failure")
    outcomes = [{"summary": "Success", "scenario": "Baseline"}, *map(_outcome, summaries, range(1, 6))]
    results = rust_results(outcomes)
    assert [(mutant.line, noticed) for mutant, noticed in results] == [(1, True), (2, False), (3, True)]
    assert {mutant.after for mutant, _ in results} == {"replace | with &"}


def test_the_page_says_how_it_was_made_and_what_survived() -> None:
    survivor = Mutant("kvm/vm.py", "AddNot", 9, "if a:", "if not a:", "code")
    page = document(report([(survivor, False)]) | {"drawn": 5}, "scripts/mutants.py --count 1")
    assert "`scripts/mutants.py --count 1`" in page
    assert "0 of 1 noticed; 5 were drawn" in page
    assert "| `kvm/vm.py` | 1 | 0 |" in page
    assert "`if a:` became `if not a:`" in page
