"""A proxy that takes CONNECT, and says what it was asked for. For tests."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_BYTES = 1 << 16
#: Every variable from which gRPC, curl or Python take a proxy.
VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


def names_a_dead_proxy() -> dict[str, str]:
    """An environment whose proxy nobody is: whoever asks it for anything is refused."""
    dead = "http://127.0.0.1:9"
    names = [*VARIABLES, *(name.upper() for name in VARIABLES)]
    return {**dict.fromkeys(names, dead), "no_proxy": "", "NO_PROXY": "", "no_grpc_proxy": ""}


@dataclass
class Proxy:
    """A running proxy."""

    url: str
    asked: list[str] = field(default_factory=list)  # first lines, and what authorised them
    tunnelled: int = 0  # bytes, both ways


@contextmanager
def connect_proxy() -> Iterator[Proxy]:
    """One on any free port of this machine, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        proxy = Proxy(f"http://127.0.0.1:{listening.getsockname()[1]}")
        threads: list[threading.Thread] = []
        open_sockets: list[socket.socket] = []

        def accept() -> None:
            with suppress(OSError):  # closed: the block has ended
                while True:
                    caller, _ = listening.accept()
                    open_sockets.append(caller)
                    thread = threading.Thread(target=_serve, args=(proxy, caller, open_sockets))
                    threads.append(thread)
                    thread.start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield proxy
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for each in open_sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for each in open_sockets:
                each.close()


def _serve(proxy: Proxy, caller: socket.socket, open_sockets: list[socket.socket]) -> None:
    with suppress(OSError):  # one end has gone
        head = b""
        while b"\r\n\r\n" not in head:
            more = caller.recv(_BYTES)
            if not more:
                return
            head += more
        lines = head.decode().split("\r\n")
        proxy.asked.append(lines[0])
        proxy.asked += [each for each in lines if each.lower().startswith("proxy-authorization")]
        host, _, port = lines[0].split()[1].rpartition(":")
        called = socket.create_connection((host, int(port)))
        open_sockets.append(called)
        caller.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        _tunnel(proxy, caller, called)


def _tunnel(proxy: Proxy, one: socket.socket, other: socket.socket) -> None:
    with selectors.DefaultSelector() as ready:
        ready.register(one, selectors.EVENT_READ, other)
        ready.register(other, selectors.EVENT_READ, one)
        while True:
            for key, _ in ready.select():
                source = key.fileobj
                assert isinstance(source, socket.socket)
                data = source.recv(_BYTES)
                if not data:
                    for each in (one, other):
                        with suppress(OSError):
                            each.shutdown(socket.SHUT_RDWR)
                    return
                proxy.tunnelled += len(data)
                key.data.sendall(data)
