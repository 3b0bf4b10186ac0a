"""Trace context from dispatch to handler, and the spans of both."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import eventlet
import pytest
import requests
from eventlet.event import Event
from nameko.containers import ServiceContainer
from nameko.testing.services import dummy, entrypoint_hook
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from werkzeug.wrappers import Request

from shared.events import Backoff, EventDispatcher, MessageContext, QueueService, event_handler
from shared.observe import traces
from shared.providers.rabbitmq.messages import encoded
from shared.rpc import RpcProxy, rpc
from shared.testing.servers import free_port
from shared.types import Envelope
from shared.web import http
from tests.support.processes import ROOT
from tests.support.waiting import wait_until

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
ORIGIN = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}

FAST = Backoff(base=0.001, cap=0.001)


class Shop:
    """Dispatches, and handles what it dispatched."""

    name = "shop"
    dispatch = EventDispatcher()
    queue = QueueService()
    message = MessageContext()
    itself = RpcProxy("shop")

    seen: ClassVar[list[Any]] = []
    both_run: ClassVar[Event] = Event()

    @dummy
    def send(self, *args: Any, **options: Any) -> str:
        return self.dispatch(*args, **options)

    @dummy
    def send_many(self, events: Any) -> list[str]:
        return self.dispatch.many(events)

    @dummy
    def publish(self, *args: Any, **options: Any) -> str:
        return self.queue.publish(*args, **options)

    @http("POST", "/orders")
    def order(self, _request: Request) -> Any:
        return {"id": self.dispatch("item.sold", {})}

    @event_handler("shop", "item.sold", backoff=FAST)
    def sold(self, payload: Any) -> None:
        self.seen.append(self.message)
        if self.message.attempt <= payload.get("fail", 0):
            raise ValueError("told to fail")
        if payload.get("tell"):
            self.dispatch("item.told", payload)
        if payload.get("call"):
            self.itself.meet()

    @event_handler("shop", "item.told")
    def told(self, payload: Any) -> None:
        self.seen.append(self.message)
        span = trace.get_current_span()
        if payload.get("meet"):
            # the other one runs meanwhile
            self.meeting.append(payload["n"])
            while len(self.meeting) < 2:
                eventlet.sleep(0.001)
            assert trace.get_current_span() is span
            self.dispatch("item.met", payload)

    meeting: ClassVar[list[int]] = []

    @rpc
    def meet(self) -> str:
        return self.dispatch("item.met", {})

    @event_handler("shop", "item.met")
    def met(self, payload: Any) -> None:
        self.seen.append(self.message)

    @event_handler("shop", "item.counted", batch_size=2, batch_timeout=5)
    def counted(self, _payloads: Any) -> None:
        self.seen.append(self.message)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Given opentelemetry that is set up: what it exports."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(traces, "_tracer", lambda: provider.get_tracer("test"))
    return exporter


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def call(tmp_path: Path, address: str) -> Iterator[Callable[..., Any]]:
    """Calls a method of the service."""
    Shop.seen, Shop.meeting = [], []
    config = {"QUEUE_DATA_DIR": str(tmp_path), "WEB_SERVER_ADDRESS": address}
    container = ServiceContainer(Shop, config)
    container.start()

    def call(method: str, *args: Any, **options: Any) -> Any:
        with entrypoint_hook(container, method) as hook:
            return hook(*args, **options)

    yield call
    container.stop()


def ended(exporter: InMemorySpanExporter, count: int) -> list[ReadableSpan]:
    """Wait for spans, and return them in the order in which they began."""
    wait_until(
        lambda: len(exporter.get_finished_spans()) >= count,
        10,
        lambda: f"{count} spans: {[each.name for each in exporter.get_finished_spans()]}",
    )
    return sorted(exporter.get_finished_spans(), key=lambda each: each.start_time or 0)


def seen(count: int) -> list[Any]:
    wait_until(lambda: len(Shop.seen) >= count, 10, "the handlers")
    return Shop.seen


def carried_by(message: Any) -> str:
    return message.metadata["nameko"]["context"]["traceparent"]


class TestSpans:
    def test_of_a_dispatch_and_of_its_handler_are_one_trace(
        self, call: Callable[..., Any], spans: InMemorySpanExporter
    ) -> None:
        message_id = call("send", "item.sold", {})
        dispatch, handle = ended(spans, 2)
        assert (dispatch.name, dispatch.kind) == ("dispatch shop", SpanKind.PRODUCER)
        assert dispatch.attributes == {
            "messaging.system": "nameko_queue",
            "messaging.operation.name": "dispatch",
            "messaging.operation.type": "send",
            "messaging.destination.name": "shop",
            "messaging.message.id": message_id,
            "nameko_queue.message.type": "item.sold",
        }
        assert (handle.name, handle.kind) == ("handle shop", SpanKind.CONSUMER)
        assert handle.attributes == {
            "messaging.system": "nameko_queue",
            "messaging.operation.name": "handle",
            "messaging.operation.type": "process",
            "messaging.destination.name": "shop",
            "messaging.destination.subscription.name": "shop.sold",
            "messaging.message.id": message_id,
            "nameko_queue.message.type": "item.sold",
            "nameko_queue.attempt": 1,
        }
        assert dispatch.parent is None
        assert handle.parent is not None
        assert handle.parent.span_id == dispatch.context.span_id
        assert handle.context.trace_id == dispatch.context.trace_id

    def test_are_one_for_each_attempt_with_what_it_raised(
        self, call: Callable[..., Any], spans: InMemorySpanExporter
    ) -> None:
        call("send", "item.sold", {"fail": 1})
        dispatch, first, second = ended(spans, 3)
        assert [each.attributes["nameko_queue.attempt"] for each in (first, second)] == [1, 2]
        assert first.status.status_code is StatusCode.ERROR
        assert [each.name for each in first.events] == ["exception"]
        assert second.status.status_code is StatusCode.UNSET
        assert {each.parent.span_id for each in (first, second)} == {dispatch.context.span_id}

    def test_of_what_a_handler_dispatches_are_below_its_own(
        self, call: Callable[..., Any], spans: InMemorySpanExporter
    ) -> None:
        call("send", "item.sold", {"tell": True})
        _, sold, tell, told = ended(spans, 4)
        assert tell.parent.span_id == sold.context.span_id
        assert told.parent.span_id == tell.context.span_id

    def test_of_what_is_dispatched_by_a_method_that_it_called_are_too(
        self, call: Callable[..., Any], spans: InMemorySpanExporter
    ) -> None:
        call("send", "item.sold", {"call": True})
        _, sold, meet, met = ended(spans, 4)
        assert meet.parent.span_id == sold.context.span_id
        assert met.parent.span_id == meet.context.span_id

    def test_of_handlers_at_the_same_time_are_apart(
        self, call: Callable[..., Any], spans: InMemorySpanExporter
    ) -> None:
        for n in range(2):
            call("send", "item.told", {"meet": True, "n": n})
        found = ended(spans, 8)
        assert len({each.context.trace_id for each in found}) == 2
        by_id = {each.context.span_id: each for each in found}
        roots = 0
        for each in found:
            assert each.status.status_code is StatusCode.UNSET
            roots += each.parent is None
            if each.parent is not None:
                assert by_id[each.parent.span_id].context.trace_id == each.context.trace_id
        assert roots == 2

    def test_of_a_batch_are_linked_to_each_dispatch(
        self, call: Callable[..., Any], spans: InMemorySpanExporter
    ) -> None:
        for _ in range(2):
            call("send", "item.counted", {})
        first, second, batch = ended(spans, 3)
        assert batch.parent is None
        assert [each.context.span_id for each in batch.links] == [
            first.context.span_id,
            second.context.span_id,
        ]
        assert batch.attributes["messaging.batch.message_count"] == 2

    def test_of_many_dispatched_together_are_one(
        self, call: Callable[..., Any], spans: InMemorySpanExporter
    ) -> None:
        call("send_many", [("item.sold", {}), ("item.met", {})])
        dispatch, *handles = ended(spans, 3)
        assert dispatch.attributes["messaging.batch.message_count"] == 2
        assert dispatch.attributes["nameko_queue.message.type"] == "item.met,item.sold"
        assert {each.parent.span_id for each in handles} == {dispatch.context.span_id}

    def test_of_a_dispatch_that_is_refused_say_so(
        self, call: Callable[..., Any], spans: InMemorySpanExporter
    ) -> None:
        with pytest.raises(ValueError, match="event_type"):
            call("send", "no such type", {})
        [dispatch] = ended(spans, 1)
        assert dispatch.status.status_code is StatusCode.ERROR

    def test_that_cannot_be_made_harm_no_event(
        self,
        call: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def fail() -> Any:
            raise RuntimeError("no tracer")

        monkeypatch.setattr(traces, "_tracer", fail)
        message_id = call("send", "item.sold", {})
        assert seen(1)[0].id == message_id
        assert "an event could not be traced" in caplog.text


class TestWithoutSetUp:
    """Given opentelemetry that is installed, and that nobody set up."""

    def test_no_span_is_made(
        self, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Any] = []
        monkeypatch.setattr(trace.ProxyTracer, "start_span", lambda *a, **_: made.append(a))
        call("send", "item.sold", {"tell": True})
        seen(2)
        assert made == []

    def test_what_came_in_goes_on(self, call: Callable[..., Any], address: str) -> None:
        requests.post(f"http://{address}/orders", headers=ORIGIN, timeout=5)
        call("publish", "shop", "item.sold", {"tell": True}, metadata=ORIGIN)
        assert {carried_by(message) for message in seen(3)} == {ORIGIN["traceparent"]}


class TestContext:
    def test_of_an_http_request_goes_on(
        self, call: Callable[..., Any], spans: InMemorySpanExporter, address: str
    ) -> None:
        answer = requests.post(f"http://{address}/orders", headers=ORIGIN, timeout=5)
        assert answer.status_code == 200
        dispatch, handle = ended(spans, 2)
        assert f"{dispatch.context.trace_id:032x}" == TRACE_ID
        assert f"{dispatch.parent.span_id:016x}" == PARENT_ID
        assert handle.parent.span_id == dispatch.context.span_id
        assert handle.context.trace_state == {"vendor": "1"}

    def test_of_metadata_goes_on(
        self, call: Callable[..., Any], spans: InMemorySpanExporter
    ) -> None:
        call("publish", "shop", "item.sold", {}, metadata=ORIGIN)
        dispatch, _ = ended(spans, 2)
        assert f"{dispatch.parent.span_id:016x}" == PARENT_ID

    def test_passes_a_service_without_opentelemetry(
        self, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, address: str
    ) -> None:
        monkeypatch.setattr(traces, "IS_ON", False)
        requests.post(f"http://{address}/orders", headers=ORIGIN, timeout=5)
        call("publish", "shop", "item.sold", {"tell": True}, metadata=ORIGIN)
        assert {carried_by(message) for message in seen(3)} == {ORIGIN["traceparent"]}

    def test_that_nobody_gave_is_none(
        self, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(traces, "IS_ON", False)
        call("send", "item.sold", {})
        [message] = seen(1)
        assert message.metadata["nameko"]["context"].keys() == {"call_id_stack"}

    @pytest.mark.parametrize("value", ["", "x" * 513, 7, None])
    def test_that_is_none_is_let_go_of(self, value: Any) -> None:
        assert traces.carried({"traceparent": value}.get) == {}

    def test_is_in_headers_that_plain_nameko_passes_on(self) -> None:
        envelope = Envelope(
            "id", "shop", "item.sold", "{}", metadata={"nameko": {"context": ORIGIN}}
        )
        headers = encoded(envelope).headers
        assert {name: headers[f"nameko.{name}"] for name in ORIGIN} == ORIGIN


def test_opentelemetry_is_needed_for_nothing() -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None
from shared.observe import traces
from shared.events import EventDispatcher, event_handler
assert not traces.IS_ON
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
