"""Schedules: each occurrence is dispatched once, whoever tries, on either database."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import DataError

from shared.contracts import contracts
from shared.errors import ContractError, PayloadError, ScheduleNotFoundError
from shared.events.direct import DirectClient, DirectSchedules
from shared.settings import load_settings
from shared.store import log, schedules, trail
from shared.tables import messages as messages_table
from shared.tables import schedules as table
from tests.unit.message_log import Log

NIGHTLY: dict[str, Any] = {
    "queue_name": "orders", "message_type": "placed", "payload": {"a": 1}, "cron": "0 2 * * *",
}  # fmt: skip


class Desk(DirectSchedules):
    """Somebody who makes schedules, and stands in for the clock."""

    def __init__(self, store: Log) -> None:
        super().__init__(DirectClient(load_settings(store.config)))
        self.store = store

    def make(self, name: str = "nightly", **options: Any) -> dict[str, Any]:
        return self.put("ada", name, **{**NIGHTLY, **options})

    def be_due(self, name: str = "nightly", seconds: float = 0.0) -> datetime:
        """Have the next occurrence be so long ago; return it."""

        def step(tx: Any) -> datetime:
            at = (tx.now - timedelta(seconds=seconds)).replace(microsecond=0)
            tx.connection.execute(update(table).where(table.c.name == name).values(next_at=at))
            return at

        return self.store.do(step)

    def dispatched(self) -> list[Any]:
        rows = self.store.rows(messages_table)
        return [json.loads(row.metadata)["schedule"]["occurrence"] for row in rows]

    def trail(self) -> list[Any]:
        found = self.store.do(lambda tx: trail.entries(tx.connection, None, 100)["entries"])
        return [(each["action"], each["target"]) for each in found]


@pytest.fixture
def desk(store: Log) -> Iterator[Desk]:
    made = Desk(store)
    yield made
    made.client.close()


def iso(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds") + "Z"


def test_dispatches_what_is_due_and_moves_on(desk: Desk) -> None:
    desk.store.subscribe()
    made = desk.make(priority="urgent", metadata={"campaign": "x"}, time_zone="Europe/Berlin")
    assert (made["enabled"], made["lastAt"], made["sentence"]) == (True, None, "At 02:00 every day")
    assert 0 < desk.carry_on() <= 1
    assert desk.dispatched() == []
    at = desk.be_due()

    assert desk.carry_on() == 0

    [message] = desk.store.rows(messages_table)
    shown = desk.schedule("nightly")
    assert (shown["lastAt"], shown["lastMessageId"]) == (iso(at), message.id)
    assert shown["nextAt"] > iso(at)
    assert (message.queue_name, message.message_type, message.payload, message.priority) == (
        "orders", "placed", '{"a":1}', "urgent",
    )  # fmt: skip
    kept = json.loads(message.metadata)
    assert kept["schedule"] == {"name": "nightly", "occurrence": iso(at)}
    assert kept["campaign"] == "x"
    assert message.status == "pending"
    assert desk.carry_on() > 0
    assert len(desk.dispatched()) == 1


def test_the_latest_stands_for_what_was_missed(desk: Desk) -> None:
    desk.make(cron="* * * * * *")
    at = desk.be_due(seconds=30)

    desk.carry_on()

    shown = desk.schedule("nightly")
    [occurrence] = desk.dispatched()
    assert occurrence == shown["lastAt"]
    late = (datetime.fromisoformat(occurrence[:-1]) - at).total_seconds()
    assert late >= 30
    assert shown["skipped"] == late


def test_many_at_once_dispatch_an_occurrence_once(desk: Desk) -> None:
    desk.make()
    desk.be_due()
    rows, _, now = desk.reader.read(lambda c: (*schedules.due(c, datetime(2037, 1, 1)), None))
    now = rows[0].next_at + timedelta(seconds=1)
    moved: list[bool] = []
    barrier = threading.Barrier(6)

    def dispatch() -> None:
        other = Desk(desk.store)
        other.client.read(schedules.list_schedules)
        barrier.wait()
        moved.append(other._move_on(rows[0], now))
        other.client.close()

    threads = [threading.Thread(target=dispatch) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert sorted(moved) == [False] * 5 + [True]
    assert len(desk.dispatched()) == 1


def test_what_was_changed_meanwhile_is_not_dispatched_as_it_was_seen(desk: Desk) -> None:
    desk.make()
    at = desk.be_due()
    [row] = desk.reader.read(schedules.list_schedules)
    desk.make(payload={"a": 2})

    assert desk._move_on(row, at) is False

    assert desk.carry_on() == 0
    [message] = desk.store.rows(messages_table)
    assert message.payload == '{"a":2}'


class TestChanging:
    def test_keeps_the_next_occurrence_of_the_same_expression(self, desk: Desk) -> None:
        first = desk.make()
        at = desk.be_due()
        assert desk.make(payload=[1])["nextAt"] == iso(at)
        assert desk.make(cron="0 3 * * *")["nextAt"][11:16] == "03:00"
        assert desk.make()["nextAt"] == first["nextAt"]

    def test_keeps_a_pause(self, desk: Desk) -> None:
        desk.make()
        paused = desk.pause("bob", "nightly")
        assert (paused["enabled"], paused["nextAt"], paused["updatedBy"]) == (False, None, "bob")
        changed = desk.make(cron="0 3 * * *")
        assert (changed["enabled"], changed["nextAt"]) == (False, None)
        assert desk.carry_on() > 0
        resumed = desk.resume("bob", "nightly")
        assert (resumed["enabled"], resumed["nextAt"][11:16]) == (True, "03:00")
        at = desk.be_due()
        assert desk.resume("bob", "nightly")["nextAt"] == iso(at)

    def test_is_in_the_audit_log(self, desk: Desk) -> None:
        desk.make()
        desk.pause("ada", "nightly")
        desk.resume("ada", "nightly")
        desk.run("ada", "nightly")
        desk.remove("ada", "nightly")
        done = [action for action, target in desk.trail() if target == "schedule nightly"]
        assert done == ["remove", "run", "resume", "pause", "schedule"]
        assert desk.schedules() == []

    def test_of_what_is_not_there_is_refused(self, desk: Desk) -> None:
        desk.make("Nightly")
        for act in (desk.pause, desk.resume, desk.run, desk.remove):
            with pytest.raises(ScheduleNotFoundError, match="no schedule nightly"):
                act("ada", "nightly")

    @pytest.mark.parametrize(
        ("wrong", "field"),
        [
            ({"cron": "x"}, "cron"),
            ({"cron": "* * */20 * 1L"}, "cron"),
            ({"time_zone": "Mars"}, "timeZone"),
            ({"metadata": {"schedule": {}}}, "metadata.schedule"),
            ({"metadata": [1]}, "metadata"),
            ({"priority": "extreme"}, "priority"),
            ({"name": "a b"}, "name"),
        ],
    )
    def test_refuses_what_cannot_be(self, desk: Desk, wrong: Any, field: str) -> None:
        with pytest.raises(PayloadError) as caught:
            desk.make(**wrong)
        assert list(caught.value.errors) == [field]
        assert desk.schedules() == []
        assert desk.trail() == []


def test_several_who_make_one_at_the_same_moment_make_one(desk: Desk) -> None:
    barrier = threading.Barrier(4)
    failed: list[Exception] = []

    def make() -> None:
        other = Desk(desk.store)
        other.client.read(schedules.list_schedules)
        barrier.wait()
        try:
            other.make()
        except Exception as exc:
            failed.append(exc)
        other.client.close()

    threads = [threading.Thread(target=make) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert failed == []
    assert [each["name"] for each in desk.schedules()] == ["nightly"]


USER = {"queue_name": "user-events", "message_type": "user.registered"}
PERSON = {"user_id": "1", "email": "a@b.example", "first_name": "A", "last_name": "B"}


class TestContracts:
    def test_what_breaks_one_is_refused(self, desk: Desk) -> None:
        with pytest.raises(ContractError) as caught:
            desk.make(**USER, payload={"user_id": "1"})
        assert "payload.email" in caught.value.errors

    def test_what_breaks_one_later_is_shown_and_the_schedule_goes_on(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk.make(**USER, payload=PERSON)
        at = desk.be_due()

        def refuse(*_: Any) -> None:
            raise ContractError({"payload.email": "is out of fashion"})

        monkeypatch.setattr(contracts, "check", refuse)
        assert desk.carry_on() == 0

        shown = desk.schedule("nightly")
        assert shown["error"] == "payload.email: is out of fashion"
        assert shown["errorAt"] is not None
        assert (shown["lastAt"], desk.dispatched()) == (None, [])
        assert shown["nextAt"] > iso(at)
        with pytest.raises(ContractError):
            desk.run("ada", "nightly")
        monkeypatch.undo()
        desk.be_due()
        desk.carry_on()
        shown = desk.schedule("nightly")
        assert (shown["error"], shown["errorAt"], len(desk.dispatched())) == (None, None, 1)


def test_what_the_database_refuses_is_shown_and_the_schedule_goes_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.make()
    desk.make("other")
    at = desk.be_due()
    append = log.append

    def refuse(tx: Any, envelopes: Any, *args: Any, **options: Any) -> Any:
        if envelopes[0].metadata["schedule"]["name"] == "nightly":
            raise DataError("INSERT …", None, ValueError("too odd" * 1000))
        return append(tx, envelopes, *args, **options)

    monkeypatch.setattr(log, "append", refuse)
    assert desk.carry_on() == 0
    desk.be_due("other")
    assert desk.carry_on() == 0
    assert desk.carry_on() > 0

    shown, other = desk.schedules()
    assert "too odd" in shown["error"]
    assert len(shown["error"]) <= 1000
    assert (shown["lastAt"], other["error"]) == (None, None)
    assert shown["nextAt"] > iso(at)
    assert len(desk.dispatched()) == 1


def test_a_zone_that_is_gone_is_shown_and_stops_that_schedule_alone(desk: Desk) -> None:
    desk.make()
    desk.make("other")
    desk.store.do(
        lambda tx: tx.connection.execute(
            update(table).where(table.c.name == "nightly").values(time_zone="Old/Land")
        )
    )
    desk.be_due()
    desk.be_due("other")

    desk.carry_on()

    shown, other = desk.schedules()
    assert shown["error"] == "timeZone: must be a time zone such as Europe/Berlin"
    assert (shown["nextAt"], shown["sentence"]) == (None, shown["error"])
    assert (other["error"], len(desk.dispatched())) == (None, 1)
    # made anew it goes on
    assert desk.make()["nextAt"] is not None


def test_runs_now_beside_its_occurrences(desk: Desk) -> None:
    made = desk.make()
    desk.pause("ada", "nightly")

    message_id = desk.run("bob", "nightly")

    shown = desk.schedule("nightly")
    assert (shown["lastMessageId"], shown["nextAt"], shown["enabled"]) == (message_id, None, False)
    assert desk.dispatched() == [shown["lastAt"]]
    assert desk.resume("ada", "nightly")["nextAt"] == made["nextAt"]
