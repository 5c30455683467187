# SPDX-License-Identifier: Apache-2.0
"""``--net``: what it takes, and the one line for what it doesn't."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Network, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.vmm.devices.virtio_net import NetSpec, parse
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.net.spec import Allowed, Forward, TapNet, UserNet


def user(text: str) -> UserNet:
    """The user-mode network of an option."""
    net = parse(text).net
    assert isinstance(net, UserNet)
    return net


def test_user_alone_is_qemus_network() -> None:
    """10.0.2.0/24: gateway .2, name server .3, guest .15 (QEMU's manual, "user mode networking")."""
    net = user("user")
    assert [str(a) for a in (net.network, net.gateway, net.nameserver, net.guest)] == [
        "10.0.2.0/24", "10.0.2.2", "10.0.2.3", "10.0.2.15",
    ]  # fmt: skip
    assert parse("user") == NetSpec(UserNet(), None, 1500, 1)


def test_everything_that_can_be_said_is_understood() -> None:
    text = (
        "user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp:[::1]:0-10.9.0.15:53,allow=192.0.2.1:80,allow=192.0.2.2,"
        "allow=[2001:db8::1]:443,allow=Example.org:443,dns=192.0.2.53,hostname=a-b.c,net=10.9.0.0/16,restrict=on,"
        "mac=52:54:00:aa:BB:01,mtu=9000,queues=2"
    )
    spec = parse(text)
    assert spec == NetSpec(
        UserNet(
            IPv4Network("10.9.0.0/16"),
            "a-b.c",
            (ip_address("192.0.2.53"), 53),
            (
                Allowed(ip_address("192.0.2.1"), 80),
                Allowed(ip_address("192.0.2.2"), 0),
                Allowed(ip_address("2001:db8::1"), 443),
                Allowed("example.org", 443),
            ),
            (
                Forward("tcp", ip_address("127.0.0.1"), 2222, None, 22),
                Forward("udp", ip_address("::1"), 0, ip_address("10.9.0.15"), 53),
            ),
            True,
        ),
        bytes.fromhex("525400aabb01"),
        9000,
        2,
    )


def test_a_forwarded_port_without_an_address_is_the_loopbacks() -> None:
    assert str(user("user,hostfwd=tcp::80-:8080").forwards[0]) == "tcp:127.0.0.1:80-:8080"


@pytest.mark.parametrize("size", [1, 15])
def test_tap_names_of_up_to_15_bytes_are_taken_whole(size: int) -> None:
    assert parse(f"tap={'t' * size}").net == TapNet("t" * size)


@pytest.mark.parametrize("size", [16, 17, 255, 4096, 60_000])
def test_longer_tap_names_are_refused_and_never_cut(size: int) -> None:
    with pytest.raises(ConfigError, match=f"a name of {size} bytes, expected 1 to 15"):
        parse(f"tap={'t' * size}")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a b", "a:b", "a%d", "\N{LATIN SMALL LETTER U WITH DIAERESIS}" * 8]
)
def test_names_that_the_kernel_has_no_device_of_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"tap={name}")


@pytest.mark.parametrize("name", ["a", "a" * 63, ".".join(["a" * 63] * 3 + ["a" * 61])])
def test_host_names_of_up_to_253_bytes_are_taken_whole(name: str) -> None:
    assert user(f"user,hostname={name}").hostname == name


@pytest.mark.parametrize(
    "name", ["a" * 64, ".".join(["a" * 63] * 3 + ["a" * 62]), "a" * 60_000, "-a", "a-", "a..b", "a b", ".", "ä"]
)
def test_other_host_names_are_refused_and_never_cut(name: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"user,hostname={name}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing, expected user or tap=NAME"),
        ("bridge", "bridge, expected user or tap=NAME"),
        ("user=x", "user=x, expected user or tap=NAME"),
        ("user,mac", "unknown: mac"),
        ("user,mac=", "expected six bytes"),
        ("user,speed=1", "unknown: speed"),
        ("tap=t,hostfwd=tcp::1-:1", "unknown: hostfwd"),
        ("user,mtu=1500,mtu=1500", "mtu is there twice"),
        ("user,mac=01:00:5e:00:00:01", "no group's"),
        ("user,mac=00:00:00:00:00:00", "not all zeroes"),
        ("user,mac=52:54:00", "expected six bytes"),
        ("user,mtu=1279", "expected a number from 1280 to 65521"),
        ("user,mtu=70000", "expected a number from 1280 to 65521"),
        ("user,queues=0", "expected a number from 1 to 16"),
        ("user,queues=17", "expected a number from 1 to 16"),
        ("user,hostfwd=tcp:2222:22", "expected tcp|udp:[HOST]:PORT-[GUEST]:PORT"),
        ("user,hostfwd=tcp::70000-:22", "70000 is no port"),
        ("user,hostfwd=tcp::22-:0", "0 is no port"),
        ("user,hostfwd=tcp:localhost:22-:22", "localhost is no address"),
        ("user,hostfwd=tcp::22-192.0.2.1:22", "192.0.2.1 is not in 10.0.2.0/24"),
        ("user,allow=127.0.0.1:80", "the guest reaches it as its gateway"),
        ("user,allow=[::1]:80", "the guest reaches it as its gateway"),
        ("user,allow=224.0.0.1", "no single host"),
        ("user,allow=255.255.255.255", "no single host"),
        ("user,allow=0.0.0.0", "no single host"),
        ("user,allow=1.2.3.4:0", "0 is no port"),
        ("user,allow=1.2.3.4:", "expected ADDR or ADDR:PORT"),
        ("user,allow=1.2.3", "1.2.3 is no address"),
        ("user,allow=10.0.2.9", "in 10.0.2.0/24"),
        ("user,allow=10.0.2.2:80", "the host's loopback, which restrict=off allows"),
        ("user,dns=example", "example is no address"),
        ("user,net=10.0.2.0/30", "expected 8 to 27 bits"),
        ("user,net=127.0.0.0/8", "expected a network of hosts"),
        ("user,net=10.0.2.1/24", "has host bits set"),
        ("user,restrict=yes", "expected on or off"),
    ],
)  # fmt: skip
def test_what_is_wrong_stands_in_one_line_with_the_option(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert says in message and message.startswith(f"--net {text}:") and "\n" not in message


@given(st.text(max_size=80))
def test_no_text_raises_anything_else(text: str) -> None:
    for option in (
        text,
        f"user,{text}",
        f"tap={text}",
        f"user,hostfwd={text}",
        f"user,allow={text}",
        f"user,dns={text}",
    ):
        with contextlib.suppress(ConfigError):
            parse(option)
