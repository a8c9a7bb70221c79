"""How busy a device was since its server started: totals that two looks turn into rates."""

from __future__ import annotations

import time
from collections.abc import Callable

from expertmesh.telemetry.metric import Histogram
from expertmesh.v1 import control_pb2


class DeviceUse:
    """Sums over time. `enter`, `leave` and `message` on the event loop, `worked` on the device's
    thread."""

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock_ns = clock_ns
        self._started_ns = self._changed_ns = clock_ns()
        self._busy_ns = 0
        self._ongoing = 0
        self._ongoing_ns = 0  # requests times time

    def enter(self) -> None:
        """A request has come."""
        self._pass(+1)

    def leave(self) -> None:
        """A request has gone, whatever became of it."""
        self._pass(-1)

    def worked(self, took_ns: int) -> None:
        """The device worked for so long."""
        self._busy_ns += took_ns

    def message(self, queue_seconds: Histogram) -> control_pb2.DeviceLoad:
        """All of it; the histogram is that of the requests' waits."""
        self._pass(0)
        return control_pb2.DeviceLoad(
            uptime_us=(self._changed_ns - self._started_ns) // 1000,
            busy_us=self._busy_ns // 1000,
            ongoing_us=self._ongoing_ns // 1000,
            ongoing=self._ongoing,
            queue_delays=queue_seconds.counts,
        )

    def _pass(self, change: int) -> None:
        now_ns = self._clock_ns()
        self._ongoing_ns += self._ongoing * (now_ns - self._changed_ns)
        self._changed_ns = now_ns
        self._ongoing += change
