"""One deadline a request, as an absolute instant, handed from hop to hop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from expertmesh.errors import DeadlineError

_MAX_TIMEOUT_US = 1e18  # 30,000 years: what a peer sends must fit in 64 bits when sent on


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant of the monotonic clock after which the answer is useless."""

    at: float  # seconds, time.monotonic(); infinity for none

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """The instant that many seconds from now; None for never."""
        return cls(math.inf if seconds is None else time.monotonic() + seconds)

    @property
    def remaining(self) -> float:
        """Seconds left; negative when it has passed."""
        return self.at - time.monotonic()

    @property
    def timeout(self) -> float | None:
        """Seconds left, at least 0, as gRPC and asyncio take them: None for never."""
        return None if self.at == math.inf else max(0.0, self.remaining)

    @property
    def timeout_us(self) -> int:
        """Microseconds left, at least 1, as frames carry them: 0 for never."""
        if self.at == math.inf:
            return 0
        return max(1, int(min(self.remaining * 1e6, _MAX_TIMEOUT_US)))

    def check(self) -> None:
        """Raises DeadlineError when it has passed."""
        if self.remaining <= 0:
            raise DeadlineError("the deadline had passed: allow more time, or send fewer rows")
