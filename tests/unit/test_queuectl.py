"""``queuectl`` beyond the tables, which tests/flow tests as the documentation does it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import update

from shared import tables
from shared.cli import main
from shared.database import Database, database_url
from shared.native import sleep
from shared.settings import load_settings
from shared.store import subscriptions
from shared.store.measures import Rule
from shared.store.subscriptions import SILENT_AFTER_SECONDS
from shared.types import Subscription


def queuectl(*args: str, env: Mapping[str, str]) -> Result:
    return CliRunner().invoke(main, args, env=env)


class TestAlive:
    @pytest.fixture
    def signed(self, log_settings: Mapping[str, str]) -> None:
        """Given two subscriptions, one of which nobody signs for any more."""
        wanted = [
            Subscription("orders", "shop", "placed", "my_audit.note"),
            Subscription("orders", "shop", "placed", "my_audit.renamed"),
        ]
        self.in_log(log_settings, lambda tx: subscriptions.register(tx, wanted))
        self.age(log_settings, "my_audit.renamed")

    @staticmethod
    def in_log(settings: Mapping[str, str], step) -> None:
        database = Database(database_url(load_settings(settings)), sleep)
        database.run(step)
        database.close()

    def age(self, settings: Mapping[str, str], subscriber: str) -> None:
        s = tables.subscriptions

        def make_old(tx) -> None:
            old = tx.later(-SILENT_AFTER_SECONDS - 1)
            its = s.c.subscriber == subscriber
            tx.connection.execute(update(s).where(its).values(seen_at=old))

        self.in_log(settings, make_old)

    def test_is_who_signs(self, log_settings: Mapping[str, str], signed: None) -> None:
        done = queuectl("alive", "my_audit", env=log_settings)
        assert (done.exit_code, done.output) == (0, "my_audit: alive\n")

    @pytest.mark.parametrize("service", ["myXaudit", "my_audi", "audit", "my_audit.note"])
    def test_is_nobody_else(
        self, log_settings: Mapping[str, str], signed: None, service: str
    ) -> None:
        done = queuectl("alive", service, env=log_settings)
        assert (done.exit_code, done.output) == (1, f"Error: nobody consumes for {service}\n")

    def test_is_not_who_fell_silent(self, log_settings: Mapping[str, str], signed: None) -> None:
        self.age(log_settings, "my_audit.note")
        assert queuectl("alive", "my_audit", env=log_settings).exit_code == 1

    def test_says_what_is_wrong_with_the_database(self, tmp_path) -> None:
        done = queuectl("alive", "my_audit", env={"QUEUE_DATA_DIR": str(tmp_path)})
        assert done.exit_code == 1
        assert done.output.startswith("Error: sqlite:///")
        assert "no such table" in done.output


class TestThresholds:
    @pytest.fixture(autouse=True)
    def subscribed(self, log_settings: Mapping[str, str]) -> None:
        wanted = [Subscription("orders", "shop", "placed", "my_audit.note")]
        TestAlive.in_log(log_settings, lambda tx: subscriptions.register(tx, wanted))

    def test_are_taken_away_only_where_that_is_said(self, log_settings: Mapping[str, str]) -> None:
        self.set("--dead-letters", "100", env=log_settings)
        for args in ([], ["--none", "--dead-letters", "5"]):
            refused = queuectl("alerts", "set", "orders", *args, env=log_settings)
            assert refused.exit_code == 2
            assert "--none, or at least one threshold" in refused.stderr
        assert self.own(log_settings) == ["dead_letters"]
        self.set("--none", env=log_settings)
        assert self.own(log_settings) == []

    def test_are_shown_as_they_may_be_given(self, log_settings: Mapping[str, str]) -> None:
        """Given what is the queue's own, and a usual one that is changed then."""
        its = {
            "failurePercent": "0.25", "oldestSeconds": "90.5",
            "deadLetters": "100", "silentConsumers": "2", "failingSchedules": "3",
        }  # fmt: skip
        options = {
            "failurePercent": "--failure-percent", "oldestSeconds": "--oldest-seconds",
            "deadLetters": "--dead-letters", "silentConsumers": "--silent-consumers",
            "failingSchedules": "--failing-schedules",
        }  # fmt: skip
        self.set(*[word for name in its for word in (options[name], its[name])], env=log_settings)
        table = queuectl("alerts", "thresholds", env=log_settings).stdout
        [row] = [line for line in table.splitlines() if line.startswith("orders")]
        assert row.split()[1:6] == list(its.values())
        assert set(row.split(maxsplit=6)[6].strip().split(", ")) == set(Rule)
        shown = queuectl("alerts", "thresholds", "--json", env=log_settings).stdout
        [queue] = json.loads(shown, parse_float=str, parse_int=str)["queues"]
        again = [word for name in its for word in (options[name], queue[name])]
        self.set(*again, env=log_settings)
        assert queuectl("alerts", "thresholds", "--json", env=log_settings).stdout == shown

    def set(self, *args: str, env: Mapping[str, str]) -> None:
        done = queuectl("alerts", "set", "orders", *args, env=env)
        assert done.exit_code == 0, done.output

    def own(self, env: Mapping[str, str]) -> list[str]:
        shown = json.loads(queuectl("alerts", "thresholds", "--json", env=env).stdout)
        [its] = shown["queues"]
        return its["own"]


class TestAudit:
    @pytest.mark.parametrize("name", ["os:path", "shared.providers:QueueProvider"])
    def test_says_in_one_line_that_the_setting_names_no_provider(self, tmp_path, name: str) -> None:
        env = {"QUEUE_DATA_DIR": str(tmp_path), "QUEUE_PROVIDER": name}
        done = queuectl("audit", env=env)
        assert done.exit_code == 2
        assert done.output.startswith(f"Error: QUEUE_PROVIDER: {name} must ")
        assert done.output.count("\n") == 1
