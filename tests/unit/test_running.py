"""Services that run by the virtual clock, as tests of services run them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import eventlet
import pytest
from eventlet.green import socket
from nameko.rpc import rpc
from nameko.timer import timer
from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared.database import utc_now
from shared.errors import MessageNotFoundError
from shared.events import Backoff, EventDispatcher, EventHandler, MessageContext, event_handler
from shared.store import DatabaseSession
from shared.store.outbox import outbox_table
from shared.testing.running import RunningService
from shared.testing.virtual import VirtualClock

Run = Callable[..., RunningService]

HOUR = 3600


class Base(DeclarativeBase):
    """The tables of the shop, which has no migrations."""


outbox_table(Base.metadata, "shop")


class Sale(Base):
    __tablename__ = "shop_sales"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
    made_at: Mapped[str] = mapped_column(server_default=func.now())


class Shop:
    name = "shop"

    db = DatabaseSession(Base)
    dispatch = EventDispatcher()
    message = MessageContext()

    @event_handler("till", "refused", backoff=Backoff(base=60, cap=100))
    def refuse(self, payload: Any) -> None:
        raise RuntimeError("refused")

    @event_handler("till", "looked_at", timeout=60, max_retries=0)
    def look(self, payload: Any) -> None:
        eventlet.sleep(payload)

    @event_handler("till", "sold")
    def sell(self, payload: Any) -> None:
        self.db.add(Sale(item=payload["item"]))
        self.db.flush()
        # whoever else wants to write waits for this one's lock meanwhile
        self.dispatch("item.seen", payload)
        self.dispatch("item.sold", payload, session=self.db, priority="high")
        self.db.commit()

    @timer(interval=HOUR)
    def count(self) -> None:
        self.dispatch("hour", self.db.scalar(select(func.count(Sale.id))))

    @rpc
    def wait(self, seconds: float) -> str:
        time.sleep(seconds)
        return self.name

    @rpc
    def fail(self) -> None:
        raise LookupError("nothing there")


class Warehouse:
    name = "warehouse"

    dispatch = EventDispatcher()
    packer = MessageContext()  # the tests inject something else

    @event_handler("shop", "item.sold", batch_size=3, batch_timeout=5)
    def pack(self, payloads: list[Any]) -> None:
        self.packer(payloads)

    @event_handler("shop", "item.seen", reliable_delivery=False)
    def see(self, payload: Any) -> None:
        pass


@pytest.fixture
def shop(run_service: Run) -> RunningService:
    return run_service(Shop)


def tried(service: RunningService) -> list[tuple[float, str]]:
    return [(attempt.at, attempt.outcome) for attempt in service.attempts]


class TestRetries:
    def test_come_at_their_time_and_end_as_a_dead_letter(self, shop: RunningService) -> None:
        message_id = shop.dispatch("till", "refused", {"n": 1})
        assert tried(shop) == [(0, "retry")]
        shop.clock.advance(59.999)
        assert len(shop.attempts) == 1
        shop.clock.advance(HOUR)
        assert tried(shop) == [(0, "retry"), (60, "retry"), (160, "retry"), (260, "failed")]
        assert [each.retry_in for each in shop.attempts] == [60, 100, 100, None]
        (dead,) = shop.dead_letters
        assert (dead.message_id, dead.type, dead.payload) == (message_id, "refused", {"n": 1})
        assert (dead.subscriber, dead.attempts) == ("shop.refuse", 4)
        assert (dead.error_type, dead.error) == ("RuntimeError", "refused")
        assert 'raise RuntimeError("refused")' in dead.traceback

    def test_survive_a_restart(self, run_service: Run, shop: RunningService) -> None:
        shop.dispatch("till", "refused", {})
        shop.stop()
        again = run_service(Shop)
        assert tried(again) == [(0, "retry")]
        again.clock.advance(60)
        assert tried(again) == [(0, "retry"), (60, "retry")]

    def test_of_several_come_in_order(self, shop: RunningService) -> None:
        ids = []
        for _ in range(3):
            ids.append(shop.dispatch("till", "refused", {}, max_retries=1))
            shop.clock.advance(7)
        shop.clock.advance(HOUR)
        second = [each for each in shop.attempts if each.number == 2]
        assert [(each.message_id, each.at) for each in second] == list(
            zip(ids, (60, 67, 74), strict=True)
        )


class TestTime:
    def test_of_handlers_runs_out(self, shop: RunningService) -> None:
        shop.dispatch("till", "looked_at", 100)
        shop.clock.advance(59)
        assert shop.attempts == []
        shop.clock.advance(1)
        (attempt,) = shop.attempts
        assert attempt.error_type == "HandlerTimeoutError"

    def test_of_leases_is_renewed_while_a_handler_waits(self, run_service: Run) -> None:
        # the rival is woken first
        rival, shop = run_service(Shop), run_service(Shop)
        shop.dispatch("till", "looked_at", 55)
        shop.clock.advance(HOUR)
        assert tried(shop) == [(0, "completed")]
        assert tried(rival) == tried(shop)

    def test_of_delays_and_schedules_passes(self, shop: RunningService) -> None:
        later = shop.clock.now + timedelta(days=1)
        shop.dispatch("till", "looked_at", 1, scheduled_at=later)
        shop.dispatch("till", "looked_at", 1, delay=90)
        assert shop.attempts == []
        shop.clock.advance(24 * HOUR + 1)
        assert tried(shop) == [(90, "completed"), (24 * HOUR, "completed")]

    def test_of_timers_passes_while_a_handler_waits(self, shop: RunningService) -> None:
        shop.dispatch("till", "sold", {"item": "tea"})
        shop.clock.advance(2 * HOUR)
        hours = [each for each in shop.dispatched if each.type == "hour"]
        assert [each.payload for each in hours] == [1, 1]
        start = shop.clock.now.replace(tzinfo=None) - timedelta(hours=2)
        passed = [each.created_at - start for each in hours if each.created_at]
        assert passed == [timedelta(hours=1), timedelta(hours=2)]

    def test_is_what_sqlite_fills_in(self, shop: RunningService) -> None:
        shop.clock.advance(3 * 24 * HOUR)
        shop.dispatch("till", "sold", {"item": "tea"})
        with shop.session() as db:
            assert db.scalar(select(Sale.made_at)) == shop.clock.now.strftime("%Y-%m-%d %H:%M:%S")
            assert utc_now(db.connection()) == shop.clock.now.replace(tzinfo=None)

    def test_stands_still_by_itself(self, shop: RunningService) -> None:
        before = shop.clock.now, shop.clock.seconds
        time.sleep(0.05)  # nor does the test's own sleep last for ever
        assert (shop.clock.now, shop.clock.seconds) == before

    def test_passes_faster_than_it_is_waited_for(self, shop: RunningService) -> None:
        shop.dispatch("till", "refused", {})
        start = time.monotonic()
        shop.clock.advance(HOUR)
        assert shop.dead_letters
        assert time.monotonic() - start < 10


class TestEvents:
    def test_are_dispatched_with_and_without_an_outbox(self, shop: RunningService) -> None:
        shop.dispatch("till", "sold", {"item": "tea"})
        assert sorted((x.type, x.payload["item"], str(x.priority)) for x in shop.dispatched) == [
            ("item.seen", "tea", "normal"),
            ("item.sold", "tea", "high"),
        ]

    def test_are_handled_when_handlers_wait_for_one_lock(self, shop: RunningService) -> None:
        for _ in range(5):
            shop.dispatch("till", "sold", {"item": "tea"}, delay=60)
        shop.clock.advance(60)
        assert tried(shop) == [(60, "completed")] * 5
        assert shop.clock.seconds == 60

    def test_go_from_one_service_to_another(self, run_service: Run, shop: RunningService) -> None:
        packed: list[Any] = []
        warehouse = run_service(Warehouse, dependencies={"packer": packed.append})
        for item in "abcd":
            shop.dispatch("till", "sold", {"item": item})
        assert packed == [[{"item": "a"}, {"item": "b"}, {"item": "c"}]]
        shop.clock.advance(5)
        assert packed[1:] == [[{"item": "d"}]]
        assert {each.subscriber for each in warehouse.attempts} >= {"warehouse.pack"}
        assert {each.subscriber for each in shop.attempts} == {"shop.sell"}

    def test_reach_unreliable_handlers_after_a_long_time(
        self, run_service: Run, shop: RunningService
    ) -> None:
        warehouse = run_service(Warehouse)
        shop.clock.advance(HOUR)
        shop.dispatch("till", "sold", {"item": "tea"})
        assert "warehouse.see" in {each.subscriber for each in warehouse.attempts}

    def test_can_be_looked_at(self, shop: RunningService) -> None:
        message_id = shop.dispatch("till", "looked_at", 0)
        assert shop.message(message_id)["status"] == "completed"
        with pytest.raises(MessageNotFoundError):
            shop.message("none")


class TestCalls:
    def test_return_what_the_method_does(self, shop: RunningService) -> None:
        assert shop.call("wait", 0) == "shop"
        assert shop.clock.seconds == 0

    def test_let_the_time_pass_that_the_method_waits(self, shop: RunningService) -> None:
        assert shop.call("wait", 120) == "shop"
        assert shop.clock.seconds == pytest.approx(120, abs=0.1)

    def test_raise_what_the_method_does(self, shop: RunningService) -> None:
        with pytest.raises(LookupError, match="nothing there"):
            shop.call("fail")


class TestServices:
    def test_take_nothing_from_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
    ) -> None:
        monkeypatch.setenv("DB_HOST", "db.invalid")
        monkeypatch.setenv("QUEUE_PROVIDER", "redis")
        shop = request.getfixturevalue("run_service")(Shop)
        shop.dispatch("till", "looked_at", 0)
        assert tried(shop) == [(0, "completed")]

    def test_are_waited_for_where_they_wait_for_a_server(self, run_service: Run) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def pack(payloads: list[Any]) -> None:
                with socket.create_connection(listener.getsockname()) as connection:
                    answers.append(connection.recv(10))

            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    os_sleep(0.05)
                    connection.sendall(b"packed")

            answers: list[bytes] = []
            warehouse = run_service(Warehouse, dependencies={"packer": pack})
            eventlet.spawn(serve)
            for _ in range(3):
                warehouse.dispatch("shop", "item.sold", {})
        assert answers == [b"packed"]

    def test_that_do_nothing_with_events_are_refused(self, run_service: Run) -> None:
        class Idle:
            name = "idle"

        with pytest.raises(ValueError, match="Idle neither handles events nor dispatches any"):
            run_service(Idle)

    def test_that_crash_say_why(
        self, monkeypatch: pytest.MonkeyPatch, shop: RunningService
    ) -> None:
        monkeypatch.setattr(EventHandler, "handle", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shop.dispatch("till", "looked_at", 0)

    def test_stop_while_a_handler_waits(self, run_service: Run, shop: RunningService) -> None:
        message_id = shop.dispatch("till", "looked_at", 50)
        shop.stop()
        again = run_service(Shop)
        # it was handed back unburnt, and begins anew
        assert [each.outcome for each in again.attempts] == ["released"]
        again.clock.advance(50)
        assert again.message(message_id)["status"] == "completed"


class TestClock:
    def test_gives_the_real_one_its_place_back(self) -> None:
        hub = eventlet.hubs.get_hub()
        before = hub.clock, hub.wait, Backoff.delay
        clock = VirtualClock()
        clock.install()
        assert (hub.clock, hub.wait, Backoff.delay) != before
        clock.uninstall()
        assert (hub.clock, hub.wait, Backoff.delay) == before


class TestPlugin:
    def test_imports_nothing_before_it_is_used(self) -> None:
        code = "import sys, shared.testing.plugin; assert 'eventlet' not in sys.modules"
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


os_sleep = eventlet.patcher.original("time").sleep
