"""Who sends a request, for limits on what one client may hold."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network

from fastapi import Request

from serving.state import state_of

# Whoever has an IPv6 address has so many bits of it in common with all their others.
IPV6_PREFIX = 64


def client_of(request: Request) -> str:
    """A name for the client: its API key's number where there are several keys, else its address.

    One key is everybody's, and a key that nobody checks can be invented anew for each request. An address behind a
    proxy is the proxy's: what a header says of another is the client's word.
    """
    number = getattr(request.state, "api_key_number", None)  # None where no key is asked for
    if number is not None and len(state_of(request).options.api_keys) > 1:
        return f"key {number}"
    return _network(request.client.host) if request.client is not None else "unknown address"


def _network(host: str) -> str:
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((int(address), IPV6_PREFIX), strict=False))
