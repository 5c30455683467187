# SPDX-License-Identifier: Apache-2.0
"""The crate's layers (DESIGN.md, "The silicon"): general modules name no architecture, and modules import in no circle.

What a module imports is read from its text: `use` and paths that begin with `crate`, `super` or `self`, to the module
that they name. Methods of a type that other modules define are not seen.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.circles import circles

Module = tuple[str, ...]

SOURCE = Path(__file__).parents[1] / "cpu" / "src"
ARCHITECTURES = frozenset({"x86", "arm64", "s390x"})
# What each part of the crate may import beside itself. An architecture may import all that is general.
LAYERS: dict[str, frozenset[str]] = {
    "clock": frozenset(),
    "int": frozenset(),
    "float": frozenset({"int"}),
    "mem": frozenset({"int", "clock"}),
    "engine": frozenset({"int", "clock", "mem"}),
    "native": frozenset({"int", "clock", "mem", "engine"}),
}
# Crates that general modules use: the decoder of an architecture is the architecture's.
GENERAL_CRATES = frozenset({"std", "core", "libc"})
#: It decodes the host's instructions, not a guest's.
HOSTS_DECODER = ("mem", "lost", "instruction")


def code_of(text: str) -> str:
    """The text without comments, strings and unit tests."""
    text = re.sub(
        r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', lambda m: '""' if m[0][0] == '"' else "", text, flags=re.DOTALL
    )
    for start in [m.start() for m in re.finditer(r"#\[cfg\(test\)\]\s*mod \w+ \{", text)][::-1]:
        text = text[:start] + text[closing(text, text.index("{", start)) + 1 :]
    return text


def closing(text: str, at: int) -> int:
    """Where the brace at ``at`` is closed."""
    depth = 0
    for m in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if m[0] == "{" else -1
        if depth == 0:
            return m.start()
    raise ValueError("a brace is not closed")


def leaves(tree: str, prefix: Module = ()) -> Iterator[Module]:
    """The paths of a `use` tree."""
    group = re.fullmatch(r"\s*((?:\w+\s*::\s*)*)\{(.*)\}\s*", tree, re.DOTALL)
    if not group:
        yield (*prefix, *(part.strip() for part in tree.split(" as ")[0].split("::")))
        return
    prefix += tuple(re.findall(r"\w+", group[1]))
    depth, start = 0, 0
    for i, c in enumerate(group[2] + ","):
        depth += (c == "{") - (c == "}")
        if c == "," and depth == 0:
            if group[2][start:i].strip():
                yield from leaves(group[2][start:i], prefix)
            start = i + 1


def paths(code: str, module: Module) -> Iterator[Module]:
    """Every path that the code names, from the root of the crate; a crate's own begins with `extern`."""
    while inline := re.search(r"\bmod (\$?\w+) \{", code):
        end = closing(code, inline.end() - 1)
        yield from paths(code[inline.end() : end], (*module, inline[1]))
        code = code[: inline.start()] + code[end + 1 :]
    named = [leaf for m in re.finditer(r"\buse\s+([^;]+);", code) for leaf in leaves(m[1])]
    code = re.sub(r"\buse\s+[^;]+;", "", code)
    named += [tuple(m[0].split("::")) for m in re.finditer(r"\b(?:crate|super|self|core|std|libc)(?:::\w+)+", code)]
    children = set(re.findall(r"\bmod (\w+);", code))
    named += [(m[1],) for m in re.finditer(r"(?<!::)\b(\w+)::", code) if m[1] in children]
    for path in named:
        base, rest = module, list(path)
        if rest[0] == "crate":
            yield tuple(rest[1:])
        elif rest[0] in {"super", "self"}:
            while rest and rest[0] in {"super", "self"}:
                base = base[:-1] if rest.pop(0) == "super" else base
            yield (*base, *rest)
        elif rest[0] in children:
            yield (*module, *rest)
        else:
            yield ("extern", *rest)


def imports(sources: Mapping[Module, str]) -> dict[Module, set[Module]]:
    """For each module those that it names."""
    found: dict[Module, set[Module]] = {}
    for module, text in sources.items():
        named = set()
        for path in paths(code_of(text), module):
            longest = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in sources), None)
            if longest and longest != module:
                named.add(longest)
        found[module] = named
    return found


@functools.cache
def crate() -> dict[Module, str]:
    """The modules of the crate and their texts."""
    sources = {}
    for file in SOURCE.rglob("*.rs"):
        module = file.relative_to(SOURCE).with_suffix("").parts
        sources[module[:-1] if module[-1] in {"mod", "lib"} else module] = file.read_text(encoding="utf-8")
    del sources[()]
    return sources


@functools.cache
def crate_imports() -> dict[Module, set[Module]]:
    """What its modules import."""
    return imports(crate())


def test_imports_point_downwards_and_general_modules_name_no_architecture() -> None:
    wrong = []
    for module, named in crate_imports().items():
        for other in named:
            top, below = module[0], other[0]
            allowed = (LAYERS.keys() if top in ARCHITECTURES else LAYERS[top]) | {top}
            if below not in allowed:
                wrong.append(f"{'::'.join(module)} names {'::'.join(other)}")
    assert not wrong, "\n".join(wrong)


def test_general_modules_use_no_crate_that_an_architecture_brings() -> None:
    wrong = [
        f"{'::'.join(module)} uses {path[1]}"
        for module, text in crate().items()
        if module[0] not in ARCHITECTURES and module != HOSTS_DECODER
        for path in paths(code_of(text), module)
        if path[0] == "extern" and path[1] not in GENERAL_CRATES and path[1][0].islower()
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_import_in_no_circle() -> None:
    assert circles(crate_imports()) == []


def test_reader_of_imports_sees_every_way_to_name_a_module() -> None:
    sources = {
        ("a",): "pub mod b;\nmod c;\npub use b::{X, Y};",
        ("a", "b"): "use super::{c::{self, Z}, d as e};\nmod inner {\n    use super::super::d::*;\n}",
        (
            "a",
            "c",
        ): 'fn f() -> crate::mem::T { /* crate::x86 */ }\n// use crate::x86;\nconst S: &str = "use crate::x86;";',
        ("a", "d"): "#[cfg(test)]\nmod tests {\n    use crate::x86::{self};\n}\nfn f() { super::b::g() }",
        ("mem",): "",
        ("x86",): "",
    }
    graph = imports(sources)
    assert graph["a",] == {("a", "b")}
    assert graph["a", "b"] == {("a", "c"), ("a", "d")}
    assert graph["a", "c"] == {("mem",)}
    assert graph["a", "d"] == {("a", "b")}
    assert circles(graph) == [{("a", "b"), ("a", "d")}]
