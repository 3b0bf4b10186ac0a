"""What is counted, and what of it Prometheus gets to see."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import requests
from nameko.containers import ServiceContainer
from nameko.testing.services import dummy, entrypoint_hook
from sqlalchemy import update

from shared.errors import DispatchError, DispatchRefusedError
from shared.events import EventDispatcher
from shared.events.direct import DirectClient, DirectSchedules
from shared.events.relay import Relay
from shared.lifecycle import DeliveryStatus
from shared.observe import endpoint as endpoint_module
from shared.observe.counts import (
    MOST_TYPES,
    OTHERS,
    AuditCounts,
    Histogram,
    PumpCounts,
    ServiceCounts,
)
from shared.observe.endpoint import Endpoint
from shared.observe.metrics import exposed, log_registry, process_registry
from shared.settings import Address, load_settings
from shared.store import attempts, backlog, limits, outbox, queries, ramps, subscriptions
from shared.store.gauges import DrainGauges, LogGauges, log_gauges
from shared.store.limits import Ask, Limits
from shared.store.ramps import RampStatus
from shared.tables import deliveries, messages
from shared.tables import failures as failures_table
from shared.tables import schedules as schedules_table
from shared.tables import subscriptions as subscriptions_table
from shared.testing.servers import free_port
from shared.types import Delivery, Envelope, Lease, Subscription
from tests.support.metrics import Samples, collected, parsed, value
from tests.support.waiting import wait_until
from tests.unit.message_log import COMPLETED, FAILED, RETRY, Log, event

PLACED = Subscription("orders", "shop", "placed", "audit.note", id=7)


class TestHistogram:
    def test_counts_a_value_up_to_the_bound_that_it_does_not_exceed(self) -> None:
        histogram = Histogram((1, 2))
        for number in (0.5, 1, 1.5, 2, 99):
            histogram.observe(number)
        assert (histogram.counts, histogram.sum) == ([2, 2, 1], 104)


class TestProcess:
    @pytest.fixture
    def counts(self) -> ServiceCounts:
        counts = ServiceCounts("audit")
        counts.subscriptions[PLACED.id] = PLACED
        return counts

    def scrape(self, counts: ServiceCounts) -> Samples:
        return parsed(exposed(process_registry([counts]), None)[0].decode())

    def test_tells_what_was_dispatched(self, counts: ServiceCounts) -> None:
        counts.count_dispatched([event("placed"), event("placed"), event("cancelled")])
        samples = self.scrape(counts)
        labels = {"service": "audit", "queue": "orders"}
        assert value(samples, "dispatched_total", message_type="placed", **labels) == 2
        assert value(samples, "dispatched_total", message_type="cancelled", **labels) == 1

    def test_tells_a_bounded_number_of_types_apart(self, counts: ServiceCounts) -> None:
        counts.count_dispatched([event(f"t{n}") for n in range(MOST_TYPES + 5)])
        counts.count_dispatched([event("t0")])
        assert len(counts.dispatched) == MOST_TYPES + 1
        assert (counts.dispatched[OTHERS], counts.dispatched["orders", "t0"]) == (5, 2)

    def test_tells_how_attempts_ended_by_subscription(self, counts: ServiceCounts) -> None:
        counts.handled[PLACED.id, DeliveryStatus.COMPLETED] += 3
        counts.handled[PLACED.id, DeliveryStatus.PENDING] += 1
        samples = self.scrape(counts)
        found = {
            outcome: value(samples, "handled_total", subscriber="audit.note", outcome=outcome)
            for outcome in ("completed", "retry", "failed", "released")
        }
        assert found == {"completed": 3, "retry": 0, "failed": 0, "released": 1}

    def test_tells_how_long_handlers_run(self, counts: ServiceCounts) -> None:
        seconds = counts.handler(PLACED)
        for number in (0.004, 0.2, 1000):
            seconds.observe(number)
        samples = self.scrape(counts)
        labels = {"subscriber": "audit.note", "message_type": "placed"}
        bounds = {"0.005": 1, "0.25": 2, "300.0": 2, "+Inf": 3}
        for bound, count in bounds.items():
            assert value(samples, "handler_seconds_bucket", le=bound, **labels) == count
        assert value(samples, "handler_seconds_count", **labels) == 3
        assert value(samples, "handler_seconds_sum", **labels) == pytest.approx(1000.204)

    def test_tells_what_the_pump_counts(self, counts: ServiceCounts) -> None:
        counts.pump.lost_leases += 2
        counts.pump.flushed(0.002, 10)
        samples = self.scrape(counts)
        assert value(samples, "lease_losses_total", service="audit") == 2
        assert value(samples, "flush_seconds_count", service="audit") == 1
        assert value(samples, "flush_events_sum", service="audit") == 10

    def test_tells_what_the_pump_and_the_hub_stored_together(self, counts: ServiceCounts) -> None:
        counts.pump.flushed(0.02, 10)
        counts.shortcut.flushed(0.002, 1)
        samples = self.scrape(counts)
        assert value(samples, "flush_seconds_count", service="audit") == 2
        assert value(samples, "flush_seconds_bucket", service="audit", le="0.0025") == 1
        assert value(samples, "flush_events_sum", service="audit") == 11

    def test_does_not_count_a_flush_of_nothing(self) -> None:
        pump = PumpCounts()
        pump.flushed(0.002, 0)
        assert sum(pump.flush_seconds.counts) == sum(pump.flush_events.counts) == 0

    def test_tells_its_memory_and_its_python(self, counts: ServiceCounts) -> None:
        names = {name for name, _ in self.scrape(counts)}
        assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "python_info"} < names

    def test_speaks_openmetrics_to_who_asks_for_it(self, counts: ServiceCounts) -> None:
        text, content_type = exposed(process_registry([counts]), "application/openmetrics-text")
        assert content_type.startswith("application/openmetrics-text")
        assert text.endswith(b"# EOF\n")


class TestOutboxLag:
    """An outbox that cannot be relayed, and then can."""

    @pytest.fixture
    def relay(self, monkeypatch: pytest.MonkeyPatch) -> Relay:
        self.rows: list[outbox.Row] = []
        self.error: Exception | None = None
        self.set_aside: list[outbox.Row] = []
        self.counts = ServiceCounts("shop")
        monkeypatch.setattr("shared.store.outbox.oldest", lambda *_: list(self.rows))
        monkeypatch.setattr("shared.store.outbox.remove", lambda *_: self.rows.clear())
        monkeypatch.setattr("shared.store.outbox.set_aside", self.put_aside)
        return Relay(self, _Engine(), "shop")  # type: ignore[arg-type]

    def append(self, envelopes: Sequence[Envelope], again: bool) -> list[str]:
        if self.error:
            raise self.error
        return [envelope.id for envelope in envelopes]

    def put_aside(self, _connection: Any, _outbox: Any, row: outbox.Row, _reason: str) -> bool:
        self.set_aside.append(row)
        self.rows.remove(row)
        return True

    def row(self) -> outbox.Row:
        return outbox.Row(1, outbox._to_text(event()))

    def lag(self) -> float:
        lag = value(collected(process_registry([self.counts])), "outbox_lag_seconds")
        assert lag is not None
        return lag

    def test_grows_from_the_first_failure_until_it_is_relayed(self, relay: Relay) -> None:
        relay.sweep()
        assert self.lag() == 0
        self.rows, self.error = [self.row()], DispatchError("away")
        for _ in range(2):
            with pytest.raises(DispatchError):
                relay.sweep()
        first = self.lag()
        assert 0 < first < self.lag()

        self.error = None
        assert relay.sweep() == 1
        assert self.lag() == 0

    @pytest.mark.parametrize("why", ["it cannot be read", "the log refuses it"])
    def test_does_not_count_what_is_set_aside(self, relay: Relay, why: str) -> None:
        row = self.row()
        if why == "it cannot be read":
            row = row._replace(envelope="{")
        else:
            self.error = DispatchRefusedError(why)
        self.rows = [row]
        relay.sweep()
        assert self.set_aside == [row]
        assert self.lag() == 0


class _Engine:
    dialect = Mock()

    def connect(self) -> Any:
        return self

    begin = connect

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def execution_options(self, **_: Any) -> None:
        pass


class Source:
    name = "source"
    dispatch = EventDispatcher()

    @dummy
    def send_twice(self, **options: Any) -> list[str]:
        return [self.dispatch("thing.happened", {}, **options) for _ in range(2)]


class TestDispatched:
    @pytest.fixture
    def container(self, tmp_path: Path) -> Iterator[ServiceContainer]:
        container = ServiceContainer(Source, {"QUEUE_DATA_DIR": str(tmp_path)})
        container.start()
        yield container
        container.stop()

    @pytest.mark.parametrize(("options", "count"), [({}, 2), ({"dedupe_key": "order-7"}, 1)])
    def test_counts_what_was_stored(
        self, container: ServiceContainer, options: Any, count: int
    ) -> None:
        with entrypoint_hook(container, "send_twice") as hook:
            assert len(set(hook(**options))) == count
        [dispatcher] = container.dependencies
        assert dispatcher.queue_client.counts.dispatched == {("source", "thing.happened"): count}


class TestEndpoint:
    @pytest.fixture
    def address(self) -> Address:
        return Address("127.0.0.1", free_port())

    @pytest.fixture
    def endpoint(self, address: Address) -> Iterator[Endpoint]:
        self.counts = ServiceCounts("audit")
        endpoint = Endpoint(address)
        yield endpoint
        endpoint.remove(self.counts)

    def get(self, address: Address) -> requests.Response:
        return requests.get(f"http://{address}/metrics", timeout=5)

    def test_tells_of_each_service_until_it_is_removed(
        self, endpoint: Endpoint, address: Address
    ) -> None:
        other = ServiceCounts("other")
        endpoint.add(self.counts)
        endpoint.add(other)
        wait_until(lambda: endpoint.port, 5, "the port")
        answer = self.get(address)
        assert answer.headers["Content-Type"].startswith("text/plain")
        samples = parsed(answer.text)
        assert value(samples, "lease_losses_total", service="audit") == 0
        assert value(samples, "lease_losses_total", service="other") == 0

        endpoint.remove(other)
        assert value(parsed(self.get(address).text), "lease_losses_total", service="other") is None
        endpoint.remove(self.counts)
        with pytest.raises(requests.ConnectionError):
            self.get(address)

    def test_takes_no_other_method(self, endpoint: Endpoint, address: Address) -> None:
        endpoint.add(self.counts)
        wait_until(lambda: endpoint.port, 5, "the port")
        assert requests.post(f"http://{address}/metrics", timeout=5).status_code == 405

    def test_waits_for_an_address_that_is_taken(
        self,
        endpoint: Endpoint,
        address: Address,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(endpoint_module, "AGAIN_SECONDS", 0.01)
        before, its_counts = Endpoint(address), ServiceCounts("before")
        before.add(its_counts)
        wait_until(lambda: before.port, 5, "the port")
        with caplog.at_level(logging.WARNING):
            endpoint.add(self.counts)
            wait_until(lambda: "cannot listen" in caplog.text, 5, "the warning")
        before.remove(its_counts)
        wait_until(lambda: endpoint.port, 5, "the port")
        assert self.get(address).status_code == 200
        assert caplog.text.count("cannot listen") == 1


class TestAudits:
    def test_are_told_by_their_result_and_by_what_they_put_right(self) -> None:
        audited = AuditCounts()
        audited.ended(0, 0)
        audited.ended(40, 0)
        audited.ended(2, 3)
        audited.put_off()
        samples = collected(log_registry("redis", True, None, audited))
        results = {"balanced": 1, "repaired": 2, "put_off": 1}
        for result, count in results.items():
            assert value(samples, "audits_total", result=result) == count
        assert value(samples, "audit_repaired_total", what="delivery") == 42
        assert value(samples, "audit_repaired_total", what="message") == 3


class TestLogGauges:
    def gauges(self, store: Log, joins_log: bool = True) -> LogGauges:
        return store.do(lambda tx: log_gauges(tx.connection, joins_log))

    def age(self, store: Log, table: Any, seconds: float, **columns: Any) -> None:
        """Have something happened some time ago."""

        def step(tx: Any) -> None:
            tx.connection.execute(
                update(table).values(**dict.fromkeys(columns, tx.later(-seconds)))
            )

        store.do(step)

    def test_count_messages_by_queue_and_status(self, store: Log) -> None:
        store.subscribe()
        done, dead, _ = store.append(event(), event(), event())
        store.append(event("nobody.wants"))
        store.attempt(done, COMPLETED)
        store.attempt(dead, FAILED)
        assert self.gauges(store).messages == {
            ("orders", "completed"): 2,
            ("orders", "failed"): 1,
            ("orders", "pending"): 1,
        }

    def test_count_what_is_not_completed_by_subscription(self, store: Log) -> None:
        store.subscribe()
        store.subscribe(subscriber="stock.take")
        first, second, *_ = store.append(event(), event())
        store.attempt(first, COMPLETED)
        store.attempt(second, RETRY, delay=60)
        audit, stock = self.gauges(store).subscriptions
        assert (audit.subscription.subscriber, stock.subscription.subscriber) == (
            "audit.note",
            "stock.take",
        )
        found = [dict(each.deliveries) for each in (audit, stock)]
        assert sum(each.get("retry", 0) for each in found) == 1
        assert sum(each.get("pending", 0) for each in found) == 2
        assert all("completed" not in each for each in found)

    def test_take_what_is_scheduled_for_not_waiting(self, store: Log) -> None:
        store.subscribe()
        store.append(event(), event(delay=60))
        [audit] = self.gauges(store).subscriptions
        assert (audit.waiting, audit.deliveries) == (1, {"pending": 2})

    def test_tell_for_how_long_the_oldest_waits(self, store: Log) -> None:
        store.subscribe()
        [first] = store.append(event())
        self.age(store, messages, 100, created_at=None)
        store.append(event())
        [audit] = self.gauges(store).subscriptions
        assert audit.waiting == 2
        assert 98 < audit.oldest_waiting < 110

        store.attempt(first, COMPLETED)
        [audit] = self.gauges(store).subscriptions
        assert audit.waiting == 1
        assert audit.oldest_waiting < 10

    def test_count_the_wait_from_when_it_was_due(self, store: Log) -> None:
        """Given a message that is old, and due since its schedule, or its last attempt."""
        store.subscribe()
        [retried] = store.append(event())
        store.attempt(retried, RETRY, delay=0)
        self.age(store, messages, 5000, created_at=None)
        [audit] = self.gauges(store).subscriptions
        assert audit.waiting == 1
        assert audit.oldest_waiting < 10

        self.age(store, deliveries, 100, available_at=None)
        [audit] = self.gauges(store).subscriptions
        assert 98 < audit.oldest_waiting < 110

    @pytest.mark.parametrize("is_signed_off", [False, True])
    def test_tell_a_silent_subscription_as_health_does(
        self, store: Log, is_signed_off: bool
    ) -> None:
        def silent() -> list[str]:
            return store.do(lambda tx: queries.silent_subscriptions(tx.connection, tx.now))

        store.subscribe()
        if is_signed_off:  # as one does that gets nothing of what waits
            store.do(
                lambda tx: tx.connection.execute(update(subscriptions_table).values(seen_at=None))
            )
        else:
            self.age(store, subscriptions_table, 31, seen_at=None)
        [audit] = self.gauges(store).subscriptions
        assert (audit.is_live, audit.is_silent, silent()) == (False, False, [])
        store.append(event())
        [audit] = self.gauges(store).subscriptions
        assert (audit.is_live, audit.is_silent) == (False, True)
        assert silent() == ["placed audit.note"]

        self.age(store, subscriptions_table, 0, paused_at=None)
        [audit] = self.gauges(store).subscriptions
        assert (audit.is_paused, audit.is_silent, silent()) == (True, False, [])

    def test_tell_a_live_one(self, store: Log) -> None:
        store.subscribe()
        store.append(event())
        [audit] = self.gauges(store).subscriptions
        assert (audit.is_live, audit.is_silent) == (True, False)

    def test_leave_out_what_is_retired(self, store: Log) -> None:
        its = store.subscribe()
        store.do(subscriptions.retire, [its.id])
        assert self.gauges(store).subscriptions == []

    def test_tell_the_age_of_what_is_not_published(self, store: Log) -> None:
        store.subscribe()
        published, waiting = store.append(event(), event())
        store.do(backlog.give_back, [published, waiting])
        self.age(store, messages, 100, created_at=None)
        assert self.gauges(store).relay_lag == {"orders": 0}
        assert 98 < self.gauges(store, joins_log=False).relay_lag["orders"] < 110

        def publish(tx: Any, *its: Delivery) -> None:
            seqs = [each.seq for each in its]
            tx.connection.execute(
                update(deliveries).where(deliveries.c.seq.in_(seqs)).values(ready=False)
            )

        store.do(publish, published)
        assert self.gauges(store, joins_log=False).relay_lag["orders"] > 98
        store.do(publish, waiting)
        assert self.gauges(store, joins_log=False).relay_lag == {"orders": 0}

    def test_do_not_take_what_a_worker_has_for_unpublished(self, store: Log) -> None:
        store.subscribe()
        [its] = store.append(event())
        store.do(attempts.start, [Lease(its, 1)], "host:1", held_for=30)
        self.age(store, messages, 100, created_at=None)
        assert self.gauges(store, joins_log=False).relay_lag == {"orders": 0}
        [audit] = self.gauges(store).subscriptions
        assert (audit.waiting, audit.deliveries) == (0, {"processing": 1})

    def test_tell_what_waits_for_a_limit(self, store: Log) -> None:
        """Given one delivery in hand, which is all that may be, and two that wait."""
        its = store.subscribe()
        others = store.subscribe("cancelled")
        first, *_ = store.append(event(), event(), event(), event("cancelled"))
        store.do(limits.change, its.id, Limits(concurrency=1))
        store.do(limits.change, others.id, Limits(concurrency=1))
        store.do(attempts.start, [Lease(first, 1)], "host:1", held_for=30)

        def ask(tx: Any, held: int) -> None:
            grants = limits.ask(tx, "host:1", [Ask(its.id, held)])
            limits.keep(tx, "host:1", list(grants.values()), 30)

        store.do(ask, 1)
        held, free = self.gauges(store).subscriptions
        assert (held.waiting, held.held_back) == (2, 2)
        assert (free.waiting, free.held_back) == (1, 0)

        # a pause holds it back as well
        self.age(store, subscriptions_table, 0, paused_at=None)
        assert [each.held_back for each in self.gauges(store).subscriptions] == [0, 0]
        store.do(
            lambda tx: tx.connection.execute(update(subscriptions_table).values(paused_at=None))
        )
        store.do(ask, 0)
        assert [each.held_back for each in self.gauges(store).subscriptions] == [0, 0]

    def test_tell_what_waits_for_a_rate(self, store: Log) -> None:
        its = store.subscribe()
        store.append(event())
        store.do(limits.change, its.id, Limits(rate=0.001, burst=1))
        assert [each.held_back for each in self.gauges(store).subscriptions] == [0]

        def take(tx: Any) -> None:
            grants = limits.ask(tx, "host:1", [Ask(its.id, 0, want=1)])
            grants[its.id].use(1, 0)
            limits.keep(tx, "host:1", list(grants.values()), 30)

        store.do(take)
        assert [each.held_back for each in self.gauges(store).subscriptions] == [1]

    def test_tell_a_schedule_that_fails(self, store: Log) -> None:
        desk = DirectSchedules(DirectClient(load_settings(store.config)))
        its = {"queue_name": "orders", "message_type": "placed", "payload": {}, "cron": "0 2 * * *"}
        for name in ("fails", "paused", "works"):
            desk.put("ada", name, **its)
        table = schedules_table.c

        def fail(tx: Any) -> None:
            failed = {"error": "too long", "error_at": tx.now}
            tx.connection.execute(
                update(schedules_table).where(table.name != "works").values(**failed)
            )

        store.do(fail)
        desk.pause("ada", "paused")
        samples = collected(log_registry("redis", True, self.gauges(store), None))
        labels = {"queue": "orders", "message_type": "placed"}
        failing = {
            name: value(samples, "schedule_failing", schedule=name, **labels)
            for name in ("fails", "paused", "works")
        }
        assert failing == {"fails": 1, "paused": 0, "works": 0}

        desk.run("ada", "fails")
        assert not any(each.is_failing for each in self.gauges(store).schedules)
        desk.client.close()

    def test_count_ramps_by_status(self, store: Log) -> None:
        store.subscribe()
        [dead] = store.append(event())
        store.attempt(dead, FAILED)
        [group] = [row.fingerprint for row in store.rows(failures_table)]
        first = store.do(ramps.start, group, "ada", 10)
        store.do(ramps.cancel, first, "ada")
        store.do(ramps.start, group, "ada", 10)
        samples = collected(log_registry("redis", True, self.gauges(store), None))
        counts = {each: value(samples, "ramps", status=each) for each in RampStatus}
        assert counts == {"running": 1, "completed": 0, "stopped": 0, "cancelled": 1}

    def test_of_an_empty_log_are_none(self, store: Log) -> None:
        assert self.gauges(store) == LogGauges({}, [], {})

    def test_become_metrics(self, store: Log) -> None:
        store.subscribe()
        [dead] = store.append(event())
        store.attempt(dead, FAILED)
        samples = collected(log_registry("redis", True, self.gauges(store), None))
        its = {"queue": "orders", "message_type": "placed", "subscriber": "audit.note"}
        assert value(samples, "provider_up", provider="redis") == 1
        assert value(samples, "database_up") == 1
        assert value(samples, "messages", queue="orders", status="failed") == 1
        assert value(samples, "messages", queue="orders", status="completed") == 0
        assert value(samples, "deliveries", status="failed", **its) == 1
        assert value(samples, "deliveries", status="retry", **its) == 0
        assert value(samples, "consumer_live", **its) == 1

    @pytest.mark.parametrize(("left", "is_up"), [(12, 1), (0, 1), (None, 0)])
    def test_tell_what_is_left_where_a_provider_is_moved_away_from(
        self, left: int | None, is_up: int
    ) -> None:
        draining = DrainGauges("rabbitmq", left)
        registry = log_registry("redis", True, None, None, draining)
        samples = parsed(exposed(registry, None)[0].decode())
        assert value(samples, "draining", provider="rabbitmq") == 1
        assert value(samples, "draining_deliveries", provider="rabbitmq") == left
        assert value(samples, "provider_up", provider="rabbitmq") == is_up
        assert value(samples, "provider_up", provider="redis") == 1

    def test_that_could_not_be_had_are_told_to_be_missing(self) -> None:
        samples = collected(log_registry("redis", False, None, None))
        assert {name: number for (name, _), number in samples.items()} == {
            "nameko_queue_provider_up": 0,
            "nameko_queue_database_up": 0,
        }
