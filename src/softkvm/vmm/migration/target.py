# SPDX-License-Identifier: Apache-2.0
"""The side that gets the machine: memory as it comes, then a machine with the state, which starts when it is ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import softkvm
from softkvm.closing import Closing
from softkvm.vmm.errors import MachineError, MigrationError
from softkvm.vmm.memory import PAGE_SIZE, GuestMemory
from softkvm.vmm.migration.stream import OFFSET, RANGE, VERSION, Channel, Kind, decode_json
from softkvm.vmm.snapshot import encoding, state
from softkvm.vmm.snapshot.manifest import CONFIG
from softkvm.vmm.snapshot.structures import field

if TYPE_CHECKING:
    from softkvm import api
    from softkvm.vmm.machine import Config, Machine

NewMachine = Callable[["Config", dict[str, Any]], "Machine"]
"""Makes a machine of a configuration and what the source's user interface said of it."""


class Incoming(Closing):
    """The machine that comes over *channel*, made by *new_machine*. MigrationError, and there is none, if it can't be.

    A machine whose devices have files is made when the source stands, and they are as they will be.
    """

    def __init__(self, channel: Channel, new_machine: NewMachine) -> None:
        self._channel = channel
        self._new_machine = new_machine
        self._memory: GuestMemory | None = None
        self._machine: Machine | None = None

    def receive(self) -> Machine:
        """Wait for all of it; return the machine, which is ours, for the caller to start at once and to close."""
        try:
            machine = self._receive()
        except MigrationError as error:
            self._refuse(str(error))
            raise
        except (MachineError, OSError, MemoryError) as error:
            self._refuse(str(error))
            raise MigrationError(str(error)) from None
        self._memory = self._machine = None
        return machine

    def _refuse(self, why: str) -> None:
        self.close()  # its files go back first
        self._channel.send_refusal(why)

    def _receive(self) -> Machine:
        hello = decode_json(self._channel.receive(Kind.HELLO)[1])
        config, files = self._check(hello)
        self._memory = GuestMemory(config["memory_size"])
        extra = field(hello, "extra", dict)
        if not files:
            self._build(config, extra)
        self._channel.send(Kind.ACCEPTED)
        saved = self._receive_memory(self._memory)
        machine = self._machine or self._build(config, extra)
        state.restore(machine, saved)
        if field(hello, "paused", bool):
            machine.pause()
        self._channel.send(Kind.READY)
        self._channel.receive(Kind.COMMIT)
        self._channel.send(Kind.COMMITTED)
        return machine

    def _check(self, hello: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return the machine's configuration, and whether it has files; MigrationError for a source of another kind."""
        if hello.get("version") != VERSION:
            raise MigrationError(f"migration of version {hello.get('version')!r}, expected {VERSION}")
        if hello.get("softkvm") != softkvm.__version__:
            raise MigrationError(f"the source is softkvm {hello.get('softkvm')}, this is {softkvm.__version__}")
        config = field(hello, "machine", dict)
        if config.keys() != set(CONFIG) or type(config["memory_size"]) is not int:
            raise MigrationError("a machine that cannot be: its configuration is none")
        return config, field(hello, "files", bool)

    def _build(self, config: dict[str, Any], extra: dict[str, Any]) -> Machine:
        from softkvm.vmm.machine import Config

        assert self._memory is not None
        try:
            self._machine = self._new_machine(Config(**config, memory=self._memory), extra)
        except TypeError as error:
            raise MigrationError(f"a machine that cannot be: {error}") from None
        return self._machine

    def _receive_memory(self, memory: GuestMemory) -> dict[str, Any]:
        """Take pages until the state comes; return that."""
        while True:
            kind, data = self._channel.receive(Kind.PAGES, Kind.ZEROES, Kind.STATE)
            if kind is Kind.STATE:
                saved = encoding.decode(bytes(data))
                if not isinstance(saved, dict):
                    raise MigrationError("the other side sends what is no state")
                return saved
            if kind is Kind.PAGES:
                (offset,) = OFFSET.unpack_from(data)
                contents = memoryview(data)[OFFSET.size :]
                _check_range(memory, offset, len(contents))
                memory.view[offset : offset + len(contents)] = contents
            else:
                offset, size = RANGE.unpack(data)
                _check_range(memory, offset, size)
                memory.zero(offset, size)

    def close(self) -> None:
        """Give back what there is of the machine, if it has not been handed on."""
        if self._machine is not None:
            self._machine.close()
        elif self._memory is not None:
            self._memory.close()
        self._memory = self._machine = None


def _check_range(memory: GuestMemory, offset: int, size: int) -> None:
    if offset % PAGE_SIZE or size % PAGE_SIZE or offset + size > memory.size:
        raise MigrationError(f"the other side sends {size:#x} bytes at {offset:#x}, where there is no such memory")


def listen_for(channel: Channel, kvm: api.Kvm, console: Callable[[bytes], None] | None = None) -> Machine:
    """Return the machine that comes over *channel*, on *kvm*, if it has no devices but the board's."""
    from softkvm.vmm.machine import Machine

    with Incoming(channel, lambda config, extra: Machine(kvm, config, console)) as incoming:
        return incoming.receive()
