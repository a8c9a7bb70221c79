"""Messages waiting to be written to one stream, taken in turn from every frame.

A frame's chunks are produced as they are written. Frames take turns, so a large answer does not
make a small one wait for all of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator

from expertmesh.codec.frames import Message, joined

_MAX_FRAMES = 1024  # beyond, who fills the outbox waits for `room`
_Entry = tuple[int, Iterator[Message], Callable[[], None] | None]


class Outbox:
    """A queue of frames for one writer.

    It is as long as the peer is slow: who fills it bounds what the frames hold, and awaits `room`
    before taking in more.
    """

    def __init__(self, on_put: Callable[[], None] | None = None) -> None:
        """Written by `run`; or by `on_put`, called whenever something is put, with `take`."""
        self._on_put = on_put
        self._frames: deque[_Entry] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._empty, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()

    def put(
        self,
        frame_id: int,
        messages: Iterator[Message],
        on_done: Callable[[], None] | None = None,
    ) -> None:
        """Queues the messages of one frame; `on_done` is called once they are out, or dropped."""
        self._frames.append((frame_id, messages, on_done))
        self._empty.clear()
        if len(self._frames) > _MAX_FRAMES:
            self._room.clear()
        if self._on_put is not None:
            self._on_put()
        elif self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def discard(self, frame_id: int) -> None:
        """Drops what is left of one frame."""
        dropped = [entry for entry in self._frames if entry[0] == frame_id]
        if dropped:
            self._frames = deque(entry for entry in self._frames if entry[0] != frame_id)
            self._done(dropped)

    def clear(self) -> None:
        """Drops everything: nobody writes any more."""
        dropped, self._frames = self._frames, deque()
        self._done(dropped)

    def stop(self) -> None:
        """Drops everything, and calls nobody any more."""
        self._on_put = None
        self.clear()

    def _done(self, entries: Iterable[_Entry]) -> None:
        if len(self._frames) <= _MAX_FRAMES:
            self._room.set()
        for _, _, on_done in entries:
            if on_done is not None:
                on_done()

    @property
    def full(self) -> bool:
        """Whether who fills it should await `room`."""
        return len(self._frames) > _MAX_FRAMES

    async def room(self) -> None:
        """Returns at once while the queue is short, else when it has become so."""
        await self._room.wait()

    async def written(self) -> None:
        """Returns once everything queued has been written."""
        await self._empty.wait()

    def take(self) -> Message | None:
        """The next message; None when there is none. A frame is out when it is asked for more."""
        while self._frames:
            entry = self._frames.popleft()
            message = next(entry[1], None)
            if message is not None:
                self._frames.append(entry)
                return message
            self._done((entry,))
        self._empty.set()
        return None

    async def run(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Writes messages for ever; ends with what `write` raises."""
        loop = asyncio.get_running_loop()
        while True:
            while (message := self.take()) is not None:
                await write(joined(message))
            self._waiting = loop.create_future()
            await self._waiting
