"""Moves from each provider to each other, live: nothing is lost, nothing runs twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner

from shared.cli import main
from shared.events import moving
from shared.settings import load_settings
from shared.store import trail
from shared.testing.servers import HOST, free_port
from tests.support.metrics import parsed, value
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

FLEET = "tests.flow.apps.fleet"
CONFIG = ("--config", "config.yml")

MOVES = [
    (old, new)
    for old in ("redis", "rabbitmq", "embedded")
    for new in ("redis", "rabbitmq", "embedded")
    if old != new
]

WAITING, SCHEDULED, RETRIED, DEAD, HALTED = 240, 30, 20, 15, 20


class Move:
    """A fleet of two processes, what it has to do, and the one who moves it."""

    def __init__(self, flow, old, new):
        self.flow = flow
        self.old, self.new = old, new
        self.fleet = [self.start(QUEUE_PROVIDER=old) for _ in range(2)]
        # dispatched before anybody had subscribed
        self.early = {each["n"] for each in flow.effects.all(what="sent")}

    def start(self, **env):
        # slow enough for most to be waiting still when the move begins
        more = {"MAX_WORKERS": "2", "SLOW_SECONDS": "0.1", "PER_SECOND": "15"}
        return self.flow.run(FLEET, ready=2, arguments=CONFIG, **more, **env)

    def fill(self):
        """Dispatch what waits, is scheduled, is to be tried again, is dead, and is paused."""
        send = self.flow.send_many
        self.dead = send([("task.sent", {"n": f"d{n}", "is_broken": True}) for n in range(DEAD)])
        again = [("task.sent", {"n": f"r{n}", "again_in": 15}) for n in range(RETRIED)]
        retried = send(again, priority="urgent")
        for each, status in ((self.dead[-1], "failed"), (retried[-1], "retry")):
            self.flow.wait_for_status(each, status, 30)
        self.pause("task.halted", True)
        self.ids = [
            *retried,
            *send([("task.sent", {"n": n}) for n in range(WAITING)]),
            *send([("task.put_off", {"n": n}) for n in range(SCHEDULED)], delay=15),
        ]
        self.halted = send([("task.halted", {"n": n}) for n in range(HALTED)])
        # who dispatched them is stopped next: it would leave to others what is not published yet
        wait_until(self.is_published, 20, lambda: str(self.ctl("audit", "--json")))

    def is_published(self):
        rows = self.ctl("audit", "--json")["subscriptions"]
        # what ticks goes on, and some of it is always on its way
        its = [x for x in rows if x["queue"] == "source" and x["subscriber"] != "crew.slow"]
        return not sum(each["inLog"] for each in its)

    def pause(self, event_type, is_paused, **env):
        shown = self.ctl("subscriptions", "--json", **env)
        [its] = [x["id"] for x in shown["subscriptions"] if x["messageType"] == event_type]
        self.ctl("pause" if is_paused else "resume", str(its), **env)

    def restart(self, new, old):
        """Stop each process in its turn, and start it with other settings."""
        self.flow.stop_source()
        for place, process in enumerate(self.fleet):
            assert process.terminate() == 0
            self.fleet[place] = self.start(QUEUE_PROVIDER=new, QUEUE_PROVIDER_DRAIN=old)

    def ctl(self, *command, status=0, **env):
        done = CliRunner().invoke(main, command, env={**self.flow.env, **env})
        assert done.exit_code == status, (done.output, done.stderr)
        return json.loads(done.stdout) if "--json" in command or "migrate" in command else None

    def migrate(self, old, new, *options, status=0):
        return self.ctl("migrate", "--from", old, "--to", new, "--json", *options, status=status)

    def kill_migrate(self, old, new, mariadb):
        """Begin a move, and kill it when it is about to carry over what is paused."""
        queuectl = Path(sys.executable).with_name("queuectl")
        command = [queuectl, "migrate", "--from", old, "--to", new]
        with self.held("task.halted", mariadb) as is_waited_for:
            process = subprocess.Popen(command, env={**os.environ, **self.flow.env})
            try:
                # looked at more often, the server goes on to tell what it told before
                wait_until(is_waited_for, 30, "it to come to what is paused", every=0.2)
            finally:
                process.kill()
                status = process.wait()
        assert status == -signal.SIGKILL

    @contextlib.contextmanager
    def held(self, event_type, mariadb):
        """Lock the deliveries of a type; yield what says whether anybody waits for them.

        A provider apart leaves those of a paused one alone: so it is who carries them over.
        """
        database = self.flow.settings.database.name
        lock = (
            f"SELECT seq FROM {database}.queue_deliveries WHERE subscription_id ="
            # not joined: it would be locked, too, and services sign for it
            f" (SELECT id FROM {database}.queue_subscriptions WHERE message_type = %s) FOR UPDATE"
        )
        waiting = (
            "SELECT count(*) FROM information_schema.innodb_lock_waits w"
            " JOIN information_schema.innodb_trx t ON t.trx_id = w.blocking_trx_id"
            " WHERE t.trx_mysql_thread_id = %s"
        )
        with (
            contextlib.closing(mariadb.connect()) as holding,
            contextlib.closing(mariadb.connect()) as looking,
            holding.cursor() as hold,
            looking.cursor() as look,
        ):
            hold.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            hold.execute("START TRANSACTION")
            hold.execute(lock, (event_type,))

            def is_waited_for():
                look.execute(waiting, (holding.thread_id(),))
                return look.fetchone()[0]

            yield is_waited_for

    def states(self):
        """Return what the audit log says of moves, the newest first."""
        with self.flow.reading() as connection:
            entries = trail.entries(connection, None, 100)["entries"]
        return [each["detail"]["state"] for each in entries if each["action"] == "migrate"]

    def check_the_rest(self, new, old):
        """Retry what is dead, resume what is paused, and see that each was handled once."""
        there = {"QUEUE_PROVIDER": new, "QUEUE_PROVIDER_DRAIN": old}
        assert self.flow.effects.all(handler="halted") == []
        (self.flow.folder / "effects.mended").touch()
        self.ctl("retry", "--queue", "source", **there)
        self.pause("task.halted", False, **there)
        self.ids += self.dead + self.halted
        self.finish()
        self.check()
        # nobody needs the old one any more
        assert self.fleet[0].terminate() == 0
        self.ctl("audit", QUEUE_PROVIDER=new)

    def finish(self, timeout=60):
        """Have nothing more dispatched, and wait until all is handled."""
        flow = self.flow
        for each in self.ids:
            flow.wait_for_status(each, "completed", timeout)
        self.stop_ticking()

    def stop_ticking(self):
        # the ticker of each process goes with it; what they sent is handled by the last one
        last = self.fleet.pop()
        for process in self.fleet:
            assert process.terminate() == 0
        self.fleet = [last]

    def check(self):
        """See that each was handled once, by an account that is not the log's."""
        effects = self.flow.effects
        sent = {each["n"] for each in effects.all(what="sent")}

        def unhandled():
            return sorted(sent - self.early - {each["n"] for each in effects.all(handler="quick")})

        wait_until(lambda: not unhandled(), 30, lambda: f"these to be handled: {unhandled()}")
        ran = Counter((x["handler"], x["n"]) for x in effects.all(what="ran"))
        assert [each for each, count in ran.items() if count > 1] == []
        expected = {
            "slow": WAITING + RETRIED + DEAD,
            "beside": WAITING + RETRIED + DEAD,
            "later": SCHEDULED,
            "halted": HALTED,
        }
        found = Counter(handler for handler, _ in ran)
        assert {name: found[name] for name in expected} == expected
        times = {(x["handler"], x["n"]): x for x in effects.all(what="ran")}
        assert all(times["slow", f"r{n}"]["attempt"] == 2 for n in range(RETRIED))


def receipt_is_right(report, old):
    assert (report["from"], report["isEmpty"], report["balanced"]) == (old, True, True)
    assert report["missing"] == report["unpaused"] == report["misdrawn"] == 0
    assert report["strays"] == {}
    rows = {(x["messageType"], x["subscriber"]): x for x in report["subscriptions"]}
    for each in rows.values():
        ended = each["completed"] + each["dead"] + each["discarded"]
        assert each["dispatched"] == ended + each["waiting"]
        assert each["leftInOld"] == 0
    slow = rows["task.sent", "crew.slow"]
    assert (slow["dispatched"], slow["dead"]) == (WAITING + RETRIED + DEAD, DEAD)
    assert rows["task.put_off", "crew.later"]["dispatched"] == SCHEDULED
    assert rows["task.halted", "crew.halted"]["waiting"] == HALTED


@pytest.fixture
def servers(redis_server, rabbitmq_server, mariadb_log):
    redis_server.empty()
    yield {
        **redis_server.environment,
        **rabbitmq_server.environment,
        "RABBITMQ_VHOST": rabbitmq_server.new_vhost(),
        **mariadb_log,
        "QUEUE_LEASE_SECONDS": "5",
    }
    redis_server.empty()


@pytest.mark.parametrize(("old", "new"), MOVES)
def test_a_fleet_moves(flow_on, servers, tmp_path, old, new):
    """Given a backlog, schedules, retries, dead letters and a pause, and events that come in."""
    move = Move(flow_on({**servers, "QUEUE_PROVIDER": old}), old, new)
    move.fill()

    move.restart(new, old)
    receipt = tmp_path / "receipt.json"
    report = move.migrate(old, new, "--receipt", str(receipt))

    receipt_is_right(report, old)
    # what is ready in the log anybody relays
    assert report["carried"] >= HALTED or old == "embedded"
    assert json.loads(receipt.read_text()) == report
    move.check_the_rest(new, old)


@pytest.mark.parametrize(("old", "new"), [("redis", "rabbitmq"), ("rabbitmq", "redis")])
def test_a_fleet_goes_back_half_way(flow_on, servers, mariadb_server, monkeypatch, old, new):
    """Given a move that is killed in the middle, and begun again before it is taken back."""
    move = Move(flow_on({**servers, "QUEUE_PROVIDER": old}), old, new)
    move.fill()
    move.restart(new, old)
    move.kill_migrate(old, new, mariadb_server)
    monkeypatch.setattr(moving, "BATCH", 10)
    half = moving.Move(load_settings(move.flow.env), old, new)
    half.begin("a test")
    assert any(each.carried >= HALTED for each in half.carry()), half.progress
    half.close()

    move.restart(old, new)
    report = move.migrate(new, old)

    receipt_is_right(report, new)
    assert move.states() == ["completed", "begun", "begun", "begun"]
    move.check_the_rest(old, new)


def test_what_is_left_is_seen_and_not_taken_for_lost(flow_on, servers):
    flow = flow_on({**servers, "QUEUE_PROVIDER": "redis"})
    crew = flow.run(FLEET, ready=2, PER_SECOND="0.1")
    ids = flow.send_many([("task.put_off", {"n": n}) for n in range(20)], delay=15)

    def in_redis():
        report = CliRunner().invoke(main, ["audit", "--json"], env=flow.env).stdout
        return sum(each["inProvider"] for each in json.loads(report)["subscriptions"])

    wait_until(lambda: in_redis() == 20, 10, "all to be in Redis, by the log")
    flow.stop_source()
    assert crew.terminate() == 0
    address = f"{HOST}:{free_port()}"
    there = {"QUEUE_PROVIDER": "rabbitmq", "QUEUE_PROVIDER_DRAIN": "redis"}
    admin = {"QUEUE_AUDIT_SECONDS": "0.3", "QUEUE_ADMIN_ADDRESS": address, **there}
    process = flow.run("services.queue_admin", **admin)

    def draining():
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"http://{address}/queue/health", timeout=10).json()["draining"]

    expected = {"name": "redis", "status": "up", "left": 20}
    wait_until(lambda: draining() == expected, 20, lambda: str(draining()))

    def metric(name, **labels):
        told = parsed(requests.get(f"http://{address}/metrics", timeout=10).text)
        return value(told, name, **labels)

    def balanced():
        return metric("audits_total", result="balanced") or 0

    assert metric("draining", provider="redis") == 1
    assert metric("draining_deliveries", provider="redis") == 20
    assert metric("provider_up", provider="redis") == metric("provider_up", provider="rabbitmq")

    # what is due within seconds no audit misses
    wait_until(lambda: balanced() >= 5, 20, process.output, every=0.1)
    assert "missing" not in process.output()

    flow.run(FLEET, ready=2, PER_SECOND="0.1", **there)

    for each in ids:
        flow.wait_for_status(each, "completed", 20)
    assert len(flow.effects.all(handler="later")) == 20
    wait_until(lambda: draining()["left"] == 0, 10, lambda: str(draining()))
    assert "missing" not in process.output()


@pytest.mark.parametrize(("old", "new"), [("redis", "rabbitmq"), ("embedded", "redis")])
def test_who_was_not_restarted_is_named(flow_on, servers, old, new):
    """Given a dispatcher that goes on with the old provider, beside a process that moved."""
    move = Move(flow_on({**servers, "QUEUE_PROVIDER": old}), old, new)
    move.flow.stop_source()
    moved, _ = move.fleet
    assert moved.terminate() == 0
    move.fleet[0] = move.start(QUEUE_PROVIDER=new, QUEUE_PROVIDER_DRAIN=old)

    command = ["migrate", "--from", old, "--to", new, "--wait", "4"]
    done = CliRunner().invoke(main, command, env=move.flow.env)

    assert "ticker dispatches without the settings of the move" in done.stderr
    assert f"QUEUE_PROVIDER={new} and QUEUE_PROVIDER_DRAIN={old}" in done.stderr
    assert "source dispatches" not in done.stderr
    move.restart(new, old)
    report = move.migrate(old, new)
    assert (report["strays"], report["isComplete"]) == ({}, True)


def test_what_comes_to_the_old_provider_meanwhile_tells_who_sent_it(flow_on, servers):
    """Given what waits there before a move, and more that comes once that has begun."""
    flow = flow_on({**servers, "QUEUE_PROVIDER": "redis"})
    crew = flow.run(FLEET, ready=2, PER_SECOND="0.1")
    assert crew.terminate() == 0
    move = moving.Move(load_settings(flow.env), "redis", "embedded")
    try:
        flow.send_many([("task.sent", {"n": n}) for n in range(3)])
        move.begin("a test")
        # each has two subscribers
        flow.send_many([("task.sent", {"n": n}) for n in range(2)])
        wait_until(lambda: sum(move.left().values()) >= 10, 20, lambda: str(move.left()))

        for _ in move.carry():
            pass

        assert move.end("a test").strays == {"source": 4}
    finally:
        move.close()


@pytest.mark.parametrize(("old", "new"), [("redis", "rabbitmq"), ("rabbitmq", "redis")])
def test_what_was_dispatched_just_before_a_restart_is_carried_over(flow_on, servers, old, new):
    """Given that nobody is there yet to consume from either."""
    flow = flow_on({**servers, "QUEUE_PROVIDER": old})
    there = {"QUEUE_PROVIDER": new, "QUEUE_PROVIDER_DRAIN": old}
    assert flow.run(FLEET, ready=2, PER_SECOND="0.1").terminate() == 0
    ids = flow.send_many([("task.put_off", {"n": n}) for n in range(3)])
    flow.stop_source()

    command = ["migrate", "--from", old, "--to", new, "--json"]
    done = CliRunner().invoke(main, command, env=flow.env)

    report = json.loads(done.stdout)
    assert (report["carried"], report["dropped"], report["isComplete"]) == (3, 0, True)
    flow.run(FLEET, ready=2, PER_SECOND="0.1", **there)
    for each in ids:
        flow.wait_for_status(each, "completed", 10)


def test_what_it_refuses(flow_on, servers):
    flow = flow_on({**servers, "QUEUE_PROVIDER": "redis"})

    def said(*command, **env):
        done = CliRunner().invoke(main, ["migrate", *command], env={**flow.env, **env})
        return done.exit_code, done.stderr.strip()

    assert said("--from", "redis", "--to", "redis") == (2, "Error: the two providers must differ")
    status, line = said("--from", "kafka", "--to", "redis")
    assert (status, line[:38]) == (2, "Error: --from: must be one of embedded")
    flow.run(FLEET, ready=2)
    away = {"RABBITMQ_PORT": str(free_port())}
    status, line = said("--from", "redis", "--to", "rabbitmq", **away)
    assert status == 1
    assert line.endswith("what was done stays done: begin again, or go back")
