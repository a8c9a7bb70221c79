"""HOST:PORT is read and written in one place, and what is none is refused with what to write."""

from __future__ import annotations

import pytest

from expertmesh.errors import ConfigError, InvalidRequestError
from expertmesh.rpc.address import Address, format_address, parse_address, parse_host

WRITTEN = {
    "10.0.0.5:50051": Address("10.0.0.5", 50051),
    "localhost:1": Address("localhost", 1),
    "expertmesh-router.expertmesh:65535": Address("expertmesh-router.expertmesh", 65535),
    "router.svc.cluster.local.:50051": Address("router.svc.cluster.local.", 50051),
    "load_controller:50050": Address("load_controller", 50050),
    "[::1]:50051": Address("::1", 50051),
    "[2001:db8::5]:50051": Address("2001:db8::5", 50051),
    "[::ffff:10.0.0.5]:50051": Address("::ffff:10.0.0.5", 50051),
    "[fe80::5%eth0]:50051": Address("fe80::5%eth0", 50051),
}


@pytest.mark.parametrize(("text", "address"), WRITTEN.items(), ids=WRITTEN)
def test_an_address_is_read_and_written_back(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_host_is_written_in_brackets_once(host: str) -> None:
    assert format_address(host, 50051) == "[::1]:50051"


REFUSED = {
    "": "no port",
    "127.0.0.1": r"port is missing; do you mean 127\.0\.0\.1:50051\?",
    "router.example": r"port is missing; do you mean router\.example:50051\?",
    "::1": r"port is missing; do you mean \[::1\]:50051\?",
    "[::1]": r"port is missing; do you mean \[::1\]:50051\?",
    "router:": "no port",
    "router:port": "no port",
    "router:0": "no port",
    "router:65536": "no port",
    "router:-1": "no port",
    "router:+1": "no port",
    "router: 1": "no port",
    "router:\u0665\u0660": "no port",  # digits, but not ours
    "router:" + "9" * 5000: "no port",
    ":50051": "host is missing",
    "[]:50051": "only an IPv6 address stands in brackets",
    "[router]:50051": "only an IPv6 address stands in brackets",
    "fe80::1:2:zz:50051": "an IPv6 address stands in brackets",
    "[fe80::1%a b]:50051": "no IPv6 address",
    "[::g]:50051": "no IPv6 address",
    "[::1:50051": "no IPv6 address",
    "http://10.0.0.5:50051": "has a scheme",
    "grpc://router:50051": "has a scheme",
    "dns:///router:50051": "has a scheme",
    "dns:router:50051": "has a scheme",
    "ipv4:10.0.0.5:50051": "has a scheme",
    "DNS:router:50051": "has a scheme",
    "unix:/run/router.sock": "has a scheme",
    "10.0.5:50051": "no IPv4 address",
    "10.0.0.256:50051": "no IPv4 address",
    "12:50051": "no IPv4 address",
    "a b:50051": "no name of a host",
    "a,b:50051": "no name of a host",
    "user@router:50051": "no name of a host",
    "router/path:50051": "no name of a host",
    "a..b:50051": "no name of a host",
    "-a:50051": "no name of a host",
    "a" * 64 + ":50051": "no name of a host",
    " router:50051": "no name of a host",
}


@pytest.mark.parametrize(("text", "fault"), REFUSED.items(), ids=[key[:40] for key in REFUSED])
def test_what_is_no_address_is_refused_with_what_to_write(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"--controller is .*, expected host:port, .*{fault}"):
        parse_address(text, "--controller")


@pytest.mark.parametrize("value", [None, 50051, b"router:50051"])
def test_what_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequestError, match="expected host:port") as caught:
        parse_address(value, "address", InvalidRequestError)

    assert caught.value.field == "address"


@pytest.mark.parametrize(
    ("text", "host"),
    [("10.0.0.5", "10.0.0.5"), ("::1", "::1"), ("[::1]", "::1"), ("node-1", "node-1"),
     ("0.0.0.0", "0.0.0.0")],
)  # fmt: skip
def test_a_host_may_come_in_brackets(text: str, host: str) -> None:
    assert parse_host(text) == host


@pytest.mark.parametrize("text", ["", "10.0.0.5:50051", "http://10.0.0.5", "[::1]:1", "a b"])
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--host is .*, expected a host without a port"):
        parse_host(text, "--host")
