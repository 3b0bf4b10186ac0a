"""Schedules over HTTP and from the command line, beside who handles what they dispatch."""

import json
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
import requests
from click.testing import CliRunner

from shared.cli import main
from shared.testing.servers import free_port
from tests.flow.conftest import BACKENDS
from tests.flow.test_operations import QUEUE, Site
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

EVERY_SECOND = {
    "queueName": QUEUE, "messageType": "patient.asked", "payload": {"a": 1}, "cron": "* * * * * *",
}  # fmt: skip
NIGHTLY = {**EVERY_SECOND, "cron": "30 2 * * *", "timeZone": "Europe/Berlin"}


class ScheduleSite(Site):
    """Where schedules are made."""

    def put(self, name, status=200, **body):
        answer = self.call("PUT", f"/queue/schedules/{name}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def act(self, name, word, status=200):
        return self.post(f"/queue/schedules/{name}/{word}", status)

    def schedules(self):
        return {each["name"]: each for each in self.get("/queue/schedules")["schedules"]}

    def second(self):
        """Start another queue_admin."""
        return self.flow.run("services.queue_admin", QUEUE_ADMIN_ADDRESS="127.0.0.1:0")

    def remove_all(self):
        """Remove the schedules, and wait for what they dispatched."""
        for name in self.schedules():
            self.call("DELETE", f"/queue/schedules/{name}")
        wait_until(self.is_done, 20, lambda: str(self.flow.stats()))

    def is_done(self):
        stats = self.flow.stats()
        return stats.get("completed") == stats.get("total")

    def occurrences(self):
        """Return of all messages of ticks the occurrence that they are of, in their order."""
        found, cursor = [], {}
        while True:
            page = self.get("/queue/messages", queue=QUEUE, limit=100, **cursor)
            for each in page["messages"]:
                its = self.message(each["messageId"])["metadata"]["schedule"]
                if its["name"] == "tick":
                    found.append(datetime.fromisoformat(its["occurrence"]))
            if page["nextCursor"] is None:
                return sorted(found)
            cursor = {"cursor": page["nextCursor"]}


def check_each_once(found, shown):
    """Check that none came twice, and that none was left out that is not counted."""
    assert len(set(found)) == len(found)
    span = found[-1] - found[0]
    # on a busy machine one may be late for more than a second
    assert span.total_seconds() + 1 == len(found) + shown["skipped"]


@pytest.fixture(scope="module", params=list(BACKENDS))
def shared_site(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    made = ScheduleSite(folder, dict(BACKENDS[request.param](request)))
    yield made
    made.flow.close()
    for log in sorted(folder.glob("process-*.log")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}")


@pytest.fixture
def site(shared_site):
    """The site of the backend, without schedules."""
    yield shared_site
    shared_site.remove_all()


@pytest.fixture
def plain_site(tmp_path):
    made = ScheduleSite(tmp_path, {})
    yield made
    made.flow.close()


def test_each_occurrence_is_dispatched_once_by_two_of_which_one_is_killed(site):
    second = site.second()
    before = site.flow.stats().get("completed", 0)
    its = {"handler": "first", "payload": {"a": "tick"}}
    site.put("tick", **{**EVERY_SECOND, "payload": its["payload"]})
    site.flow.effects.wait_for(5, **its)

    second.kill()

    site.flow.effects.wait_for(11, **its)
    site.act("tick", "pause")
    found = site.occurrences()
    assert len(found) >= 11
    shown = site.schedules()["tick"]
    check_each_once(found, shown)
    assert (shown["error"], shown["nextAt"]) == (None, None)
    assert datetime.fromisoformat(shown["lastAt"]) == found[-1]
    wait_until(
        lambda: site.flow.stats()["completed"] == before + len(found), 20, "all to be handled"
    )
    ran = [each["id"] for each in site.flow.effects.all(**its)]
    assert len(ran) == len(set(ran)) == len(found)


def test_what_nobody_dispatched_in_time_is_dispatched_once(plain_site):
    site = plain_site
    site.put("tick", **EVERY_SECOND)
    site.flow.effects.wait_for(1, handler="first")
    admin = site.flow.processes[0]
    admin.kill()
    stopped = datetime.now(UTC)
    count = len(site.flow.effects.all(handler="first"))
    wait_until(lambda: datetime.now(UTC) - stopped > timedelta(seconds=3), 5, "it to be late")

    admin.restart()

    site.flow.effects.wait_for(count + 2, handler="first")
    site.act("tick", "pause")
    shown, found = site.schedules()["tick"], site.occurrences()
    check_each_once(found, shown)
    assert max(after - before for before, after in pairwise(found)) >= timedelta(seconds=3)
    assert shown["skipped"] >= 2


def test_is_made_changed_run_paused_and_removed(site):
    before = len(site.trail())
    made = site.put("nightly", **NIGHTLY)
    assert made["enabled"] is True
    assert made["sentence"] == "At 02:30 every day"
    assert made["nextAt"][11:16] in ("00:30", "01:30")
    assert (made["lastMessageId"], made["updatedBy"]) == (None, "anonymous@127.0.0.1")

    message_id = site.act("nightly", "run", 202)["messageId"]

    message = site.wait_for(message_id, "completed")
    shown = site.schedules()["nightly"]
    assert message["metadata"]["schedule"] == {"name": "nightly", "occurrence": shown["lastAt"]}
    assert (message["payload"], shown["lastMessageId"]) == ({"a": 1}, message_id)
    assert shown["nextAt"] == made["nextAt"]
    assert site.act("nightly", "pause")["enabled"] is False
    changed = site.put("nightly", **{**NIGHTLY, "priority": "high", "cron": "0 12 * * *"})
    assert (changed["priority"], changed["enabled"], changed["nextAt"]) == ("high", False, None)
    assert site.act("nightly", "resume")["nextAt"] is not None
    answer = site.call("DELETE", "/queue/schedules/nightly")
    assert answer.json() == {"name": "nightly", "removed": True}
    assert site.schedules() == {}
    trail = site.trail()
    done = [(each["action"], each["target"]) for each in trail[: len(trail) - before]]
    assert done == [
        (action, "schedule nightly")
        for action in ("remove", "resume", "schedule", "pause", "run", "schedule")
    ]


def test_what_is_dispatched_is_counted(tmp_path):
    metrics = f"127.0.0.1:{free_port()}"
    site = ScheduleSite(tmp_path, {})
    try:
        site.flow.processes[0].kill()
        site.flow.run(
            "services.queue_admin", QUEUE_ADMIN_ADDRESS=site.address, QUEUE_METRICS_ADDRESS=metrics
        )
        site.put("tick", **EVERY_SECOND)
        site.flow.effects.wait_for(1, handler="first")
        site.act("tick", "run", 202)
        site.act("tick", "pause")
        text = requests.get(f"http://{metrics}/metrics", timeout=20).text
        [count] = re.findall(r"^nameko_queue_dispatched_total{.*queue_admin.*} (\S+)", text, re.M)
        assert float(count) == len(site.occurrences())
    finally:
        site.flow.close()


def test_what_nobody_here_wants_is_published_at_once(site):
    # to RabbitMQ, where plain nameko may listen
    before = site.get(f"/queue/stats/{QUEUE}")["unrouted"]
    site.put("lone", **{**NIGHTLY, "messageType": "nobody.wants"})
    site.wait_for(site.act("lone", "run", 202)["messageId"], "completed")
    assert site.get(f"/queue/stats/{QUEUE}")["unrouted"] == before + 1


def test_refuses_what_cannot_be(plain_site):
    site = plain_site
    for wrong, field, said in [
        ({"cron": "61 * * * *"}, "cron", "is no cron expression: Bad minute"),
        ({"cron": "* * */20 * 1L"}, "cron", "has no occurrence in the next 50 years"),
        ({"timeZone": "Mars"}, "timeZone", "must be a time zone such as Europe/Berlin"),
        ({"metadata": {"schedule": 1}}, "metadata.schedule", "is reserved"),
        ({"queueName": "a b"}, "queueName", "Must match"),
        ({"priority": "extreme"}, "priority", "Must be one of"),
        ({"queueName": "user-events", "messageType": "user.registered"}, "payload.email", ""),
    ]:
        problem = site.put("nightly", 422, **{**NIGHTLY, **wrong})
        assert said in problem["errors"][field][0], wrong
    assert list(site.put("a b", 422, **NIGHTLY)["errors"]) == ["name"]
    assert list(site.put("nightly", 422)["errors"]) == [
        "queueName", "messageType", "payload", "cron",
    ]  # fmt: skip
    for word in ("run", "pause", "resume"):
        problem = site.act("nightly", word, 404)
        assert problem["type"] == "/problems/schedule-not-found"
    assert site.call("DELETE", "/queue/schedules/nightly").status_code == 404
    assert site.schedules() == {}
    assert site.trail() == []


def test_a_command_does_the_same(site):
    def queuectl(*args, status=0, **options):
        done = CliRunner().invoke(main, ["schedules", *args], env=site.flow.env, **options)
        assert done.exit_code == status, (args, done.output, done.exception)
        return done

    def ask(*args, **options):
        return json.loads(queuectl(*args, "--json", **options).stdout)

    said = queuectl(
        "set", "early", "30 2 * * *", QUEUE, "patient.asked", '{"a": 1}',
        "--time-zone", "Europe/Berlin", "--priority", "high", "--metadata", '{"b": 2}',
    ).stdout  # fmt: skip
    assert said.startswith("early: At 02:30 every day; next at 20")
    [listed] = ask("list")["schedules"]
    assert listed == site.schedules()["early"]
    assert (listed["priority"], listed["metadata"]) == ("high", {"b": 2})
    message_id = ask("run", "early")["messageId"]
    assert site.wait_for(message_id, "completed")["priority"] == "high"
    assert queuectl("pause", "early").stdout == "early: paused\n"
    header, row = queuectl("list").stdout.splitlines()[:2]
    assert dict(zip(header.split(), row.split(), strict=False))["queueName"] == QUEUE
    assert "paused" in row
    assert ask("resume", "early")["enabled"] is True
    wrong = queuectl("set", "other", "61 * * * *", QUEUE, "patient.asked", status=2)
    assert "cron: is no cron expression: Bad minute" in wrong.stderr
    queuectl("set", "other", "* * * * *", QUEUE, "patient.asked", "{", status=2)
    queuectl("set", "o/r", "* * * * *", QUEUE, "patient.asked", status=2)
    # what somebody makes here queue_admin dispatches
    ask("set", "other-tick", "* * * * * *", QUEUE, "patient.asked", "-", input='{"n": 1}')
    site.flow.effects.wait_for(2, handler="first", payload={"n": 1})
    assert ask("remove", "other-tick") == {"name": "other-tick", "removed": True}
    queuectl("remove", "early")
    for word in ("run", "pause", "resume", "remove"):
        assert "no schedule early" in queuectl(word, "early", status=1).stderr
    assert ask("list") == {"schedules": []}
