"""Channels to our servers, with the options that tensors and moving pods need.

Nobody else of ours opens one: `tests/repo/test_channels.py`.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import grpc
import grpc.aio

from expertmesh.config import RpcConfig
from expertmesh.errors import InvalidRequestError

_SLACK_BYTES = 8 << 20  # ids, weights and headers beside the hidden states

#: What an HTTP/2 frame may hold, on either side: a chunk with its header, not one in 64 of it.
FRAME_OPTION = ("grpc.http2.max_frame_size", 2 << 20)
#: Both ends: message sizes are bounded by our own limits; dead peers are noticed within 30 s even
#: when no packet says so; nothing waits two minutes to reconnect.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    FRAME_OPTION,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, how long an attempt to connect may take at least: two round trips over a
    # slow line, or to a host that is busy.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Each of our connections is one persistent stream: sharing one TCP connection between several
    # clients of a process would serialise them.
    ("grpc.use_local_subchannel_pool", 1),
)


def max_message_bytes(config: RpcConfig) -> int:
    """The longest message that a server takes, by whichever way it comes."""
    return config.max_request_bytes + _SLACK_BYTES


def open_channel(endpoint: str, proxy: str = "") -> grpc.aio.Channel:
    """An insecure channel to "host:port"; connects when first used.

    It connects directly, whatever `http_proxy`, `https_proxy` or `grpc_proxy` say in the
    environment: those are meant for the way out of a site, and gRPC would send even what goes to
    this machine there. `proxy` names one that shall be used, as `check_proxy` takes it.
    """
    return grpc.aio.insecure_channel(endpoint, options=[*CHANNEL_OPTIONS, *_proxy_options(proxy)])


def _proxy_options(proxy: str) -> list[tuple[str, int | str]]:
    return [("grpc.http_proxy", proxy)] if proxy else [("grpc.enable_http_proxy", 0)]


def check_proxy(proxy: str) -> str:
    """The proxy itself: "http://[user:password@]host:port", or empty for none.

    Raises InvalidRequestError, which does not repeat a password: gRPC would go without a proxy that
    it cannot read.
    """
    try:
        parts = urlsplit(proxy)
        is_proxy = parts.scheme == "http" and bool(parts.hostname and parts.port)
        is_proxy &= not (parts.path.strip("/") or parts.query or parts.fragment)
    except (AttributeError, TypeError, ValueError):
        is_proxy = False
    if proxy != "" and not is_proxy:
        shown = "given" if "@" in str(proxy) else repr(proxy)
        raise InvalidRequestError(
            f"proxy is {shown}, expected http://host:port or http://user:password@host:port of a "
            "proxy that takes CONNECT",
            field="proxy",
        )
    return proxy
