"""The operations API of queue_admin, over HTTP, beside a service that fails until it is mended."""

import hashlib
import itertools
import re
import signal
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests

from services.queue_admin import QueueAdminService
from services.queue_admin.answers import Problem
from services.queue_admin.openapi import routes_of, statuses_of
from shared.testing.servers import free_port
from tests.conftest import migrate
from tests.flow.conftest import Flow
from tests.support.processes import freeze
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

QUEUE = "source"
FIRST, SECOND = "patient.first", "patient.second"


ROUTES = [route for route, _ in routes_of(QueueAdminService)]


def check_described(method, path, answer):
    """Check that an answer is one of those that /openapi.json tells of."""
    route = next(
        each
        for each in ROUTES
        if each.method == method and re.fullmatch(re.sub("<.+?>", "[^/]+", each.url), path)
    )
    assert answer.status_code in statuses_of(route), answer.text
    schema = route.answers if answer.status_code == route.status else Problem
    if schema is not None:
        assert schema().validate(answer.json()) == {}, answer.text


class Site:
    """queue_admin and the patient, each a process, on one log."""

    def __init__(self, folder, env):
        self.mended = folder / "mended"
        self.flow = Flow(folder, {**env, "QUEUE_MAX_RETRIES": "0", "MENDED": str(self.mended)})
        self.address = f"127.0.0.1:{free_port()}"
        self._numbers = itertools.count(1)
        self.flow.run("services.queue_admin", QUEUE_ADMIN_ADDRESS=self.address, wait=False)
        self.patient = self.flow.run("tests.flow.apps.patient")
        wait_until(self.is_open, 20, lambda: self.flow.processes[0].output())

    def is_open(self):
        return "queue ready" in self.flow.processes[0].output()

    def call(self, method, path, **options):
        answer = requests.request(method, f"http://{self.address}{path}", timeout=20, **options)
        check_described(method, path, answer)
        return answer

    def get(self, path, **query):
        answer = self.call("GET", path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path, status=200, **options):
        answer = self.call("POST", path, **options)
        assert answer.status_code == status, answer.text
        return answer.json()

    def publish(self, payload, message_type="patient.asked", **options):
        body = {"queueName": QUEUE, "messageType": message_type, "payload": payload, **options}
        return self.post("/queue/publish", 202, json=body)["messageId"]

    def listed(self, **query):
        return [each["messageId"] for each in self.get("/queue/messages", **query)["messages"]]

    def message(self, message_id):
        return self.get(f"/queue/messages/{message_id}")

    def delivery(self, message_id, subscriber):
        its = self.message(message_id)["deliveries"]
        return [each for each in its if each["subscriber"] == subscriber][-1]

    def wait_for(self, message_id, status):
        wait_until(
            lambda: self.message(message_id)["status"] == status,
            20,
            lambda: f"{status}: {self.message(message_id)} {self.reasons(message_id)}",
        )
        return self.message(message_id)

    def failed(self, **payload):
        """Publish a message whose first handler fails, and wait until it has."""
        message_id = self.publish({"fail": "value", **payload})
        self.wait_for(message_id, "failed")
        return message_id

    def mend(self):
        self.mended.touch()

    def subscription(self, subscriber):
        its = self.get("/queue/subscriptions", queue=QUEUE)["subscriptions"]
        return next(each for each in its if each["subscriber"] == subscriber)

    def pause(self, subscriber, word="pause"):
        path = f"/queue/subscriptions/{self.subscription(subscriber)['id']}/{word}"
        return self.post(path)

    def limit(self, subscriber, **limits):
        path = f"/queue/subscriptions/{self.subscription(subscriber)['id']}/limits"
        answer = self.call("PUT", path, json=limits)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_until_heard(self, names):
        """Wait until who consumes has heard of the limits."""
        wait_until(
            lambda: f"limits heard of: {names}\n" in self.patient.output(),
            10,
            lambda: self.patient.output(),
        )

    def reasons(self, message_id):
        return self.get(f"/queue/messages/{message_id}/why")["reasons"]

    def why(self, message_id, subscriber):
        its = self.reasons(message_id)
        return [each for each in its if each["subscriber"] == subscriber][-1]

    def ran(self, handler, message_id):
        return self.flow.effects.all(handler=handler, id=message_id)

    def trail(self):
        return self.get("/queue/audit-log", limit=100)["entries"]

    def word(self):
        """Return a word that no other test has."""
        return f"word{next(self._numbers)}x"


def _mariadb(request):
    database = request.getfixturevalue("mariadb_server").create_database()
    migrate(database.environment)
    return database.environment


def _redis(request):
    server = request.getfixturevalue("redis_server")
    # what an earlier module paused there would be paused here: each log begins with the same ids
    server.empty()
    return {"QUEUE_PROVIDER": "redis", **server.environment, **_mariadb(request)}


def _rabbitmq(request):
    server = request.getfixturevalue("rabbitmq_server")
    broker = {**server.environment, "RABBITMQ_VHOST": server.new_vhost()}
    return {"QUEUE_PROVIDER": "rabbitmq", **broker, **_mariadb(request)}


BACKENDS = {
    "sqlite": lambda _: {},
    "mariadb": _mariadb,
    "redis": _redis,
    "rabbitmq": _rabbitmq,
}


@pytest.fixture(scope="module", params=list(BACKENDS))
def made(request, tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp(request.param))
    site = Site(folder, dict(BACKENDS[request.param](request)))
    yield site
    site.flow.close()
    for log in sorted(folder.glob("process-*.log")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}")


@pytest.fixture
def site(made):
    """The site of the backend, with nothing mended or paused."""
    made.mended.unlink(missing_ok=True)
    return made


def in_seconds(seconds):
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


class TestMessages:
    def test_are_listed_newest_first_in_pages_that_stay(self, site):
        word = site.word()
        ids = [site.publish({"n": n, "say": word}) for n in range(5)]
        first = site.get("/queue/messages", text=word, limit=2)
        site.publish({"say": word})

        second = site.get("/queue/messages", text=word, limit=2, cursor=first["nextCursor"])
        third = site.get("/queue/messages", text=word, limit=2, cursor=second["nextCursor"])

        pages = [
            [each["messageId"] for each in page["messages"]] for page in (first, second, third)
        ]
        assert pages == [[ids[4], ids[3]], [ids[2], ids[1]], [ids[0]]]
        assert third["nextCursor"] is None
        # without a filter, too
        page = site.get("/queue/messages", limit=1)
        again = site.get("/queue/messages", limit=100, cursor=page["nextCursor"])
        assert page["messages"][0] not in again["messages"]
        assert len(again["messages"]) >= 5

    def test_are_found_by_each_filter(self, site):
        word = site.word()
        dead = site.failed(say=word, user={"age": 7, "tags": ["a", word], "ok": True, "no": None})
        other = site.publish({"say": word}, priority="urgent")
        alien = site.publish({"say": word}, message_type="nobody.asked")

        def found(**query):
            return site.listed(text=word, **query)

        assert found() == [alien, other, dead]
        assert found(queue=QUEUE) == [alien, other, dead]
        assert found(queue="elsewhere") == []
        assert found(type="nobody.asked") == [alien]
        assert found(status="failed") == [dead]
        assert found(priority="urgent") == [other]
        assert found(subscriber=FIRST) == [other, dead]
        assert found(subscriber=FIRST, exceptionType="ValueError") == [dead]
        assert found(subscriber=SECOND, exceptionType="ValueError") == []
        assert found(exceptionType="KeyError") == []
        assert found(createdTo=in_seconds(-100)) == []
        assert found(createdFrom=in_seconds(-100)) == [alien, other, dead]
        assert found(createdFrom=in_seconds(100)) == []
        for path, value in [
            ("$.user.age", "7"), ("$.user.ok", "true"), ("$.user.no", "null"),
            ("$.user.tags[1]", word), ("$.user.tags[0]", '"a"'),
        ]:  # fmt: skip
            assert found(payloadPath=path, payloadValue=value) == [dead], path
        for path, value in [
            ("$.user.age", "8"), ("$.user.age", '"7"'), ("$.user.ok", "1"),
            ("$.user.ok", "false"), ("$.user.tags[0]", "b"), ("$.nothing", "null"),
        ]:  # fmt: skip
            assert found(payloadPath=path, payloadValue=value) == [], path

    def test_are_found_by_text_as_it_is(self, site):
        word = site.word()
        odd = site.publish({"say": f'{word} "q" 100% a_b \\ é'})

        for text in (f'{word} "q"', "100% a_b", "\\ é"):
            assert odd in site.listed(text=text), text
        assert odd not in site.listed(text="100% aXb")
        assert odd not in site.listed(text=word.upper())

    @pytest.mark.parametrize(
        ("query", "field"),
        [
            ({"limit": "0"}, "limit"), ({"limit": "101"}, "limit"), ({"limit": "x"}, "limit"),
            ({"limit": "1_0"}, "limit"), ({"limit": "+10"}, "limit"),
            ({"limit": "\u0661"}, "limit"),
            ({"cursor": "nonsense"}, "cursor"), ({"status": "odd"}, "status"),
            ({"priority": "odd"}, "priority"), ({"queue": "a b"}, "queue"),
            ({"createdFrom": "yesterday"}, "createdFrom"),
            ({"createdTo": "0001-01-01T00:00:00+09:00"}, "createdTo"),
            ({"payloadPath": "$.a"}, "payloadValue"), ({"payloadValue": "a"}, "payloadPath"),
            ({"payloadPath": "a b", "payloadValue": "1"}, "payloadPath"),
            ({"text": ""}, "text"), ({"unknown": "1"}, "unknown"),
            ({"limit": ["1", "2"]}, "limit"),
        ],
    )  # fmt: skip
    def test_refuse_a_query_that_cannot_be(self, site, query, field):
        answer = site.call("GET", "/queue/messages", params=query)

        assert answer.status_code == 422, answer.text
        assert list(answer.json()["errors"]) == [field]

    @pytest.mark.parametrize(
        "place", ["alerts", "alerts/thresholds", "schedules", "failures", "stats", "retention"]
    )
    def test_refuse_a_query_where_there_is_nothing_to_ask(self, site, place):
        answer = site.call("GET", f"/queue/{place}", params={"status": "failed"})

        assert answer.status_code == 422, answer.text
        assert list(answer.json()["errors"]) == ["status"]
        assert site.call("GET", "/queue/health", params={"at": "1"}).status_code == 200

    @pytest.mark.parametrize(
        ("method", "path", "body"),
        [
            ("POST", "retry", {}), ("POST", "retry/some-id", None),
            ("POST", "subscriptions/1/pause", None), ("POST", "queues/source/resume", None),
            ("PUT", "subscriptions/1/limits", {}), ("DELETE", "schedules/some", None),
        ],
    )  # fmt: skip
    def test_refuse_a_query_where_a_body_or_nothing_says_what_is_changed(
        self, site, method, path, body
    ):
        answer = site.call(method, f"/queue/{path}", params={"queue": "other"}, json=body)

        assert answer.status_code == 422, answer.text
        assert list(answer.json()["errors"]) == ["queue"]


class TestCauses:
    def test_are_shown_both_ways(self, site):
        cause = site.publish({"n": 1}, message_type="chain.begun")
        wait_until(lambda: len(site.message(cause)["caused"]) == 2, 20, "effects")

        shown = site.message(cause)
        effects = [each["messageId"] for each in shown["caused"]]

        assert shown["causedBy"] == []
        assert {each["messageType"] for each in shown["caused"]} == {"chain.ended"}
        assert all(each["caused"] == [] for each in shown["caused"])
        assert not shown["causedMore"]
        effect = site.message(effects[0])
        assert [each["messageId"] for each in effect["causedBy"]] == [cause]
        assert effect["metadata"]["nameko"]["cause"] == cause
        assert "cause" not in shown["metadata"].get("nameko", {})


class TestRetrying:
    def test_by_filter_touches_what_fits_and_no_more(self, site):
        word = site.word()
        ours = [site.failed(say=word) for _ in range(3)]
        theirs = site.failed(say=word, fail="key")
        site.mend()

        body = {"text": word, "exceptionType": "ValueError", "subscriber": FIRST, "limit": 2}
        answer = site.post("/queue/retry", 202, json=body)

        assert (answer["messages"], answer["retried"]) == (2, 2)
        assert answer["nextCursor"]
        answer = site.post("/queue/retry", 202, json={**body, "cursor": answer["nextCursor"]})
        assert answer == {"messages": 1, "retried": 1, "nextCursor": None}
        for message_id in ours:
            site.wait_for(message_id, "completed")
            assert len(site.ran("first", message_id)) == len(site.ran("second", message_id)) == 1
        assert site.message(theirs)["status"] == "failed"
        # whose retry by the old call is in the audit log as well
        site.post(f"/queue/retry/{theirs}", 202)
        site.wait_for(theirs, "completed")
        done = [(each["action"], each["target"]) for each in site.trail()[:3]]
        retried = ("retry", "messages by filter")
        assert done == [("retry", f"message {theirs}"), retried, retried]
        assert site.trail()[0]["actor"] == "anonymous@127.0.0.1"
        filters = {
            "exception_type": "ValueError",
            "status": "failed",
            "subscriber": FIRST,
            "text": word,
        }
        assert site.trail()[1]["detail"]["filters"] == filters

    @pytest.mark.parametrize(
        ("body", "field"),
        [
            ({"limit": 0}, "limit"), ({"status": "completed"}, "status"),
            ({"payloadPath": "$.a", "payloadValue": [1]}, "payloadValue"),
            ({"payloadPath": "$.a", "payloadValue": 1 << 70}, "payloadValue"),
            ({"cursor": "nonsense"}, "cursor"),
        ],
    )  # fmt: skip
    def test_refuses_a_filter_that_cannot_be(self, site, body, field):
        answer = site.call("POST", "/queue/retry", json=body)

        assert answer.status_code == 422, answer.text
        assert list(answer.json()["errors"]) == [field]


class TestFailures:
    def group_of(self, site, message_id):
        its = site.get("/queue/failures")["failures"]
        return next((x for x in its if x["example"]["messageId"] == message_id), None)

    def test_are_grouped_by_exception_and_place(self, site):
        one = site.failed(fail="lookup", say="one")
        two = site.failed(fail="lookup", say="two")

        group = self.group_of(site, two)

        assert (group["errorType"], group["count"]) == ("LookupError", 2)
        assert group["place"] == "tests.flow.apps.patient.refuse"
        assert group["example"]["subscriber"] == FIRST
        assert group["example"]["errorMessage"] == "two"
        assert group["firstSeenAt"] <= group["lastSeenAt"]
        path = f"/queue/failures/{group['fingerprint']}"
        assert site.post(f"{path}/discard", params={"limit": 1}) == {"discarded": 1, "remaining": 1}
        assert site.message(one)["status"] == "completed"
        assert site.delivery(one, FIRST)["status"] == "discarded"
        site.mend()
        assert site.post(f"{path}/retry", 202) == {"retried": 1, "remaining": 0}
        site.wait_for(two, "completed")
        assert len(site.ran("first", two)) == 1
        assert site.ran("first", one) == []
        assert self.group_of(site, two) is None
        for word in ("retry", "discard"):
            problem = site.post(f"{path}/{word}", 409)
            assert problem["type"] == "/problems/nothing-to-retry"
        done = [(each["action"], each["target"]) for each in site.trail()[:2]]
        target = f"failure group {group['fingerprint']}"
        assert done == [("retry", target), ("discard", target)]

    def test_that_fail_again_are_in_their_group_again(self, site):
        dead = site.failed(fail="lookup", say="again")
        group = self.group_of(site, dead)
        assert site.post(f"/queue/failures/{group['fingerprint']}/retry", 202)["retried"] == 1

        wait_until(lambda: len(site.delivery(dead, FIRST)["history"]) == 2, 20, "another attempt")

        assert self.group_of(site, dead)["fingerprint"] == group["fingerprint"]
        site.post(f"/queue/messages/{dead}/discard")


class TestOneMessage:
    def test_is_discarded(self, site):
        dead = site.failed()

        assert site.post(f"/queue/messages/{dead}/discard") == {"messageId": dead, "discarded": 1}

        assert site.message(dead)["status"] == "completed"
        assert site.why(dead, FIRST)["reason"] == "discarded"
        problem = site.post(f"/queue/messages/{dead}/discard", 409)
        assert problem["type"] == "/problems/nothing-to-change"
        problem = site.post(f"/queue/retry/{dead}", 409)
        assert problem["type"] == "/problems/nothing-to-retry"

    def test_is_sent_anew_with_another_payload_to_those_that_failed(self, site):
        dead = site.failed(say="wrong")

        answer = site.post(
            f"/queue/messages/{dead}/resend", 202, json={"payload": {"say": "right"}}
        )

        new = answer["messageId"]
        assert (answer["origin"], answer["sent"]) == (dead, 1)
        shown = site.wait_for(new, "completed")
        assert (shown["origin"], shown["payload"]) == (dead, {"say": "right"})
        assert [each["subscriber"] for each in shown["deliveries"]] == [FIRST]
        assert len(site.ran("first", new)) == 1
        assert site.ran("second", new) == []
        old = site.message(dead)
        assert (old["status"], old["origin"]) == ("completed", None)
        assert site.delivery(dead, FIRST)["status"] == "discarded"
        assert site.trail()[0]["detail"]["newId"] == new
        problem = site.post(f"/queue/messages/{dead}/resend", 409, json={"payload": {}})
        assert problem["type"] == "/problems/nothing-to-retry"

    def test_is_cancelled_and_its_copy_is_not_run(self, site):
        later = site.publish({"say": "later"}, scheduledAt=in_seconds(1.5))
        assert site.why(later, FIRST)["reason"] == "scheduled"

        assert site.post(f"/queue/messages/{later}/cancel")["cancelled"] == 2

        assert site.message(later)["status"] == "completed"
        assert site.trail()[0] | {"id": 0, "at": ""} == {
            "id": 0, "at": "", "actor": "anonymous@127.0.0.1", "action": "cancel",
            "target": f"message {later}", "detail": {"deliveries": 2},
        }  # fmt: skip
        # what is scheduled after it has run: its own copy would have before
        after = site.publish({"say": "after"}, scheduledAt=in_seconds(2.5))
        site.wait_for(after, "completed")
        assert site.ran("first", later) == site.ran("second", later) == []
        problem = site.post(f"/queue/messages/{later}/cancel", 409)
        assert problem["type"] == "/problems/nothing-to-change"

    def test_is_put_forward_and_put_off(self, site):
        far = site.publish({"say": "far"}, scheduledAt=in_seconds(3600))
        near = site.publish({"say": "near"}, scheduledAt=in_seconds(2))

        path = f"/queue/messages/{far}/reschedule"
        assert site.post(path, json={"scheduledAt": in_seconds(-5)})["rescheduled"] == 2
        path = f"/queue/messages/{near}/reschedule"
        assert site.post(path, json={"scheduledAt": in_seconds(3600)})["rescheduled"] == 2

        site.wait_for(far, "completed")
        assert len(site.ran("first", far)) == len(site.ran("second", far)) == 1
        after = site.publish({"say": "after"}, scheduledAt=in_seconds(3))
        site.wait_for(after, "completed")
        assert site.ran("first", near) == []
        assert site.message(near)["status"] == "pending"
        assert site.why(near, FIRST)["sentence"].startswith("Scheduled until 20")
        assert site.post(f"/queue/messages/{near}/cancel")["cancelled"] == 2
        for body in ({}, {"scheduledAt": "soon"}, {"scheduledAt": "2400-01-01T00:00:00Z"}):
            problem = site.post(path, 422, json=body)
            assert list(problem["errors"]) == ["scheduledAt"]

    def test_that_is_not_there_is_said_so(self, site):
        for path in ("discard", "cancel"):
            problem = site.post(f"/queue/messages/nobody/{path}", 404)
            assert problem["type"] == "/problems/message-not-found"
        site.post("/queue/messages/nobody/resend", 404, json={"payload": 1})
        site.post("/queue/messages/nobody/reschedule", 404, json={"scheduledAt": in_seconds(1)})
        assert site.call("GET", "/queue/messages/nobody/why").status_code == 404


class TestSubscriptions:
    def test_are_paused_and_resumed(self, site):
        assert site.pause(FIRST)["paused"] is True

        held = [site.publish({"n": n}) for n in range(2)]
        urgent = site.publish({"n": 2}, priority="urgent")
        site.flow.effects.wait_for(1, handler="second", id=urgent)
        shown = site.subscription(FIRST)
        assert shown["pausedBy"] == "anonymous@127.0.0.1"
        assert (shown["waiting"], shown["consumer"]) == (3, "live")
        assert shown["oldestWaitingSeconds"] >= 0
        why = site.why(held[0], FIRST)
        assert why["sentence"] == f"Paused by anonymous@127.0.0.1 since {shown['pausedAt']}."
        assert site.why(held[0], SECOND)["reason"] == "completed"
        assert site.get("/queue/health")["status"] == "healthy"
        assert site.ran("first", held[0]) == []

        assert site.pause(FIRST, "resume")["paused"] is False

        for message_id in (*held, urgent):
            site.wait_for(message_id, "completed")
        assert site.subscription(FIRST)["pausedAt"] is None
        assert [each["action"] for each in site.trail()[:5]] == [
            "resume", "publish", "publish", "publish", "pause",
        ]  # fmt: skip

    def test_of_a_queue_are_paused_together(self, site):
        paused = site.post(f"/queue/queues/{QUEUE}/pause")
        message_id = site.publish({})

        for subscriber in (FIRST, SECOND):
            wait_until(lambda s=subscriber: site.why(message_id, s)["reason"] == "paused", 5, "why")
        assert len(paused["subscriptions"]) == 3
        resumed = site.post(f"/queue/queues/{QUEUE}/resume")
        assert resumed["subscriptions"] == paused["subscriptions"]
        site.wait_for(message_id, "completed")
        site.post("/queue/queues/nowhere/pause", 404)

    def test_are_limited_and_let_go(self, site):
        its = site.subscription(FIRST)
        assert its["limits"] is None
        done = site.limit(FIRST, rate=0.01, concurrency=5)
        limits = {"rate": 0.01, "burst": 1, "concurrency": 5}
        assert done == {"subscription": its["id"], "limits": limits}
        assert site.subscription(FIRST)["limits"] == limits
        site.wait_until_heard("patient.asked patient.first")
        ids = [site.publish({"n": n}) for n in range(4)]
        # one that may begin, in whichever order they arrived
        site.flow.effects.wait_for(4, handler="second")
        wait_until(lambda: sum(len(site.ran("first", each)) for each in ids) == 1, 20, "one to run")
        left = [each for each in ids if not site.ran("first", each)]
        wait_until(
            lambda: site.why(left[-1], FIRST)["reason"] == "rate-limited",
            20,
            lambda: str(site.why(left[-1], FIRST)),
        )
        why = site.why(left[-1], FIRST)
        assert why["sentence"] == "Rate-limited to 0.01/s; 2 are before it."
        assert why["evidence"] == {**limits, "inHand": 0, "before": 2}

        assert site.limit(FIRST)["limits"] is None
        for each in ids:
            site.wait_for(each, "completed")
        assert site.subscription(FIRST)["limits"] is None
        [last, first] = [each for each in site.trail() if each["action"] == "limit"][:2]
        assert (first["detail"], last["detail"]) == (limits, None)
        assert first["target"] == f"subscription {its['id']}"

    @pytest.mark.parametrize(
        ("body", "field"),
        [
            ({"rate": 0}, "rate"),
            ({"rate": "fast"}, "rate"),
            ({"rate": 1e9}, "rate"),
            ({"concurrency": 0}, "concurrency"),
            ({"concurrency": 1.5}, "concurrency"),
            ({"burst": 5}, "rate"),
            ({"speed": 5}, "speed"),
        ],
    )
    def test_refuse_a_limit_that_cannot_be(self, site, body, field):
        path = f"/queue/subscriptions/{site.subscription(FIRST)['id']}/limits"
        answer = site.call("PUT", path, json=body)
        assert answer.status_code == 422
        assert list(answer.json()["errors"]) == [field]
        assert site.call("PUT", "/queue/subscriptions/99999/limits", json={}).status_code == 404

    def test_are_retired_once_nobody_consumes_them(self, site):
        live = site.subscription(SECOND)["id"]
        problem = site.post(f"/queue/subscriptions/{live}/retire", 409)
        assert problem["type"] == "/problems/subscription-live"
        for unknown in ("12345", "9" * 30):
            for word in ("pause", "resume", "retire"):
                problem = site.post(f"/queue/subscriptions/{unknown}/{word}", 404)
                assert problem["type"] == "/problems/subscription-not-found"

        problem = site.post("/queue/queues/nowhere/resume", 404)
        assert problem["type"] == "/problems/queue-not-found"


class TestOverview:
    def overview(self, site, queue=QUEUE):
        its = site.get("/queue/stats")["queues"]
        return next((each for each in its if each["queueName"] == queue), None)

    def test_says_what_each_queue_has_to_do(self, site):
        before = self.overview(site)
        assert before["subscriptions"] == 3
        dead = site.failed(say="overview")
        later = site.publish({"n": 1}, scheduledAt=in_seconds(3600))
        site.pause(FIRST)
        held = site.publish({"n": 2})
        site.flow.effects.wait_for(1, handler="second", id=held)

        def grown(name):
            return self.overview(site)[name] - before[name]

        # what the worker of the other handler has in hand, it soon has not
        wait_until(lambda: grown("active") == 0, 20, "no work in hand")
        assert [grown(name) for name in ("dead", "scheduled", "waiting")] == [1, 2, 1]
        shown = self.overview(site)
        assert (shown["paused"], shown["silent"]) == (1, 0)
        assert shown["oldestWaitingSeconds"] >= 0

        site.pause(FIRST, "resume")
        site.wait_for(held, "completed")
        site.post(f"/queue/messages/{dead}/discard")
        site.post(f"/queue/messages/{later}/cancel")
        assert [grown(name) for name in ("dead", "scheduled", "waiting", "paused")] == [0, 0, 0, 0]

    def test_counts_the_last_minute_by_status(self, site):
        queue = site.word()
        assert self.overview(site, queue) is None
        body = {"queueName": queue, "messageType": "nobody.asked", "payload": {}}
        for _ in range(3):
            site.post("/queue/publish", 202, json=body)

        # until the second in which they were stored is over
        wait_until(
            lambda: sum(self.overview(site, queue)["recent"]["completed"]) == 3, 20, "the messages"
        )

        shown = self.overview(site, queue)
        assert shown["dispatchedPerSecond"] == 0.05
        assert {len(counts) for counts in shown["recent"].values()} == {30}
        assert sum(map(sum, shown["recent"].values())) == 3
        assert any(shown["recent"]["completed"][-20:])
        assert (shown["subscriptions"], shown["oldestWaitingSeconds"]) == (0, None)


class TestWhy:
    def test_says_who_has_it_and_what_it_is_behind(self, site):
        assert site.pause(FIRST)["paused"]
        low, normal = site.publish({}, priority="low"), site.publish({})
        high = site.publish({}, priority="high")
        # frozen while it writes, it would keep everybody from writing
        for message_id in (low, normal, high):
            wait_until(
                lambda each=message_id: site.delivery(each, SECOND)["status"] == "completed",
                10,
                "its sibling",
            )
        pid = site.patient.pid
        try:
            freeze(pid)
            site.pause(FIRST, "resume")
            behind = site.why(low, FIRST)
            assert behind["reason"] == "behind", behind
            assert behind["sentence"] == (
                "Behind 2 of higher priority and 0 older; workers have 0 in hand."
            )
            assert site.why(normal, FIRST)["evidence"]["higherPriority"] == 1
            assert site.why(high, FIRST)["reason"] == "next"
        finally:
            site.patient.process.send_signal(signal.SIGCONT)
        done = site.wait_for(low, "completed")
        why = site.why(low, FIRST)
        assert why["sentence"].startswith("Completed at 20"), why
        assert why["evidence"]["worker"].endswith(f":{pid}")
        assert done["status"] == "completed"

    def test_says_why_it_is_dead_and_that_nobody_was_subscribed(self, site):
        dead = site.failed(say="as told")
        alien = site.publish({}, message_type="nobody.asked")

        assert site.why(dead, FIRST)["sentence"] == "Dead after 1 attempt: ValueError: as told"
        [reason] = site.get(f"/queue/messages/{alien}/why")["reasons"]
        assert (reason["reason"], reason["subscriber"]) == ("unrouted", None)


class TestDescription:
    def test_lists_each_call_and_fetches_nothing(self, site):
        spec = site.get("/openapi.json")
        page = site.call("GET", "/docs")

        assert spec["openapi"] == "3.1.0"
        listed = spec["paths"]["/queue/messages"]["get"]
        limit = next(each for each in listed["parameters"] if each["name"] == "limit")
        assert limit["schema"] == {"type": "integer", "default": 50, "minimum": 1, "maximum": 100}
        assert page.headers["Content-Type"].startswith("text/html")
        assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; style-src")
        assert not re.search(r"https?:|<script|<link|<img", page.text)
        for path, its in spec["paths"].items():
            for method in its:
                assert f"<code>{method.upper()} {path}</code></h2>" in page.text


def test_the_audit_log_names_the_token(flow_on, tmp_path):
    secret, other = "s3cret-s3cret-s3cret", "another-another-another"
    flow = flow_on({"QUEUE_ADMIN_AUTH": "token", "QUEUE_ADMIN_TOKENS": f"ada:{secret},{other}"})
    address = f"127.0.0.1:{free_port()}"
    flow.run("services.queue_admin", QUEUE_ADMIN_ADDRESS=address)
    body = {"queueName": QUEUE, "messageType": "a", "payload": {}}

    def call(method, path, token, **options):
        headers = {"Authorization": f"Bearer {token}"}
        return requests.request(
            method, f"http://{address}{path}", headers=headers, timeout=20, **options
        )

    for token, status in [(secret, 202), (other, 202), (f"ada:{secret}", 401), ("ada", 401)]:
        assert call("POST", "/queue/publish", token, json=body).status_code == status
    assert requests.get(f"http://{address}/openapi.json", timeout=20).status_code == 401
    entries = call("GET", "/queue/audit-log", secret, params={"limit": 1}).json()
    digest = hashlib.sha256(other.encode()).hexdigest()[:8]
    assert [each["actor"] for each in entries["entries"]] == [f"token-{digest}"]
    older = call("GET", "/queue/audit-log", secret, params={"before": entries["nextBefore"]})
    assert [each["actor"] for each in older.json()["entries"]] == ["ada"]
    assert older.json()["nextBefore"] is None


def test_a_subscription_that_nobody_consumes_is_said_so_and_retired(flow_on):
    flow = flow_on({})
    patient = flow.run("tests.flow.apps.patient")
    address = f"127.0.0.1:{free_port()}"
    flow.run("services.queue_admin", QUEUE_ADMIN_ADDRESS=address)
    patient.kill()
    with closing(sqlite3.connect(flow.folder / "var" / "queue.db")) as log, log:
        log.execute("UPDATE queue_subscriptions SET seen_at = '2026-01-02 03:04:05.000000'")
    message_id = flow.send("patient.asked", {})

    def call(method, path):
        return requests.request(method, f"http://{address}{path}", timeout=20).json()

    [why, _] = call("GET", f"/queue/messages/{message_id}/why")["reasons"]
    said = "Nobody consumes this subscription since 2026-01-02T03:04:05.000Z."
    assert (why["reason"], why["sentence"]) == ("silent", said)
    shown = call("GET", f"/queue/subscriptions?queue={QUEUE}")["subscriptions"]
    its = {each["subscriber"]: each for each in shown if each["messageType"] == "patient.asked"}
    assert {each["consumer"] for each in its.values()} == {"silent"}
    assert its[FIRST]["waiting"] == 1

    for each in its.values():
        assert call("POST", f"/queue/subscriptions/{each['id']}/retire")["retired"] is True

    assert flow.message(message_id)["status"] == "completed"
    assert call("GET", f"/queue/messages/{message_id}/why")["reasons"][0]["reason"] == "discarded"
    problem = call("POST", f"/queue/subscriptions/{its[FIRST]['id']}/retire")
    assert problem["type"] == "/problems/subscription-not-found"
