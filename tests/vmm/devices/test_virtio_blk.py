# SPDX-License-Identifier: Apache-2.0
"""The block device (VIRTIO 1.3, 5.2), driven without a vCPU."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.virtio_driver import NEEDS_RESET, Driver, DriverQueue, driving

from softkvm.vmm.block.files import create_qcow2, open_image
from softkvm.vmm.block.image import Image
from softkvm.vmm.devices import virtio_blk
from softkvm.vmm.devices.virtio_blk import Disk, DiskSpec, parse, parse_overlay
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.virtio.worker import Worker

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
F_RO, F_FLUSH, F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = 5, 9, 11, 12, 13, 14
SIZE = 1 << 20


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def request(
    queue: DriverQueue, kind: int, sector: int = 0, data: Sequence[bytes] = (), room: Sequence[int] = ()
) -> tuple[int, bytes]:
    """Carry out a request; its status, and what was read."""
    answer = queue.request([header(kind, sector), *data], [*room, 1])
    return answer[-1], answer[:-1]


def ranges(*entries: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *entry) for entry in entries)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    file.write_bytes(b"".join(b"%08d" % n * 64 for n in range(SIZE // 512)))
    return file


@pytest.fixture(params=["pci", "mmio", "packed"])
def driver(path: Path, request: pytest.FixtureRequest) -> Iterator[Driver]:
    disk = Disk(open_image(str(path)), serial=b"serial-0123456789-ab")
    transport = request.param.replace("packed", "pci")
    with driving(disk, transport=transport, packed=request.param == "packed") as driver:
        yield driver


def test_sectors_are_read_and_written(driver: Driver, path: Path) -> None:
    queue = driver.queues[0]
    for indirect in (False, True):
        queue.indirect = indirect
        status, data = request(queue, IN, 3, room=[512, 1024])
        assert (status, data[:8], data[512:520]) == (OK, b"00000003", b"00000004")
        assert request(queue, OUT, 5, [b"a" * 100, b"b" * 924])[0] == OK
        assert request(queue, IN, 5, room=[1024])[1] == b"a" * 100 + b"b" * 924
        assert request(queue, FLUSH)[0] == OK
    assert path.read_bytes()[2560:3584] == b"a" * 100 + b"b" * 924


def test_headers_and_status_may_be_in_any_segment(driver: Driver) -> None:
    """2.7.4.2: a device makes no assumptions about how a request is cut."""
    queue = driver.queues[0]
    whole = header(OUT, 7) + b"c" * 512
    assert queue.request([whole[:3], whole[3:20], whole[20:]], [1]) == b"\0"
    assert queue.request([header(IN, 7)], [512 + 1]) == b"c" * 512 + b"\0"
    assert queue.request([header(IN, 7)], [256, 257]) == b"c" * 512 + b"\0"


def test_what_is_not_on_the_disk_fails(driver: Driver) -> None:
    queue, last = driver.queues[0], SIZE // 512
    assert request(queue, IN, last - 1, room=[512])[0] == OK
    for kind, sector, size in (
        (IN, last, 512),
        (IN, last - 1, 1024),
        (IN, (1 << 64) - 1, 512),
        (IN, 0, 100),
        (OUT, last, 512),
        (OUT, 0, 513),
    ):
        data, room = ([b"x" * size], []) if kind == OUT else ([], [size])
        assert request(queue, kind, sector, data, room)[0] == IOERR
    assert request(queue, 77)[0] == UNSUPP
    assert request(queue, IN, 0, room=[512])[0] == OK


def test_requests_without_header_or_status_need_a_reset(driver: Driver) -> None:
    for readable, writable in (([b"short"], [1]), ([header(IN)], [])):
        driver.start()
        queue = driver.queues[0]
        queue.add(readable, writable)
        queue.notify()
        driver.wait_until(lambda: driver.registers.status() & NEEDS_RESET)
    driver.start()
    assert request(driver.queues[0], FLUSH)[0] == OK


def test_the_serial_number_has_20_bytes(driver: Driver) -> None:
    queue = driver.queues[0]
    assert request(queue, GET_ID, room=[20]) == (OK, b"serial-0123456789-ab")
    assert request(queue, GET_ID, room=[10])[0] == IOERR


def test_discarded_and_zeroed_sectors(driver: Driver, path: Path) -> None:
    queue = driver.queues[0]
    assert request(queue, DISCARD, data=[ranges((8, 8, 0), (32, 16, 0))])[0] == OK
    assert request(queue, WRITE_ZEROES, data=[ranges((100, 10, 0), (200, 1, 1))])[0] == OK
    contents = path.read_bytes()
    assert contents[100 * 512 : 110 * 512] == bytes(5120)
    assert contents[200 * 512 : 202 * 512] == bytes(512) + b"00000201" * 64
    for kind in (DISCARD, WRITE_ZEROES):
        for wrong in (b"", ranges((0, 1, 0))[:-1], ranges((SIZE // 512, 1, 0)), ranges((0, 0xFFFFFFFF, 0))):
            assert request(queue, kind, data=[wrong] if wrong else [])[0] == IOERR
        assert request(queue, kind, data=[ranges(*[(0, 1, 0)] * 65)])[0] == IOERR
        assert request(queue, kind, data=[ranges((0, 1, 2))])[0] == UNSUPP
    assert request(queue, DISCARD, data=[ranges((0, 1, 1))])[0] == UNSUPP  # unmap is not a discard's


def test_the_configuration_describes_the_disk(path: Path) -> None:
    with driving(Disk(open_image(str(path)), queues=3, block_size=4096)) as driver:
        config = driver.registers.config
        assert config(0, 4) | config(4, 4) << 32 == SIZE // 512
        assert config(20, 4) == 4096
        assert config(34, 2) == 3  # num_queues
        assert config(32, 1) == 1  # writeback
        assert config(36, 4) >= 8  # max_discard_sectors
        assert config(44, 4) == 8  # discard_sector_alignment: a block of 4096
        assert config(56, 1) == 1  # write_zeroes_may_unmap
        assert driver.registers.features() >> F_MQ & 1


def test_a_disk_that_is_only_read(path: Path) -> None:
    before = path.read_bytes()
    with driving(Disk(open_image(str(path), read_only=True))) as driver:
        features = driver.registers.features()
        assert features >> F_RO & 1
        assert not features >> F_DISCARD & 1
        queue = driver.queues[0]
        assert request(queue, IN, 0, room=[512])[0] == OK
        assert request(queue, OUT, 0, [b"x" * 512])[0] == IOERR
        assert request(queue, DISCARD, data=[ranges((0, 1, 0))])[0] == IOERR
        assert request(queue, WRITE_ZEROES, data=[ranges((0, 1, 0))])[0] == IOERR
        assert request(queue, FLUSH)[0] == OK
    assert path.read_bytes() == before


def test_without_a_cache_each_write_is_flushed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5.2.5.2: by the driver's choice in writeback, or because it knows no flush."""
    count = 0
    real = os.fdatasync

    def counted(fd: int) -> None:
        nonlocal count
        count += 1
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)

    def flushes_of_a_write(driver: Driver) -> int:
        before = count
        assert request(driver.queues[0], OUT, 0, [b"x" * 512])[0] == OK
        return count - before

    with driving(Disk(open_image(str(path)))) as driver:
        assert flushes_of_a_write(driver) == 0
        driver.registers.set_config(32, 1, 0)
        assert driver.registers.config(32, 1) == 0
        assert flushes_of_a_write(driver) == 1
        driver.registers.set_config(32, 1, 1)
        assert flushes_of_a_write(driver) == 0
        driver.start(without=[F_FLUSH, F_CONFIG_WCE])
        assert flushes_of_a_write(driver) == 1
        driver.start(without=[F_CONFIG_WCE])
        assert flushes_of_a_write(driver) == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_the_hosts_errors_are_the_requests(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    queue = driver.queues[0]

    def fails(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        for name in ("pwritev", "preadv", "fdatasync"):
            patch.setattr(os, name, fails)
        for _ in range(3):
            assert request(queue, OUT, 0, [b"x" * 512])[0] == IOERR
            assert request(queue, IN, 0, room=[512])[0] == IOERR
            assert request(queue, FLUSH)[0] == IOERR
    assert request(queue, IN, 0, room=[512])[0] == OK
    assert capfd.readouterr().err.count(os.strerror(code)) == 1  # once, not for each request


def test_an_image_that_has_lost_its_end_is_an_error_of_what_was_there(driver: Driver, path: Path) -> None:
    os.truncate(path, 4096)
    path.unlink()
    queue = driver.queues[0]
    assert request(queue, IN, 0, room=[512])[0] == OK
    assert request(queue, IN, 100, room=[512])[0] == IOERR
    assert request(queue, OUT, 100, [b"x" * 512])[0] == OK  # where there is room there is no error
    assert request(queue, IN, 100, room=[512]) == (OK, b"x" * 512)


def test_an_image_that_another_process_has_kept_is_gone_for_the_guest(
    driver: Driver, path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(virtio_blk, "TAKE_BACK_S", 0.05)
    disk, queue = driver.device, driver.queues[0]
    disk.let_go_of_files()
    with open_image(str(path)):
        disk.take_files_back()
    assert "the disk is gone" in capfd.readouterr().err
    assert request(queue, IN, 0, room=[512])[0] == IOERR
    assert request(queue, OUT, 0, [b"x" * 512])[0] == IOERR
    assert request(queue, FLUSH)[0] == IOERR


class Slow(Image):
    """A disk whose first request lasts until the second comes."""

    name, size, read_only = "slow", 4096, False

    def __init__(self) -> None:
        self.together = threading.Barrier(2)

    def readv(self, views: Sequence[memoryview], offset: int) -> None:
        self.together.wait(30)

    def writev(self, views: Sequence[memoryview], offset: int) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, size: int) -> None: ...
    def zero(self, offset: int, size: int, *, unmap: bool) -> None: ...
    def close(self) -> None: ...


class Stuck(Slow):
    """A disk whose first request takes a while, and whose second doesn't end until it is let."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def readv(self, views: Sequence[memoryview], offset: int) -> None:
        if offset:
            assert self.go_on.wait(30)
        else:
            time.sleep(0.002)


def test_what_is_done_is_seen_while_the_next_request_takes_its_time() -> None:
    image = Stuck()
    with driving(Disk(image)) as driver:
        queue = driver.queues[0]
        with driver.transport.lock:
            first, second = (queue.add([header(IN, sector)], [512, 1]) for sector in (0, 1))
            queue.notify()
        assert queue.wait(first).data()[-1] == OK
        assert second.written is None
        image.go_on.set()
        assert queue.wait(second).data()[-1] == OK


def test_queues_are_served_at_the_same_time() -> None:
    disk = Disk(Slow(), queues=2)
    workers = [Worker("first"), Worker("second")]
    disk.queue_workers = workers
    try:
        with driving(disk) as driver:
            buffers = [(queue, queue.add([header(IN)], [512, 1])) for queue in driver.queues]
            for queue, _ in buffers:
                queue.notify()
            for queue, buffer in buffers:
                assert queue.wait(buffer).data()[-1] == OK
            driver.registers.set_status(0)
            assert driver.registers.status() == 0
    finally:
        for worker in workers:
            worker.close()


def test_a_disk_goes_on_where_it_was_saved(driver: Driver) -> None:
    queue = driver.queues[0]
    assert request(queue, OUT, 0, [b"s" * 512])[0] == OK
    driver.registers.set_config(32, 1, 0)
    with driver.transport.lock:
        state = driver.transport.save()
        driver.transport.reset()
        driver.transport.restore(state)
    assert driver.registers.config(32, 1) == 0
    assert request(queue, IN, 0, room=[512]) == (OK, b"s" * 512)
    state["device"]["size"] += 512
    with pytest.raises(ValueError, match="when it was saved"):
        driver.transport.restore(state)


KILLED = """
import sys
from tests.support.virtio_driver import driving
from tests.vmm.devices.test_virtio_blk import FLUSH, OK, OUT, request
from softkvm.vmm.block.files import open_image
from softkvm.vmm.devices.virtio_blk import Disk

with driving(Disk(open_image(sys.argv[1]))) as driver:
    queue = driver.queues[0]
    for number in range(1 << 30):
        sector = number * 37 % 2000
        assert request(queue, OUT, sector, [b"%016d" % number * 32])[0] == OK
        assert request(queue, FLUSH)[0] == OK
        print(number, flush=True)
"""


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_what_was_flushed_survives_kill_9(tmp_path: Path, format: str) -> None:
    path = tmp_path / "disk"
    if format == "raw":
        path.write_bytes(bytes(SIZE))
    else:
        create_qcow2(str(path), SIZE, cluster_bits=9)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = -1
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged == 300:
            process.send_signal(signal.SIGKILL)
            break
    for line in process.stdout:
        acknowledged = int(line)
    process.wait()
    newest = {number * 37 % 2000: number for number in range(acknowledged + 1)}
    with open_image(str(path)) as image:
        for sector, number in newest.items():
            data = bytearray(512)
            image.readv([memoryview(data)], sector * 512)
            assert int(data[:16]) >= number
            assert data == data[:16] * 32
    if format == "qcow2" and shutil.which("qemu-img") is not None:
        checked = subprocess.run(["qemu-img", "check", str(path)], capture_output=True, text=True, check=False)
        assert checked.returncode in (0, 3), checked.stdout


# -- the option


def test_the_options_text() -> None:
    assert parse("disk.img") == DiskSpec("disk.img")
    assert parse("a,,b,ro,format=raw,serial=x y,queues=4,block-size=4096") == DiskSpec(
        "a,b", read_only=True, format="raw", serial="x y", queues=4, block_size=4096
    )
    assert parse_overlay("disk.img") == parse("disk.img,overlay") == DiskSpec("disk.img", overlay=True)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "a file's name"),
        ("d,serial=" + "x" * 21, "up to 20 printable"),
        ("d,serial=ü", "up to 20 printable"),
        ("d,format=vmdk", "raw, qcow2 or auto"),
        ("d,queues=17", "from 1 to 16"),
        ("d,ro,overlay", "expected one of them"),
        ("d,rw", "unknown: rw"),
        ("d,block-size=1024", "512 or 4096"),
        ("d\0", "NUL"),
        ("d,ro=maybe", "on or off"),
        ("d,serial=a,serial=b", "twice"),
    ],
)
def test_what_is_wrong_with_the_text_is_one_line(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong) as error:
        parse(text)
    assert "\n" not in str(error.value)
