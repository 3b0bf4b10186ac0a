"""A database that goes away and comes back."""

import sqlite3
from contextlib import closing

import pytest

from shared.errors import DispatchError
from tests.conftest import migrate
from tests.support.processes import NamekoProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

RECORDER = "tests.flow.apps.recorder"


@pytest.fixture
def held(flow):
    """Another program that holds SQLite's write lock, as one that is frozen would."""
    flow.container  # noqa: B018 - makes the file
    connection = sqlite3.connect(flow.folder / "var" / "queue.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield connection
    connection.close()


def test_what_cannot_be_stored_raises_and_is_not_sent_later(flow, held):
    with pytest.raises(DispatchError, match="locked"):
        flow.send("thing.happened", {"n": 1})

    held.execute("ROLLBACK")
    flow.send("thing.happened", {"n": 2})

    assert flow.stats()["total"] == 1


def test_a_worker_goes_on_when_the_database_is_back(flow):
    worker = flow.run(RECORDER)
    message_id = flow.send("thing.happened", {"sleep": 1})
    flow.effects.wait_for(1, handler="first", what="ran")
    path = flow.folder / "var" / "queue.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        wait_until(lambda: "unreachable" in worker.output(), 15, "the trouble in the log")

        connection.execute("ROLLBACK")

    flow.wait_for_status(message_id, "completed")
    assert "reachable again" in worker.output()
    next_id = flow.send("thing.happened", {})
    flow.wait_for_status(next_id, "completed")


def test_a_worker_on_mariadb_goes_on_when_the_server_is_back(mariadb_flow):
    flow, server = mariadb_flow
    worker = flow.run(RECORDER)
    before = flow.send("thing.happened", {})
    flow.wait_for_status(before, "completed")

    server.kill()
    with pytest.raises(DispatchError):
        flow.send("thing.happened", {"n": 1})
    wait_until(lambda: "unreachable" in worker.output(), 15, "the trouble in the log")
    server.start()

    after = flow.send("thing.happened", {"fail": 1})
    message = flow.wait_for_status(after, "completed")
    assert message["retryCount"] == 1
    assert flow.stats()["total"] == 2


def test_without_its_tables_a_service_does_not_start_and_says_what_to_run(
    tmp_path, mariadb_database
):
    process = NamekoProcess(
        "services.company",
        env={"QUEUE_DATA_DIR": str(tmp_path / "var"), **mariadb_database.environment},
        log=tmp_path / "process-0.log",
    )

    assert process.process.wait(20) == 2
    assert "the tables of company are missing: run queuectl db upgrade" in process.output()


def test_a_worker_waits_for_the_tables_of_the_log(flow_on, mariadb_database):
    flow = flow_on(mariadb_database.environment)
    worker = flow.run(RECORDER, wait=False)
    wait_until(lambda: "tables of queue are missing" in worker.output(), 15, "the line in the log")

    migrate(mariadb_database.environment)

    wait_until(lambda: "queue ready" in worker.output(), 15, worker.output)
    flow.wait_for_status(flow.send("thing.happened", {}), "completed")
