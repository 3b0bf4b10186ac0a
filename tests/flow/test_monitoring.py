"""Metrics and traces of real processes."""

import json
import os
import signal

import pytest
import requests
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.observe import traces
from shared.testing.servers import free_port
from tests.flow.conftest import BACKENDS, Flow
from tests.support.metrics import parsed, value
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

ADMIN = "services.queue_admin"
RECORDER = "tests.flow.apps.recorder"
TRACED = "tests.flow.apps.traced"
TOKEN = "a-token-of-the-tests"
FIRST = {"queue": "source", "message_type": "thing.happened", "subscriber": "recorder.first"}


def free_address():
    return f"127.0.0.1:{free_port()}"


class Scraped:
    """A process that Prometheus would scrape."""

    def __init__(self, address, token=None):
        self.url = f"http://{address}/metrics"
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def get(self):
        return requests.get(self.url, headers=self.headers, timeout=10)

    def value(self, name, **labels):
        return value(parsed(self.get().text), name, **labels)

    def wait_for(self, wanted, name, **labels):
        """Wait for a value, or for one of which a function says yes."""
        is_it = wanted if callable(wanted) else lambda found: found == wanted
        wait_until(lambda: is_it(self.value(name, **labels)), 20, lambda: self.get().text)


def run_admin(flow, **env):
    address = free_address()
    flow.run(ADMIN, QUEUE_ADMIN_ADDRESS=address, **env)
    return Scraped(address, env.get("QUEUE_ADMIN_TOKENS"))


def run_scraped(flow, *services, **env):
    address = free_address()
    process = flow.run(*services, QUEUE_METRICS_ADDRESS=address, **env)
    return Scraped(address), process


def is_completed(flow, message_id, subscriber):
    deliveries = flow.message(message_id)["deliveries"]
    return {d["subscriber"]: d["status"] for d in deliveries}[subscriber] == "completed"


def test_a_process_tells_what_it_did_and_queue_admin_what_is_left(flow):
    recorder, process = run_scraped(flow, RECORDER)
    admin = run_admin(flow, QUEUE_ADMIN_AUTH="token", QUEUE_ADMIN_TOKENS=TOKEN)

    flow.send("thing.happened", {"fail": 1})
    dead = flow.send("thing.happened", {"reject": True})
    flow.send("chain.begun", {})
    flow.send("thing.happened", {}, delay=3600)
    flow.wait_for_status(dead, "failed")

    for outcome, count in {"completed": 1, "retry": 1, "failed": 1, "released": 0}.items():
        recorder.wait_for(count, "handled_total", outcome=outcome, service="recorder", **FIRST)
    recorder.wait_for(1, "dispatched_total", message_type="chain.ended", queue="recorder")
    # one that failed and was made again, and one that was rejected
    assert recorder.value("handler_seconds_count", **FIRST) == 3
    assert 0 < recorder.value("handler_seconds_sum", **FIRST) < 3
    # the end of the chain is dispatched; beside those three, four attempts have outcomes
    recorder.wait_for(8, "flush_events_sum", service="recorder")
    assert recorder.value("flush_seconds_count", service="recorder") >= 1
    assert recorder.value("lease_losses_total", service="recorder") == 0

    assert admin.value("messages", queue="source", status="failed") == 1
    assert admin.value("deliveries", status="failed", **FIRST) == 1
    assert admin.value("deliveries", status="pending", **FIRST) == 1
    assert admin.value("waiting_deliveries", **FIRST) == 0
    assert admin.value("consumer_live", **FIRST) == 1
    assert admin.value("provider_up", provider="embedded") == 1
    assert admin.value("database_up") == 1
    assert requests.get(admin.url, timeout=10).status_code == 401

    assert process.terminate() == 0
    flow.send("thing.happened", {})
    admin.wait_for(1, "waiting_deliveries", **FIRST)
    admin.wait_for(lambda age: age > 1, "oldest_waiting_seconds", **FIRST)


def test_a_lost_lease_is_counted_by_who_lost_it(flow):
    frozen, process = run_scraped(flow, RECORDER)
    message_id = flow.send("thing.happened", {"sleep": 1.5})
    flow.effects.wait_for(1, handler="first", what="ran")
    # frozen while it writes, it would keep everybody from writing
    wait_until(lambda: is_completed(flow, message_id, "recorder.second"), 5, "its sibling")
    os.kill(process.pid, signal.SIGSTOP)
    other, _ = run_scraped(flow, RECORDER)
    flow.effects.wait_for(1, handler="first", what="done")
    os.kill(process.pid, signal.SIGCONT)

    frozen.wait_for(1, "lease_losses_total", service="recorder")
    assert other.value("lease_losses_total", service="recorder") == 0


def test_a_broker_that_is_away_is_seen(request, tmp_path, redis_server):
    flow = Flow(tmp_path, dict(BACKENDS["redis"](request)))
    try:
        flow.run(RECORDER)
        admin = run_admin(flow)
        flow.wait_for_status(flow.send("thing.happened", {}), "completed")
        admin.wait_for(0, "relay_lag_seconds", queue="source")
        assert admin.value("provider_up", provider="redis") == 1

        redis_server.stop()
        message_id = flow.send("thing.happened", {})
        admin.wait_for(0, "provider_up", provider="redis")
        admin.wait_for(lambda age: age > 1, "relay_lag_seconds", queue="source")

        redis_server.start()
        flow.wait_for_status(message_id, "completed")
        admin.wait_for(1, "provider_up", provider="redis")
        admin.wait_for(0, "relay_lag_seconds", queue="source")
    finally:
        flow.close()


def test_a_database_that_is_away_is_seen(mariadb_flow):
    flow, server = mariadb_flow
    admin = run_admin(flow)
    assert admin.value("database_up") == 1

    server.stop()

    admin.wait_for(0, "database_up")
    assert admin.value("messages", queue="source", status="failed") is None


def test_a_trace_goes_from_one_process_to_another(backend_flow, monkeypatch, tmp_path):
    flow = backend_flow
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(traces, "_tracer", lambda: provider.get_tracer("test"))
    file = tmp_path / "spans"
    flow.run(TRACED, SPANS=str(file))

    message_id = flow.send("step.taken", {})

    wait_until(lambda: file.exists() and file.read_text().endswith("\n"), 20, "the span")
    [handle] = [json.loads(line) for line in file.read_text().splitlines()]
    [dispatch] = exporter.get_finished_spans()
    its = dispatch.context
    assert handle["context"]["trace_id"] == f"0x{its.trace_id:032x}"
    assert handle["parent_id"] == f"0x{its.span_id:016x}"
    assert handle["kind"] == "SpanKind.CONSUMER"
    assert handle["attributes"]["messaging.message.id"] == message_id
    [effect] = flow.effects.wait_for(1, handler="follow")
    assert handle["context"]["span_id"] == f"0x{effect['span']:016x}"
