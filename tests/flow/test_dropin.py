"""One service, written for plain nameko: it does the same with ours, by another import."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nameko.events
import pytest
from kombu import Exchange, Queue
from nameko.constants import MAX_WORKERS_CONFIG_KEY
from nameko.containers import ServiceContainer
from nameko.testing.services import entrypoint_hook
from nameko.testing.utils import get_extension
from nameko.utils import get_redacted_args

import shared.events
from shared.database import database_url, make_reader
from shared.settings import load_settings
from shared.store import stats
from shared.testing.servers import RabbitMQServer
from tests.flow.plainly import Vhost, as_if_moved, as_it_is
from tests.support.processes import Effects
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

KINDS = {
    "nameko": (as_it_is, {}),
    "with-log": (as_if_moved, {}),
    "without-log": (as_if_moved, {"QUEUE_LOG": "off"}),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vhost(rabbitmq_server: RabbitMQServer) -> Vhost:
    return Vhost(rabbitmq_server)


@pytest.fixture
def app(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Given the services, by one of the imports, and an environment that says how."""
    make, env = KINDS[kind]
    own = {"QUEUE_PROVIDER": "rabbitmq", "QUEUE_DATA_DIR": str(tmp_path / "var"), **env}
    for name, value in {**own, "EFFECTS": str(tmp_path / "effects")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("QUEUE_RETRY_BASE_SECONDS", "0.05")
    return make("plain")


@pytest.fixture
def effects(tmp_path: Path) -> Effects:
    return Effects(tmp_path / "effects")


@pytest.fixture
def start(vhost: Vhost) -> Iterator[Callable[[type], ServiceContainer]]:
    started: list[ServiceContainer] = []

    def start(service: type, **config: Any) -> ServiceContainer:
        container = ServiceContainer(service, {"AMQP_URI": vhost.uri, **config})
        started.append(container)
        container.start()
        return container

    yield start
    for container in started:
        container.stop()


def call(container: ServiceContainer, method: str, *args: Any, **context: Any) -> Any:
    with entrypoint_hook(container, method, context_data=context) as hook:
        return hook(*args)


BROKEN = "evt-shop-item.broken--warehouse.mend"


def is_settled(vhost: Vhost, queue: str) -> bool:
    """Say whether a queue has nothing left, and nothing that waits to come back to it."""
    counts = {name: x["messages"] for name, x in vhost.queues("messages").items()}
    return not any(n for name, n in counts.items() if name == queue or ".delay." in name)


def is_ours(kind: str) -> bool:
    return kind != "nameko"


class TestNames:
    def test_are_namekos_own_objects(self) -> None:
        for name in ("BROADCAST", "SERVICE_POOL", "SINGLETON"):
            assert getattr(shared.events, name) is getattr(nameko.events, name)

    def test_are_subclasses(self) -> None:
        for name in ("EventDispatcher", "EventHandler"):
            assert issubclass(getattr(shared.events, name), getattr(nameko.events, name))


class TestBroker:
    def test_a_dispatcher_declares_its_exchange_alone(
        self, app: ModuleType, start: Any, vhost: Vhost
    ) -> None:
        shop = start(app.Shop)

        call(shop, "sell", "item.sold", {"item": "tea"})

        wait_until(vhost.exchanges, 10, "the exchange")
        assert {name: (x["type"], x["durable"]) for name, x in vhost.exchanges().items()} == {
            "shop.events": ("topic", True)
        }
        assert vhost.queues() == {}

    def test_handlers_have_the_queues_of_nameko(
        self, app: ModuleType, start: Any, vhost: Vhost, kind: str
    ) -> None:
        start(app.Warehouse)

        found = vhost.queues()
        flags = {
            name: (x["durable"], x["auto_delete"], x["exclusive"])
            for name, x in found.items()
            if name.startswith("evt-") and not name.endswith(".dead")
        }
        [opened] = [name for name in flags if name.startswith("evt-shop-shop.opened--")]
        own = opened.removeprefix("evt-shop-shop.opened--warehouse.open-")
        assert len(own) == 32
        lasting, loose = (True, False, False), (True, True, False)
        assert flags == {
            "evt-shop-item.sold--warehouse.pack": lasting,
            "evt-shop-item.counted": lasting,
            # RabbitMQ lets none last that belongs to a connection
            opened: (False, True, True),
            "evt-shop-item.seen--warehouse.look": loose,
            "evt-shop-shop.closed--warehouse.close-host-1": lasting,
            "evt-shop-item.broken--warehouse.mend": lasting,
            "evt-shop-item.spilt--warehouse.wipe": lasting,
            "evt-shop-item.dropped--warehouse.pick_up": lasting,
            "evt-shop-item.returned--warehouse.take_back": lasting,
            "evt-shop-item.lost--warehouse.look_for": lasting,
            "evt-warehouse-search.begun--warehouse.search": lasting,
        }
        bound = vhost.bindings("evt-shop-item.sold--warehouse.pack")
        assert ("shop.events", "item.sold") in bound
        assert {source for source, _ in bound} - {"nameko.due.queues"} == {"shop.events"}
        if not is_ours(kind):
            assert found.keys() == flags.keys()


class TestHandlers:
    def test_of_a_pool_share_events(self, app: ModuleType, start: Any, effects: Effects) -> None:
        one = start(app.Warehouse, **{MAX_WORKERS_CONFIG_KEY: 1})
        two = start(app.Warehouse, **{MAX_WORKERS_CONFIG_KEY: 1})
        shop = start(app.Shop)

        for n in range(30):
            call(shop, "sell", "item.sold", {"n": n})

        done = effects.wait_for(30, handler="pack")
        assert sorted(each["payload"]["n"] for each in done) == list(range(30))
        assert {each["instance"] for each in done} <= {id(one), id(two)}

    def test_singletons_share_events_across_services(
        self, app: ModuleType, start: Any, effects: Effects
    ) -> None:
        start(app.Warehouse)
        start(app.Office)
        shop = start(app.Shop)

        for n in range(10):
            call(shop, "sell", "item.counted", {"n": n})

        done = effects.wait_for(10, handler="count")
        assert sorted(each["payload"]["n"] for each in done) == list(range(10))

    def test_of_broadcasts_all_get_them(
        self, app: ModuleType, start: Any, effects: Effects
    ) -> None:
        instances = {id(start(app.Warehouse)), id(start(app.Warehouse))}
        shop = start(app.Shop)

        call(shop, "sell", "shop.opened", {"at": 8})

        done = effects.wait_for(2, handler="open")
        assert {each["instance"] for each in done} == instances

    def test_that_are_unreliable_get_nothing_that_came_before(
        self, app: ModuleType, start: Any, effects: Effects, vhost: Vhost
    ) -> None:
        shop = start(app.Shop)
        first = start(app.Warehouse)
        call(shop, "sell", "item.seen", {"n": 1})
        effects.wait_for(1, handler="look")
        first.stop()
        wait_until(
            lambda: "evt-shop-item.seen--warehouse.look" not in vhost.queues(), 20, "its end"
        )
        call(shop, "sell", "item.seen", {"n": 2})
        call(shop, "sell", "item.sold", {"n": 3})

        start(app.Warehouse)
        call(shop, "sell", "item.seen", {"n": 4})

        effects.wait_for(1, handler="pack")
        effects.wait_for(2, handler="look")
        assert [x["payload"]["n"] for x in effects.all(handler="look")] == [1, 4]

    def test_are_given_again_what_is_to_be_requeued(
        self, app: ModuleType, start: Any, effects: Effects, tmp_path: Path
    ) -> None:
        start(app.Warehouse)
        shop = start(app.Shop)

        call(shop, "sell", "item.dropped", {"until": str(tmp_path / "picked-up")})

        first, second = effects.wait_for(2, handler="pick_up")
        assert first["payload"] == second["payload"]

    def test_may_look_at_results_in_a_class_of_their_own(
        self, app: ModuleType, start: Any, effects: Effects, vhost: Vhost
    ) -> None:
        start(app.Warehouse)
        shop = start(app.Shop)

        call(shop, "sell", "shop.closed", {"at": 18})
        call(shop, "sell", "item.broken", {"n": 1})
        call(shop, "sell", "item.broken", {"n": 2})

        effects.wait_for(3, handler="result")
        for queue in ("evt-shop-shop.closed--warehouse.close-host-1", BROKEN):
            wait_until(lambda queue=queue: is_settled(vhost, queue), 10, f"{queue} to be settled")
        results = [(x["method"], x["result"], x["raised"]) for x in effects.all(handler="result")]
        assert sorted(results, key=str) == [
            ("close", "closed", None),
            ("mend", None, "ExpectedError"),
            ("mend", None, "ExpectedError"),
        ]

    def test_may_settle_in_a_class_of_their_own(
        self, app: ModuleType, start: Any, effects: Effects, vhost: Vhost
    ) -> None:
        start(app.Warehouse)
        shop = start(app.Shop)

        call(shop, "sell", "item.spilt", {"n": 1})

        effects.wait_for(2, handler="wipe")
        queue = "evt-shop-item.spilt--warehouse.wipe"
        wait_until(lambda: is_settled(vhost, queue), 10, "it to be settled")
        assert len(effects.all(handler="wipe")) == 2

    def test_log_what_they_expect_as_a_warning(
        self,
        app: ModuleType,
        start: Any,
        effects: Effects,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("QUEUE_MAX_RETRIES", "0")
        start(app.Warehouse)
        shop = start(app.Shop)

        with caplog.at_level(logging.WARNING, "nameko.containers"):
            call(shop, "sell", "item.returned", {"card": "4111"})
            wait_until(lambda: "not wanted" in caplog.text, 10, lambda: caplog.text)

        [said] = [x for x in caplog.records if x.name == "nameko.containers"]
        assert said.levelno == logging.WARNING

    def test_hide_what_is_sensitive(self, app: ModuleType, start: Any) -> None:
        container = start(app.Warehouse)
        handler = get_extension(container, shared.events.EventHandler, method_name="take_back")
        handler = handler or get_extension(
            container, nameko.events.EventHandler, method_name="take_back"
        )
        shown = get_redacted_args(handler, {"card": "4111", "item": "tea"})
        assert shown == {"payload": {"card": "********", "item": "tea"}}

    def test_know_the_context_of_who_dispatched(
        self, app: ModuleType, start: Any, effects: Effects
    ) -> None:
        start(app.Warehouse)
        shop = start(app.Shop)

        sold = call(shop, "sell", "item.lost", {"n": 1}, language="ta", call_id_stack=["web.1"])

        [lost] = effects.wait_for(1, handler="look_for")
        [begun] = effects.wait_for(1, handler="search")
        assert lost["language"] == begun["language"] == "ta"
        assert lost["stack"][:2] == ["web.1", sold]
        assert begun["stack"][:-1] == lost["stack"]
        assert [each.rpartition(".")[0] for each in begun["stack"][1:]] == [
            "shop.sell",
            "warehouse.look_for",
            "warehouse.search",
        ]


class TestDispatcher:
    def test_takes_the_options_of_namekos_publisher(
        self, app: ModuleType, start: Any, effects: Effects
    ) -> None:
        start(app.Warehouse)
        shop = start(app.Shop)

        call(shop, "sell_surely", "item.sold", {"item": "tea"})

        [packed] = effects.wait_for(1, handler="pack")
        assert packed["payload"] == {"item": "tea"}

    def test_has_namekos_publisher_for_what_is_no_event(
        self, app: ModuleType, start: Any, vhost: Vhost, effects: Effects
    ) -> None:
        start(app.Warehouse)
        shop = start(app.Shop)
        dispatcher = next(x for x in shop.extensions if getattr(x, "attr_name", "") == "dispatch")
        audit = Queue("audit", Exchange("audits", type="direct"), routing_key="audit")

        dispatcher.publisher.publish(
            {"n": 1}, exchange=audit.exchange, routing_key="audit", declare=[audit]
        )
        dispatcher.publisher.publish(
            {"n": 2}, routing_key="item.sold", extra_headers={"nameko.language": "ta"}
        )

        wait_until(lambda: vhost.count("audit") == 1, 10, "what was published")
        [packed] = effects.wait_for(1, handler="pack")
        assert packed["payload"] == {"n": 2}


class TestLog:
    @pytest.fixture(params=["sqlite", "mariadb"])
    def log(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Any:
        """Given a message log by the environment alone."""
        env = {"QUEUE_DATA_DIR": str(tmp_path / "var")}
        if request.param == "mariadb":
            env |= request.getfixturevalue("mariadb_log")
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return make_reader(database_url(load_settings(env)), lambda _: None)

    @pytest.mark.parametrize("kind", ["with-log"], indirect=True)
    def test_has_what_was_dispatched(
        self, app: ModuleType, log: Any, start: Any, effects: Effects
    ) -> None:
        start(app.Warehouse)
        shop = start(app.Shop)

        for n in range(3):
            call(shop, "sell", "item.sold", {"n": n})

        effects.wait_for(3, handler="pack")

        def completed() -> Any:
            with log.connect() as connection:
                return (stats.queue_stats(connection, "shop") or {}).get("completed")

        wait_until(lambda: completed() == 3, 10, lambda: str(completed()))
        log.dispose()

    @pytest.mark.parametrize("kind", ["without-log"], indirect=True)
    def test_is_not_there_where_it_is_off(
        self, app: ModuleType, start: Any, effects: Effects, tmp_path: Path
    ) -> None:
        start(app.Warehouse)
        call(start(app.Shop), "sell", "item.sold", {"n": 1})
        effects.wait_for(1, handler="pack")
        assert list(tmp_path.glob("var/*.db")) == []
