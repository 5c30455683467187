# SPDX-License-Identifier: Apache-2.0
"""The layers hold: imports point downwards, general code names no architecture, no import circle at run time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tests.support.circles import circles

ROOT = Path(__file__).resolve().parents[1] / "src" / "softkvm"

#: What each layer may import of the package, itself aside. ``softkvm.__init__`` opens either KVM, when it is asked to.
BELOW: dict[str, set[str]] = {
    "abi": set(),
    "api": {"abi", "cputime"},
    "trace": {"threads"},
    "kvm": {"abi", "closing", "cputime", "threads", "trace"},
    "live": {"abi", "closing", "kvm", "threads", "trace"},
    "devkvm": {"abi", "api", "closing", "cputime", "threads"},
    "vmm": {"abi", "api", "closing", "cputime", "progress", "threads"},
    "control": {"abi", "api", "closing", "live", "threads", "vmm"},
    "script": {"abi", "vmm"},
    "reports": set(),
    "unittests": {"abi", "api", "vmm", "qemu", "reports"},
    "bench": {"abi", "api", "closing", "cputime", "vmm", "unittests", "qemu", "reports"},
    "client": {"abi", "kvm", "live", "plugin", "threads", "trace"},
    "selftests": {"abi", "client", "reports"},
    "vsocktest": {"abi", "api", "reports", "vmm"},
    "cli": {
        "abi",
        "api",
        "vmm",
        "unittests",
        "bench",
        "client",
        "closing",
        "threads",
        "reports",
        "selftests",
        "qemu",
        "control",
        "kvm",
        "live",
        "plugin",
        "progress",
        "trace",
        "vsocktest",
    },
}

#: Modules that every architecture shares, by prefix; an ``__init__`` only puts the parts together.
GENERAL = ("softkvm.abi", "softkvm.api", "softkvm.kvm")
ARCHITECTURES = {"x86", "arm64", "s390x"}
COMPOSE = {"softkvm.abi", "softkvm.api", "softkvm.kvm"}

#: Circles of annotations: an object's state names the types of what it owns, and those take the state (DESIGN.md).
TYPING_CIRCLES = {
    "softkvm.kvm.x86.state": "a vCPU's state owns its emulator, CPUID table, APIC; their modules take the state",
    "softkvm.kvm.x86.irqchip.lapic": "the bus of the local APICs and the APICs on it",
    "softkvm.kvm.vm": "dirty log and eventfds belong to the VM they work for",
    "softkvm.kvm.x86.vm": "the table of capabilities sets options of the VM that asks it",
    "softkvm.vmm.machine": "a machine's threads and board belong to it",
}


@cache
def modules() -> dict[str, Path]:
    """Return the package's modules by their dotted names."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ("softkvm", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules())
    elif isinstance(node, ast.ImportFrom) and node.module in modules():
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            if inner in modules():
                yield inner
            elif node.module != "softkvm":
                yield node.module


def _walk(node: ast.AST, *, typing: bool, functions: bool) -> Iterator[ast.AST]:
    """Yield the statements that run when the module is imported, those for type checkers too with *typing*."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            if typing:
                yield from child.body
            continue
        if isinstance(child, ast.FunctionDef) and not functions:
            continue
        yield child
        yield from _walk(child, typing=typing, functions=functions)


@cache
def imports(module: str, *, typing: bool = True, functions: bool = True) -> frozenset[str]:
    """Return what a module imports of the package."""
    tree = ast.parse(modules()[module].read_text())
    nodes = _walk(tree, typing=typing, functions=functions)
    return frozenset(name for node in nodes for name in _imported(node)) - {module}


@pytest.mark.parametrize("layer", sorted(BELOW))
def test_imports_point_downwards(layer: str) -> None:
    allowed = BELOW[layer] | {layer}
    wrong = {
        f"{module} imports {other}"
        for module in modules()
        if f"{module}.".startswith(f"softkvm.{layer}.")
        for other in imports(module)
        if other != "softkvm" and other.split(".")[1] not in allowed
    }
    assert not wrong


def test_every_package_has_its_place_among_the_layers() -> None:
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert packages == set(BELOW)


def test_general_code_names_no_architecture() -> None:
    wrong = {
        f"{module} imports {other}"
        for module in modules()
        if module.startswith(GENERAL) and module not in COMPOSE and not ARCHITECTURES & set(module.split("."))
        for other in imports(module)
        if ARCHITECTURES & set(other.split("."))
    }
    assert not wrong


def test_no_import_circle_at_run_time() -> None:
    assert not circles({name: imports(name, typing=False, functions=False) for name in modules()})


def test_circles_of_annotations_are_those_that_the_design_names() -> None:
    found = circles({name: imports(name, functions=False) for name in modules()})
    assert sorted(len(component & set(TYPING_CIRCLES)) for component in found) == [1] * len(TYPING_CIRCLES)
    design = (ROOT.parents[1] / "DESIGN.md").read_text()
    assert [name for name in TYPING_CIRCLES if f"`{name.removeprefix('softkvm.')}`" not in design] == []
