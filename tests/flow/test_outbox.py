"""The outbox in real processes: several at once, killed, and with a broker that is down."""

import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
import requests
from sqlalchemy import select

from shared.database import database_url, make_reader
from shared.tables import deliveries, messages
from shared.testing.servers import free_port
from tests.flow.apps import outboxes
from tests.support.processes import ROOT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

TALLY = "tests.flow.apps.tally"
KILLS = int(os.environ.get("OUTBOX_KILLS", "5"))
"""Processes that are killed between a commit and what follows; 200 take some minutes."""


class Sellers:
    """Processes of tests.flow.apps.outboxes."""

    def __init__(self, flow):
        self.flow = flow
        self.processes = []
        outboxes.make_tables(flow.settings)

    def start(self, *arguments):
        log = self.flow.folder / f"process-seller-{len(self.processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.flow.apps.outboxes", *arguments],
                cwd=ROOT,
                env={**os.environ, **self.flow.env, "PYTHONWARNINGS": "ignore"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process, log

    def sent(self):
        """The numbers in the order in which the log has their deliveries."""
        engine = make_reader(database_url(self.flow.settings), lambda _: None)
        query = (
            select(messages.c.payload)
            .join(deliveries, deliveries.c.message_id == messages.c.id)
            .order_by(deliveries.c.seq)
        )
        with engine.connect() as connection:
            found = [json.loads(body)["n"] for body in connection.execute(query).scalars()]
        engine.dispose()
        return found

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def sellers(backend_flow):
    made = Sellers(backend_flow)
    yield made
    made.stop()


def test_three_processes_on_one_outbox_neither_double_nor_reorder(sellers):
    flow, most = sellers.flow, 120
    flow.run(TALLY)
    three = [sellers.start("sell", str(most)) for _ in range(3)]
    wait_until(lambda: len(sellers.sent()) > most / 10, 30, lambda: str(len(sellers.sent())))
    killed, _ = random.choice(three)
    killed.kill()
    assert sorted(process.wait(60) for process, _ in three) == [-9, 0, 0]

    wait_until(lambda: outboxes.left(flow.settings) == 0, 20, "the outbox to be empty")
    assert sellers.sent() == list(range(most))
    handled = flow.effects.wait_for(most, timeout=60, what="ran")
    assert sorted(effect["n"] for effect in handled) == list(range(most))


def test_what_was_committed_is_sent_whenever_the_process_is_killed(sellers):
    flow = sellers.flow
    flow.run(TALLY)

    process, log = sellers.start("die", str(KILLS))

    assert process.wait(30 + 5 * KILLS) == 0, log.read_text()
    assert re.search(r"^all relayed$", log.read_text(), re.MULTILINE)
    assert sorted(sellers.sent()) == list(range(KILLS))
    handled = flow.effects.wait_for(KILLS, timeout=60, what="ran")
    wait_until(lambda: flow.stats()["completed"] == KILLS, 30, lambda: str(flow.stats()))
    assert {effect["n"] for effect in handled} == set(range(KILLS))
    assert flow.stats()["total"] == KILLS


def test_people_sign_up_while_the_broker_is_down(flow_on, redis_server):
    redis_server.empty()
    address = f"127.0.0.1:{free_port()}"
    env = {"QUEUE_PROVIDER": "redis", **redis_server.environment, "AUTH_EVENTS_ADDRESS": address}
    flow = flow_on({**env, "COMPANY_ADDRESS": f"127.0.0.1:{free_port()}"})
    flow.run("services.auth_events")
    flow.run("services.company")

    def sign_up(n):
        person = {"email": f"p{n}@example.com", "password": "long enough", "first_name": "P",
                  "last_name": str(n)}  # fmt: skip
        return requests.post(f"http://{address}/auth/register", json=person, timeout=20)

    answers = [sign_up(n) for n in range(3)]
    redis_server.kill()
    began = time.monotonic()
    answers += [sign_up(n) for n in range(3, 9)]
    assert time.monotonic() - began < 10
    redis_server.start()
    answers += [sign_up(n) for n in range(9, 10)]

    assert [answer.status_code for answer in answers] == [201] * 10
    for answer in answers:
        flow.wait_for_status(answer.json()["message_id"], "completed", 30)
