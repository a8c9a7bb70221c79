"""A service's readings over HTTP, as Prometheus scrapes them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import (
    Metric as Family,
)
from prometheus_client.registry import Collector

from expertmesh.errors import ConfigError
from expertmesh.rpc.address import format_address, parse_host
from expertmesh.rpc.own_address import listening_host
from expertmesh.telemetry.metric import Histogram, Metric, Reading

_log = logging.getLogger(__name__)
_READ_S = 5.0  # an event loop that does not answer for so long is down, and the scrape says so

Read = Callable[[], Iterable[Reading]]


class MetricsServer:
    """`GET /metrics` of one service. Made, started and stopped on the service's event loop.

    A scrape reads the service's numbers on that loop, where they change, and writes them out on a
    thread of its own: the loop pays for reading some hundred integers, no more.
    """

    def __init__(self, read: Read, host: str, port: int | None) -> None:
        """`port` 0 takes any free one; None serves nothing."""
        self._read = read
        self._host = listening_host(parse_host(host))
        self._wanted = port
        self.port = 0

    async def start(self) -> None:
        """Listens. Raises ConfigError when it cannot."""
        if self._wanted is None:
            return
        loop = asyncio.get_running_loop()
        registry = CollectorRegistry()
        registry.register(_OnLoop(self._read, loop))
        ProcessCollector(registry=registry)
        try:
            self._http, self._thread = start_http_server(self._wanted, self._host, registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen on {format_address(self._host, self._wanted)} for metrics: "
                f"{error}; choose another --metrics-port"
            ) from None
        self.port = self._http.server_port
        _log.info("metrics on port %d", self.port)

    async def stop(self) -> None:
        """Closes the port, if it is open; once is enough."""
        if self.port:
            self.port = 0
            await asyncio.to_thread(self._http.shutdown)
            self._http.server_close()
            self._thread.join()


class _OnLoop(Collector):
    """Prometheus' collector over readings that are taken on an event loop."""

    def __init__(self, read: Read, loop: asyncio.AbstractEventLoop) -> None:
        self._read = read
        self._loop = loop

    def collect(self) -> Iterator[Family]:
        readings = asyncio.run_coroutine_threadsafe(self._take(), self._loop).result(_READ_S)
        yield from families(readings)

    async def _take(self) -> list[Reading]:
        return list(self._read())


def families(readings: Iterable[Reading]) -> list[Family]:
    """Prometheus' form of the readings, each metric once, in the order in which they came."""
    found: dict[Metric, Family] = {}
    for reading in readings:
        metric, value = reading.metric, reading.value
        family = found.get(metric)
        if family is None:
            family = found[metric] = _family(metric)
        if isinstance(value, Histogram):
            assert isinstance(family, HistogramMetricFamily)
            family.add_metric(reading.labels, value.cumulative(), value.total)
        else:
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            family.add_metric(reading.labels, value)
    return list(found.values())


def _family(metric: Metric) -> Family:
    kinds: dict[str, type[Family]] = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return kinds[metric.kind](metric.name, metric.help, labels=metric.labels)  # type: ignore[call-arg]
