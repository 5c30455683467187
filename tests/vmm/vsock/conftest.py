# SPDX-License-Identifier: Apache-2.0
"""A guest on a thread that echoes at port 5000, and the machine's side of its device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.vsock import Responder

from softkvm.vmm.vsock.api import Vsock
from softkvm.vmm.vsock.hub import Hub

ECHO = 5000


@pytest.fixture
def echo_hub() -> Iterator[Hub]:
    hub = Hub(3)
    responder = Responder(hub, {ECHO})
    yield hub
    hub.close()
    responder.close()


@pytest.fixture
def vsock(echo_hub: Hub) -> Vsock:
    return Vsock(echo_hub, lambda cid: None)
