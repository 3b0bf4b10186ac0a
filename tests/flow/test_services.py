"""The four services together, as real processes: from the sign-up to the mail."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from shared.testing.servers import free_port
from tests.support.processes import NamekoProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

SERVICES = ("auth_events", "company", "notifications", "queue_admin")
ADA = {
    "email": "Ada@Example.com",
    "password": "analytical engine",
    "first_name": "Ada",
    "last_name": "Lovelace",
    "company_name": "Engines",
    "company_domain": "example.com",
}
SEED_BODY = {
    "queueName": "user-events",
    "messageType": "user.registered",
    "payload": {
        "user_id": "123",
        "email": "user@example.com",
        "first_name": "John",
        "last_name": "Doe",
    },
    "priority": "normal",
    "metadata": {"source": "auth-service", "version": "1.0"},
}


class Suite:
    """The services on free ports."""

    def __init__(self, flow):
        self.flow = flow
        self.ports = {name: free_port() for name in ("auth_events", "company", "queue_admin")}
        flow.env.update(
            {f"{name.upper()}_ADDRESS": f"127.0.0.1:{port}" for name, port in self.ports.items()}
        )

    def start(self, *groups, arguments=()):
        """Start one process for each group of services."""
        for group in groups:
            self.flow.run(*[f"services.{name}" for name in group], arguments=arguments)

    def call(self, method, service, path, **kwargs):
        url = f"http://127.0.0.1:{self.ports[service]}{path}"
        return requests.request(method, url, timeout=20, **kwargs)

    def register(self, **changes):
        return self.call("POST", "auth_events", "/auth/register", json={**ADA, **changes})

    def login(self, email="ada@example.com", password=ADA["password"]):
        body = {"email": email, "password": password}
        return self.call("POST", "auth_events", "/auth/login", json=body)

    def person(self, user_id):
        return self.call("GET", "company", f"/company/users/{user_id}")

    def message(self, message_id):
        return self.call("GET", "queue_admin", f"/queue/messages/{message_id}").json()

    def stats(self):
        return self.call("GET", "queue_admin", "/queue/stats/user-events").json()

    def mails(self):
        return list((self.flow.folder / "var" / "mail").glob("*.eml"))

    def wait_for_completed(self, message_id):
        wait_until(
            lambda: self.message(message_id)["status"] == "completed",
            20,
            lambda: str(self.message(message_id)),
        )


@pytest.fixture
def suite(flow):
    return Suite(flow)


@pytest.fixture
def running(suite):
    suite.start(SERVICES)
    return suite


@pytest.mark.parametrize(
    "groups",
    [[SERVICES], [[name] for name in SERVICES]],
    ids=["four in one process", "each in a process of its own"],
)
def test_from_the_sign_up_to_the_mail(suite, groups):
    suite.start(*groups)

    answer = suite.register()

    assert answer.status_code == 201
    user_id = answer.json()["user"]["user_id"]
    assert answer.json()["user"]["email"] == "ada@example.com"
    assert answer.json()["user"]["role"] == "admin"
    suite.wait_for_completed(answer.json()["message_id"])
    assert suite.person(user_id).json() == {
        "user_id": user_id,
        "email": "ada@example.com",
        "first_name": "Ada",
        "last_name": "Lovelace",
        "role": "admin",
        "company": {"name": "Engines", "domain": "example.com"},
        "last_login_at": None,
        "open_sessions": 0,
    }
    assert len(suite.mails()) == 1
    deliveries = suite.message(answer.json()["message_id"])["deliveries"]
    assert sorted(each["subscriber"] for each in deliveries) == [
        "company.handle_user_registered",
        "notifications.send_welcome",
    ]


def test_a_login_and_a_logout_reach_the_company(running):
    user_id = running.register().json()["user"]["user_id"]
    answer = running.login(email="ADA@example.COM")
    assert answer.status_code == 200
    assert answer.json()["user_id"] == user_id
    wait_until(lambda: running.person(user_id).json().get("open_sessions") == 1, 15, "the login")
    assert running.person(user_id).json()["last_login_at"] is not None

    bearer = {"Authorization": f"Bearer {answer.json()['access_token']}"}
    assert running.call("POST", "auth_events", "/auth/logout", headers=bearer).status_code == 204

    wait_until(lambda: running.person(user_id).json()["open_sessions"] == 0, 15, "the logout")
    assert running.call("POST", "auth_events", "/auth/logout", headers=bearer).status_code == 401


def test_bare_in_one_terminal_and_with_the_configuration_in_another(suite):
    suite.start(["company"])
    suite.start(["auth_events"], arguments=("--config", "config.yml"))

    user_id = suite.register().json()["user"]["user_id"]

    wait_until(lambda: suite.person(user_id).status_code == 200, 15, "the registration")


def test_the_seeds_own_example_is_published_and_counted(running):
    answer = running.call("POST", "queue_admin", "/queue/publish", json=SEED_BODY)

    assert answer.status_code == 202
    running.wait_for_completed(answer.json()["messageId"])
    stats = running.stats()
    assert set(stats) == {
        "queueName", "pending", "processing", "completed", "failed", "retry", "total",
        "unrouted", "avgProcessingSeconds", "subscriptions",
    }  # fmt: skip
    assert (stats["completed"], stats["total"], stats["unrouted"]) == (1, 1, 0)
    assert stats["avgProcessingSeconds"] >= 0
    assert {"subscriber": "notifications.send_welcome", "waiting": 0, "active": 0,
            "scheduled": 0, "dead": 0} in stats["subscriptions"]  # fmt: skip
    assert running.person("123").json()["first_name"] == "John"


def test_what_failed_is_retried_over_http_and_nothing_else(suite):
    running = suite
    # nothing listens there
    suite.flow.env["MAIL_URL"] = f"smtp://127.0.0.1:{free_port()}"
    suite.start(SERVICES)
    body = {**SEED_BODY, "maxRetries": 0}
    answer = running.call("POST", "queue_admin", "/queue/publish", json=body)
    message_id = answer.json()["messageId"]
    wait_until(lambda: running.message(message_id)["status"] == "failed", 15, "the dead letter")

    answer = running.call("POST", "queue_admin", f"/queue/retry/{message_id}")

    assert (answer.status_code, answer.json()) == (202, {"messageId": message_id, "retried": 1})
    wait_until(
        lambda: any(len(d["history"]) == 2 for d in running.message(message_id)["deliveries"]),
        15,
        "the second attempt in the history",
    )
    company = next(
        d for d in running.message(message_id)["deliveries"] if d["subscriber"].startswith("comp")
    )
    assert (company["status"], company["attempts"]) == ("completed", 1)
    unknown = running.call("POST", "queue_admin", "/queue/retry/nobody")
    assert unknown.status_code == 404
    free = running.call("POST", "queue_admin", "/queue/publish", json={**body, "messageType": "x"})
    nothing = running.call("POST", "queue_admin", f"/queue/retry/{free.json()['messageId']}")
    assert nothing.status_code == 409


def deep(levels):
    return json.loads("[" * levels + "]" * levels)


def publish(**changes):
    return {**SEED_BODY, **changes}


BAD_PUBLISHES = {
    "malformed": (b"{", 400),
    "not an object": (b"[]", 400),
    "NaN": (json.dumps(publish(messageType="x", payload=float("nan"))).encode(), 400),
    "deep": (json.dumps(publish(messageType="x", payload=deep(65))).encode(), 400),
    "NUL": (json.dumps(publish(messageType="x", payload="\0")).encode(), 400),
    "wrong types": (json.dumps(publish(payload={"user_id": 1})).encode(), 422),
    "queue name": (json.dumps(publish(queueName="-x")).encode(), 422),
    "queue too long": (json.dumps(publish(queueName="x" * 201)).encode(), 422),
    "message type": (json.dumps(publish(messageType="a b")).encode(), 422),
    "priority": (json.dumps(publish(priority="asap")).encode(), 422),
    "retries": (json.dumps(publish(maxRetries=101)).encode(), 422),
    "schedule": (json.dumps(publish(scheduledAt="tomorrow")).encode(), 422),
    "no time zone": (json.dumps(publish(scheduledAt="2030-01-01T00:00:00")).encode(), 422),
    "too late": (json.dumps(publish(scheduledAt="2038-01-01T00:00:00Z")).encode(), 422),
    "line break": (
        json.dumps(
            publish(payload={**SEED_BODY["payload"], "email": "a@b.c\nBcc: d@e.f"})
        ).encode(),
        422,
    ),
    "version": (json.dumps(publish(metadata={"version": "9"})).encode(), 422),
    "unknown field": (json.dumps(publish(colour="red")).encode(), 422),
    "too large": (json.dumps(publish(payload="x" * 1_100_000)).encode(), 413),
}


def test_bad_input_is_a_problem_and_nothing_is_stored(running):
    for name, (body, status) in BAD_PUBLISHES.items():
        headers = {"Content-Type": "application/json"}
        answer = running.call("POST", "queue_admin", "/queue/publish", data=body, headers=headers)
        assert answer.status_code == status, (name, answer.text)
        assert answer.headers["Content-Type"] == "application/problem+json", name
        assert answer.json()["status"] == status, name
        assert answer.json()["type"].startswith("/problems/"), name
        if status == 422:
            named = {each.partition(".")[0] for each in answer.json()["errors"]}
            assert named <= {*SEED_BODY, "scheduledAt", "maxRetries", "colour"}, (name, named)
    for method, path, status in (("GET", "/nowhere", 404), ("PUT", "/queue/publish", 405)):
        answer = running.call(method, "queue_admin", path)
        assert answer.status_code == status
        assert answer.headers["Content-Type"] == "application/problem+json"
    registrations = [{"email": "a@b\nc.de"}, {"role": "admin"}, {"password": "short"}, {"email": 3}]
    for changes in registrations:
        assert running.register(**changes).status_code == 422, changes
    assert running.login("nobody@example.com").status_code == 401

    stats = running.stats()
    assert stats["total"] == 0


def test_of_the_same_address_in_any_case_at_once_one_is_taken(running):
    emails = ["ada@example.com", "ADA@example.com", "Ada@Example.COM"] * 3
    with ThreadPoolExecutor(len(emails)) as pool:
        answers = list(pool.map(lambda email: running.register(email=email).status_code, emails))

    assert sorted(answers) == [201] + [409] * 8
    wait_until(lambda: running.stats()["completed"] == 1, 15, lambda: str(running.stats()))
    assert running.stats()["total"] == 1


def test_health_is_red_while_work_waits_without_a_consumer(suite):
    suite.start(["company"], ["queue_admin"])
    assert suite.call("GET", "queue_admin", "/queue/health").status_code == 200
    suite.flow.processes[0].kill()
    suite.call("POST", "queue_admin", "/queue/publish", json=SEED_BODY)

    wait_until(
        lambda: suite.call("GET", "queue_admin", "/queue/health").status_code == 503,
        45,
        "the silence to be noticed",
    )
    health = suite.call("GET", "queue_admin", "/queue/health").json()
    assert health["status"] == "unhealthy"
    assert health["consumers"]["silent"] == ["user.registered company.handle_user_registered"]

    suite.start(["company"])
    wait_until(
        lambda: suite.call("GET", "queue_admin", "/queue/health").status_code == 200, 15, "health"
    )


def test_tokens_guard_everything_but_health(suite):
    token = "a-token-of-enough-length"
    suite.flow.env.update({"QUEUE_ADMIN_AUTH": "token", "QUEUE_ADMIN_TOKENS": token})
    suite.start(["queue_admin"])

    def status(path, **headers):
        return suite.call("GET", "queue_admin", path, headers=headers).status_code

    assert status("/queue/health") == 200
    assert status("/queue/stats/user-events") == 401
    assert status("/queue/stats/user-events", Authorization="Bearer wrong") == 401
    assert status("/queue/stats/user-events", Authorization=f"Bearer {token}") == 404


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("QUEUE_PROVIDER", "rabbitmqq", "QUEUE_PROVIDER: must be"),
        ("DB_PORT", "many", "DB_PORT: must be a whole number"),
        ("QUEUE_ADMIN_ADDRESS", "0.0.0.0:3005", "QUEUE_ADMIN_TOKENS: must hold a token"),
        ("QUEUE_SOURCES", "a=x,b=x", "QUEUE_SOURCES: must be pairs"),
    ],
)
def test_a_wrong_setting_ends_the_start_with_one_line(tmp_path, variable, value, said):
    process = NamekoProcess(
        "services.company",
        env={"QUEUE_DATA_DIR": str(tmp_path / "var"), variable: value},
        log=tmp_path / "process-0.log",
    )

    assert process.process.wait(20) == 2
    (line,) = process.output().strip().splitlines()
    assert line.startswith(f"Error: {said}")


def test_an_address_is_one_process_own(suite):
    suite.start(["company"])
    second = suite.flow.run("services.company", wait=False)

    assert second.process.wait(20) == 2
    said = second.output()
    where = f"127.0.0.1:{suite.ports['company']}"
    assert f"Error: company cannot listen on {where}: Address already in use\n" in said
    assert "Traceback" not in said
    assert suite.call("GET", "company", "/company/users/nobody").status_code == 404


def test_an_address_is_free_at_once_for_who_comes_after(suite):
    suite.start(["company"])
    [first] = suite.flow.processes
    with requests.Session() as kept:
        url = f"http://127.0.0.1:{suite.ports['company']}/company/users/nobody"
        assert kept.get(url, timeout=10).status_code == 404
        # closed by the server, a connection is remembered for a minute
        assert first.terminate() == 0
        suite.start(["company"])
        assert kept.get(url, timeout=10).status_code == 404
