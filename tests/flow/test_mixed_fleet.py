"""Processes on plain nameko beside processes on ours, by one RabbitMQ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

import amqp
import pytest
from nameko.containers import ServiceContainer
from nameko.standalone.rpc import ServiceRpcProxy
from nameko.testing.services import dummy, entrypoint_hook

from shared.database import database_url, make_reader
from shared.events import EventDispatcher
from shared.store import stats
from shared.testing.servers import RabbitMQServer
from tests.flow.conftest import Flow
from tests.flow.plainly import Vhost
from tests.support.processes import NamekoProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

COMPANY = "tests.flow.apps.newcomer"
PLAIN = "tests.flow.apps.plain_users"
QUEUE = "evt-auth_events-user.registered--company.handle_user_registered"
NOTES = "evt-source-thing.happened--greeter.note"
LONGEST_ABSENCE = 30
"""Seconds between two attempts of a plain nameko to connect again: kombu tries after 2, 4, 6 ...,
so that it depends on when the broker is back how much of them is left."""

ADA = {"user_id": "1", "email": "ada@example.com", "first_name": "Ada", "last_name": "Lovelace"}

RunPlain = Callable[[], NamekoProcess]


@pytest.fixture
def vhost(rabbitmq_server: RabbitMQServer) -> Vhost:
    return Vhost(rabbitmq_server)


@pytest.fixture
def fleet(vhost: Vhost, flow_on: Callable[..., Flow]) -> Flow:
    """Given a flow whose broker plain processes use as well."""
    return flow_on({"QUEUE_PROVIDER": "rabbitmq", **vhost.environment})


@pytest.fixture
def run_plain(fleet: Flow, vhost: Vhost) -> RunPlain:
    return lambda: plain_process(fleet, vhost)


def plain_process(fleet: Flow, vhost: Vhost) -> NamekoProcess:
    """Start the plain services, configured as theirs are: by AMQP_URI alone."""
    config = fleet.folder / "plain.yml"
    config.write_text(f'AMQP_URI: "{vhost.uri}"\n')
    process = fleet.run(PLAIN, arguments=("--config", str(config)), wait=False)
    wait_until(lambda: all(map(vhost.is_consumed, (NOTES, "rpc-auth_events"))), 20, process.output)
    return process


@pytest.fixture
def register(vhost: Vhost) -> Iterator[Callable[..., None]]:
    """A function that has the plain ``auth_events`` dispatch."""
    with ServiceRpcProxy("auth_events", {"AMQP_URI": vhost.uri}, timeout=20) as service:
        yield lambda *payloads: service.register(list(payloads))


def company_stats(fleet: Flow) -> dict[str, Any]:
    reader = make_reader(database_url(fleet.settings), lambda _: None)
    with reader.connect() as connection:
        found = stats.queue_stats(connection, "user-events") or {}
    reader.dispose()
    return found


def wait_for_stats(fleet: Flow, **wanted: int) -> None:
    def is_so() -> bool:
        stats = company_stats(fleet)
        return all(stats.get(name) == count for name, count in wanted.items())

    wait_until(is_so, 20, lambda: str(company_stats(fleet)))


class TestPlainDispatchers:
    def test_are_heard_and_their_events_adopted(
        self, fleet: Flow, run_plain: RunPlain, register: Any
    ) -> None:
        fleet.run(COMPANY)
        run_plain()
        unversioned = {**ADA, "user_id": "2", "shoe_size": 38, "tags": ["first"]}

        register(ADA, unversioned)

        done = fleet.effects.wait_for(2, handler="company-done")
        assert sorted((x["payload"] for x in done), key=str) == sorted([ADA, unversioned], key=str)
        wait_for_stats(fleet, completed=2, total=2)
        message = fleet.message(done[0]["id"])
        assert (message["queueName"], message["status"]) == ("user-events", "completed")
        # whoever stayed with plain nameko has them as well
        greeted = fleet.effects.wait_for(2, handler="greet")
        assert {x["payload"]["user_id"] for x in greeted} == {"1", "2"}

    def test_get_retries_and_dead_letters_from_ours(
        self, fleet: Flow, run_plain: RunPlain, register: Any, vhost: Vhost
    ) -> None:
        fleet.run(COMPANY)
        run_plain()

        register({**ADA, "fail": 1}, {**ADA, "fail": 9})

        [done] = fleet.effects.wait_for(1, handler="company-done")
        wait_for_stats(fleet, completed=1, failed=1)
        assert fleet.message(done["id"])["retryCount"] == 1
        [dead] = {x["id"] for x in fleet.effects.all(handler="company")} - {done["id"]}
        message = fleet.message(dead)
        assert message["payload"] == {**ADA, "fail": 9}
        assert message["deliveries"][0]["errorType"] == "ValueError"
        assert len(fleet.effects.all(handler="company", id=dead)) == 3
        wait_until(lambda: vhost.count(f"{QUEUE}.dead") == 1, 10, "the dead letter")

    def test_that_break_the_contract_fill_the_dead_letters(
        self, fleet: Flow, run_plain: RunPlain, register: Any
    ) -> None:
        fleet.run(COMPANY)
        run_plain()

        register({"user_id": "1"})

        wait_for_stats(fleet, failed=1, total=1)
        assert fleet.effects.all(handler="company") == []

    def test_may_send_headers_that_no_log_can_hold(self, fleet: Flow, vhost: Vhost) -> None:
        fleet.run(COMPANY)
        headers = {
            "nameko.since": datetime(2024, 5, 6, 7, 8, 9),
            "nameko.price": Decimal("1.20"),
            "nameko.language": "ta",
            "x-request-id": "r-1",
        }

        with vhost.channel() as channel:
            event = amqp.Message(
                json.dumps(ADA), content_type="application/json", application_headers=headers
            )
            channel.basic_publish(event, "auth_events.events", "user.registered")

        [done] = fleet.effects.wait_for(1, handler="company-done")
        kept = fleet.message(done["id"])["metadata"]["nameko"]["context"]
        # nameko hands on whatever header there is
        assert kept == {"language": "ta", "x-request-id": "r-1"}

    def test_lose_nothing_when_a_worker_is_killed(
        self, fleet: Flow, run_plain: RunPlain, register: Any
    ) -> None:
        victim = fleet.run(COMPANY)
        run_plain()
        register({**ADA, "sleep": 3})
        fleet.effects.wait_for(1, handler="company")
        other = fleet.run(COMPANY)

        victim.kill()

        [done] = fleet.effects.wait_for(1, handler="company-done")
        assert done["pid"] == other.pid
        wait_for_stats(fleet, completed=1, total=1)
        begun = fleet.effects.all(handler="company")
        assert [x["pid"] for x in begun] == [victim.pid, other.pid]
        assert len({x["id"] for x in begun}) == 1


class Source:
    """Nothing of it needs the log."""

    name = "source"

    dispatch = EventDispatcher()

    @dummy
    def send(self, *args: Any, **options: Any) -> None:
        self.dispatch(*args, **options)


class TestOurDispatchers:
    @pytest.fixture(params=["on", "off"])
    def send(self, request: pytest.FixtureRequest, fleet: Flow) -> Iterator[Callable[..., None]]:
        """A function that dispatches, with the log and without."""
        container = ServiceContainer(Source, {**fleet.env, "QUEUE_LOG": request.param})
        container.start()

        def send(*args: Any, **options: Any) -> None:
            with entrypoint_hook(container, "send") as hook:
                hook(*args, **options)

        yield send
        container.stop()

    def test_are_heard_by_plain_handlers(
        self, fleet: Flow, run_plain: RunPlain, send: Callable[..., None]
    ) -> None:
        run_plain()
        payloads = [ADA, ["a", 1, None], "text"]

        for payload in payloads:
            send("thing.happened", payload)

        noted = fleet.effects.wait_for(3, handler="note")
        assert sorted(str(x["payload"]) for x in noted) == sorted(map(str, payloads))
        for each in noted:
            ours, its = each["stack"]
            assert (ours.rpartition(".")[0], its.rpartition(".")[0]) == (
                "source.send",
                "greeter.note",
            )

    def test_are_heard_later_when_they_say_so(
        self, fleet: Flow, run_plain: RunPlain, send: Callable[..., None]
    ) -> None:
        run_plain()

        send("thing.happened", {"n": 1}, delay=1)
        send("thing.happened", {"n": 2}, priority="urgent")

        noted = fleet.effects.wait_for(2, handler="note")
        assert [x["payload"]["n"] for x in noted] == [2, 1]
        assert len(noted[1]["stack"]) == 2


def test_what_is_dispatched_while_the_broker_is_down_reaches_plain_handlers(
    fleet: Flow, run_plain: RunPlain, vhost: Vhost, rabbitmq_server: RabbitMQServer
) -> None:
    run_plain()
    fleet.send("thing.happened", {"n": 0})
    fleet.effects.wait_for(1, handler="note")
    wait_until(lambda: fleet.stats()["completed"] == 1, 10, lambda: str(fleet.stats()))
    wait_until(lambda: not vhost.queues("messages")[NOTES]["messages"], 10, "what was first")

    rabbitmq_server.stop()
    try:
        for n in range(1, 21):
            fleet.send("thing.happened", {"n": n})
    finally:
        rabbitmq_server.start()

    fleet.effects.wait_for(21, handler="note", timeout=LONGEST_ABSENCE + 20)
    noted = [x["payload"]["n"] for x in fleet.effects.all(handler="note")]
    assert sorted(noted) == list(range(21))
    wait_until(lambda: fleet.stats()["completed"] == 21, 20, lambda: str(fleet.stats()))
