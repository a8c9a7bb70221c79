"""From two looks at what servers say of their devices to what the autoscaler decides by. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expertmesh.telemetry.metric import SECONDS
from expertmesh.v1 import control_pb2 as pb
from load_controller.autoscale_state import Sample


@dataclass(frozen=True, slots=True)
class Rates:
    """One server, between two looks."""

    utilization: float  # work offered / capacity; above 1 where its queue grows
    ongoing: float  # requests before the device and on it, mean over the time
    delays: tuple[int, ...]  # requests by how long they had waited: bounds are SECONDS


def rates(before: pb.DeviceLoad, after: pb.DeviceLoad) -> Rates | None:
    """What happened between two messages of one incarnation; None where no time has passed."""
    passed_us = after.uptime_us - before.uptime_us
    if passed_us <= 0:
        return None
    old = before.queue_delays or [0] * len(after.queue_delays)
    delays = tuple(new - old for new, old in zip(after.queue_delays, old, strict=True))
    busy = (after.busy_us - before.busy_us) / passed_us
    # What has come and not been done is work as well: as long as it took to do the rest.
    grown = max(0, after.ongoing - before.ongoing)
    return Rates(
        utilization=busy * (1 + grown / max(1, sum(delays))) if busy > 0 else 0.0,
        ongoing=(after.ongoing_us - before.ongoing_us) / passed_us,
        delays=delays,
    )


class Looks:
    """The last look at each server; the next gives its rates."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, pb.DeviceLoad]] = {}
        self._rates: dict[str, Rates] = {}

    def sample(self, servers: Iterable[pb.FleetServer]) -> Sample:
        """What the servers that are ready have measured since the last look.

        One that is seen for the first time does not report yet. One that has not spoken since is
        taken to be as it was: that it is ready says that it has lately.
        """
        ready = {s.server.server_id: s for s in servers if s.server.state == "ready"}
        found: dict[str, Rates] = {}
        for name, entry in ready.items():
            incarnation, before = self._last.get(name, ("", pb.DeviceLoad()))
            if not entry.HasField("load"):
                continue
            if incarnation == entry.server.incarnation:
                now = rates(before, entry.load) or self._rates.get(name)
                if now is not None:
                    found[name] = now
            self._last[name] = (entry.server.incarnation, entry.load)
        self._last = {name: last for name, last in self._last.items() if name in ready}
        self._rates = found
        return _sample(list(found.values()))


def _sample(found: Sequence[Rates]) -> Sample:
    if not found:
        return Sample()
    busy = [each.utilization for each in found]
    return Sample(
        utilization=sum(busy) / len(busy),
        busiest=max(busy),
        ongoing=sum(each.ongoing for each in found) / len(found),
        queue_delay_s=quantile(
            [sum(many) for many in zip(*(f.delays for f in found), strict=True)]
        ),
        reporting=len(found),
    )


def quantile(counts: Sequence[int], q: float = 0.99) -> float:
    """Seconds that a share of `q` of the requests waited at most, drawn evenly within a bound; 0
    where there were none."""
    total = sum(counts)
    below, low = 0, 0.0
    for count, high in zip(counts, (*SECONDS, SECONDS[-1]), strict=True):
        if count and below + count >= q * total:
            return low + (high - low) * max(0.0, q * total - below) / count
        below, low = below + count, high
    return 0.0
