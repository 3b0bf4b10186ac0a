"""W3C trace context, from a dispatch to its handlers, and a span for each of both.

``traceparent`` and ``tracestate`` travel in the context data that nameko hands from worker
to worker: so they go with events and calls, also through a service that has no
opentelemetry, and through plain nameko on RabbitMQ. Spans are made where opentelemetry is
installed (``pip install nameko-event-suite[otel]``) and set up, for whatever it is to do with
them; without that, what comes in goes on as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

from shared.tables import OWN_METADATA
from shared.types import Envelope, Lease, Subscription

try:
    from opentelemetry import trace
    from opentelemetry.trace import Link, Span, SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    IS_ON = False
else:
    IS_ON = True
    _propagator = TraceContextTextMapPropagator()

_log = logging.getLogger(__name__)

HEADERS = ("traceparent", "tracestate")
"""The names of W3C's Trace Context, as headers of HTTP and as keys of context data."""

LONGEST_HEADER = 512
"""Characters that W3C asks for a tracestate to be passed on; more is let go of."""

SYSTEM = "nameko_queue"
"""What semantic conventions call the messaging system."""


def carried(get: Callable[[str], Any]) -> dict[str, str]:
    """Return the trace context of some headers, or of context data, whose ``get`` is given."""
    found = {name: get(name) for name in HEADERS}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, str) and 0 < len(value) <= LONGEST_HEADER
    }


class Dispatching:
    """One dispatch, of one event or many.

    :param context: what came with the worker that dispatches: context data.
    """

    def __init__(self, queue: str, context: Mapping[str, Any]) -> None:
        self.headers = carried(context.get)
        """What the events are to carry."""
        self._queue = queue
        self._span: Span | None = None
        self._current: Any = None

    def __enter__(self) -> Dispatching:
        if IS_ON:
            _guarded(self._begin)
        return self

    def __exit__(self, kind: Any, error: Any, trace_back: Any) -> None:
        if self._span is not None:
            _guarded(self._current.__exit__, kind, error, trace_back)

    def note(self, envelopes: Sequence[Envelope]) -> None:
        """Note which events it is about."""
        if self._span is not None:
            _guarded(_note, self._span, envelopes)

    def _begin(self) -> None:
        tracer = _tracer()
        if tracer is None:
            return
        parent = None
        if not trace.get_current_span().get_span_context().is_valid:
            parent = _propagator.extract(self.headers)
        span = tracer.start_span(
            f"dispatch {self._queue}",
            parent,
            SpanKind.PRODUCER,
            attributes={
                "messaging.system": SYSTEM,
                "messaging.operation.name": "dispatch",
                "messaging.operation.type": "send",
                "messaging.destination.name": self._queue,
            },
        )
        self._current = trace.use_span(span, end_on_exit=True)
        self._current.__enter__()
        self._span = span
        headers: dict[str, str] = {}
        _propagator.inject(headers)
        self.headers = headers or self.headers


def _note(span: Span, envelopes: Sequence[Envelope]) -> None:
    types = sorted({envelope.type for envelope in envelopes})
    span.set_attribute("nameko_queue.message.type", ",".join(types))
    if len(envelopes) == 1:
        span.set_attribute("messaging.message.id", envelopes[0].id)
    else:
        span.set_attribute("messaging.batch.message_count", len(envelopes))


def traced(
    method: Callable[..., Any], leases: Sequence[Lease], subscription: Subscription, worker_ctx: Any
) -> Callable[..., Any]:
    """Return a handler's method with a span about each of its runs."""
    if not IS_ON or _guarded(_tracer) is None:
        return method
    return partial(_run, method, leases, subscription, worker_ctx)


def _run(
    method: Callable[..., Any],
    leases: Sequence[Lease],
    subscription: Subscription,
    worker_ctx: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    with _handling(leases, subscription, worker_ctx):
        return method(*args, **kwargs)


@contextmanager
def _handling(
    leases: Sequence[Lease], subscription: Subscription, worker_ctx: Any
) -> Iterator[None]:
    span = _guarded(_begin_handling, leases, subscription)
    if span is None:
        yield
        return
    with trace.use_span(span, end_on_exit=True):
        # what the handler calls goes on from here
        _guarded(_propagator.inject, worker_ctx.data)
        yield


def _begin_handling(leases: Sequence[Lease], subscription: Subscription) -> Span:
    origins = [_propagator.extract(headers_of(lease.delivery.message)) for lease in leases]
    # many events have many origins: they are links, and none of them is the parent
    is_one = len(leases) == 1
    spans = [] if is_one else [trace.get_current_span(each) for each in origins]
    span: Span = _tracer().start_span(
        f"handle {subscription.queue}",
        origins[0] if is_one else None,
        SpanKind.CONSUMER,
        attributes=_attributes(leases, subscription),
        links=[Link(each.get_span_context()) for each in spans if _is_valid(each)],
    )
    return span


def _attributes(leases: Sequence[Lease], subscription: Subscription) -> dict[str, Any]:
    attributes = {
        "messaging.system": SYSTEM,
        "messaging.operation.name": "handle",
        "messaging.operation.type": "process",
        "messaging.destination.name": subscription.queue,
        "messaging.destination.subscription.name": subscription.subscriber,
        "nameko_queue.message.type": subscription.event_type,
    }
    if len(leases) > 1:
        return {**attributes, "messaging.batch.message_count": len(leases)}
    [lease] = leases
    its = {
        "messaging.message.id": lease.delivery.message.id,
        "nameko_queue.attempt": lease.delivery.attempts + 1,
    }
    return {**attributes, **its}


def headers_of(message: Envelope) -> dict[str, str]:
    """Return the trace context of a message.

    That of its dispatcher goes before what whoever published it wrote into its metadata.
    """
    own = message.metadata.get(OWN_METADATA, {}).get("context", {})
    return carried(own.get) or carried(message.metadata.get)


def _is_valid(span: Span) -> bool:
    return bool(span.get_span_context().is_valid)


def _tracer() -> Any:
    provider = trace.get_tracer_provider()
    # this one stands for none, and its spans cost as much as those that somebody sees
    if isinstance(provider, trace.ProxyTracerProvider):
        return None
    return _tracer_of(provider)


@lru_cache(maxsize=1)
def _tracer_of(provider: Any) -> Any:
    return provider.get_tracer("nameko_event_suite")


def _guarded(function: Callable[..., Any], *args: Any) -> Any:
    """Call what only observes: its failure is logged, and harms no event."""
    try:
        return function(*args)
    except Exception:
        _log.exception("an event could not be traced")
        return None
