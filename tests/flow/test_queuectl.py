"""The commands of queuectl, beside a service that fails until it is mended."""

import json
import os
import pwd
import re
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from shared.cli import main
from shared.database import database_url, make_reader
from shared.store import trail
from tests.flow.conftest import Flow
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

PATIENT = "tests.flow.apps.patient"
QUEUE, TYPE = "source", "patient.asked"
FIRST, SECOND = "patient.first", "patient.second"
ME = f"{pwd.getpwuid(os.getuid()).pw_name}@{socket.gethostname()}"


class Desk:
    """Somebody at a shell, beside a patient that tries once."""

    def __init__(self, flow):
        self.flow = flow
        self.mended = flow.folder / "mended"
        self.flow.env |= {"QUEUE_MAX_RETRIES": "0", "MENDED": str(self.mended)}
        self.patient = None

    def start(self):
        self.patient = self.flow.run(PATIENT)

    def run(self, *args, status=0, input=None):
        """Run a command; return what it did."""
        done = CliRunner().invoke(main, args, env=self.flow.env, input=input)
        assert done.exit_code == status, (args, done.output, done.exception)
        return done

    def ask(self, *args, **options):
        """Return the JSON that a command prints."""
        return json.loads(self.run(*args, "--json", **options).stdout)

    def publish(self, payload, *options, message_type=TYPE):
        text = json.dumps(payload)
        return self.ask("publish", QUEUE, message_type, text, *options)["messageId"]

    def failed(self, **payload):
        message_id = self.publish({"fail": "value", **payload})
        self.flow.wait_for_status(message_id, "failed")
        return message_id

    def subscription(self, subscriber):
        its = self.ask("subscriptions", QUEUE)["subscriptions"]
        return next(x for x in its if (x["subscriber"], x["messageType"]) == (subscriber, TYPE))

    def ran(self, handler, message_id):
        return self.flow.effects.all(handler=handler, id=message_id)

    def trail(self):
        """Return who did what, the newest first."""
        engine = make_reader(database_url(self.flow.settings), lambda _: None)
        with engine.connect() as connection:
            found = trail.entries(connection, None, 100)["entries"]
        engine.dispose()
        return found

    def group(self):
        [group] = self.ask("failures")["failures"]
        return group


@pytest.fixture
def desk(backend_flow):
    made = Desk(backend_flow)
    made.start()
    return made


@pytest.fixture
def plain_desk(flow: Flow):
    """On SQLite alone: what has nothing to do with a provider."""
    made = Desk(flow)
    made.start()
    return made


def test_a_message_is_published_found_explained_and_retried(desk):
    dead = desk.failed(say="as told")

    assert desk.ask("stats", QUEUE)["failed"] == 1
    queues = [each["queueName"] for each in desk.ask("stats")["queues"]]
    assert queues == ["patient", QUEUE]
    found = desk.ask("messages", "--status", "failed", "--text", "as told", "--subscriber", FIRST)
    assert [each["messageId"] for each in found["messages"]] == [dead]
    assert desk.ask("messages", "--queue", "elsewhere")["messages"] == []
    shown = desk.ask("show", dead)
    assert (shown["origin"], shown["payload"]) == (None, {"fail": "value", "say": "as told"})
    sentence = "Dead after 1 attempt: ValueError: as told"
    assert sentence in [each["sentence"] for each in desk.ask("why", dead)["reasons"]]
    for command in (["stats"], ["messages"], ["show", dead], ["failures"], ["subscriptions"]):
        assert desk.run(*command).stdout.strip()
    assert f"{FIRST}: {sentence}" in desk.run("why", dead).stdout
    assert "ValueError: as told" in desk.run("show", dead).stdout  # the traceback

    desk.mended.touch()
    assert desk.ask("retry", dead) == {"messageId": dead, "retried": 1}

    desk.flow.wait_for_status(dead, "completed")
    assert len(desk.ran("first", dead)) == len(desk.ran("second", dead)) == 1
    done = [(each["actor"], each["action"], each["target"]) for each in desk.trail()]
    assert done == [(ME, "retry", f"message {dead}"), (ME, "publish", f"message {dead}")]


def test_what_is_put_back_is_handed_to_the_provider_by_the_command_itself(desk):
    """Given nobody who would relay it."""
    dead = desk.failed()
    waiting = desk.publish({})
    desk.flow.wait_for_status(waiting, "completed")
    desk.patient.kill()

    assert desk.ask("retry", dead)["retried"] == 1
    later = desk.publish({"say": "later"})

    def shown():
        its = {
            x["subscriber"]: x
            for x in desk.ask("audit")["subscriptions"]
            if x["messageType"] == TYPE
        }
        return [
            [its[x][key] for key in ("inLog", "inProvider", "missing")] for x in (FIRST, SECOND)
        ]

    # RabbitMQ may take a moment to hear that who was killed has nothing in hand any more
    wait_until(lambda: shown() == [[0, 2, 0], [0, 1, 0]], 20, lambda: str(shown()))
    desk.mended.touch()
    desk.start()
    for message_id in (dead, later):
        desk.flow.wait_for_status(message_id, "completed")
        assert len(desk.ran("first", message_id)) == len(desk.ran("second", message_id)) == 1


def test_dead_letters_are_retried_by_filter_and_by_group_and_discarded(desk):
    dead = [desk.failed(fail="lookup", say=f"no {n}") for n in range(4)]
    other = desk.failed(say="another")
    desk.mended.touch()

    done = desk.ask("retry", "--exception-type", "LookupError", "--limit", "1")
    assert done == {"messages": 1, "retried": 1}
    desk.flow.wait_for_status(dead[3], "completed")
    group = next(x for x in desk.ask("failures")["failures"] if x["errorType"] == "LookupError")
    its = group["fingerprint"]
    assert group["count"] == 3
    assert desk.ask("discard", "--group", its, "--limit", "1") == {"discarded": 1, "remaining": 2}
    assert desk.ask("why", dead[0])["reasons"][0]["reason"] == "discarded"
    assert desk.ask("retry", "--group", its) == {"retried": 2, "remaining": 0}
    for message_id in dead[1:3]:
        desk.flow.wait_for_status(message_id, "completed")
        assert len(desk.ran("first", message_id)) == 1
    assert "no dead letter is in the group" in desk.run("retry", "--group", its, status=1).stderr
    assert desk.ask("discard", other) == {"messageId": other, "discarded": 1}
    assert desk.ran("first", other) == []
    assert desk.run("retry", other, status=1).stderr.startswith("Error: ")


def test_a_group_whose_cause_is_there_yet_is_retried_once_and_no_more(plain_desk):
    desk = plain_desk
    for _ in range(3):
        desk.failed()

    assert desk.ask("retry", "--group", desk.group()["fingerprint"])["retried"] == 3

    def counts():
        # until the first of them fails again, there is no group
        return [each["count"] for each in desk.ask("failures")["failures"]]

    wait_until(lambda: counts() == [3], 20, "all of them to fail again")


def test_what_waits_is_held_cancelled_and_goes_on(desk):
    first = desk.subscription(FIRST)
    assert desk.ask("pause", str(first["id"])) == {"subscriptions": [first["id"]], "paused": True}
    held, given_up = desk.publish({}), desk.publish({})
    desk.flow.effects.wait_for(1, handler="second", id=given_up)
    assert desk.subscription(FIRST)["pausedBy"] == ME
    wait_until(lambda: desk.ask("why", held)["reasons"][0]["reason"] == "paused", 20, "the pause")

    assert desk.ask("cancel", given_up) == {"messageId": given_up, "cancelled": 1}
    assert desk.ask("resume", str(first["id"]))["paused"] is False

    desk.flow.wait_for_status(held, "completed")
    assert len(desk.ran("first", held)) == 1
    assert desk.ran("first", given_up) == []
    paused = desk.ask("pause", "--queue", QUEUE)["subscriptions"]
    assert desk.ask("resume", "--queue", QUEUE) == {"subscriptions": paused, "paused": False}
    assert desk.run("pause", "--queue", "nowhere", status=1).stderr == "Error: no queue nowhere\n"
    assert "was there in the last 30 s" in desk.run("retire", str(first["id"]), status=1).stderr
    actions = [each["action"] for each in desk.trail()][-1::-1]
    assert actions[:5] == ["pause", "publish", "publish", "cancel", "resume"]


def test_a_subscription_is_limited(desk):
    its = str(desk.subscription(FIRST)["id"])
    limits = {"rate": 10.0, "burst": 1, "concurrency": 2}

    done = desk.ask("limit", its, "--rate", "10", "--concurrency", "2")
    assert done == {"subscription": int(its), "limits": limits}
    assert desk.subscription(FIRST)["limits"] == limits
    assert "10 a second, 1 together; 2 at once" in desk.run("subscriptions").stdout
    held = desk.publish({})
    desk.flow.wait_for_status(held, "completed")

    said = desk.run("limit", its, "--rate", "0.5", "--burst", "7").stdout
    assert said == f"subscription {its}: 0.5 a second, 7 together\n"
    assert desk.run("limit", its, "--none").stdout == f"subscription {its}: no limits\n"
    assert desk.subscription(FIRST)["limits"] is None
    assert desk.run("limit", "99999", "--none", status=1).stderr.startswith("Error: no subscr")
    removed = next(each for each in desk.trail() if each["action"] == "limit")
    assert (removed["actor"], removed["detail"]) == (ME, None)


def test_a_subscription_without_a_handler_is_retired(plain_desk):
    desk = plain_desk
    desk.patient.kill()
    with closing(sqlite3.connect(desk.flow.folder / "var" / "queue.db")) as log, log:
        log.execute("UPDATE queue_subscriptions SET seen_at = '2026-01-02 03:04:05.000000'")
    waiting = desk.publish({})
    its = desk.subscription(FIRST)["id"]

    assert desk.ask("retire", str(its)) == {"subscriptions": [its], "retired": True}

    assert desk.ask("why", waiting)["reasons"][0]["reason"] == "discarded"
    assert "no subscription" in desk.run("retire", str(its), status=1).stderr


BROKEN = json.dumps(
    {"messageId": "a", "queueName": "user-events", "messageType": "user.registered", "payload": {}}
)
"""A line whose payload breaks the contract."""


class TestTransfer:
    def test_what_is_imported_is_dispatched_anew_and_once(self, desk):
        dead = desk.failed(say="over there")
        fine = desk.publish({"say": "fine"}, "--priority", "high")
        desk.flow.wait_for_status(fine, "completed")
        file = desk.flow.folder / "messages.jsonl"

        assert desk.run("export", str(file)).stderr == "1 exported\n"
        [line] = map(json.loads, file.read_text().splitlines())
        assert (line["messageId"], line["payload"]["say"]) == (dead, "over there")
        desk.mended.touch()
        assert desk.ask("import", str(file)) == {"imported": 1, "known": 0, "homeless": 0}
        again = desk.run("import", "-", input=file.read_text())
        assert again.stdout == "0 imported, 1 were imported before\n"

        [new] = [
            each
            for each in desk.ask("messages", "--text", "over there")["messages"]
            if each["messageId"] != dead
        ]
        shown = desk.ask("show", new["messageId"])
        assert shown["origin"] == dead
        desk.flow.wait_for_status(new["messageId"], "completed")
        assert len(desk.ran("first", new["messageId"])) == 1
        assert len(desk.ran("second", new["messageId"])) == 1
        assert desk.flow.message(dead)["status"] == "failed"
        every = desk.run("export", "--queue", QUEUE).stdout.splitlines()
        assert [json.loads(each)["messageId"] for each in every] == [dead, fine, new["messageId"]]
        [entry] = [each for each in desk.trail() if each["action"] == "import"]
        assert (entry["actor"], entry["detail"]["messages"]) == (ME, 1)

    def test_what_is_restored_goes_to_those_alone_who_had_not_done_with_it(self, desk):
        dead = desk.failed(say="restored")
        lines = desk.run("export").stdout
        desk.ask("discard", dead)
        desk.mended.touch()

        done = desk.ask("import", "--restore", input=lines + lines)

        assert done == {"imported": 1, "known": 1, "homeless": 0}
        assert desk.ask("import", "--restore", input=lines)["known"] == 1
        assert desk.ask("import", input=lines)["known"] == 1
        [new] = [
            each["messageId"]
            for each in desk.ask("messages", "--text", "restored")["messages"]
            if each["messageId"] != dead
        ]
        desk.flow.wait_for_status(new, "completed")
        shown = desk.ask("show", new)
        assert shown["origin"] == dead
        assert [each["subscriber"] for each in shown["deliveries"]] == [FIRST]
        assert len(desk.ran("first", new)) == 1
        assert desk.ran("second", new) == []

    def test_what_nobody_subscribes_to_is_not_restored(self, plain_desk):
        plain_desk.failed()
        line = json.loads(plain_desk.run("export").stdout)
        line["messageType"] = "patient.gone"

        done = plain_desk.run("import", "--restore", input=json.dumps(line), status=1)

        assert done.stdout == "0 imported, 0 were imported before\n"
        assert done.stderr == "Error: 1 not restored: nobody subscribes\n"

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("{", "is not JSON"),
            ('{"messageId": "a"}', "queueName: Missing data for required field."),
            ("[]", "line: Invalid input type."),
            ('{"messageId": "a", "queueName": "a b", "messageType": "c", "payload": 1}', "queue"),
            (BROKEN, "user_id"),
        ],
    )
    def test_a_line_that_cannot_be_is_named(self, plain_desk, line, said):
        good = '{"messageId": "b", "queueName": "b", "messageType": "c", "payload": 1}\n'

        done = plain_desk.run("import", input=f"\n{good}{line}", status=2)

        assert "line 3: " in done.stderr
        assert said in done.stderr

    def test_what_waits_for_a_time_waits_for_it_where_it_is_restored(self, plain_desk):
        later = plain_desk.publish({"n": 1}, "--scheduled-at", "2031-01-02T03:04:05Z")
        line = json.loads(plain_desk.run("export").stdout)
        assert (line["messageId"], line["scheduledAt"][:19]) == (later, "2031-01-02T03:04:05")

        plain_desk.ask("import", "--restore", input=json.dumps(line))

        [new, _] = plain_desk.ask("messages", "--type", TYPE)["messages"]
        times = [
            each["availableAt"] for each in plain_desk.ask("show", new["messageId"])["deliveries"]
        ]
        assert times == ["2031-01-02T03:04:05.000Z"] * 2


def test_what_is_done_while_redis_is_away_is_stored_and_relayed_later(
    flow_on, request, redis_server, mariadb_log
):
    redis_server.empty()
    desk = Desk(flow_on({"QUEUE_PROVIDER": "redis", **redis_server.environment, **mariadb_log}))
    desk.start()
    dead = desk.failed()
    desk.mended.touch()
    redis_server.stop()
    try:
        done = desk.run("retry", dead)
        assert "stored, and relayed when redis takes it" in done.stderr
        new = desk.publish({"say": "meanwhile"})
        pausing = desk.run("pause", str(desk.subscription(FIRST)["id"]), status=1)
        assert pausing.stderr.startswith("Error: ")
        assert desk.subscription(FIRST)["pausedBy"] is None
    finally:
        redis_server.start()
    for message_id in (dead, new):
        desk.flow.wait_for_status(message_id, "completed", 40)
        assert len(desk.ran("first", message_id)) == 1


def test_watching_says_each_time_what_there_is(plain_desk):
    plain_desk.publish({"say": "look"})

    done = plain_desk.run("watch", QUEUE, "--count", "2", "--interval", "0.1", "--json")

    looks = [json.loads(line) for line in done.stdout.splitlines()]
    assert [[each["queueName"] for each in look["queues"]] for look in looks] == [[QUEUE]] * 2
    assert "waiting" in plain_desk.run("watch", "--count", "1").stdout
    assert plain_desk.run("watch", "nowhere", status=1).stderr == "Error: no queue nowhere\n"


class TestEnding:
    """Statuses: 1 where something failed, 2 where a setting or an argument is wrong."""

    @pytest.mark.parametrize(
        "args",
        [
            ["retry"], ["retry", "a", "--group", "b"], ["discard"], ["pause"],
            ["pause", "1", "--queue", "a"], ["pause", "x"], ["limit", "1"], ["limit", "--none"],
            ["limit", "1", "--none", "--rate", "2"], ["limit", "1", "--rate", "0"],
            ["limit", "1", "--burst", "2", "--concurrency", "2"], ["limit", "1", "--rate", "nan"],
            ["alerts", "set", "a", "--oldest-seconds", "nan"],
            ["messages", "--queue", "a b"],
            ["messages", "--limit", "0"], ["messages", "--created-from", "yesterday"],
            ["messages", "--created-to", "2400-01-01T00:00:00Z"],
            ["messages", "--payload-path", "$.a"], ["messages", "--cursor", "nonsense"],
            ["messages", "--payload-path", "a b", "--payload-value", "1"],
            ["publish", "a b", "c"], ["publish", "a", "c", "{"], ["publish", "a", "c", "NaN"],
            ["publish", "a", "c", "--metadata", "[]"], ["publish", "a", "c", "--delay", "-1"],
            ["publish", "user-events", "user.registered", "{}"], ["import", "no-such-file"],
            ["watch", "--interval", "0"], ["config", "check", "--config", "no-such-file"],
        ],
    )  # fmt: skip
    def test_an_argument_that_cannot_be_is_2(self, sqlite_log, args):
        done = CliRunner().invoke(main, args, env=sqlite_log)
        assert (done.exit_code, done.stdout) == (2, ""), done.output
        assert re.fullmatch(r"Error: [^\n]+\n", done.stderr)

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["stats", "--odd"], "No such option"),
            (["alerts", "set"], "Missing argument 'QUEUE'; see queuectl alerts set --help"),
            (["nonsense"], "No such command 'nonsense'; see queuectl --help"),
            (
                ["messages", "--priority", "x"],
                "'x' is not one of 'low', 'normal', 'high', 'urgent'",
            ),
            (["limit", "1"], "--none, or at least one of --rate and --concurrency; see queuectl"),
        ],
    )
    def test_a_usage_error_has_its_cause_and_where_help_is(self, sqlite_log, args, said):
        done = CliRunner().invoke(main, args, prog_name="queuectl", env=sqlite_log)
        assert done.exit_code == 2
        assert said in done.stderr
        assert re.fullmatch(r"Error: .*; see queuectl( \w+)* --help\n", done.stderr)

    @pytest.mark.parametrize("args", [[], ["alerts"]])
    def test_without_anything_the_help_is_shown(self, sqlite_log, args):
        done = CliRunner().invoke(main, args, env=sqlite_log)
        assert "Commands:" in done.output
        assert "Error" not in done.output

    @pytest.mark.parametrize(
        "args",
        [
            ["show", "nobody"], ["why", "nobody"], ["retry", "nobody"], ["discard", "nobody"],
            ["cancel", "nobody"], ["pause", "12345"], ["resume", "12345"], ["retire", "12345"],
            ["retire", "9999999999"], ["stats", "nowhere"], ["discard", "--group", "nothing"],
        ],
    )  # fmt: skip
    def test_what_is_not_there_is_1(self, sqlite_log, args):
        done = CliRunner().invoke(main, args, env=sqlite_log)
        assert (done.exit_code, done.stdout) == (1, ""), done.output
        assert done.stderr.startswith("Error: ")

    def test_no_log_is_1_and_none_is_made(self, tmp_path):
        for command in (["stats"], ["publish", "a", "b"], ["retry", "--all"]):
            done = CliRunner().invoke(main, command, env={"QUEUE_DATA_DIR": str(tmp_path)})
            assert done.exit_code == 1
            assert "there is no message log" in done.stderr
        assert list(tmp_path.glob("*.db")) == []

    def test_an_unreachable_database_is_1(self, tmp_path):
        env = {"QUEUE_DATA_DIR": str(tmp_path), "DB_HOST": "127.0.0.1", "DB_PORT": "1"}
        done = CliRunner().invoke(main, ["stats"], env=env)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "127.0.0.1" in done.stderr

    def test_without_a_log_is_2(self, tmp_path):
        env = {"QUEUE_DATA_DIR": str(tmp_path), "QUEUE_PROVIDER": "rabbitmq", "QUEUE_LOG": "off"}
        done = CliRunner().invoke(main, ["stats"], env=env)
        assert done.exit_code == 2
        assert "QUEUE_LOG" in done.stderr

    def test_nothing_to_be_retried_by_filter_is_0(self, sqlite_log):
        done = CliRunner().invoke(main, ["retry", "--all", "--json"], env=sqlite_log)
        assert (done.exit_code, json.loads(done.stdout)) == (0, {"messages": 0, "retried": 0})


class TestConfig:
    def check(self, env, *args):
        done = CliRunner().invoke(main, ["config", "check", "--json", *args], env=env)
        found = json.loads(done.stdout)
        return done.exit_code, {x["name"]: x for x in found["settings"]}, found["wrong"]

    def test_says_where_each_came_from(self, tmp_path):
        file = tmp_path / "config.yml"
        file.write_text("QUEUE_MAX_RETRIES: ${QUEUE_MAX_RETRIES:7}\nREDIS_DB: 4\n")
        env = {"QUEUE_DATA_DIR": str(tmp_path), "REDIS_DB": "5"}

        status, found, wrong = self.check(env, "--config", str(file))

        assert (status, wrong) == (0, [])
        shown = {name: (found[name]["value"], found[name]["origin"]) for name in found}
        assert shown["QUEUE_MAX_RETRIES"] == ("7", "configuration")
        assert shown["REDIS_DB"] == ("5", "environment")
        assert shown["QUEUE_LEASE_SECONDS"] == ("30", "default")
        assert "nothing is wrong" in CliRunner().invoke(main, ["config", "check"], env=env).stdout

    def test_names_what_is_no_setting(self, tmp_path):
        file = tmp_path / "config.yml"
        file.write_text("QUEUE_MAX_RETRY: 7\nmax_workers: 3\nLOGGING: {}\n5: 6\n")
        env = {
            "QUEUE_DATA_DIR": str(tmp_path), "QUEUE_LEASE_SECOND": "5", "ALERT_MAIL": "x",
            "QUEUE_XYZZY_PLUGH_42": "1", "REDIS_HOST": "redis", "QUEUED": "1",
        }  # fmt: skip
        done = CliRunner().invoke(main, ["config", "check", "--config", str(file)], env=env)
        assert done.exit_code == 0
        assert done.stdout.splitlines()[-5:] == [
            "ALERT_MAIL: is no setting; did you mean ALERT_MAIL_TO?",
            "QUEUE_LEASE_SECOND: is no setting; did you mean QUEUE_LEASE_SECONDS?",
            "QUEUE_MAX_RETRY: is no setting; did you mean QUEUE_MAX_RETRIES?",
            "QUEUE_XYZZY_PLUGH_42: is no setting",
            "nothing else is wrong",
        ]
        args = ["config", "check", "--json", "--config", str(file)]
        found = json.loads(CliRunner().invoke(main, args, env=env).stdout)
        assert [each.partition(":")[0] for each in found["unknown"]] == [
            "ALERT_MAIL", "QUEUE_LEASE_SECOND", "QUEUE_MAX_RETRY", "QUEUE_XYZZY_PLUGH_42",
        ]  # fmt: skip
        assert found["wrong"] == []

    def test_says_all_that_is_wrong(self, tmp_path):
        (tmp_path / "file").touch()
        env = {
            "QUEUE_DATA_DIR": str(tmp_path), "QUEUE_LEASE_SECONDS": "0", "REDIS_PORT": "x",
            "QUEUE_ADMIN_AUTH": "token",
        }  # fmt: skip
        status, found, wrong = self.check(env)

        assert status == 2
        assert found["QUEUE_LEASE_SECONDS"]["wrong"] == "must be a number from 1 to 86400"
        assert found["REDIS_HOST"]["wrong"] is None
        names = [each.partition(":")[0] for each in wrong]
        assert names == ["QUEUE_LEASE_SECONDS", "REDIS_PORT", "QUEUE_ADMIN_TOKENS"]
        status, _, wrong = self.check({"QUEUE_DATA_DIR": str(tmp_path / "file")})
        assert (status, wrong[0].partition(":")[0]) == (2, "QUEUE_DATA_DIR")

    def test_hides_what_is_secret(self, tmp_path):
        secret = "s3cr3t-s3cr3t-s3cr3t"
        env = {
            "QUEUE_DATA_DIR": str(tmp_path), "DB_PASSWORD": secret, "REDIS_PASSWORD": secret,
            "RABBITMQ_PASSWORD": secret, "QUEUE_ADMIN_TOKENS": f"ada:{secret}",
            "MAIL_URL": f"smtp://me:{secret}@mail.example:25",
            "REDIS_URL": f"rediss://:{secret}@redis.example/1?ssl_password={secret}",
            "AMQP_URI": f"amqp://me:{secret}@one;amqp://me:{secret}@two/vhost",
        }  # fmt: skip
        done = CliRunner().invoke(main, ["config", "check"], env=env)
        assert done.exit_code == 0, done.output
        assert secret not in done.output
        assert "smtp://***@mail.example:25" in done.output
        for name in ("MAIL_URL", "REDIS_URL", "AMQP_URI"):
            broken = {**env, name: f"nonsense {secret} @ {secret}@{name.lower()}"}
            done = CliRunner().invoke(main, ["config", "check"], env=broken)
            assert done.exit_code == 2
            assert secret not in done.output, done.output


class TestShell:
    def complete(self, words, shell="bash"):
        env = {
            **os.environ, "_QUEUECTL_COMPLETE": f"{shell}_complete",
            "COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")),
        }  # fmt: skip
        program = str(Path(sys.executable).with_name("queuectl"))
        done = subprocess.run([program], env=env, capture_output=True, text=True, check=False)
        return {line.partition(",")[2] for line in done.stdout.splitlines()}

    def test_completes_commands_options_and_words(self):
        assert {"retry", "retire", "resume"} <= self.complete("queuectl re")
        assert "--exception-type" in self.complete("queuectl messages --e")
        assert self.complete("queuectl messages --status f") == {"failed"}

    def test_a_pipe_has_no_bar_and_nothing_but_the_lines(self, plain_desk):
        plain_desk.failed()
        program = Path(sys.executable).with_name("queuectl")
        env = {**os.environ, **plain_desk.flow.env}
        done = subprocess.run(
            [str(program), "export"], env=env, capture_output=True, text=True, check=True
        )
        assert len(done.stdout.splitlines()) == 1
        assert done.stderr == "1 exported\n"
