"""Alerts and retention with real processes: what is told, to whom, and how often."""

import json
import socket
import subprocess
import sys
from datetime import timedelta
from email import message_from_bytes
from email.policy import default

import pytest
from click.testing import CliRunner
from sqlalchemy import update

from services.notifications.models import Base as MailBase
from shared.cli import main
from shared.database import Database, database_url, make_engine
from shared.native import sleep
from shared.store.alerts import END_LOOKS
from shared.store.migrate import service_migrations, upgrade
from shared.tables import messages, timers
from shared.testing.servers import mortal
from tests.flow.conftest import BACKENDS
from tests.flow.test_operations import FIRST, QUEUE, Site
from tests.support.processes import ROOT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

SECONDS = 60
LOOK_SECONDS = 0.2
SECRET = "a-path-that-nobody-may-see"


class WebhookServer:
    """Whom alerts are posted to."""

    def __init__(self, folder):
        self.posts_file = folder / "posts.jsonl"
        self.failing = folder / "webhook-failing"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            command = [sys.executable, str(ROOT / "tests/support/webhook_server.py")]
            command += ["--fd", str(listener.fileno()), "--posts", str(self.posts_file)]
            self.process = subprocess.Popen(
                [*mortal(), *command, "--failing", str(self.failing)],
                pass_fds=[listener.fileno()],
            )
        self.url = f"http://127.0.0.1:{port}/{SECRET}"

    @property
    def posts(self):
        if not self.posts_file.exists():
            return []
        return [json.loads(line) for line in self.posts_file.read_text().splitlines()]

    def stop(self):
        self.process.kill()
        self.process.wait()


class AlertSite(Site):
    """queue_admin twice, the patient and notifications: dead letters alert from three on."""

    def __init__(self, folder, env):
        self.webhook = WebhookServer(folder)
        self.mail = folder / "mail"
        super().__init__(
            folder,
            {
                **env,
                "QUEUE_ALERT_SECONDS": str(LOOK_SECONDS),
                "QUEUE_ALERT_DEAD_LETTERS": "3",
                "QUEUE_ALERT_FAILURE_PERCENT": "0",
                "ALERT_MAIL_TO": "ops@example.org",
                "ALERT_WEBHOOK_URL": self.webhook.url,
                "MAIL_URL": f"file:{self.mail}",
            },
        )
        if self.flow.settings.database is not None:
            engine = make_engine(database_url(self.flow.settings, "notifications"), sleep)
            upgrade(engine, service_migrations("notifications", MailBase))
            engine.dispose()
        both = ("services.notifications", "services.queue_admin")
        self.flow.run(*both, QUEUE_ADMIN_ADDRESS="127.0.0.1:0")
        self.database = Database(database_url(self.flow.settings), sleep)

    def alerts(self):
        return self.get("/queue/alerts")

    def letters(self):
        found = [
            message_from_bytes(x.read_bytes(), policy=default) for x in self.mail.glob("*.eml")
        ]
        return sorted(found, key=lambda letter: letter["Message-ID"])

    def taken(self):
        return [post for post in self.webhook.posts if post["status"] == 204]

    def wait_for_news(self, count):
        wait_until(
            lambda: len(self.letters()) >= count and len(self.taken()) >= count,
            SECONDS,
            lambda: f"{count} of {self.letters()}, {self.taken()}: {self.alerts()}",
        )

    def wait_for_looks(self, count):
        """Wait for some looks more: while there is an episode each of them writes."""
        for _ in range(count):
            before = self.timer()
            wait_until(lambda: self.timer() != before, SECONDS, "a look")  # noqa: B023

    def timer(self):
        with self.database.transaction() as tx:
            return tx.connection.execute(timers.select().where(timers.c.name == "alerts")).first()

    def close(self):
        self.database.close()
        self.flow.close()
        self.webhook.stop()


@pytest.fixture(scope="module", params=list(BACKENDS))
def shared_site(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    made = AlertSite(folder, dict(BACKENDS[request.param](request)))
    yield made
    made.close()
    for log in sorted(folder.glob("process-*.log")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}")


@pytest.fixture
def site(shared_site):
    """The site of the backend, where nothing is dead."""
    yield shared_site
    for each in shared_site.listed(queue=QUEUE, status="failed"):
        shared_site.post(f"/queue/messages/{each}/discard")


@pytest.fixture
def plain_site(tmp_path):
    made = AlertSite(tmp_path, {})
    yield made
    made.close()


def make_old(site, days=40):
    def step(tx):
        at = tx.now - timedelta(days=days)
        its = {"created_at": at, "processed_at": at}
        done = messages.c.status.in_(["completed", "failed"])
        tx.connection.execute(update(messages).where(done).values(**its))

    site.database.run(step)


def test_what_is_old_is_removed_by_command_and_by_the_hour(site):
    """This comes before what shares the site: it counts all that is in the log."""

    def queuectl(*args):
        done = CliRunner().invoke(main, [*args], env=site.flow.env)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    dead = site.failed()
    old = [site.publish({"n": n}) for n in range(3)]
    for each in old:
        site.wait_for(each, "completed")
    make_old(site)
    new = site.publish({"n": 4})
    site.wait_for(new, "completed")
    before = queuectl("audit", "--json")
    assert before["balanced"]

    assert queuectl("prune", "--dry-run", "--json") == {"messages": 3, "removed": False}
    assert queuectl("prune", "--json") == {"messages": 3, "removed": True}

    assert site.listed() == [new, dead]
    after = queuectl("audit", "--json")
    assert after["balanced"]
    for each in before["subscriptions"]:
        each["removed"] += 3 * (each["subscriber"] in (FIRST, "patient.second"))
    assert after == before
    for each in after["subscriptions"]:
        ended = each["completed"] + each["dead"] + each["discarded"]
        assert each["dispatched"] == ended + each["waiting"]
    [entry] = [each for each in site.trail() if each["action"] == "prune"]
    assert entry["detail"] == {"messages": 3, "deliveries": 6}
    shown = site.get("/queue/retention")
    assert (shown["completedDays"], shown["deadDays"], shown["inboxDays"]) == (30, 0, 30)
    assert shown["lastRunAt"] < shown["nextRunAt"]
    assert shown["lastResult"] == {"messages": 3, "deliveries": 6}
    # and by itself
    make_old(site)
    newest = site.publish({"n": 5})  # whose message is never removed
    site.wait_for(newest, "completed")
    site.database.run(
        lambda tx: tx.connection.execute(
            update(timers).where(timers.c.name == "retention").values(next_at=tx.now)
        )
    )
    wait_until(
        lambda: site.get("/queue/retention")["lastResult"] == {"messages": 1, "deliveries": 2},
        SECONDS,
        lambda: str(site.get("/queue/retention")),
    )
    assert site.listed() == [newest, dead]
    assert site.trail()[0]["actor"] == "queue_admin"
    # what was removed is not missed: work goes on
    again = site.publish({"n": 6})
    site.wait_for(again, "completed")
    assert queuectl("audit", "--json")["balanced"]


def test_an_episode_is_told_once_by_mail_and_webhook_and_so_is_its_end(site):
    dead = [site.failed(n=n) for n in range(3)]

    site.wait_for_news(1)
    site.wait_for_looks(5)

    [firing] = site.alerts()["firing"]
    assert (firing["queueName"], firing["rule"], firing["value"]) == (QUEUE, "dead_letters", 3)
    its = f"3 dead letters ({FIRST}); 3 is the threshold."
    assert firing["sentence"] == f"{QUEUE} had up to {its}"
    [letter], [post] = site.letters(), site.taken()
    assert (letter["To"], letter["Subject"]) == ("ops@example.org", f"Alert: {QUEUE}, dead_letters")
    assert f"{QUEUE} has {its}" in letter.get_body(("plain",)).get_content()
    assert post["key"] == f'"{firing["messageId"]}"'
    assert post["type"] == "application/json"
    body = post["body"]
    assert (body["status"], body["alert_id"], body["summary"]) == (
        "firing", firing["id"], f"{QUEUE} has {its}",
    )  # fmt: skip
    shown = site.message(firing["messageId"])
    assert (shown["messageType"], shown["priority"]) == ("queue.alert", "urgent")

    for each in dead:
        site.post(f"/queue/messages/{each}/discard")
    site.wait_for_news(2)

    wait_until(lambda: site.alerts()["resolved"], SECONDS, "the end")
    [past] = site.alerts()["resolved"]
    assert past["id"] == firing["id"]
    assert past["endedAt"] > past["beganAt"]
    assert site.alerts()["firing"] == []
    assert site.letters()[1]["Subject"] == f"Over: {QUEUE}, dead_letters"
    assert [post["body"]["status"] for post in site.taken()] == ["firing", "resolved"]
    assert site.taken()[1]["key"] == f'"{past["endMessageId"]}"'
    # another episode, and no more of the old one
    for n in range(3):
        site.failed(n=n)
    site.wait_for_news(3)
    site.wait_for_looks(END_LOOKS + 2)
    assert len(site.letters()) == len(site.taken()) == 3
    counted = site.get("/queue/stats/queue_admin")
    assert (counted["total"], counted["failed"]) == (3, 0)


def test_a_webhook_that_fails_is_tried_again_and_the_mail_is_not(plain_site):
    site = plain_site
    site.webhook.failing.touch()
    for n in range(3):
        site.failed(n=n)
    wait_until(lambda: len(site.webhook.posts) >= 3, SECONDS, lambda: str(site.webhook.posts))

    site.webhook.failing.unlink()
    site.wait_for_news(1)

    assert len(site.letters()) == len(site.taken()) == 1
    assert len({post["key"] for post in site.webhook.posts}) == 1
    [firing] = site.alerts()["firing"]
    site.wait_for(firing["messageId"], "completed")
    history = site.delivery(firing["messageId"], "notifications.post_alert")["history"]
    assert history[0]["errorMessage"] == "127.0.0.1: HTTP status 500"
    assert site.delivery(firing["messageId"], "notifications.mail_alert")["history"] == []
    assert SECRET not in json.dumps(history)
    for process in site.flow.processes:
        assert SECRET not in process.output()


def test_an_alert_that_cannot_be_told_makes_no_other(plain_site):
    """Its dead letters are above the threshold, and the queue of the alerts is not watched."""
    site = plain_site
    site.webhook.stop()
    site.mail.write_text("no folder")
    ids = [site.failed(n=n) for n in range(3)]
    wait_until(lambda: site.alerts()["firing"], SECONDS, "an alert")
    [firing] = site.alerts()["firing"]
    for subscriber in ("notifications.post_alert", "notifications.mail_alert"):
        wait_until(
            lambda: site.delivery(firing["messageId"], subscriber)["status"] == "retry",  # noqa: B023
            SECONDS,
            lambda: str(site.message(firing["messageId"])),
        )
    site.wait_for_looks(5)
    assert site.get("/queue/stats/queue_admin")["total"] == 1
    assert len(ids) == 3


def test_thresholds_are_set_by_call_and_command(plain_site):
    site = plain_site

    def put(queue, status=200, **body):
        answer = site.call("PUT", f"/queue/alerts/thresholds/{queue}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def queuectl(*args, status=0):
        done = CliRunner().invoke(main, ["alerts", *args], env=site.flow.env)
        assert done.exit_code == status, done.output
        return done

    assert site.get("/queue/alerts/thresholds")["usual"]["deadLetters"] == 3
    changed = put(QUEUE, deadLetters=1, oldestSeconds=0)
    assert changed == {
        "queueName": QUEUE, "failurePercent": 0, "oldestSeconds": 0, "deadLetters": 1,
        "silentConsumers": 1, "failingSchedules": 1, "own": ["dead_letters", "oldest_seconds"],
    }  # fmt: skip
    site.failed()
    wait_until(lambda: site.alerts()["firing"], SECONDS, "an alert")
    for queue in ("nowhere", "queue_admin"):
        assert put(queue, 404, deadLetters=1)["type"] == "/problems/queue-not-found"
    for body in ({"deadLetters": -1}, {"deadLetters": 1.5}, {"failurePercent": 101}, {"odd": 1}):
        assert list(put(QUEUE, 422, **body)["errors"]) == list(body)
    for body in ({"own": ["dead_letters"]}, {"queueName": "nowhere"}):
        assert list(put(QUEUE, 422, **body)["errors"]) == list(body)
    assert list(put(QUEUE, 422, own=["odd"])["errors"]) == ["own.0"]
    [done] = [each for each in site.trail() if each["action"] != "publish"]
    assert (done["action"], done["target"]) == ("set thresholds", f"queue {QUEUE}")
    assert done["detail"] == {"dead_letters": 1, "oldest_seconds": 0}

    # what is shown may be given, and leaves all as it is
    all_ = site.get("/queue/alerts/thresholds")["queues"]
    [shown] = [each for each in all_ if each["queueName"] == QUEUE]
    assert put(QUEUE, **shown) == shown == changed

    assert f"{QUEUE} had up to 1 dead letter" in queuectl("list").stdout
    assert json.loads(queuectl("list", "--json").stdout)["firing"] == site.alerts()["firing"]
    changed = json.loads(queuectl("set", QUEUE, "--dead-letters", "5", "--json").stdout)
    assert (changed["deadLetters"], changed["oldestSeconds"]) == (5, 300)
    assert QUEUE in queuectl("thresholds").stdout
    assert "no queue nowhere" in queuectl("set", "nowhere", "--none", status=1).stderr
    queuectl("set", QUEUE, "--dead-letters", "-1", status=2)
    wait_until(lambda: not site.alerts()["firing"], SECONDS, "the end")
