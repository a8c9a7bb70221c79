"""How much one stream may have in flight, on the side that sends. Pure.

A server says it in its first message; until then a small default holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from expertmesh.codec.frames import Message

_INITIAL_FRAMES, _INITIAL_BYTES = 256, 64 << 20  # what every server of ours has room for
_Send = Callable[[int, Iterator[Message]], None]


class CreditGate:
    """Lets frames through while there is credit for them; the others wait in their order.

    A frame takes credit from when it is let through until it is answered or given up. One frame may
    always be under way, whatever its size.
    """

    def __init__(self, send: _Send) -> None:
        self._send = send
        self._frames = _INITIAL_FRAMES
        self._bytes = _INITIAL_BYTES
        self._sent: dict[int, int] = {}  # bytes by frame
        self._sent_bytes = 0
        self._waiting: deque[tuple[int, int, Iterator[Message]]] = deque()

    def put(self, frame_id: int, size: int, messages: Iterator[Message]) -> None:
        """Sends a frame of that many bytes now, or when there is credit."""
        self._waiting.append((frame_id, size, messages))
        self._let_through()

    def done(self, frame_id: int) -> bool:
        """The frame is answered or given up. Whether it had been sent."""
        size = self._sent.pop(frame_id, None)
        if size is None:
            self._waiting = deque(entry for entry in self._waiting if entry[0] != frame_id)
        else:
            self._sent_bytes -= size
        self._let_through()
        return size is not None

    def grant(self, frames: int, bytes_: int) -> None:
        """What the server allows from now on."""
        self._frames, self._bytes = max(1, frames), bytes_
        self._let_through()

    def _let_through(self) -> None:
        while self._waiting:
            frame_id, size, messages = self._waiting[0]
            full = len(self._sent) >= self._frames or self._sent_bytes + size > self._bytes
            if full and self._sent:
                return
            self._waiting.popleft()
            self._sent[frame_id] = size
            self._sent_bytes += size
            self._send(frame_id, messages)
