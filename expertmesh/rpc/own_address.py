"""Where this machine can be reached, and where a service listens for it."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import closing, suppress

from expertmesh.errors import ConfigError
from expertmesh.rpc.address import parse_address, parse_host

#: Every interface, IPv4 ones as well.
EVERYWHERE = "::"
_EVERYWHERE_IPV4 = "0.0.0.0"
_LOOPBACK = "127.0.0.1"
# Of the ranges kept for documentation: to "connect" a datagram socket asks the routing table, and
# sends nothing.
_SOMEWHERE = {socket.AF_INET: "198.51.100.1", socket.AF_INET6: "2001:db8::1"}
_ANY_PORT = 9


def advertised_host(host: str, controller: str = "") -> str:
    """What others are told to connect to, without brackets.

    `host` itself, unless it says every interface (0.0.0.0 or ::), which nobody can connect to: then
    this machine's address on the way to the load controller, or else on the way to anywhere.
    Raises ConfigError for what is no host.
    """
    host = parse_host(host)
    if host not in (_EVERYWHERE_IPV4, EVERYWHERE):
        return host
    families = [socket.AF_INET] if host == _EVERYWHERE_IPV4 else [socket.AF_INET6, socket.AF_INET]
    ways = [*_ways_to(controller), *_SOMEWHERE.items()]
    for family in families:
        for way, where in ways:
            if way == family and (own := _own_address(family, where)) is not None:
                return own
    return _LOOPBACK  # there is no way out of this machine


def _ways_to(controller: str) -> list[tuple[socket.AddressFamily, str]]:
    with suppress(ConfigError, OSError):
        address = parse_address(controller)
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
        return [(family, str(where[0])) for family, _, _, _, where in found]
    return []


def _own_address(family: socket.AddressFamily, where: str) -> str | None:
    """This end's address of a way that leaves this machine; None where there is none."""
    with suppress(OSError), closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        probe.connect((where, _ANY_PORT))
        own = str(probe.getsockname()[0])
        if not ipaddress.ip_address(own).is_loopback:
            return own
    return None


def listening_host(host: str) -> str:
    """Where to bind for `host`: every interface of a kernel without IPv6 is 0.0.0.0."""
    return _EVERYWHERE_IPV4 if host == EVERYWHERE and not socket.has_dualstack_ipv6() else host


def everywhere_socket(port: int) -> socket.socket:
    """A TCP socket that listens on every interface, of IPv4 and IPv6; not blocking.

    Raises OSError.
    """
    bound = socket.create_server((EVERYWHERE, port), family=socket.AF_INET6, dualstack_ipv6=True)
    bound.setblocking(False)
    return bound
