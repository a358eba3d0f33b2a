"""Which addresses an import may reach. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# What a network of its own takes instead (64:ff9b:1::/48, RFC 8215) may hold the IPv4 address anywhere.
_NAT64 = IPv6Network("64:ff9b::/96")
# All that the registry gives out to the public; site-local addresses are global to Python's library.
_UNICAST = IPv6Network("2000::/3")
# Global to Python's library, and yet not the outside: Azure's platform address, the block of protocol assignments (a
# cloud's metadata is in it).
_INSIDE = (IPv4Network("168.63.129.16/32"), IPv4Network("192.0.0.0/24"))


def networks(given: Sequence[str]) -> tuple[Network, ...]:
    """Raises ValueError for what is no network."""
    return tuple(ip_network(one) for one in given)


def may_reach(address: str, allowed: Sequence[Network]) -> bool:
    """Whether an import may connect there: global addresses, and what the operator allows.

    An IPv6 address that stands for an IPv4 one (mapped, 6to4, NAT64, Teredo) may be reached if both may.
    """
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return all(_permitted(one, allowed) for one in (found, *_inner(found)))


def _permitted(address: Address, allowed: Sequence[Network]) -> bool:
    if any(address.version == network.version and address in network for network in allowed):
        return True
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped or address in _NAT64:
            # What they stand for decides.
            return True
        return address in _UNICAST and address.is_global
    if any(address in network for network in _INSIDE):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _inner(address: Address) -> list[IPv4Address]:
    if isinstance(address, IPv4Address):
        return []
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return [inner for inner in found if inner is not None]
