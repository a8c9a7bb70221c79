"""What stands between two machines: a proxy that takes CONNECT, a line that is slow. For tests."""

from __future__ import annotations

import selectors
import socket
import threading
import time
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


@contextmanager
def slow_line(address: str, delay_s: float) -> Iterator[str]:
    """An address that leads to another one; what is sent arrives so much later, either way."""
    host, _, port = address.rpartition(":")
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_BYTES):
                time.sleep(delay_s)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept(listening: socket.socket) -> None:
        with suppress(OSError):  # closed: the block has ended
            while True:
                caller, _ = listening.accept()
                called = socket.create_connection((host, int(port)))
                sockets.extend((caller, called))
                for ends in ((caller, called), (called, caller)):
                    threads.append(threading.Thread(target=pump, args=ends))
                    threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepting = threading.Thread(target=accept, args=(listening,))
        accepting.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for each in sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for each in sockets:
                each.close()
