"""Who may add and remove servers, and within which bounds. Kept in the store; no clock, no network.

One owner at a time holds a lease; each change of owner has a larger fencing number. What an owner
had asked for when it lost the lease is refused by that number, however late it comes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isfinite

from expertmesh.errors import InvalidRequestError, LeaseLostError
from expertmesh.v1 import control_pb2 as pb
from load_controller.store import Store

#: After a restart the last owner has so long to come back before another may take over.
RETURN_S = 10.0
MOST_S = 300.0  # nobody may hold a lease for longer without a word


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many servers there may be, by hand; 0 where nothing was said."""

    min_replicas: int = 0
    max_replicas: int = 0


class Scaling:
    """Lease and bounds of one cluster."""

    def __init__(self, store: Store) -> None:
        """Takes up what the store has."""
        self._store = store
        self.owner = store.meta("lease_owner") or ""
        self.fence = int(store.meta("lease_fence") or 0)
        self.bounds = Bounds(**json.loads(store.meta("server_bounds") or "{}"))
        self.report = pb.ScalingReport()  # what the owner last said of itself
        self._until: float | None = None  # None: not since the restart

    def take(self, owner: str, seconds: float, now: float) -> int:
        """Takes, keeps or (0 seconds) gives back the lease; its fencing number.

        Raises LeaseLostError while another has it, InvalidRequestError, and UnavailableError where
        a new owner cannot be stored.
        """
        if not owner:
            raise InvalidRequestError("a lease needs an owner", field="owner")
        if not (isfinite(seconds) and 0 <= seconds <= MOST_S):
            raise InvalidRequestError(
                f"a lease of {seconds} s was asked for, expected 0 to {MOST_S:.0f}", field="seconds"
            )
        if self.owner not in ("", owner) and (left := self._left(now)) > 0:
            raise LeaseLostError(
                f"{self.owner} adds and removes servers here: end it first, or wait {left:.0f} s "
                "after its end",
                retry_after_s=left,
            )
        if owner != self.owner:
            if seconds == 0:
                return self.fence
            with self._store.transaction():
                self._store.set_meta("lease_owner", owner)
                self._store.set_meta("lease_fence", str(self.fence + 1))
            self.owner, self.fence = owner, self.fence + 1
        self._until = now + seconds
        return self.fence

    def holder(self, now: float) -> str:
        """Who has the lease now; empty when nobody has."""
        return self.owner if self.owner and self._left(now) > 0 else ""

    def check(self, fence: int) -> None:
        """Raises LeaseLostError for a fencing number that is not the last one; 0 is by hand."""
        if fence and fence != self.fence:
            raise LeaseLostError(
                f"another owner has taken the lease since: its number is {self.fence}, not {fence}"
            )

    def set_bounds(self, bounds: Bounds) -> None:
        """Sets bounds by hand. Raises InvalidRequestError."""
        least, most = bounds.min_replicas, bounds.max_replicas
        if least < 0 or most < 0 or (most and most < least):
            raise InvalidRequestError(
                f"at least {least} and at most {most} servers cannot be", field="bounds"
            )
        self._store.set_meta("server_bounds", json.dumps(asdict(bounds)))
        self.bounds = bounds

    def _left(self, now: float) -> float:
        if self._until is None:
            self._until = now + RETURN_S
        return self._until - now
