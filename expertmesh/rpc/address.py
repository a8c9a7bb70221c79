"""HOST:PORT, as commands and peers say it: read and written in one place. Pure.

    10.0.0.5:50051                         IPv4
    expertmesh-router.expertmesh:50051     a name; whoever connects looks it up
    [2001:db8::5]:50051                    IPv6, in brackets
    [fe80::5%eth0]:50051                   with a zone

Nothing else is an address: no scheme (`http://`, `dns:///`), no path (`unix:`), no address without
a port. gRPC would take such a thing, fail to reach it, and try again for ever.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from expertmesh.errors import ConfigError, MeshError

EXPECTED = "host:port, for example 10.0.0.5:50051, router.example:50051 or [2001:db8::5]:50051"
_LAST_PORT = 65535
_LABEL = r"\w(?:[\w-]{0,61}\w)?"  # an underscore, too: container networks give such names
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_PORT = re.compile(r"[0-9]{1,5}")
#: What gRPC would take for the resolver to use, not for a host.
_SCHEMES = ("dns:", "ipv4:", "ipv6:", "passthrough:", "unix:", "unix-abstract:", "vsock:", "xds:")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service listens. `str` writes it so that `parse_address` reads it again."""

    host: str  # a name, or an IPv4 or IPv6 address; never in brackets
    port: int  # 1 to 65535

    def __str__(self) -> str:
        return format_address(self.host, self.port)


def format_address(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 address. `host` may come in brackets itself."""
    bare = host.removeprefix("[").removesuffix("]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def parse_address(
    text: object, name: str = "address", error: type[MeshError] = ConfigError
) -> Address:
    """The address that `text` says. `name` is the argument or option that it was given as.

    Raises `error`, with `name` as its field, for whatever else.
    """
    if not isinstance(text, str):
        raise _refusal(text, name, "that is no text", error)
    host, colon, port = text.rpartition(":")
    if "://" in text or text.lower().startswith(_SCHEMES):
        raise _refusal(text, name, "it has a scheme: leave that out", error)
    if _host_fault(text) == "":
        example = format_address(text, 50051)
        raise _refusal(text, name, f"the port is missing; do you mean {example}?", error)
    if not colon or not (_PORT.fullmatch(port) and 0 < int(port) <= _LAST_PORT):
        raise _refusal(text, name, f"there is no port from 1 to {_LAST_PORT} at its end", error)
    if ":" in host and not host.startswith("["):
        raise _refusal(text, name, "an IPv6 address stands in brackets", error)
    if fault := _host_fault(host):
        raise _refusal(text, name, fault, error)
    return Address(_bare(host), int(port))


def parse_host(text: str, name: str = "host", error: type[MeshError] = ConfigError) -> str:
    """A host without a port: a name, an IPv4 or an IPv6 address, whose brackets are taken away.

    Raises `error`, with `name` as its field.
    """
    if fault := _host_fault(text):
        raise error(
            f"{name} is {text!r}, expected a host without a port, for example 10.0.0.5, "
            f"node-1.example or 2001:db8::5: {fault}",
            field=name,
        )
    return _bare(text)


def _refusal(text: object, name: str, fault: str, error: type[MeshError]) -> MeshError:
    return error(f"{name} is {text!r}, expected {EXPECTED}: {fault}", field=name)


def _bare(host: str) -> str:
    return host[1:-1] if host.startswith("[") else host


def _host_fault(host: str) -> str:
    """Why this is no host; empty for one that may be."""
    if not host:
        return "the host is missing"
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            return "only an IPv6 address stands in brackets"
    if ":" in host:
        return "" if _is_ip(host) else f"{host!r} is no IPv6 address"
    if host.replace(".", "").isdigit():  # the C library would read 10.0.5 as 10.0.0.5
        return "" if _is_ip(host) else f"{host!r} is no IPv4 address"
    if len(host) > 253 or not _NAME.fullmatch(host):
        return f"{host!r} is no name of a host"
    return ""


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return not re.search(r"[\s\[\]]", host)  # a zone may be any text, but not this
