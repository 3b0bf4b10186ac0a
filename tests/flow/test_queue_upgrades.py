"""A queue of plain nameko taken over, declared anew with priorities, and given back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import amqp
import pytest
from click.testing import CliRunner
from nameko.standalone.events import event_dispatcher

from shared.cli import main
from shared.providers.rabbitmq.upgrade import Redeclaration
from shared.testing.servers import RabbitMQServer
from shared.types import Subscription
from tests.flow.conftest import Flow
from tests.flow.plainly import Vhost
from tests.support.processes import ROOT, NamekoProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

PLAIN = "tests.flow.apps.plain_users"
MOVED = "tests.flow.apps.moved_users"
RECORDER = "tests.flow.apps.recorder"
GREETINGS = "evt-auth_events-user.registered--greeter.greet"
NOTES = "evt-source-thing.happened--greeter.note"
FIRST, SECOND = (f"evt-source-thing.happened--recorder.{each}" for each in ("first", "second"))

SECONDS = 30

OURS = {
    "x-max-priority": 3,
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": f"{NOTES}.dead",
}


@pytest.fixture
def vhost(rabbitmq_server: RabbitMQServer) -> Vhost:
    return Vhost(rabbitmq_server)


@pytest.fixture
def fleet(vhost: Vhost, flow_on: Callable[..., Flow]) -> Flow:
    return flow_on({"QUEUE_PROVIDER": "rabbitmq", **vhost.environment})


@pytest.fixture
def run_plain(fleet: Flow, vhost: Vhost) -> Callable[[], NamekoProcess]:
    def run() -> NamekoProcess:
        config = fleet.folder / "plain.yml"
        config.write_text(f'AMQP_URI: "{vhost.uri}"\n')
        process = fleet.run(PLAIN, arguments=("--config", str(config)), wait=False)
        wait_until(lambda: vhost.is_consumed(NOTES), SECONDS, process.output)
        return process

    return run


@pytest.fixture
def queuectl(fleet: Flow) -> Callable[..., subprocess.Popen[str]]:
    def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "queuectl"), "rabbitmq", *arguments],
            cwd=ROOT,
            env={**os.environ, **fleet.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture
def change(fleet: Flow) -> Callable[..., str]:
    """The same command within this process, which need not start one; returns what it printed."""

    def enter(*arguments: str, status: int = 0, **env: str) -> str:
        done = CliRunner().invoke(main, ["rabbitmq", *arguments], env={**fleet.env, **env})
        assert done.exit_code == status, done.output
        return done.output

    return enter


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    """Return what a command printed, once it has ended with that status."""
    said, _ = process.communicate(timeout=90)
    assert process.returncode == status, said
    return said


def rows(said: str) -> list[list[str]]:
    """Return the rows of the table that a command printed."""
    return [line.split(maxsplit=2) for line in said.splitlines()[1:]]


def send_plainly(vhost: Vhost, numbers: Any) -> None:
    dispatch = event_dispatcher({"AMQP_URI": vhost.uri})
    for n in numbers:
        dispatch("source", "thing.happened", {"n": n})


def declare_plainly(
    vhost: Vhost, queue: str, exchange: str = "source.events", key: str = "thing.happened"
) -> None:
    """Declare a queue and bind it, as plain nameko does."""
    with vhost.channel() as channel:
        channel.exchange_declare(exchange, "topic", durable=True, auto_delete=False)
        channel.queue_declare(queue, durable=True, auto_delete=False)
        channel.queue_bind(queue, exchange, key)


def numbers_in(vhost: Vhost, queue: str) -> list[int]:
    """Return what waits in a queue, in its order, and leave it there."""
    found = []
    with vhost.channel() as channel:
        while message := channel.basic_get(queue):
            found.append(int(message.body.rpartition(":")[2].strip("} ")))
    return found


def noted(fleet: Flow) -> list[int]:
    return [each["payload"]["n"] for each in fleet.effects.all(handler="note")]


class TestTakeover:
    def test_of_a_queue_with_what_waits_in_it(
        self, fleet: Flow, run_plain: Any, vhost: Vhost
    ) -> None:
        run_plain().stop()
        send_plainly(vhost, range(50))
        assert vhost.count(NOTES) == 50

        process = fleet.run(MOVED)

        fleet.effects.wait_for(50, handler="note")
        assert sorted(noted(fleet)) == list(range(50))
        assert vhost.queues()[NOTES]["arguments"] == {}
        said = [line for line in process.output().splitlines() if NOTES in line]
        assert len(said) == 1
        assert "without priorities" in said[0]
        assert "queuectl rabbitmq upgrade-queues" in said[0]
        # and it works on
        fleet.send("thing.happened", {"n": 50})
        fleet.effects.wait_for(51, handler="note")


class TestUpgrade:
    @pytest.fixture(autouse=True)
    def plain_queue(self, fleet: Flow, vhost: Vhost) -> None:
        """Given a queue of plain nameko, with events; ours was there, and is in the log."""
        declare_plainly(vhost, NOTES)
        declare_plainly(vhost, GREETINGS, "auth_events.events", "user.registered")
        fleet.run(MOVED).stop()
        send_plainly(vhost, range(120))

    def test_and_back_keep_messages_and_their_order(
        self, fleet: Flow, vhost: Vhost, change: Any, run_plain: Any
    ) -> None:
        before = vhost.bindings(NOTES)

        said = change("upgrade-queues")

        assert rows(said) == [
            [GREETINGS, "0", "upgraded"],
            [NOTES, "120", "upgraded"],
        ]
        assert vhost.queues()[NOTES]["arguments"] == OURS
        assert numbers_in(vhost, NOTES) == list(range(120))
        assert vhost.bindings(NOTES) == before
        assert not [name for name in vhost.queues() if name.endswith((".moving", ".busy"))]
        assert "is upgraded already" in change("upgrade-queues")

        said = change("downgrade-queues")

        assert [NOTES, "120", "downgraded"] in rows(said)
        assert vhost.queues()[NOTES]["arguments"] == {}
        assert numbers_in(vhost, NOTES) == list(range(120))
        assert vhost.bindings(NOTES) == before
        run_plain()
        send_plainly(vhost, [120])
        fleet.effects.wait_for(121, handler="note")
        assert sorted(noted(fleet)) == list(range(121))

    def test_gives_priorities(self, fleet: Flow, vhost: Vhost, change: Any) -> None:
        change("upgrade-queues", "--queue", NOTES)

        fleet.send("thing.happened", {"n": 120}, priority="urgent")

        wait_until(lambda: vhost.count(NOTES) == 121, SECONDS, "the urgent one")
        assert numbers_in(vhost, NOTES) == [120, *range(120)]

    def test_to_quorum_queues_and_back(self, vhost: Vhost, change: Any) -> None:
        before = vhost.bindings(NOTES)
        for queue_type in ("quorum", "classic"):
            change("upgrade-queues", "--queue", NOTES, RABBITMQ_QUEUE_TYPE=queue_type)
            found = vhost.queues("type")[NOTES]
            assert found["type"].removeprefix("rabbit_").removesuffix("_queue") == queue_type
            assert found["arguments"]["x-dead-letter-routing-key"] == f"{NOTES}.dead"

        change("downgrade-queues", "--queue", NOTES)

        assert numbers_in(vhost, NOTES) == list(range(120))
        assert vhost.bindings(NOTES) == before

    def test_is_for_one_at_a_time(self, fleet: Flow, vhost: Vhost, change: Any) -> None:
        with vhost.channel() as channel:
            channel.queue_declare("nameko.redeclaration", exclusive=True)
            said = change("upgrade-queues", status=1)
        assert "another one declares queues anew there" in said
        assert vhost.queues()[NOTES]["arguments"] == {}

    def test_leaves_paused_what_an_operator_paused(
        self, fleet: Flow, vhost: Vhost, change: Any
    ) -> None:
        paused = f"{NOTES}.paused"
        with vhost.channel() as channel:
            channel.queue_declare(paused, durable=True, auto_delete=False)

        change("upgrade-queues")

        assert paused in vhost.queues()
        assert vhost.count(NOTES) == 120

    def test_can_be_looked_at_before(self, vhost: Vhost, change: Any) -> None:
        said = change("upgrade-queues", "--dry-run")

        assert [NOTES, "120", "to be upgraded"] in rows(said)
        assert vhost.queues()[NOTES]["arguments"] == {}
        assert not [name for name in vhost.queues() if name.endswith((".moving", ".busy"))]

    def test_is_refused_while_plain_workers_consume(
        self, fleet: Flow, vhost: Vhost, change: Any, run_plain: Any
    ) -> None:
        plain = run_plain()
        fleet.effects.wait_for(120, handler="note")
        send_plainly(vhost, [120])

        said = change("upgrade-queues", "--queue", NOTES, status=1)

        assert "refused: consumers that are none of ours: 1" in said
        assert vhost.queues()[NOTES]["arguments"] == {}
        fleet.effects.wait_for(121, handler="note")

        said = change("upgrade-queues", "--queue", NOTES, "--force")

        assert [NOTES, "0", "upgraded"] in rows(said)
        assert vhost.queues()[NOTES]["arguments"] == OURS
        # nameko tries again and again to declare what it cannot
        wait_until(lambda: "PRECONDITION_FAILED" in plain.output(), SECONDS, plain.output)
        send_plainly(vhost, [121])
        change("downgrade-queues", "--queue", NOTES)
        fleet.effects.wait_for(122, handler="note")

    def test_of_a_named_queue_needs_no_log(self, vhost: Vhost, change: Any) -> None:
        said = change("upgrade-queues", QUEUE_LOG="off", status=2)
        assert "--queue: must name the queues where QUEUE_LOG is off" in said
        said = change("upgrade-queues", "--queue", "evt-no-such", QUEUE_LOG="off", status=2)
        assert "evt-no-such" in said

        change("upgrade-queues", "--queue", NOTES, QUEUE_LOG="off")

        assert vhost.queues()[NOTES]["arguments"] == OURS

    def test_says_when_the_broker_is_away(self, change: Any) -> None:
        said = change("upgrade-queues", RABBITMQ_PORT="1", status=1)
        assert said.startswith("Error: RabbitMQ at 127.0.0.1:1: ")


class TestHyphens:
    def test_in_names_are_sorted_out_by_the_exchanges(self, vhost: Vhost, change: Any) -> None:
        with vhost.channel() as channel:
            for name in ("my-shop.events", "my.events"):
                channel.exchange_declare(name, "topic", durable=True, auto_delete=False)
            for name in ("evt-my-shop-sold-out--a.b", "evt-shop-x--a.b"):
                channel.queue_declare(name, durable=True, auto_delete=False)

        said = change("upgrade-queues", "--queue", "evt-my-shop-sold-out--a.b", status=2)
        assert "events of which source: my, my-shop?" in said
        said = change("upgrade-queues", "--queue", "evt-shop-x--a.b", status=2)
        assert "no queue of events whose source is known" in said

        arguments = ["--queue", "evt-my-shop-sold-out--a.b", "--source", "my-shop"]
        change("upgrade-queues", *arguments)

        assert ("my-shop.events", "sold-out") in vhost.bindings("evt-my-shop-sold-out--a.b")


class TestChangeover:
    @pytest.mark.parametrize("is_upgrade", [True, False], ids=["upgrade", "downgrade"])
    def test_what_comes_to_both_queues_is_kept_once(
        self, fleet: Flow, vhost: Vhost, monkeypatch: pytest.MonkeyPatch, is_upgrade: bool
    ) -> None:
        """Given an event of ours each time that two queues are bound."""
        subscription = Subscription("source", "source", "thing.happened", "greeter.note")
        declare_plainly(vhost, NOTES)
        if not is_upgrade:
            redeclare(fleet, subscription, is_upgrade=True)
        unbind, sent = Redeclaration._unbind, []

        def publish_and_unbind(self: Redeclaration, *args: Any) -> None:
            sent.append(len(sent))
            publish_as_ours(vhost, sent[-1])
            unbind(self, *args)

        monkeypatch.setattr(Redeclaration, "_unbind", publish_and_unbind)
        redeclare(fleet, subscription, is_upgrade=is_upgrade)

        assert sorted(numbers_in(vhost, NOTES)) == sent == [0, 1]
        # and then all come, each once, and nothing is left of the changeover
        publish_as_ours(vhost, 2)
        assert sorted(numbers_in(vhost, NOTES)) == [0, 1, 2]
        assert not [each for each in vhost.queues() if each.endswith((".arriving", ".moving"))]
        assert f"{NOTES}.arriving" not in vhost.exchanges()


def redeclare(fleet: Flow, subscription: Subscription, *, is_upgrade: bool) -> None:
    redeclaration = Redeclaration(fleet.settings, is_upgrade=is_upgrade)
    assert not redeclaration.do(subscription).is_failure
    redeclaration.close()


def publish_as_ours(vhost: Vhost, number: int) -> None:
    """Publish an event that bears an id, as ours do."""
    headers = {"queue-name": "source"}
    with vhost.channel() as channel:
        channel.confirm_select()
        channel.basic_publish_confirm(
            amqp.Message(
                f'{{"n": {number}}}', message_id=f"m{number}", application_headers=headers
            ),
            "source.events",
            "thing.happened",
        )


class TestOurWorkers:
    @pytest.fixture
    def recorder(self, fleet: Flow, vhost: Vhost) -> NamekoProcess:
        """Given one of ours on a queue that plain nameko declared."""
        declare_plainly(vhost, FIRST)
        return fleet.run(RECORDER)

    def test_go_on_by_themselves_and_lose_nothing(
        self, fleet: Flow, recorder: NamekoProcess, vhost: Vhost, queuectl: Any
    ) -> None:
        other = fleet.run(RECORDER)
        sent = 0

        for command in ("upgrade-queues", "downgrade-queues", "upgrade-queues"):
            # of the others, to which nothing comes, each would take two seconds as well
            process = queuectl(command, "--queue", FIRST, "--queue", SECOND)
            while process.poll() is None:
                fleet.send("thing.happened", {"n": sent})
                sent += 1
            assert "graded" in ended(process)

        def done() -> set[int]:
            return {each["n"] for each in fleet.effects.all(handler="first", what="done")}

        wait_until(lambda: len(done()) == sent, 60, lambda: str(set(range(sent)) - done()))
        wait_until(lambda: fleet.stats()["completed"] == sent, SECONDS, lambda: str(fleet.stats()))
        assert len(fleet.effects.all(handler="first", what="done")) == sent
        assert "x-max-priority" in vhost.queues()[FIRST]["arguments"]
        assert recorder.process.poll() is other.process.poll() is None
        # dead letters have their place now
        message_id = fleet.send("thing.happened", {"n": -1, "reject": True})
        fleet.wait_for_status(message_id, "failed")
        wait_until(lambda: vhost.count(f"{FIRST}.dead") == 1, SECONDS, "the dead letter")

    def test_end_what_they_have_in_hand_first(
        self, fleet: Flow, recorder: NamekoProcess, vhost: Vhost, queuectl: Any
    ) -> None:
        fleet.send_many([("thing.happened", {"n": n, "sleep": 4}) for n in range(12)])
        fleet.effects.wait_for(10, handler="first", what="ran")

        process = queuectl("upgrade-queues", "--queue", FIRST)
        fleet.effects.wait_for(1, handler="first", what="done")
        ended(process)

        fleet.effects.wait_for(12, handler="first", what="done")
        assert len(fleet.effects.all(handler="first", what="ran")) == 12
        assert "x-max-priority" in vhost.queues()[FIRST]["arguments"]

    def test_leave_scheduled_retries_to_plain_ones(
        self, fleet: Flow, vhost: Vhost, change: Any, run_plain: Any
    ) -> None:
        """A retry that waits in the delay queues finds the queue that was declared anew."""
        ours = fleet.run("tests.flow.apps.failing_greeter")
        fleet.send("thing.happened", {"n": 1})
        wait_until(lambda: fleet.stats()["retry"] == 1, SECONDS, lambda: str(fleet.stats()))
        fleet.send("thing.happened", {"n": 2}, delay=6)
        ours.stop()

        change("downgrade-queues")
        run_plain()

        fleet.effects.wait_for(2, handler="note")
        assert sorted(noted(fleet)) == [1, 2]


class TestInterruptions:
    """The command is killed after each thing that it said to RabbitMQ, and run again."""

    @pytest.fixture
    def crashing(self, fleet: Flow) -> Callable[[str], str]:
        def run(direction: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "tests.flow.apps.crashes", direction],
                cwd=ROOT,
                env={**os.environ, **fleet.env, "PYTHONWARNINGS": "ignore"},
                capture_output=True,
                text=True,
                timeout=280,
                check=False,
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            return done.stdout

        return run

    @pytest.mark.parametrize("direction", ["upgrade", "downgrade"])
    def test_lose_nothing(self, crashing: Any, direction: str) -> None:
        said = crashing(direction)
        assert said.endswith("all points\n"), said[-2000:]
