# SPDX-License-Identifier: Apache-2.0
"""Runs one entry: decides whether it can run, builds its machine, judges what came out."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import softkvm
from softkvm import abi, api
from softkvm.reports.result import Result, Status
from softkvm.reports.suite import Suite
from softkvm.unittests import config, options
from softkvm.unittests.config import Entry, SuiteError
from softkvm.unittests.machine import TestMachine
from softkvm.unittests.result import judge, read_log
from softkvm.unittests.symbols import Symbols
from softkvm.vmm.errors import ImageError, MachineError
from softkvm.vmm.machine import MAX_VCPUS
from softkvm.vmm.outcome import End, Outcome

DEFAULT_TIMEOUT_S = 90.0
TIMEOUT_MAX_S = 1e9
NODEFAULT = "nodefault"
TIMEOUT_SCALE = {"soft": 3.0, "kvm": 1.0}
"""The suite's limits are made for processors; the software CPU gets this much more time."""
DEVICES = {"soft": softkvm.SOFT, "kvm": "/dev/kvm"}
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Settings:
    """How entries are run."""

    accel: str = "soft"
    timeout_s: float | None = None
    """Overrides every entry's own."""
    timeout_scale: float | None = None
    """Multiplies the entries' own limits; None is :data:`TIMEOUT_SCALE`."""
    run_nodefault: bool = False
    """Run entries that are marked for manual runs."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Module parameters of the software KVM, as under ``/sys/module/kvm*/parameters``."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the test program sees."""


def suite_of(accel: str, architecture: str = config.ARCHITECTURES[0]) -> Suite:
    """Return what reports say of the suite, built for *architecture*."""
    engine = "KVM in Python on the software CPU" if accel == "soft" else "/dev/kvm"
    where = f"`--accel {accel}`" if architecture == config.ARCHITECTURES[0] else f"`--accel {accel}`, {architecture}"
    return Suite("kvm-unit-tests", "kvm-unit-tests", "unittests", accel, engine, where)


def scale_of(settings: Settings) -> float:
    """Return what the entries' own limits are multiplied by."""
    return TIMEOUT_SCALE.get(settings.accel, 1.0) if settings.timeout_scale is None else settings.timeout_scale


def suite_timeout_of(entry: Entry) -> float:
    """Return the suite's limit for the entry, in seconds; 0: none. SuiteError if its text is none (``30``, ``2m``)."""
    text = entry.timeout
    if not text:
        return DEFAULT_TIMEOUT_S
    unit = _UNITS_S.get(text[-1])
    try:
        limit_s = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        limit_s = math.nan
    if not 0 <= limit_s <= TIMEOUT_MAX_S:
        raise SuiteError(f"[{entry.name}] timeout = {text}: expected seconds")
    return limit_s


def timeout_of(entry: Entry, settings: Settings) -> float:
    """Return the limit that the entry runs under, in seconds; 0 is none. SuiteError as :func:`suite_timeout_of`."""
    if settings.timeout_s is not None:
        return settings.timeout_s
    return min(suite_timeout_of(entry) * scale_of(settings), TIMEOUT_MAX_S)


def note_limits(entry: Entry, settings: Settings, result: Result) -> None:
    """Fill in the limit that the entry runs under and the suite's own."""
    result.timeout_s = timeout_of(entry, settings)
    result.suite_timeout_s = suite_timeout_of(entry)


def arguments_of(entry: Entry) -> tuple[str, list[str]]:
    """Return what the test program's command line holds, and what was left out. SuiteError for unbalanced quotes."""
    text, left = config.expand(entry.test_args)
    try:
        return " ".join(shlex.split(text)), left
    except ValueError as error:
        raise SuiteError(f"[{entry.name}]: {error}") from None


def smp_of(entry: Entry) -> list[str]:
    """Return the words of the entry's ``smp``: the number of vCPUs first. SuiteError if it is none."""
    words = entry.smp.split()
    if not words or not words[0].isdecimal():
        raise SuiteError(f"[{entry.name}] smp = {entry.smp}: expected a number")
    return words


def skip_reason(directory: Path, entry: Entry, settings: Settings, accel: str) -> str:
    """Return why the suite would not run *entry* with *accel* (``kvm``, ``tcg``); empty if it would."""
    if NODEFAULT in entry.groups and not settings.run_nodefault:
        return "test marked as manual run only"
    if entry.arch and entry.arch != config.architecture(directory, entry.file):
        return f"needs {entry.arch} build"
    wanted = entry.accel.split(",")[0]
    if wanted and wanted != accel:
        return f"{wanted} only"
    if not (config.find(directory) / entry.file).is_file():
        return f"{entry.file} is not built"
    return ""


def run(path: str | os.PathLike[str], name: str, settings: Settings | None = None) -> Result:
    """Run the entry *name* of the build of kvm-unit-tests in the directory *path*.

    Raises SuiteError if there is no build, no such entry or no such parameter, OSError or ImportError if the KVM cannot
    be opened.
    """
    directory = Path(path)
    entry = next((entry for entry in config.read(directory) if entry.name == name), None)
    if entry is None:
        raise SuiteError(f"{directory}: has no test named {name}")
    return run_entry(directory, entry, replace(settings or Settings(), run_nodefault=True))


def run_entry(
    directory: Path, entry: Entry, settings: Settings, console: Callable[[bytes], None] | None = None
) -> Result:
    """Run *entry*; *console* gets the test's output as it comes."""
    result = Result(entry.name, Status.SKIP, file=entry.file, accel=settings.accel)
    started = time.monotonic()
    platform = _prepare(directory, entry, settings, result)
    if platform is not None:
        with softkvm.open(DEVICES[settings.accel]) as kvm:
            result.reason = _check_host(entry, settings, kvm, result.notes)
            if not result.reason:
                _execute(kvm, config.find(directory) / entry.file, entry, platform, settings, result, console)
    result.time_s = time.monotonic() - started
    return result


def _prepare(directory: Path, entry: Entry, settings: Settings, result: Result) -> options.Platform | None:
    """Fill in what the entry's text says; None if it cannot run, with the reason in *result*."""
    result.ignored += entry.unknown
    result.reason = skip_reason(directory, entry, settings, "kvm")  # both of ours are KVM
    if result.reason:
        return None
    if entry.disabled_if:
        result.ignored.append(f"disabled_if = {entry.disabled_if}")
    parameters, left = config.expand(entry.qemu_params)
    result.ignored += left
    try:
        platform = options.parse(parameters)
    except ValueError as error:
        raise SuiteError(f"[{entry.name}]: {error}") from None
    result.arguments, left = arguments_of(entry)
    result.ignored += [*left, *platform.ignored]
    result.memory_bytes = platform.memory_size
    result.vcpus = int(smp_of(entry)[0])
    note_limits(entry, settings, result)
    if platform.missing:
        result.reason = "needs " + ", ".join(platform.missing)
        return None
    if result.vcpus > MAX_VCPUS:
        result.reason = f"needs {result.vcpus} vCPUs, there are at most {MAX_VCPUS}"
        return None
    return platform


# -- conditions on the host


def set_params(kvm: api.Kvm, values: Mapping[str, str]) -> None:
    """Set module parameters of *kvm*; SuiteError if it has no such parameter or a value is none for it."""
    params = getattr(kvm, "params", None)
    for name, value in values.items():
        if params is None:
            raise SuiteError(f"{name}={value}: only the software KVM takes parameters; /dev/kvm's are the host's")
        try:
            params.assign(name, value)
        except ValueError as error:
            raise SuiteError(str(error)) from None


def _check_host(entry: Entry, settings: Settings, kvm: api.Kvm, notes: list[str]) -> str:
    """Return why the conditions ``path=value`` of the entry do not hold, an empty string if they do."""
    params = getattr(kvm, "params", None)
    set_params(kvm, settings.params)
    notes += [f"{name}={value}" for name, value in settings.params.items()]
    for condition in entry.check.split():
        path, _, value = condition.partition("=")
        reason = _check_file(path, value) if params is None else _check_soft(path, value, params, notes)
        if reason:
            return reason
    return ""


def _check_file(path: str, value: str) -> str:
    try:
        found = Path(path).read_text().strip()
    except OSError:
        return f"{path} is not there, expected {value}"
    return "" if found == value else f"{path} is {found}, expected {value}"


def _check_soft(path: str, value: str, params: Any, notes: list[str]) -> str:
    """The software KVM is configured as the condition wants it; the host's own files say nothing about it."""
    module, _, name = path.removeprefix("/sys/module/").partition("/parameters/")
    if module in ("kvm", "kvm_amd") and name:
        if not hasattr(params, name):
            return f"this KVM has no parameter {name}, expected {value}"
        try:
            wanted = params.parse(name, value)
        except ValueError as error:
            raise SuiteError(str(error)) from None
        if getattr(params, name) != wanted:
            setattr(params, name, wanted)
            notes.append(f"{name}={value}")
        return ""
    if module == "kvm_intel" and name:
        return f"needs an Intel processor ({name}={value})"
    notes.append(f"{path}={value} taken as given: it is about the host's hardware")
    return ""


# -- the run


def _execute(
    kvm: api.Kvm,
    image: Path,
    entry: Entry,
    platform: options.Platform,
    settings: Settings,
    result: Result,
    console: Callable[[bytes], None] | None,
) -> None:
    """Run the test program and fill in what came out."""
    if platform.cpu.hyperv and not kvm.check_extension(abi.KVM_CAP_HYPERV_CPUID):
        platform.cpu.hyperv = False
        result.ignored.append("-cpu hv_passthrough (this KVM has not got it)")
    supported = kvm.get_supported_cpuid()
    result.ignored += [f"-cpu +{name} (this KVM has not got it)" for name in platform.cpu.missing(supported)]
    output = bytearray()

    def collect(data: bytes) -> None:
        output.extend(data)
        if console is not None:
            console(data)

    timeout_s = timeout_of(entry, settings)
    environment = "".join(f"{name}={value}\n" for name, value in settings.environment.items()).encode()
    try:
        with TestMachine(kvm, platform, result.vcpus, collect) as machine:
            machine.load(image, environment or None, f"{entry.file} {result.arguments}".rstrip())
            outcome = machine.run(timeout_s or None)
            _account(machine, result)
            if outcome.end is not End.DEBUG_EXIT:
                result.places = machine.places(Symbols.of(image))
    except ImageError as error:
        result.status, result.reason = Status.FAIL, f"{entry.file}: {error}"
        return
    except MachineError as error:
        result.status, result.reason = Status.FAIL, str(error)
        return
    except (OSError, MemoryError) as error:
        outcome = Outcome(End.ERROR, f"the machine cannot be built: {error}")
    result.log = output.decode("utf-8", "replace").replace("\r", "")
    result.subtests, result.summary = read_log(result.log)
    _judge(outcome, result, settings, timeout_s)


def _judge(outcome: Outcome, result: Result, settings: Settings, timeout_s: float) -> None:
    if outcome.end is End.DEBUG_EXIT:
        result.exit_status = outcome.status
        result.status, result.reason = judge(outcome.status)
        return
    result.status = Status.FAIL
    if outcome.end is End.TIMEOUT:
        result.reason = f"timeout; duration={timeout_s:g}s"
        if settings.timeout_s is None and scale_of(settings) != 1:
            result.reason += f", {scale_of(settings):g} times the suite's"
        if result.places:
            result.reason += f"; {result.places[0]}"
    else:
        result.reason = str(outcome)


def _account(machine: TestMachine, result: Result) -> None:
    """Add up exits, the KVM's counters and instructions of all vCPUs."""
    for vcpu in machine.stats()["vcpus"]:
        for reason, numbers in vcpu["exits"].items():
            result.exits[reason] = result.exits.get(reason, 0) + numbers["count"]
        for name, value in vcpu.get("kvm", {}).items():
            if isinstance(value, int) and value:
                result.kvm_exits[name] = result.kvm_exits.get(name, 0) + value
    result.instructions = result.kvm_exits.pop("instructions", None)
