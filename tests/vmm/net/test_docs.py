# SPDX-License-Identifier: Apache-2.0
"""docs/network.md says what is so: its options are understood, its addresses and limits are the code's."""

from __future__ import annotations

import re
from ipaddress import ip_network
from pathlib import Path

from softkvm.vmm.devices.virtio_net import parse
from softkvm.vmm.net.link import MTU_DEFAULT, MTU_MAX, MTU_MIN
from softkvm.vmm.net.spec import QUEUE_PAIRS, TAP_NAME, UserNet
from softkvm.vmm.net.user.connections import BUFFERED, CONNECTIONS, HALF_OPEN
from softkvm.vmm.net.user.policy import NETWORK6
from softkvm.vmm.net.user.sender import QUEUED, WINDOW
from softkvm.vmm.net.user.stack import REPORTS
from softkvm.vmm.net.user.udp import FLOWS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "network.md").read_text(encoding="utf-8")


def test_the_pages_options_are_understood() -> None:
    options = re.findall(r"--net (\S+)", PAGE)
    assert len(options) == 4, options
    for option in options:
        parse(option.replace("dns=host", "dns=192.0.2.53"))
    words = set(re.findall(r"^\| `(\w+)=", PAGE, re.MULTILINE))
    assert words == {"hostfwd", "allow", "restrict", "dns", "hostname", "net", "mac", "mtu", "queues", "id"}
    parse(
        "user,hostfwd=tcp:127.0.0.1:1-10.0.2.15:1,allow=192.0.2.1,restrict=on,dns=192.0.2.1:53,hostname=a,net=10.0.2.0/24"
    )


def test_the_pages_addresses_are_the_networks() -> None:
    net = UserNet()
    for address in (net.gateway, net.nameserver, net.guest, NETWORK6[2], NETWORK6[3], NETWORK6, net.network):
        assert re.search(rf"(?<![\w:.]){re.escape(str(address))}(?![\w:])", PAGE), address
    assert net.network == ip_network("10.0.2.0/24")


def test_the_pages_limits_are_the_codes() -> None:
    assert f"{CONNECTIONS.most:,} connections ({HALF_OPEN.most} of them half open), {FLOWS.most} flows" in PAGE
    assert BUFFERED.most == QUEUED.most and f"{BUFFERED.most >> 20} MiB in such windows and as much" in PAGE
    assert f"a window of {WINDOW >> 10} KiB" in PAGE
    assert f"`mtu={MTU_DEFAULT}` | {MTU_MIN} to {MTU_MAX}" in PAGE and f"up to {QUEUE_PAIRS.most} |" in PAGE
    assert f"at most {TAP_NAME.most} bytes" in PAGE and REPORTS == 8
