"""Which IP addresses belong to the public internet.

The ranges below are all those of IANA's IPv4 and IPv6 special-purpose address registries. Those that are globally reachable
(anycast services, AS112) are included, because they only serve protocols and no user's program listens there.
https://www.iana.org/assignments/iana-ipv4-special-registry  https://www.iana.org/assignments/iana-ipv6-special-registry
"""

from __future__ import annotations

import ipaddress

SPECIAL_IPV4 = {
    "0.0.0.0/8": "this network",
    "0.0.0.0/32": "this host on this network",
    "10.0.0.0/8": "private use",
    "100.64.0.0/10": "shared address space",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link local",
    "172.16.0.0/12": "private use",
    "192.0.0.0/24": "IETF protocol assignments",
    "192.0.0.0/29": "IPv4 service continuity prefix",
    "192.0.0.8/32": "IPv4 dummy address",
    "192.0.0.9/32": "Port Control Protocol anycast",
    "192.0.0.10/32": "Traversal Using Relays around NAT anycast",
    "192.0.0.170/32": "NAT64/DNS64 discovery",
    "192.0.0.171/32": "NAT64/DNS64 discovery",
    "192.0.2.0/24": "documentation (TEST-NET-1)",
    "192.31.196.0/24": "AS112-v4",
    "192.52.193.0/24": "AMT",
    "192.88.99.0/24": "deprecated (6to4 relay anycast)",
    "192.88.99.2/32": "6a44 relay anycast address",
    "192.168.0.0/16": "private use",
    "192.175.48.0/24": "direct delegation AS112 service",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation (TEST-NET-2)",
    "203.0.113.0/24": "documentation (TEST-NET-3)",
    "240.0.0.0/4": "reserved",
    "255.255.255.255/32": "limited broadcast",
}
SPECIAL_IPV6 = {
    "::1/128": "loopback address",
    "::/128": "unspecified address",
    "::ffff:0:0/96": "IPv4-mapped address",
    "64:ff9b::/96": "IPv4-IPv6 translation",
    "64:ff9b:1::/48": "IPv4-IPv6 translation, local use",
    "100::/64": "discard-only address block",
    "100:0:0:1::/64": "dummy IPv6 prefix",
    "2001::/23": "IETF protocol assignments",
    "2001::/32": "Teredo",
    "2001:1::1/128": "Port Control Protocol anycast",
    "2001:1::2/128": "Traversal Using Relays around NAT anycast",
    "2001:1::3/128": "DNS-SD Service Registration Protocol anycast",
    "2001:2::/48": "benchmarking",
    "2001:3::/32": "AMT",
    "2001:4:112::/48": "AS112-v6",
    "2001:10::/28": "deprecated (previously ORCHID)",
    "2001:20::/28": "ORCHIDv2",
    "2001:30::/28": "Drone Remote ID Protocol Entity Tags prefix",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "2620:4f:8000::/48": "direct delegation AS112 service",
    "3fff::/20": "documentation",
    "5f00::/16": "Segment Routing (SRv6) SIDs",
    "fc00::/7": "unique local",
    "fe80::/10": "link-local unicast",
}
MULTICAST_IPV4 = "224.0.0.0/4"  # has its own registry
GLOBAL_UNICAST_IPV6 = ipaddress.IPv6Network("2000::/3")  # all that IANA has ever allocated
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

_NOT_PUBLIC_IPV4 = [ipaddress.IPv4Network(block) for block in (*SPECIAL_IPV4, MULTICAST_IPV4)]
_NOT_PUBLIC_IPV6 = [ipaddress.IPv6Network(block) for block in SPECIAL_IPV6]


def is_public(address: str) -> bool:
    """Whether the address belongs to the public internet. Several kinds of IPv6 addresses embed an IPv4 address. Only for
    NAT64 does that address decide, because this is how an IPv6-only network reaches public IPv4 servers. All others
    (IPv4-mapped, 6to4, Teredo) are special ranges."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in block for block in _NOT_PUBLIC_IPV4)
    if ip in NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip in GLOBAL_UNICAST_IPV6 and not any(ip in block for block in _NOT_PUBLIC_IPV6)
