# SPDX-License-Identifier: Apache-2.0
"""Ports of the host's that lead to the guest: ``hostfwd=``."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

from softkvm.vmm.errors import ConfigError
from softkvm.vmm.net.link import READ, Worker
from softkvm.vmm.net.spec import Forward, show

BACKLOG: Final = 128
BATCH: Final = 16
"""Most connections taken at once, before others on the thread have their turn."""


class Listener:
    """The host's socket for *forward*, bound at once. Raises ConfigError if the host refuses."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        family = socket.AF_INET if forward.host.version == 4 else socket.AF_INET6
        stream = forward.protocol == "tcp"
        kind = (socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) | socket.SOCK_NONBLOCK
        self.socket = socket.socket(family, kind)
        try:
            if stream:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((str(forward.host), forward.host_port))
            if stream:
                self.socket.listen(BACKLOG)
        except OSError as error:
            self.socket.close()
            raise ConfigError(f"--net hostfwd={forward}: {error.strerror}") from None

    @property
    def port(self) -> int:
        """The host's port."""
        return int(self.socket.getsockname()[1])

    def start(self, worker: Worker, ready: Callable[[Listener], object]) -> None:
        """Call *ready* whenever something has come."""
        worker.add(self.socket, READ, lambda _: ready(self))

    def stop(self, worker: Worker) -> None:
        """Do so no more."""
        worker.remove(self.socket)

    def close(self) -> None:
        """Give the port back."""
        self.socket.close()

    def describe(self) -> dict[str, object]:
        """What leads where."""
        return {
            "protocol": self.forward.protocol,
            "host": f"{show(self.forward.host)}:{self.port}",
            "guest_port": self.forward.guest_port,
        }
