# SPDX-License-Identifier: Apache-2.0
"""What a machine under control is told about snapshots and migration: docs/snapshots.md, docs/control.md."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from softkvm.live.server import Ask, Connection, Refused
from softkvm.threads import start_quiet
from softkvm.vmm.errors import MachineError, MigrationError
from softkvm.vmm.outcome import End, Outcome

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine
    from softkvm.vmm.migration.source import Migration, Progress, Report


class Moves:
    """Snapshots and the migration of *machine*, called *name*; *extra* is what its user's interface needs again."""

    def __init__(self, machine: Machine, name: str, extra: Mapping[str, Any]) -> None:
        self._machine = machine
        self._name = name
        self._extra = dict(extra)
        self._lock = threading.Lock()
        self._migration: Migration | None = None
        self.asks = {
            "snapshot": Ask(self._snapshot, waits=True),
            "migrate": Ask(self._migrate, waits=True),
            "migrate_cancel": Ask(self._cancel),
        }

    def _snapshot(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        """Save the machine; with ``end`` it ends where it was saved."""
        from softkvm.vmm.snapshot.directory import save

        directory, base = _path(request, "directory"), request.get("base")
        machine = self._machine
        machine.expect_going()
        end, was_paused = request.get("end") is True, machine.paused
        if end:
            machine.pause()
        try:
            manifest = save(
                machine,
                directory,
                base=None if base is None else _path(request, "base"),
                watch=request.get("watch") is True,
                extra=self._extra,
            )
        except BaseException:
            if end and not was_paused:
                machine.resume()
            raise
        if end:
            machine.end(Outcome(End.STOPPED, f"saved to {directory}"))
        return {"id": manifest.id, "memory_bytes": manifest.memory.size, "stored_bytes": manifest.memory.stored}

    def _migrate(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        """Begin to move the machine; events say how it goes. If the connection ends, so does that."""
        from softkvm.vmm.migration.source import DOWNTIME_S, Migration
        from softkvm.vmm.migration.stream import connect

        where = request.get("where")
        downtime_s = request.get("downtime_s", DOWNTIME_S)
        if not isinstance(where, str):
            raise Refused("where: expected unix:PATH or tcp:127.0.0.1:PORT")
        if isinstance(downtime_s, bool) or not isinstance(downtime_s, (int, float)) or not 0 < downtime_s <= 60:
            raise Refused("downtime_s: expected a number above 0, up to 60")
        self._machine.expect_going()

        def tell(state: str, more: Mapping[str, Any]) -> None:
            connection.post({"event": "migration", "machine": self._name, "state": state, **more})

        def progress(now: Progress) -> None:
            tell("active", asdict(now))

        def done(report: Report) -> None:
            tell("completed", {**asdict(report), "text": str(report)})

        def work() -> None:
            try:
                migration.run()
            except MachineError as error:
                tell("failed", {"text": str(error)})
            except Exception as error:  # whatever it is, the machine goes on, and who asked shall know
                tell("failed", {"text": f"{type(error).__name__}: {error}"})
            finally:
                channel.close()
                with self._lock:
                    self._migration = None

        def end() -> None:
            with contextlib.suppress(MigrationError):
                migration.cancel()

        with self._lock:
            if self._migration is not None:
                raise Refused("the machine is moving already")
            channel = connect(where)
            self._migration = migration = Migration(
                self._machine,
                channel,
                extra=self._extra,
                progress=progress,
                done=done,
                downtime_s=float(downtime_s),
                where=where,
            )
        connection.at_end.append(end)
        start_quiet(work, "migration")
        return {"machine": self._name}

    def _cancel(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            migration = self._migration
        if migration is None:
            raise Refused("the machine does not move")
        migration.cancel()
        return {"machine": self._name}


def _path(request: dict[str, Any], name: str) -> str:
    value = request.get(name)
    if not isinstance(value, str) or "\0" in value or not os.path.isabs(value):
        raise Refused(f"{name}: expected an absolute path")
    return value
