# SPDX-License-Identifier: Apache-2.0
"""Breaks lines of chosen modules, one at a time, and counts how many of the breaks a test notices.

python scripts/mutants.py [--count N] [--seed S] [--json FILE] [MODULE ...]

Mutations are those of cosmic-ray, drawn at random (the same for the same seed) from each module; the ones that change
annotations only are left out. Each runs the tests that the table names for its module, in a copy of the package, until
the first failure. A survivor is a place to look: a test is missing, or the change makes no difference.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
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
    "kvm/memory/memslots.py": ("tests/kvm/memory", "tests/conformance/test_memslots.py"),
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


def noticed(mutant: Mutant, copy: Path) -> bool:
    """Tell whether the module's tests fail with the change, or don't end."""
    path = copy / "src" / "softkvm" / mutant.module
    original = path.read_text()
    path.write_text(mutant.code)
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TARGETS[mutant.module]]
    try:
        ended = subprocess.run(
            command, cwd=copy, env=environment, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(original)
    return ended.returncode != 0


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
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="modules of the table (default: all)")
    parser.add_argument("--count", type=int, default=6, help="mutants of each module (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the draw (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this time (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file, too")
    options = parser.parse_args()
    unknown = set(options.modules) - set(TARGETS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected modules of {', '.join(TARGETS)}")
    drawn: list[Mutant] = []
    for module in options.modules or TARGETS:
        drawn += draw(module, options.count, options.seed)
    end = time.monotonic() + options.seconds
    results: list[tuple[Mutant, bool]] = []
    with tempfile.TemporaryDirectory(prefix="softkvm-mutants-") as directory:
        copy = Path(directory)
        for part in ("src", "tests", "scripts", "benchmarks", "docs"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "DESIGN.md"):
            shutil.copy(ROOT / part, copy / part)
        for mutant in tqdm(drawn, unit="mutant", disable=None):
            if time.monotonic() > end:
                print(f"stopped after {options.seconds:g} s: {len(results)} of {len(drawn)} mutants", file=sys.stderr)
                break
            results.append((mutant, noticed(mutant, copy)))
    result = report(results)
    for module, score in result["modules"].items():
        print(f"{module:36} {score['noticed']:3} of {score['mutants']:3}")
    for survivor in result["survivors"]:
        print(f"\n{survivor['module']}:{survivor['line']} {survivor['operator']}")
        print(f"  - {survivor['before']}\n  + {survivor['after']}")
    print(f"\n{result['noticed']} of {result['mutants']} noticed")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
