# SPDX-License-Identifier: Apache-2.0
"""Breaks lines of chosen modules, one at a time, and counts how many of the breaks a test notices.

python scripts/mutants.py [--count N] [--seed S] [--seconds T] [--write FILE] [--json FILE] [MODULE ...]

Some of each module's mutations are drawn at random, the same for the same seed and code: of those that cosmic-ray knows
for Python, less the ones that change annotations only, and of those that cargo-mutants knows for Rust, less the ones
that don't compile. Each runs the tests that the table names for its module, in a copy of the sources, until the first
failure. A survivor is a place to look: a test is missing, or the change makes no difference.

The crate's get half the time at most; what has not been run when the time is over counts for nothing.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

ROOT: Final = Path(__file__).resolve().parents[1]
_SUITE: Final = ("tests/kvm", "tests/conformance")

#: Modules below src/softkvm, and the tests that have to notice.
TARGETS: Final[dict[str, tuple[str, ...]]] = {
    "kvm/vcpu.py": _SUITE,
    "kvm/vm.py": _SUITE,
    "kvm/halt_poll.py": ("tests/kvm",),
    "kvm/irq/eventfd.py": ("tests/kvm/irq", "tests/conformance"),
    "kvm/memory/dirty_log.py": ("tests/kvm/memory", "tests/conformance/test_dirty_log.py"),
    "kvm/memory/memslots.py": ("tests/kvm/memory", "tests/kvm/x86/mmu", "tests/conformance/test_memslots.py"),
    "kvm/x86/vcpu.py": _SUITE,
    "kvm/x86/events.py": _SUITE,
    "kvm/x86/exceptions.py": _SUITE,
    "kvm/x86/mmu/spte.py": ("tests/kvm/x86/mmu",),
    "kvm/x86/mmu/tdp_mmu.py": ("tests/kvm/x86/mmu", "tests/kvm/memory", "tests/conformance/test_dirty_log.py"),
    "kvm/x86/irqchip/lapic.py": ("tests/kvm/x86/irqchip", "tests/conformance/test_interrupt_chips.py"),
    "kvm/x86/irqchip/ioapic.py": ("tests/kvm/x86/irqchip", "tests/conformance/test_interrupt_chips.py"),
    "kvm/x86/emulate/task_switch.py": ("tests/kvm/x86/emulate",),
    "vmm/devices/hpet.py": ("tests/vmm/devices",),
    "vmm/devices/cmos.py": ("tests/vmm/devices",),
}
#: Files of the crate, and arguments of cargo for the tests that have to notice.
RUST_TARGETS: Final = (
    "cpu/src/engine/block.rs",
    "cpu/src/engine/code.rs",
    "cpu/src/engine/fetch.rs",
    "cpu/src/engine/returns.rs",
    "cpu/src/mem/pool.rs",
    "cpu/src/mem/region.rs",
    "cpu/src/x86/access/bytes.rs",
    "cpu/src/x86/vmrun.rs",
)
_RUST_TESTS: Final = ("--lib", "--test", "system", "--test", "engine")
#: Of cargo-mutants: what its outcomes mean; others are no mutants.
_NOTICED: Final = {"CaughtMutant": True, "Timeout": True, "MissedMutant": False}
#: Operators that need to be told variables' names.
_NOT_FOR_ALL_CODE: Final = {"core/VariableInserter", "core/VariableReplacer"}
#: A run that takes this long has been noticed, too: something waits for ever.
TIMEOUT_S: Final = 300


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    operator: str
    line: int
    before: str
    after: str
    code: str


def _without_annotations(code: str) -> str:
    """Return the code's tree as text, without what only type checkers read."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None if name == "returns" else ast.Constant(0))
    return ast.dump(tree)


def _places(code: str) -> list[tuple[str, int]]:
    """Return every operator with each of the places in the code where it changes something."""
    from cosmic_ray import plugins  # of the dependency group `mutants`: `make test` does without
    from cosmic_ray.ast import ast_nodes, get_ast

    nodes = list(ast_nodes(get_ast(code)))
    places = []
    for name in sorted(set(plugins.operator_names()) - _NOT_FOR_ALL_CODE):
        operator = plugins.get_operator(name)()
        count = sum(1 for node in nodes for _ in operator.mutation_positions(node))
        places += [(name, occurrence) for occurrence in range(count)]
    return places


def _mutant(module: str, code: str, name: str, occurrence: int) -> Mutant | None:
    """Return the change of one operator at one place; None if it makes no other program."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    changed = mutate_code(code, plugins.get_operator(name)(), occurrence)
    try:
        if changed is None or _without_annotations(changed) == _without_annotations(code):
            return None
    except SyntaxError:
        return None
    lines = zip(code.splitlines(), changed.splitlines(), strict=False)
    line, (old, new) = next(((n, pair) for n, pair in enumerate(lines, 1) if pair[0] != pair[1]), (0, ("", "")))
    return Mutant(module, name.removeprefix("core/"), line, old.strip(), new.strip(), changed)


def draw(module: str, count: int, seed: int) -> list[Mutant]:
    """Return some changes of a module: the same for the same seed."""
    code = (ROOT / "src" / "softkvm" / module).read_text()
    places = _places(code)
    random.Random(f"{seed} {module}").shuffle(places)
    drawn: list[Mutant] = []
    for name, occurrence in places:
        if len(drawn) == count:
            break
        mutant = _mutant(module, code, name, occurrence)
        if mutant is not None:
            drawn.append(mutant)
    return drawn


def passes(copy: Path, tests: Iterable[str]) -> bool:
    """Tell whether these tests of a copy of the sources pass, and end."""
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        ended = subprocess.run(
            command, cwd=copy, env=environment, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode == 0


def noticed(mutant: Mutant, copy: Path) -> bool:
    """Tell whether the module's tests fail with the change, or don't end."""
    path = copy / "src" / "softkvm" / mutant.module
    original = path.read_text()
    path.write_text(mutant.code)
    try:
        return not passes(copy, TARGETS[mutant.module])
    finally:
        path.write_text(original)


def _cargo_mutants(*arguments: str) -> list[str]:
    return ["cargo", "mutants", "--package", "softcpu", "--profile", "mutants", *arguments]


def draw_rust(file: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return some changes of a file of the crate, as cargo-mutants describes them."""
    listed = subprocess.run(
        _cargo_mutants("--list", "--json", "--file", file), cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    found: list[dict[str, Any]] = json.loads(listed.stdout)
    random.Random(f"{seed} {file}").shuffle(found)
    return found[:count]


def run_rust(drawn: list[dict[str, Any]], seconds: float) -> list[tuple[Mutant, bool]]:
    """Have cargo-mutants try the changes, for so long; returns those that were tried and compiled."""
    with tempfile.TemporaryDirectory(prefix="softkvm-mutants-") as directory:
        names = [argument for mutant in drawn for argument in ("--re", f"^{re.escape(mutant['name'])}$")]
        files = [argument for file in dict.fromkeys(m["file"] for m in drawn) for argument in ("--file", file)]
        options = ("--baseline", "skip", "--timeout", "60", "--no-shuffle", "--output", directory)
        run = subprocess.Popen(
            _cargo_mutants(*options, *files, *names, "--", *_RUST_TESTS), cwd=ROOT, start_new_session=True
        )
        try:
            run.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"the crate's stopped after {seconds:g} s", file=sys.stderr)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGTERM)
                run.wait()
        outcomes = json.loads((Path(directory) / "mutants.out" / "outcomes.json").read_text())["outcomes"]
    return rust_results(outcomes)


def rust_results(outcomes: list[dict[str, Any]]) -> list[tuple[Mutant, bool]]:
    """Return what cargo-mutants' outcomes say of the mutants that compiled."""
    results = []
    for outcome in outcomes:
        if outcome["summary"] in _NOTICED and isinstance(outcome["scenario"], dict):
            change = outcome["scenario"]["Mutant"]
            line = change["span"]["start"]["line"]
            before = (ROOT / change["file"]).read_text().splitlines()[line - 1].strip()
            after = change["name"].split(": ", 1)[1]
            mutant = Mutant(change["file"], change["genre"], line, before, after, "")
            results.append((mutant, _NOTICED[outcome["summary"]]))
    return results


def document(result: dict[str, Any], command: str) -> str:
    """Return the scores and the survivors as a page of the documents."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    lines = [
        "# Mutations",
        "",
        f"<!-- written by: {command} -->",
        "",
        "How many broken lines of the modules that much rests on a test notices: a sample of each, drawn at random.",
        "What survives is a place to look, not a fault: many changes make no difference to anybody. The tests that the",
        "run has led to are not in its figures.",
        "",
        f"`{command}`, {today}, Python {platform.python_version()}: "
        f"{result['noticed']} of {result['mutants']} noticed; {result['drawn']} were drawn.",
        "",
        "| module | mutants | noticed |",
        "|---|---:|---:|",
    ]
    lines += [f"| `{name}` | {m['mutants']} | {m['noticed']} |" for name, m in result["modules"].items()]
    lines += ["", "Survivors:", ""]
    for survivor in result["survivors"]:
        lines.append(f"- `{survivor['module']}:{survivor['line']}` {survivor['operator']}:")
        lines.append(f"  `{survivor['before']}` became `{survivor['after']}`")
    return "\n".join(lines) + "\n"


def report(results: list[tuple[Mutant, bool]]) -> dict[str, Any]:
    """Return the score of each module and of all, and the survivors."""
    modules = {}
    for module in dict.fromkeys(mutant.module for mutant, _ in results):
        own = [killed for mutant, killed in results if mutant.module == module]
        modules[module] = {"mutants": len(own), "noticed": sum(own)}
    survivors = [
        {key: value for key, value in asdict(mutant).items() if key != "code"}
        for mutant, killed in results
        if not killed
    ]
    return {
        "mutants": len(results),
        "noticed": sum(killed for _, killed in results),
        "modules": modules,
        "survivors": survivors,
    }


def main() -> int:
    """Draw, break, test, and print a table of the scores and the survivors."""
    parser = argparse.ArgumentParser(description="Break lines and count what the tests notice.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="modules of the tables (default: all)")
    parser.add_argument("--count", type=int, default=4, help="mutants of each module (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the draw (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1500, help="stop after this time (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="write a page of the documents to this file")
    parser.add_argument("--json", type=Path, help="write the result to this file, too")
    options = parser.parse_args()
    modules = options.modules or [*RUST_TARGETS, *TARGETS]
    unknown = set(modules) - {*RUST_TARGETS, *TARGETS}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected modules of {', '.join((*RUST_TARGETS, *TARGETS))}")
    end = time.monotonic() + options.seconds
    rust = [
        mutant for file in modules if file in RUST_TARGETS for mutant in draw_rust(file, options.count, options.seed)
    ]
    results = run_rust(rust, options.seconds / 2) if rust else []
    # A mutant of each module after the other, so that none is left out when the time is over.
    each = [draw(module, options.count, options.seed) for module in modules if module in TARGETS]
    drawn = [own[n] for n in range(options.count) for own in each if n < len(own)]
    before = len(results)
    with tempfile.TemporaryDirectory(prefix="softkvm-mutants-") as directory:
        copy = Path(directory)
        for part in ("src", "tests", "scripts", "benchmarks", "docs"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "DESIGN.md"):
            shutil.copy(ROOT / part, copy / part)
        tests = dict.fromkeys(test for mutant in drawn for test in TARGETS[mutant.module])
        if drawn and not passes(copy, tests):
            sys.exit("mutants: the tests fail before anything is broken")
        for mutant in tqdm(drawn, unit="mutant", disable=None):
            if time.monotonic() > end:
                print(
                    f"stopped after {options.seconds:g} s: {len(results) - before} of {len(drawn)} mutants",
                    file=sys.stderr,
                )
                break
            results.append((mutant, noticed(mutant, copy)))
    order = {module: n for n, module in enumerate(modules)}
    result = report(sorted(results, key=lambda one: (order[one[0].module], one[0].line)))
    for module, score in result["modules"].items():
        print(f"{module:36} {score['noticed']:3} of {score['mutants']:3}")
    for survivor in result["survivors"]:
        print(f"\n{survivor['module']}:{survivor['line']} {survivor['operator']}")
        print(f"  - {survivor['before']}\n  + {survivor['after']}")
    print(f"\n{result['noticed']} of {result['mutants']} noticed")
    result["drawn"] = len(rust) + len(drawn)
    if options.write:
        chosen = "".join(f" {module}" for module in options.modules)
        command = (
            f"scripts/mutants.py --count {options.count} --seed {options.seed} --seconds {options.seconds:g}{chosen}"
        )
        options.write.write_text(document(result, command))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
