"""Webhooks are sent to the public internet only: every special-purpose range counts as private, also when it is embedded in
an IPv6 address."""

from __future__ import annotations

import ipaddress

import pytest

from jobs.notifications.ip_ranges import MULTICAST_IPV4, SPECIAL_IPV4, SPECIAL_IPV6, is_public

IPV4 = [ipaddress.IPv4Network(block) for block in (*SPECIAL_IPV4, MULTICAST_IPV4)]
IPV6 = [ipaddress.IPv6Network(block) for block in (*SPECIAL_IPV6, "fec0::/10", "ff00::/8", "::/96")]


def embedded(inner: ipaddress.IPv4Address) -> dict[str, ipaddress.IPv6Address]:
    """The IPv6 addresses that embed an IPv4 address."""
    number = int(inner)
    prefixes = {
        "mapped": "::ffff:0:0",
        "compatible": "::",
        "nat64": "64:ff9b::",
        "local nat64": "64:ff9b:1::",
    }
    addresses = {
        name: ipaddress.IPv6Address(int(ipaddress.IPv6Address(p)) | number) for name, p in prefixes.items()
    }
    addresses["6to4"] = ipaddress.IPv6Address(0x2002 << 112 | number << 80)
    addresses["teredo server"] = ipaddress.IPv6Address(
        0x20010000 << 96 | number << 64 | 0xFFFFFFFF ^ 0x08080808
    )
    addresses["teredo client"] = ipaddress.IPv6Address(
        0x20010000 << 96 | 0x08080808 << 64 | 0xFFFFFFFF ^ number
    )
    return addresses


@pytest.mark.parametrize("block", [*IPV4, *IPV6], ids=str)
def test_the_first_and_last_address_of_a_special_range_are_private(block):
    for address in (block[0], block[-1]):
        assert not is_public(str(address)), address


@pytest.mark.parametrize("block", IPV4, ids=str)
def test_a_private_address_inside_an_ipv6_address_is_private(block):
    for inner in (block[0], block[-1]):
        for kind, address in embedded(inner).items():
            assert not is_public(str(address)), (kind, address)


@pytest.mark.parametrize(
    "address", ["fec0::1", "192.0.0.8", "2001:1::1", "::ffff:8.8.8.8", "4000::1", "fe80::1%eth0"]
)
def test_addresses_outside_the_public_internet_are_private(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "1.0.0.0",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2000::",
        "2001:200::",
        "2001:db7:ffff::1",
        "2001:db9::",
        "2003::",
        "2606:4700:4700::1111",
        "3ffe:ffff::1",
        "64:ff9b::8.8.8.8",  # how an IPv6-only network reaches a public IPv4 address
    ],
)
def test_addresses_next_to_special_ranges_are_public(address):
    assert is_public(address)
