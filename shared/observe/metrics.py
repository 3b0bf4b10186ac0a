"""The metrics as Prometheus takes them: those of a process, and those of the message log.

ops/ and docs/monitoring.md name them, and a test holds both against what is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from time import monotonic
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from shared.lifecycle import DeliveryStatus, MessageStatus
from shared.observe.counts import AuditCounts, Histogram, ServiceCounts
from shared.store.gauges import DrainGauges, LogGauges, SubscriptionGauges
from shared.store.ramps import RampStatus
from shared.types import Subscription

PREFIX = "nameko_queue_"

SUBSCRIPTION = ("queue", "message_type", "subscriber")
"""The labels that name a subscription."""

OUTCOMES = {
    DeliveryStatus.COMPLETED: "completed",
    DeliveryStatus.RETRY: "retry",
    DeliveryStatus.FAILED: "failed",
    DeliveryStatus.PENDING: "released",
}


class _Collector:
    """Gives what a function makes whenever somebody asks."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        # else a registry would collect at once
        return []


# --- of a process


def process_registry(counted: Sequence[ServiceCounts]) -> CollectorRegistry:
    """Return the metrics of this process: what its services count, its memory and its time."""
    registry = CollectorRegistry()
    registry.register(_Collector(lambda: process_metrics(counted)))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def process_metrics(counted: Sequence[ServiceCounts]) -> Iterator[Metric]:
    """Yield the metrics of the services of one process."""
    yield _dispatched(counted)
    yield _handled(counted)
    yield _handler_seconds(counted)
    yield from _pumps(counted)
    yield _outbox_lag(counted)


def _dispatched(counted: Sequence[ServiceCounts]) -> Metric:
    dispatched = CounterMetricFamily(
        f"{PREFIX}dispatched",
        "Events that this process stored in the message log.",
        labels=("service", "queue", "message_type"),
    )
    for each in counted:
        for names, count in each.dispatched.items():
            dispatched.add_metric((each.service, *names), count)
    return dispatched


def _handled(counted: Sequence[ServiceCounts]) -> Metric:
    handled = CounterMetricFamily(
        f"{PREFIX}handled",
        "Attempts that ended, by their outcome: completed, retry, failed (a dead letter) or "
        "released (handed back unburnt).",
        labels=("service", *SUBSCRIPTION, "outcome"),
    )
    for each in counted:
        for subscription_id, subscription in each.subscriptions.items():
            for status, outcome in OUTCOMES.items():
                names = (each.service, *_names(subscription), outcome)
                handled.add_metric(names, each.handled[subscription_id, status])
    return handled


def _handler_seconds(counted: Sequence[ServiceCounts]) -> Metric:
    seconds = HistogramMetricFamily(
        f"{PREFIX}handler_seconds",
        "How long handlers ran; a batch is one run.",
        labels=("service", *SUBSCRIPTION),
    )
    for each in counted:
        for subscription, histogram in each.handler_seconds:
            _add_histogram(seconds, (each.service, *_names(subscription)), histogram)
    return seconds


def _pumps(counted: Sequence[ServiceCounts]) -> Iterator[Metric]:
    losses = CounterMetricFamily(
        f"{PREFIX}lease_losses",
        "Outcomes that were refused, since the lease had been lost to another worker.",
        labels=("service",),
    )
    seconds = HistogramMetricFamily(
        f"{PREFIX}flush_seconds",
        "How long a transaction took that stored events or outcomes in the message log.",
        labels=("service",),
    )
    events = HistogramMetricFamily(
        f"{PREFIX}flush_events",
        "Events and outcomes that one transaction stored together.",
        labels=("service",),
    )
    for each in counted:
        losses.add_metric((each.service,), each.pump.lost_leases)
        pump, hub = each.pump, each.shortcut
        _add_histogram(seconds, (each.service,), pump.flush_seconds + hub.flush_seconds)
        _add_histogram(events, (each.service,), pump.flush_events + hub.flush_events)
    yield from (losses, seconds, events)


def _outbox_lag(counted: Sequence[ServiceCounts]) -> Metric:
    lag = GaugeMetricFamily(
        f"{PREFIX}outbox_lag_seconds",
        "For how long what is in the service's outbox could not be relayed; 0 for nothing.",
        labels=("service",),
    )
    for each in counted:
        since = each.outbox_since
        lag.add_metric((each.service,), 0.0 if since is None else monotonic() - since)
    return lag


def _add_histogram(
    family: HistogramMetricFamily, names: Sequence[str], histogram: Histogram
) -> None:
    # read once: the thread that it belongs to may go on counting
    up_to = list(accumulate(list(histogram.counts)))
    bounds = [*[str(float(bound)) for bound in histogram.bounds], "+Inf"]
    family.add_metric(names, list(zip(bounds, up_to, strict=True)), histogram.sum)


# --- of the message log


def log_registry(
    provider: str,
    is_up: bool,
    gauges: LogGauges | None,
    audited: AuditCounts | None,
    draining: DrainGauges | None = None,
) -> CollectorRegistry:
    """Return the metrics of the message log.

    :param gauges: ``None`` says that its database does not answer.
    :param audited: ``None`` says that this process makes no audits.
    :param draining: ``None`` says that no provider is moved away from.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(lambda: log_metrics(provider, is_up, gauges, draining)))
    if audited is not None:
        registry.register(_Collector(lambda: audit_metrics(audited)))
    return registry


def audit_metrics(audited: AuditCounts) -> Iterator[Metric]:
    """Yield what the audits of this process came to."""
    audits = CounterMetricFamily(
        f"{PREFIX}audits",
        "Audits of the message log, by result: balanced, repaired, or put_off for want of an "
        "answer.",
        labels=("result",),
    )
    for result in ("balanced", "repaired", "put_off"):
        audits.add_metric((result,), audited.audits[result])
    yield audits
    repaired = CounterMetricFamily(
        f"{PREFIX}audit_repaired",
        "What audits put right: deliveries that the provider had lost or that waited for a retired "
        "subscription, and messages of another status than their deliveries.",
        labels=("what",),
    )
    repaired.add_metric(("delivery",), audited.missing_deliveries)
    repaired.add_metric(("message",), audited.misdrawn_messages)
    yield repaired


def log_metrics(
    provider: str, is_up: bool, gauges: LogGauges | None, draining: DrainGauges | None = None
) -> Iterator[Metric]:
    """Yield the metrics of the message log."""
    up = _gauge("provider_up", "Whether the provider answers: 1 or 0.", ("provider",))
    up.add_metric((provider,), int(is_up))
    if draining is not None:
        up.add_metric((draining.provider,), int(draining.left is not None))
        yield from _drain(draining)
    yield up
    database = _gauge("database_up", "Whether the message log's database answers: 1 or 0.")
    database.add_metric((), int(gauges is not None))
    yield database
    if gauges is None:
        return
    messages = _gauge("messages", "Messages that the log holds, by status.", ("queue", "status"))
    for queue in sorted({queue for queue, _ in gauges.messages}):
        for status in MessageStatus:
            messages.add_metric((queue, status), gauges.messages.get((queue, status), 0))
    yield messages
    lag = _gauge(
        "relay_lag_seconds",
        "Age of the oldest delivery that the provider has not got yet; 0 for none.",
        ("queue",),
    )
    for queue, seconds in gauges.relay_lag.items():
        lag.add_metric((queue,), seconds)
    yield lag
    yield _deliveries(gauges.subscriptions)
    yield from _of_subscriptions(gauges.subscriptions)
    yield from _schedules_and_ramps(gauges)


def _drain(draining: DrainGauges) -> Iterator[Metric]:
    drains = _gauge(
        "draining", "A provider that is moved away from: always 1.", labels=("provider",)
    )
    drains.add_metric((draining.provider,), 1)
    yield drains
    left = _gauge(
        "draining_deliveries",
        "Deliveries that the provider still has that is moved away from.",
        ("provider",),
    )
    if draining.left is not None:
        left.add_metric((draining.provider,), draining.left)
    yield left


def _schedules_and_ramps(gauges: LogGauges) -> Iterator[Metric]:
    failing = _gauge(
        "schedule_failing",
        "Whether the schedule's last occurrence could not be dispatched: 1 or 0.",
        ("schedule", "queue", "message_type"),
    )
    for each in gauges.schedules:
        failing.add_metric((each.name, each.queue, each.event_type), int(each.is_failing))
    yield failing
    ramps = _gauge(
        "ramps",
        "Ramps of dead letters, by status; stopped ones failed as before.",
        ("status",),
    )
    for status in RampStatus:
        ramps.add_metric((status,), gauges.ramps.get(status, 0))
    yield ramps


def _deliveries(subscriptions: Sequence[SubscriptionGauges]) -> Metric:
    deliveries = _gauge(
        "deliveries",
        "Deliveries that the log holds and that are not completed; failed ones are dead letters.",
        (*SUBSCRIPTION, "status"),
    )
    for each in subscriptions:
        for status in sorted(set(DeliveryStatus) - {DeliveryStatus.COMPLETED}):
            names = (*_names(each.subscription), status.value)
            deliveries.add_metric(names, each.deliveries.get(status, 0))
    return deliveries


_OF_SUBSCRIPTION: Sequence[tuple[str, str, Callable[[SubscriptionGauges], float]]] = (
    (
        "waiting_deliveries",
        "Deliveries that are due and that no worker has.",
        lambda x: x.waiting,
    ),
    (
        "oldest_waiting_seconds",
        "For how long the oldest of them is due; 0 for none.",
        lambda x: x.oldest_waiting,
    ),
    (
        "consumer_live",
        "Whether a consumer signed for the subscription in the last 30 s: 1 or 0.",
        lambda x: x.is_live,
    ),
    (
        "consumer_silent",
        "Whether work is due and no consumer is live, as health says: 1 or 0.",
        lambda x: x.is_silent,
    ),
    (
        "limited_deliveries",
        "Deliveries that are due and wait for a limit of their subscription.",
        lambda x: x.held_back,
    ),
    ("paused", "Whether the subscription is paused: 1 or 0.", lambda x: x.is_paused),
)


def _of_subscriptions(subscriptions: Sequence[SubscriptionGauges]) -> Iterator[Metric]:
    for name, text, value in _OF_SUBSCRIPTION:
        gauge = _gauge(name, text, SUBSCRIPTION)
        for each in subscriptions:
            gauge.add_metric(_names(each.subscription), float(value(each)))
        yield gauge


def _gauge(name: str, text: str, labels: Sequence[str] = ()) -> Any:
    return GaugeMetricFamily(f"{PREFIX}{name}", text, labels=labels)


def _names(subscription: Subscription) -> tuple[str, str, str]:
    return subscription.queue, subscription.event_type, subscription.subscriber


# --- as text


def exposed(registry: CollectorRegistry, accept: str | None) -> tuple[bytes, str]:
    """Return metrics as text and its content type, in a format that ``accept`` names."""
    encode, content_type = choose_encoder(accept or "")
    return encode(registry), content_type
