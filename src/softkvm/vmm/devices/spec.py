# SPDX-License-Identifier: Apache-2.0
"""Devices that a user asks for: what they are asked for with, and how a text becomes that.

A device's module has a frozen dataclass ``<Name>Spec`` with the text's contents, checked, and an ``attach(machine)``
that makes the device; its ``parse(text)`` reads ``FIRST,word,name=value,…``, where ``,,`` is a comma of a value's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from softkvm.abi.sizes import Size
from softkvm.vmm.errors import ConfigError

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine
    from softkvm.vmm.virtio.device import VirtioDevice
    from softkvm.vmm.virtio.worker import Worker

_TEXT: Final = Size("bytes of a device's option", 1 << 16, ConfigError, effect="ConfigError", where=__name__)
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class DeviceSpec(Protocol):
    """A device that a user asks for."""

    def attach(self, machine: Machine) -> Any:
        """Make the device, a part of *machine*, and return it; ConfigError if that cannot be."""


PCI, MMIO = "pci", "mmio"


@dataclass(frozen=True, slots=True)
class Placement:
    """How a virtio device is shown to the guest: what every virtio device's option takes."""

    name: str = ""
    """What the device is called in commands and messages; by default its kind and a number."""
    transport: str = PCI
    packed: bool = False

    def add(self, machine: Machine, device: VirtioDevice, worker: Worker | None = None) -> None:
        """Give *device* to *machine*."""
        machine.board.virtio.add(device, self, worker)


@dataclass(slots=True)
class Words:
    """The parts of an option's text; a part that is read is taken out, and :meth:`end` complains of what is left."""

    option: str
    text: str
    first: str = ""
    flags: list[str] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, option: str, text: str, *, first: bool = True, repeated: tuple[str, ...] = ()) -> Words:
        """Take *text* apart; its first part is a value of its own if *first*; *repeated* ones may be there often."""
        if "\0" in text or not _TEXT.allows(len(text)):
            raise ConfigError(f"{option}: a text with a NUL character or of more than {_TEXT.most} characters")
        parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
        words = cls(option, text)
        if first:
            words.first = parts.pop(0)
        for part in parts:
            name, equals, value = part.partition("=")
            if not part:
                continue
            if not equals:
                words.flags.append(name)
            elif name in repeated:
                words.lists.setdefault(name, []).append(value)
            elif name in words.values:
                raise words.error(f"{name} is there twice")
            else:
                words.values[name] = value
        return words

    def error(self, what: str) -> ConfigError:
        """Return the error that says *what* is wrong."""
        return ConfigError(f"{self.option} {self.text}: {what}")

    def flag(self, name: str) -> bool:
        """Take a word without a value, or with ``on`` or ``off`` for one."""
        if name in self.flags:
            self.flags.remove(name)
            return True
        value = self.values.pop(name, "off")
        if value not in ("on", "off"):
            raise self.error(f"{name}={value}, expected on or off")
        return value == "on"

    def value(self, name: str, default: str = "") -> str:
        """Take the value of *name*."""
        return self.values.pop(name, default)

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        """Take a value that is one of *choices*."""
        value = self.values.pop(name, default)
        if value not in choices:
            raise self.error(f"{name}={value}, expected {', '.join(choices[:-1])} or {choices[-1]}")
        return value

    def number(self, name: str, low: int, high: int, default: int) -> int:
        """Take a number from *low* to *high*."""
        value = self.values.pop(name, None)
        if value is None:
            return default
        if value.isascii() and value.isdecimal() and len(value) < 20 and low <= int(value) <= high:
            return int(value)
        raise self.error(f"{name}={value}, expected a number from {low} to {high}")

    def checked(self, name: str, check: Callable[[str], Any], default: Any) -> Any:
        """Take a value that *check* makes something of; its ValueError says what was expected."""
        value = self.values.pop(name, None)
        if value is None:
            return default
        try:
            return check(value)
        except ValueError as error:
            raise self.error(f"{name}={value}, {error}") from None

    def each(self, name: str, check: Callable[[str], Any]) -> tuple[Any, ...]:
        """Take all values of *name*; *check* makes something of each, its ValueError says what was expected."""
        found = []
        for value in self.lists.pop(name, []):
            try:
                found.append(check(value))
            except ValueError as error:
                raise self.error(f"{name}={value}, {error}") from None
        return tuple(found)

    def placement(self) -> Placement:
        """Take what every virtio device's option has: ``id``, ``transport``, ``packed``."""
        name = self.value("id")
        if name and not _NAME.fullmatch(name):
            raise self.error(f"id={name}, expected up to 64 letters, digits, '_', '-' and '.'")
        return Placement(name, self.choice("transport", (PCI, MMIO), PCI), self.flag("packed"))

    def end(self) -> None:
        """Complain of what nobody has taken."""
        unknown = [*self.flags, *self.values, *self.lists]
        if unknown:
            raise self.error(f"unknown: {', '.join(unknown)}")
