"""A stretch of history is delivered to one subscription: a new service catches up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import func, or_, select, text

from shared.cli import main
from shared.database import database_url, make_engine, make_reader
from shared.tables import deliveries
from tests.flow.apps.ledger import Base
from tests.flow.conftest import BACKENDS
from tests.flow.test_operations import QUEUE, Site
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

LATE, NOTE = "late.catch_up", "late.note"
MANY = 500
SECONDS = 120
"""For what takes a few seconds on a machine with nothing else to do."""


class ReplaySite(Site):
    """Where a service comes late."""

    def start_late(self):
        # one worker handles in the order in which it reserves
        self.flow.run("tests.flow.apps.late", arguments=("--config", "config.yml"), MAX_WORKERS="1")

    def replay(self, subscriber, status=202, **body):
        its = self.subscription(subscriber)["id"]
        return self.post(f"/queue/subscriptions/{its}/replay", status, json=body)

    def replay_all(self, subscriber, **body):
        """Replay to the end; return how many calls that took, and how many were replayed."""
        calls, replayed = 0, 0
        while True:
            done = self.replay(subscriber, **body)
            calls, replayed = calls + 1, replayed + done["replayed"]
            if done["nextCursor"] is None:
                return calls, replayed
            body["cursor"] = done["nextCursor"]

    def queuectl(self, *args, status=0):
        done = CliRunner().invoke(main, args, env=self.flow.env)
        assert done.exit_code == status, (args, done.output, done.exception)
        return done

    def wait_for_relay(self):
        """Wait until the provider has all that waits."""
        if self.flow.settings.provider == "embedded":
            return
        engine = make_reader(database_url(self.flow.settings), lambda _: None)
        d = deliveries.c
        left = select(func.count()).where(or_(d.ready.is_(True), d.lease_expires_at.is_not(None)))

        def count():
            with engine.connect() as connection:
                return connection.execute(left).scalar()

        wait_until(lambda: count() == 0, SECONDS, lambda: f"{count()} are not relayed", every=0.1)
        engine.dispose()

    def got(self, handler="late"):
        return [each["n"] for each in self.flow.effects.all(handler=handler)]

    def check_books(self):
        assert json.loads(self.queuectl("audit", "--json").stdout)["balanced"] is True


@pytest.fixture(params=list(BACKENDS))
def site(request, tmp_path):
    made = ReplaySite(tmp_path, dict(BACKENDS[request.param](request)))
    yield made
    made.flow.close()


def test_a_new_service_catches_up_in_order_and_behind_what_is_new(site):
    ids = site.flow.send_many([("patient.asked", {"n": n}) for n in range(MANY)])
    lone = [site.flow.send("nobody.asked", {"n": n}) for n in range(3)]
    site.flow.wait_for_counts(SECONDS, completed=MANY + 3)
    assert site.get(f"/queue/stats/{QUEUE}")["unrouted"] == 3
    site.start_late()
    site.pause(LATE)

    assert site.replay_all(LATE, limit=150) == (4, MANY)

    new = site.publish({"n": MANY})
    site.wait_for_relay()
    assert site.subscription(LATE)["waiting"] == MANY + 1
    site.pause(LATE, "resume")
    wait_until(
        lambda: len(site.got()) > MANY, SECONDS, lambda: f"only {len(site.got())}", every=0.1
    )
    assert site.got() == [MANY, *range(MANY)]
    assert [each["id"] for each in site.flow.effects.all(handler="late")] == [new, *ids]
    # and nobody else gets anything
    assert site.replay_all(NOTE) == (1, 3)
    site.flow.effects.wait_for(3, handler="note")
    site.flow.wait_for_counts(SECONDS, completed=MANY + 4)
    assert site.got("note") == [0, 1, 2]
    assert [each["id"] for each in site.flow.effects.all(handler="note")] == lone
    for handler in ("first", "second"):
        ran = [each["id"] for each in site.flow.effects.all(handler=handler)]
        assert sorted(ran) == sorted([*ids, new])
    assert site.get(f"/queue/stats/{QUEUE}")["unrouted"] == 0
    assert site.replay_all(LATE)[1] == site.replay_all(NOTE)[1] == 0
    site.check_books()
    its = site.subscription(LATE)["id"]
    noted = [each for each in site.trail() if each["target"] == f"subscription {its}"]
    assert sum(each["detail"]["deliveries"] for each in noted if each["action"] == "replay") == MANY


def test_what_it_had_comes_again_when_that_is_asked_for(site):
    site.start_late()
    ids = [site.publish({"n": n}) for n in range(5)]
    site.flow.wait_for_counts(SECONDS, completed=5)
    its = str(site.subscription(LATE)["id"])
    assert site.queuectl("replay", its).stdout == "0 replayed, of 5 messages\n"

    done = site.queuectl("replay", its, "--since", "2026-01-01T00:00:00Z", "--again", "--json")

    told = json.loads(done.stdout)
    assert (told["replayed"], told["messages"]) == (5, 5)
    site.flow.effects.wait_for(10, handler="late")
    assert [each["id"] for each in site.flow.effects.all(handler="late")] == ids * 2
    site.flow.wait_for_counts(SECONDS, completed=5)
    again = ["replay", its, "--again", "--mark", str(told["mark"])]
    assert site.queuectl(*again).stdout == "0 replayed, of 5 messages\n"
    assert len(site.message(ids[0])["deliveries"]) == 4
    assert len(site.flow.effects.all(handler="first")) == 5
    site.check_books()


def test_what_was_killed_is_given_again_and_doubles_nothing(site):
    count = 4 * MANY
    ids = site.flow.send_many([("patient.asked", {"n": n}) for n in range(count)])
    site.flow.wait_for_counts(SECONDS, completed=count)
    site.start_late()
    its = str(site.subscription(LATE)["id"])
    site.pause(LATE)
    command = [Path(sys.executable).parent / "queuectl", "replay", its]
    with subprocess.Popen(command, env={**os.environ, **site.flow.env}) as killed:
        wait_until(lambda: site.subscription(LATE)["waiting"] > 0, 30, "it to begin", every=0.01)
        killed.kill()
    assert 0 < site.subscription(LATE)["waiting"] < count

    site.queuectl("replay", its)

    site.pause(LATE, "resume")
    # what was on its way to a broker is published after 30 s
    wait_until(
        lambda: len(site.got()) >= count, SECONDS, lambda: f"only {len(site.got())}", every=1
    )
    site.flow.wait_for_counts(SECONDS, completed=count)
    assert sorted(each["id"] for each in site.flow.effects.all(handler="late")) == sorted(ids)
    site.check_books()


def test_refuses_what_cannot_be(tmp_path):
    site = ReplaySite(tmp_path, {})
    try:
        for wrong, field in [
            ({"from": "yesterday"}, "from"),
            ({"to": "2026-01-01T00:00:00"}, "to"),
            ({"mark": 3}, "mark"),
            ({"limit": 0}, "limit"),
            ({"again": "yes"}, "again"),
            ({"cursor": "x"}, "cursor"),
        ]:
            assert list(site.replay("patient.first", 422, **wrong)["errors"]) == [field], wrong
        problem = site.post("/queue/subscriptions/99/replay", 404, json={})
        assert problem["type"] == "/problems/subscription-not-found"
        assert "no subscription 99" in site.queuectl("replay", "99", status=1).stderr
        site.queuectl("replay", "1", "--since", "yesterday", status=2)
        site.queuectl("replay", "1", "--mark", "3", status=2)
        assert site.trail() == []
    finally:
        site.flow.close()


def test_a_handler_with_an_inbox_runs_again_once_its_notes_are_removed(tmp_path):
    site = ReplaySite(tmp_path, {})
    try:
        own = make_engine(database_url(site.flow.settings, "ledger"), lambda _: None)
        Base.metadata.create_all(own)
        site.flow.run("tests.flow.apps.ledger")
        message_id = site.publish({"n": 1, "dies": False}, "entry.made")
        site.wait_for(message_id, "completed")
        its = str(site.subscription("ledger.book")["id"])

        def replay():
            done = json.loads(site.queuectl("replay", its, "--again", "--json").stdout)
            assert done["replayed"] == 1
            site.wait_for(message_id, "completed")
            return len(site.flow.effects.all(what="ran", n=1))

        assert replay() == 1
        with own.begin() as connection:
            its_notes = "DELETE FROM ledger_inbox WHERE subscriber = 'ledger.book'"
            connection.execute(text(its_notes))
        own.dispose()
        assert replay() == 2
    finally:
        site.flow.close()
