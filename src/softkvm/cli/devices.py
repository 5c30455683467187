# SPDX-License-Identifier: Apache-2.0
"""The options of ``softkvm run`` that add a device: one row each."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from softkvm.cli import CommandError
from softkvm.vmm.devices import (
    ports,
    pvpanic,
    share,
    virtio_balloon,
    virtio_blk,
    virtio_net,
    virtio_rng,
    virtio_vsock,
    watchdog,
)
from softkvm.vmm.devices.spec import DeviceSpec
from softkvm.vmm.errors import ConfigError

NET_HELP: Final = (
    "a network device (virtio-net): user, a network of this process's that leads to the host's loopback (10.0.2.2) and "
    "to what allow=ADDR:PORT names, with hostfwd=tcp:[HOST]:PORT-:PORT, dns=, hostname=; or a tap device"
)


class DeviceOption(NamedTuple):
    """An option that adds a device each time that it is given."""

    flag: str
    metavar: str
    help: str
    parse: Callable[[str], DeviceSpec]
    """Makes a specification of the option's text; ConfigError, one line, if it is none."""
    bare: bool = False
    """Whether the option can stand without a text."""

    @property
    def name(self) -> str:
        """The option's name in a configuration file and in the parser's result."""
        return self.flag.removeprefix("--").replace("-", "_")


DEVICE_OPTIONS: Final = (
    DeviceOption(
        "--disk",
        "FILE[,ro][,overlay]…",
        "a disk (virtio-blk) with the contents of a raw or qcow2 image; ro: it is only read; overlay: what is written "
        "goes with the machine; format=raw|qcow2, serial=TEXT, queues=N, block-size=512|4096",
        virtio_blk.parse,
    ),
    DeviceOption(
        "--disk-overlay", "FILE…", "the same with overlay: the image stays as it is", virtio_blk.parse_overlay
    ),
    DeviceOption("--net", "user|tap=NAME,…", NET_HELP, virtio_net.parse),
    DeviceOption("--rng", "OPTIONS", "a source of entropy (virtio-rng)", virtio_rng.parse, bare=True),
    DeviceOption(
        "--vsock",
        "OPTIONS",
        "sockets between host and guest (virtio-vsock): cid=N, path=PATH for UNIX sockets on the host",
        virtio_vsock.parse,
        bare=True,
    ),
    DeviceOption(
        "--share",
        "DIR[:TAG][,ro]",
        "a directory of the host's, which the guest mounts by its tag (default: DIR's name); fs=9p or virtiofs: only "
        "as that; owner=host: files have the host's owners",
        share.parse,
    ),
    DeviceOption(
        "--balloon",
        "[SIZE][,reporting][,hinting][,stats=SECONDS][,deflate-on-oom]",
        "memory that comes back (virtio-balloon): SIZE is what the guest is to give up at first",
        virtio_balloon.parse,
        bare=True,
    ),
    DeviceOption(
        "--watchdog",
        "i6300esb[,action=ACTION]",
        f"a watchdog; when it expires: {', '.join(watchdog.ACTIONS)} (default: reset)",
        watchdog.parse,
    ),
    DeviceOption("--pvpanic", "pci", "the panic device on PCI, beside the one at its port", pvpanic.parse),
    DeviceOption(
        "--port",
        "NAME=WHERE",
        "a stream between host and guest (/dev/virtio-ports/NAME): unix:PATH, a socket to connect to; pty; file:PATH; "
        "stdio",
        ports.parse,
    ),
)
"""In the order in which a guest finds the devices."""


def add_device_options(parser: ArgumentParser) -> None:
    """Add all of them."""
    group = parser.add_argument_group(
        "devices",
        "each may be given several times; all virtio devices take id=NAME, transport=pci|mmio and packed besides",
    )
    for option in DEVICE_OPTIONS:
        bare: dict[str, Any] = {"nargs": "?", "const": ""} if option.bare else {}
        group.add_argument(option.flag, metavar=option.metavar, action="append", default=[], help=option.help, **bare)


def device_specs(args: Namespace) -> tuple[DeviceSpec, ...]:
    """Return the devices that *args* ask for; CommandError if one is wrong."""
    try:
        return tuple(option.parse(text) for option in DEVICE_OPTIONS for text in getattr(args, option.name))
    except ConfigError as error:
        raise CommandError(str(error)) from None


def option_texts(args: Namespace) -> list[list[str]]:
    """Return the options for devices that *args* have, as flag and text: what :func:`specs_of` reads again."""
    return [[option.flag, text] for option in DEVICE_OPTIONS for text in getattr(args, option.name)]


def specs_of(texts: object) -> tuple[DeviceSpec, ...]:
    """Return the devices of :func:`option_texts`, which a snapshot has kept; ConfigError for what is none."""
    options = {option.flag: option for option in DEVICE_OPTIONS}
    specs = []
    for pair in texts if isinstance(texts, list) else [texts]:
        if not (isinstance(pair, list) and len(pair) == 2 and pair[0] in options and isinstance(pair[1], str)):
            raise ConfigError(f"{pair!r}: there is no such device")
        specs.append(options[pair[0]].parse(pair[1]))
    return tuple(specs)
