"""Metrics as Prometheus reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]

NAME = re.compile(r"\bnameko_queue_\w+")
"""The names of metrics in an expression."""


def samples_of(families: Iterable[Metric]) -> Samples:
    """Return the samples, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def parsed(text: str) -> Samples:
    """Return the samples of a scrape."""
    return samples_of(text_string_to_metric_families(text))


def collected(registry: CollectorRegistry) -> Samples:
    """Return the samples that a registry has now."""
    return samples_of(registry.collect())


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """Return the one sample with a name that has these labels, and may have others."""
    found = [
        number
        for (its, its_labels), number in samples.items()
        if its == f"nameko_queue_{name}" and labels.items() <= dict(its_labels).items()
    ]
    assert len(found) <= 1, f"{name} {labels}: {found}"
    return found[0] if found else None
