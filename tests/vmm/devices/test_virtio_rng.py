# SPDX-License-Identifier: Apache-2.0
"""The entropy device (VIRTIO 1.3, 5.4)."""

import pytest
from tests.support.virtio_driver import driving

from softkvm.vmm.devices.virtio_rng import MOST, Rng, RngSpec, parse
from softkvm.vmm.errors import ConfigError

ALL = pytest.mark.parametrize("transport", ["pci", "mmio"]), pytest.mark.parametrize("packed", [False, True])


@ALL[0]
@ALL[1]
def test_buffers_are_filled_with_different_bytes(transport: str, packed: bool) -> None:
    with driving(Rng(), transport=transport, packed=packed) as driver:
        queue = driver.queues[0]
        found = {queue.request(writable=[32, 32]) for _ in range(200)}
        assert {len(data) for data in found} == {64}
        assert len(found) == 200
        driver.wait_interrupt()


@ALL[0]
@ALL[1]
def test_a_whole_ring_of_buffers_is_one_batch(transport: str, packed: bool) -> None:
    with driving(Rng(), transport=transport, packed=packed) as driver:
        queue = driver.queues[0]
        queue.indirect = True
        buffers = [queue.add(writable=[16, 16]) for _ in range(queue.size)]
        queue.notify()
        for buffer in buffers:
            assert len(queue.wait(buffer).data()) == 32


def test_a_buffer_gets_no_more_than_the_limit() -> None:
    with driving(Rng()) as driver:
        assert len(driver.queues[0].request(writable=[1 << 20])) == MOST.most


def test_the_option_takes_what_every_virtio_device_takes() -> None:
    assert parse("") == RngSpec()
    assert parse("id=noise,transport=mmio,packed").placement.name == "noise"
    for text, wrong in (("id=a/b", "id=a/b"), ("transport=isa", "pci or mmio"), ("size=3", "unknown: size")):
        with pytest.raises(ConfigError, match=wrong):
            parse(text)
