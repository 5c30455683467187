# SPDX-License-Identifier: Apache-2.0
"""Every test here runs on the software side, and on /dev/kvm where that opens."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from tests.support.conformance import Guest, require
from tests.support.machines import KVMS

from softkvm import api


@pytest.fixture(params=list(KVMS))
def kind(request: pytest.FixtureRequest) -> str:
    """Which KVM it is: ``soft`` or ``device``."""
    return str(request.param)


@pytest.fixture
def kvm(kind: str) -> Iterator[api.Kvm]:
    """An open KVM."""
    with KVMS[kind]() as opened:
        yield opened


@pytest.fixture
def make(kvm: api.Kvm) -> Iterator[Callable[..., Guest]]:
    """Makes guests; takes the arguments of Guest."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Guest(kvm, **options))


@pytest.fixture
def guest(make: Callable[..., Guest]) -> Guest:
    """One vCPU without in-kernel chips."""
    return make()


@pytest.fixture
def needs(kind: str) -> Callable[[str], None]:
    """Skips where the host cannot do something."""
    return lambda ability: require(kind, ability)


@pytest.fixture
def device_differs(kind: str) -> Callable[[str], None]:
    """Ends a test on a real device that is known to differ, with the reason; docs/kvm-api.md lists them."""

    def skip(reason: str) -> None:
        if kind == "device":
            pytest.skip(f"differs: {reason}")

    return skip
