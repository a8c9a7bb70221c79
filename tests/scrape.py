"""Metrics of a running service, over HTTP, as Prometheus sees them. For tests."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Family:
    """One metric of a scrape, by the name that queries use."""

    name: str  # a counter's with its _total
    kind: str
    help: str
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]  # by sample name and labels

    @property
    def labels(self) -> set[str]:
        """Every label that a sample has."""
        return {name for _, labels in self.samples for name, _ in labels}


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one service answered."""

    families: dict[str, Family]

    @property
    def ours(self) -> dict[str, Family]:
        """The metrics that are not the process's own."""
        return {name: f for name, f in self.families.items() if not name.startswith("process_")}

    @property
    def series(self) -> int:
        """How many time series one such scrape makes."""
        return sum(len(family.samples) for family in self.families.values())

    def value(self, sample: str, **labels: str) -> float:
        """One sample. Fails with what there is when there is none."""
        key = (sample, tuple(sorted(labels.items())))
        found = {k: v for f in self.families.values() for k, v in f.samples.items()}
        assert key in found, f"{key} is not in {sorted(found)}"
        return found[key]


def scrape(address: str) -> Scrape:
    """Asks the service for its metrics."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as answer:
        return parse(answer.read().decode())


def parse(text: str) -> Scrape:
    """The metrics of Prometheus' text format."""
    families = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        listed = [
            ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]
        samples = dict(listed)
        assert len(samples) == len(listed), f"{name} has a sample twice"
        families[name] = Family(name, family.type, family.documentation, samples)
    return Scrape(families)
