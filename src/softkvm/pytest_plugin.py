# SPDX-License-Identifier: Apache-2.0
"""pytest fixtures: virtual machines for tests, with their consoles in the report of a test that fails.

``guest`` is the default guest, booted once and then restored for each test as it was right behind its boot; ``machine``
one of the test's own, not started yet. The marker ``softkvm`` has arguments of :class:`softkvm.Machine` for both.
docs/scripting.md has examples.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from softkvm.machine import Machine

MARKER = "softkvm"
_machines = pytest.StashKey[list["Machine"]]()
_TAIL = 100_000
"""Characters of a console that a report shows."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers", f"{MARKER}(**arguments): arguments of softkvm.Machine for the fixtures machine and guest"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the consoles of a failed test's machines into its report."""
    report = yield
    if report.failed:
        for machine in item.stash.get(_machines, []):
            text = machine.console.text[-_TAIL:]
            report.sections.append((f"console of {machine!r}", text or "(nothing was written)"))
    return report


def _arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return what the markers say, the nearest one's word first."""
    arguments: dict[str, Any] = {}
    for marker in request.node.iter_markers(MARKER):
        if marker.args:
            raise pytest.UsageError(f"the marker {MARKER} takes arguments by name, such as vcpus=2")
        arguments = {**marker.kwargs, **arguments}
    return arguments


def _watched(request: pytest.FixtureRequest, machine: Machine) -> Machine:
    request.node.stash.setdefault(_machines, []).append(machine)
    return machine


@contextlib.contextmanager
def _or_skipped() -> Iterator[None]:
    """Skip the test where there is no default guest; fail it on CI."""
    from softkvm.vmm.guest import GuestUnavailable

    try:
        yield
    except GuestUnavailable as error:
        if os.environ.get("SOFTKVM_CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine that has not been started: the default guest, or what the marker says."""
    import softkvm

    with _or_skipped():
        made = softkvm.Machine(**_arguments(request))
    with made:
        yield _watched(request, made)


@pytest.fixture(scope="session")
def softkvm_snapshots(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Snapshots of guests that have booted, by their machines' arguments; each boots when it is first asked for."""
    import softkvm

    made: dict[str, Path] = {}

    def snapshot(arguments: dict[str, Any]) -> Path:
        key = repr(sorted(arguments.items()))
        if key not in made:
            directory = tmp_path_factory.mktemp("softkvm") / "booted"
            with softkvm.Machine(**arguments) as machine:
                machine.boot()
                machine.run("true")  # what the first command leaves behind is there
                machine.save(directory)
            made[key] = directory
        return made[key]

    return snapshot


@pytest.fixture
def guest(request: pytest.FixtureRequest, softkvm_snapshots: Callable[[dict[str, Any]], Path]) -> Iterator[Machine]:
    """The default guest, running and at its prompt, as it was when it had booted: no test sees what another did."""
    import softkvm

    arguments = _arguments(request)
    with _or_skipped():
        directory = softkvm_snapshots(arguments)
    with softkvm.Machine.restored(directory, kvm=arguments.get("kvm")) as restored:
        restored.start()
        yield _watched(request, restored)
