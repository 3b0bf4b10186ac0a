"""Episodes of alerts, one look after the other, on either database."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert, update

from shared.contracts.alert import QueueAlert
from shared.database import Database
from shared.errors import QueueNotKnownError
from shared.events import alerts as events
from shared.events.direct import DirectAlerts, DirectClient, DirectSchedules
from shared.native import sleep
from shared.settings import load_settings
from shared.store import alerts, measures, subscriptions, timers
from shared.store.measures import Measure, Rule, failure_percent
from shared.tables import alerts as alerts_table
from shared.tables import audit_log
from shared.tables import messages as messages_table
from shared.tables import schedules as schedules_table
from shared.tables import subscriptions as subscriptions_table
from shared.tables import timers as timers_table
from shared.types import Delivery, new_message_id
from tests.unit.message_log import COMPLETED, FAILED, RETRY, Log, event

LIMITS = dict.fromkeys(Rule, 10.0)


def look(store: Log, value: float | None, limit: float = 10.0) -> list[alerts.News]:
    """Look once, as if dead letters were that many."""
    its = {"orders": {Rule.DEAD_LETTERS: Measure(value, ["audit.note"])}}
    limits = {"orders": {**LIMITS, Rule.DEAD_LETTERS: limit}}
    return store.do(alerts.move, its, limits)


def told(store: Log, *values: float | None) -> list[str]:
    return [news.status.value for value in values for news in look(store, value)]


def shown(store: Log) -> dict[str, Any]:
    return store.do(lambda tx: alerts.list_alerts(tx.connection))


class TestEpisode:
    def test_is_told_once_and_its_end_once(self, store: Log) -> None:
        assert told(store, 10) == []
        assert shown(store)["firing"] == []
        assert told(store, 12) == ["firing"]
        assert told(store, 12, 40, 11, 10) == []
        [firing] = shown(store)["firing"]
        assert (firing["value"], firing["threshold"], firing["endedAt"]) == (40, 10, None)
        # by now there are 10 again
        said = "orders had up to 40 dead letters (audit.note); 10 is the threshold."
        assert firing["sentence"] == said
        assert told(store, 0, 0) == []
        [news] = look(store, 0)
        assert (news.status, news.alert_id) == ("resolved", firing["id"])
        assert news.summary == "Over: orders had too many dead letters."
        assert told(store, 0, 0, 0, 0) == []
        assert shown(store)["firing"] == []
        [past] = shown(store)["resolved"]
        assert (past["id"], past["value"], past["sentence"]) == (firing["id"], 40, said)
        assert past["endedAt"] >= past["beganAt"]
        assert told(store, 10, 10) == ["firing"]

    def test_is_told_in_a_sentence_and_shown_in_one_of_its_worst(self, store: Log) -> None:
        its = {"orders": {rule: Measure(12.34) for rule in Rule}}
        store.do(alerts.move, its, {"orders": LIMITS})
        said = [news.summary for news in store.do(alerts.move, its, {"orders": LIMITS})]
        assert said == [
            "orders has 12.3 dead letters; 10 is the threshold.",
            "12.3 schedules of orders could not dispatch the last time; 10 is the threshold.",
            "12.3 % of the newest messages of orders fail; 10 is the threshold.",
            "The oldest work of orders is due for 12.3 s; 10 is the threshold.",
            "Work of orders waits, and nobody consumes 12.3 subscriptions; 10 is the threshold.",
        ]
        limit = "; 10 is the threshold."
        assert [each["sentence"] for each in shown(store)["firing"]] == [
            "orders had up to 12.3 dead letters; 10 is the threshold.",
            "Up to 12.3 schedules of orders could not dispatch; 10 is the threshold.",
            "Up to 12.3 % of the newest messages of orders failed; 10 is the threshold.",
            "The oldest work of orders was due for up to 12.3 s; 10 is the threshold.",
            f"Work of orders waited, and nobody consumed up to 12.3 subscriptions{limit}",
        ]

    def test_shows_its_threshold_as_it_may_be_given(self, store: Log) -> None:
        limits = {"orders": {**LIMITS, Rule.FAILURE_PERCENT: 0.25, Rule.DEAD_LETTERS: 100.0}}
        its = {"orders": {rule: Measure(100) for rule in limits["orders"]}}
        for _ in range(2):
            store.do(alerts.move, its, limits)
        firing = {each["rule"]: each for each in shown(store)["firing"]}
        assert firing["failure_percent"]["sentence"].endswith("; 0.25 is the threshold.")
        assert str(firing["failure_percent"]["threshold"]) == "0.25"
        assert str(firing["dead_letters"]["threshold"]) == "100"

    def test_does_not_begin_by_one_look(self, store: Log) -> None:
        assert told(store, 10, 9, 10, 9, 10, None, 10, 0) == []
        assert store.rows(alerts_table) == []

    def test_does_not_flap_about_its_threshold(self, store: Log) -> None:
        assert told(store, 10, 10) == ["firing"]
        assert told(store, *[9, 10, 8, 8, 9, 8, 8, 10] * 5) == []
        assert told(store, 8, 8, 8) == ["resolved"]

    def test_is_over_when_nobody_wants_it_or_the_queue_is_gone(self, store: Log) -> None:
        assert told(store, 10, 10) == ["firing"]
        looks = [look(store, 10, limit=0) for _ in range(3)]
        assert [len(each) for each in looks] == [0, 0, 1]
        [[news]] = looks[2:]
        assert news.summary == "No longer watched: how many dead letters orders has."
        assert (news.status, news.payload()["status"]) == ("resolved", "resolved")
        assert told(store, 10, 10) == ["firing"]
        looks = [store.do(alerts.move, {}, {}) for _ in range(3)]
        assert [len(each) for each in looks] == [0, 0, 1]
        [[news]] = looks[2:]
        assert news.summary == "Over: orders had too many dead letters."
        assert news.payload()["ended_at"] >= news.payload()["began_at"]
        assert list(QueueAlert().validate(news.payload())) == []

    def test_is_none_where_the_threshold_is_zero(self, store: Log) -> None:
        assert [look(store, 10, limit=0) for _ in range(3)] == [[], [], []]
        assert store.rows(alerts_table) == []


class Site:
    """A queue with a consumer, and who looks at it."""

    def __init__(self, store: Log, **env: str) -> None:
        self.store = store
        self.subscription = store.subscribe()
        self.settings = load_settings({**store.config, **env})
        self.client = DirectClient(self.settings)

    def fail(self, status: Any = FAILED) -> Delivery:
        [delivery] = self.store.append(event())
        self.store.attempt(delivery, status)
        return delivery

    def look(self) -> list[str]:
        """Look at all queues, as if that were due."""
        self.store.do(lambda tx: tx.connection.execute(update(timers_table).values(next_at=tx.now)))
        return [f"{x.rule} {x.status}" for x in events.look(self.client, self.client)]

    @property
    def dispatched(self) -> list[Any]:
        is_alert = messages_table.c.message_type == "queue.alert"
        return self.store.rows(messages_table, is_alert)


@pytest.fixture
def site(store: Log) -> Any:
    made = Site(store, QUEUE_ALERT_DEAD_LETTERS="2")
    yield made
    made.client.close()


class TestLook:
    def test_dispatches_in_the_same_transaction_what_it_notes(self, site: Site) -> None:
        for _ in range(2):
            site.fail()
        assert site.look() == []
        assert site.look() == ["dead_letters firing"]
        [message] = site.dispatched
        assert (message.queue_name, message.priority) == ("queue_admin", "urgent")
        assert message.max_retries == events.MAX_RETRIES
        [row] = site.store.rows(alerts_table)
        assert row.message_id == message.id
        assert site.look() == []
        assert len(site.dispatched) == 1

    def test_is_done_by_one_of_many(self, site: Site) -> None:
        for _ in range(2):
            site.fail()
        site.look()
        site.store.do(lambda tx: tx.connection.execute(update(timers_table).values(next_at=tx.now)))
        found: list[Any] = []

        def run() -> None:
            client = DirectClient(site.settings)
            found.extend(events.look(client, client))
            client.close()

        threads = [threading.Thread(target=run) for _ in range(5)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(found) == len(site.dispatched) == 1

    def test_is_not_due_at_once_again(self, site: Site) -> None:
        for _ in range(2):
            site.fail()
        assert site.look() == []
        assert events.look(site.client, site.client) == []
        [row] = site.store.rows(alerts_table)
        assert (row.status, row.looks) == ("suspected", 1)

    def test_writes_nothing_where_all_is_well(self, site: Site) -> None:
        site.look()
        assert site.store.rows(timers_table) == site.store.rows(alerts_table) == []

    def test_leaves_the_queue_of_the_alerts_alone(self, site: Site) -> None:
        message = {
            "queue_name": "queue_admin", "message_type": "queue.alert", "payload": "{}",
            "status": "failed",
        }  # fmt: skip
        rows = [{**message, "id": new_message_id()} for _ in range(20)]
        site.store.do(lambda tx: tx.connection.execute(insert(messages_table), rows))
        measured = site.store.do(lambda tx: measures.measure(tx.connection, tx.now))
        assert measured["queue_admin"][Rule.FAILURE_PERCENT].value == 100
        assert site.look() == site.look() == []


class TestThresholds:
    def test_are_a_queues_own_until_they_are_taken_back(self, site: Site) -> None:
        site.fail()
        its = DirectAlerts(site.client)
        changed = its.set_thresholds("ada", "orders", {Rule.DEAD_LETTERS: 1})
        assert (changed["deadLetters"], changed["oldestSeconds"]) == (1, 300)
        assert changed["own"] == ["dead_letters"]
        assert its.thresholds()["usual"]["deadLetters"] == 2
        assert site.look() == []
        assert site.look() == ["dead_letters firing"]
        its.set_thresholds("ada", "orders", {})
        assert its.thresholds()["queues"] == [
            {
                "queueName": "orders", "failurePercent": 10, "oldestSeconds": 300,
                "deadLetters": 2, "silentConsumers": 1, "failingSchedules": 1, "own": [],
            }
        ]  # fmt: skip
        done = [(row.actor, row.action, row.target) for row in site.store.rows(audit_log)]
        assert done == [("ada", "set thresholds", "queue orders")] * 2

    @pytest.mark.parametrize("queue", ["nowhere", "queue_admin"])
    def test_are_not_those_of_what_is_not_watched(self, site: Site, queue: str) -> None:
        with pytest.raises(QueueNotKnownError):
            DirectAlerts(site.client).set_thresholds("ada", queue, {Rule.DEAD_LETTERS: 1})


class TestMeasures:
    def rule(self, store: Log, rule: Rule) -> Measure:
        return store.do(lambda tx: measures.measure(tx.connection, tx.now))["orders"][rule]

    def test_failures_are_those_of_the_newest_messages(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = site.store
        for status in (FAILED, RETRY, *[COMPLETED] * 7):
            site.fail(status)
        assert self.rule(store, Rule.FAILURE_PERCENT).value is None  # too few to tell
        site.fail(COMPLETED)
        store.append(event())  # nothing came of it yet
        assert self.rule(store, Rule.FAILURE_PERCENT).value == 20
        store.do(
            lambda tx: tx.connection.execute(
                update(messages_table)
                .where(messages_table.c.status == "failed")
                .values(created_at=tx.now - timedelta(seconds=measures.WINDOW_SECONDS + 5))
            )
        )
        site.fail(COMPLETED)
        assert self.rule(store, Rule.FAILURE_PERCENT).value == 10
        # of many the newest are counted
        monkeypatch.setattr(measures, "MOST_COUNTED", 8)
        store.do(
            lambda tx: tx.connection.execute(
                update(messages_table)
                .where(messages_table.c.status == "retry")
                .values(created_at=tx.now - timedelta(seconds=100))
            )
        )
        monkeypatch.setattr(measures, "LEAST_COUNTED", 8)
        assert self.rule(store, Rule.FAILURE_PERCENT).value == 0

    def test_age_is_that_of_what_is_due_and_not_paused(self, site: Site) -> None:
        store = site.store
        [delivery] = store.append(event())
        store.do(
            lambda tx: tx.connection.execute(
                update(messages_table).values(created_at=tx.now - timedelta(seconds=50))
            )
        )
        measure = self.rule(store, Rule.OLDEST_SECONDS)
        assert 50 <= (measure.value or 0) < 60
        assert measure.subscribers == ["audit.note"]
        store.do(subscriptions.set_paused, [delivery.subscription_id], "ada")
        assert self.rule(store, Rule.OLDEST_SECONDS).value == 0

    def test_silent_is_who_has_work_and_no_consumer(self, site: Site) -> None:
        store = site.store
        assert self.rule(store, Rule.SILENT_CONSUMERS).value == 0
        store.append(event())
        assert self.rule(store, Rule.SILENT_CONSUMERS).value == 0
        store.do(lambda tx: tx.connection.execute(update(subscriptions_table).values(seen_at=None)))
        assert self.rule(store, Rule.SILENT_CONSUMERS) == Measure(1, ["audit.note"])

    def test_failing_is_a_schedule_whose_last_dispatch_failed(self, site: Site) -> None:
        """Given two into a queue that nobody knows else, of which one is paused later."""
        desk = DirectSchedules(site.client)
        its = {"queue_name": "nights", "message_type": "fell", "payload": {}, "cron": "0 2 * * *"}
        for name in ("one", "other"):
            desk.put("ada", name, **its)
        assert self.of_nights(site) == Measure(0, [])
        site.store.do(
            lambda tx: tx.connection.execute(
                update(schedules_table).values(error="too long", error_at=tx.now)
            )
        )
        assert self.of_nights(site) == Measure(2, ["one", "other"])
        desk.pause("ada", "other")
        assert self.of_nights(site) == Measure(1, ["one"])
        assert [site.look(), site.look()] == [[], ["failing_schedules firing"]]
        [alert] = DirectAlerts(site.client).alerts()["firing"]
        said = "Up to 1 schedule of nights could not dispatch (one); 1 is the threshold."
        assert (alert["queueName"], alert["sentence"]) == ("nights", said)
        changed = DirectAlerts(site.client).set_thresholds(
            "ada", "nights", {Rule.FAILING_SCHEDULES: 2}
        )
        assert (changed["failingSchedules"], changed["own"]) == (2, ["failing_schedules"])

    def of_nights(self, site: Site) -> Measure:
        measured = site.store.do(lambda tx: measures.measure(tx.connection, tx.now))
        return measured["nights"][Rule.FAILING_SCHEDULES]


class TestTimer:
    def test_is_taken_once_an_interval(self, store: Log) -> None:
        assert store.do(timers.take, "alerts", 100) is True
        assert store.do(timers.take, "alerts", 100) is False
        assert store.do(timers.take, "other", 0, first=50) is False
        later = store.do(lambda tx: timers.is_due(tx.connection, "other", tx.later(51)))
        assert later is True

    def test_is_taken_by_one_of_two_at_once(self, store: Log) -> None:
        taken: list[bool] = []

        def run() -> None:
            database = Database(store.database.engine.url, sleep)
            taken.append(database.run(lambda tx: timers.take(tx, "alerts", 100)))
            database.close()

        threads = [threading.Thread(target=run) for _ in range(6)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert sorted(taken) == [False] * 5 + [True]


def test_a_rate_of_nothing_is_none(store: Log) -> None:
    found: Mapping[str, Any] = store.do(lambda tx: measures.measure(tx.connection, tx.now))
    assert found == {}
    assert store.do(lambda tx: failure_percent(tx.connection, "orders", tx.now)) is None
