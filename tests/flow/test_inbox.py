"""The inbox in real processes that are killed between a commit and its outcome."""

import eventlet
import pytest
from sqlalchemy import select

from shared.database import database_url, make_engine
from tests.flow.apps.ledger import Base, Entry
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

LEDGER = "tests.flow.apps.ledger"


def test_effects_happen_once_though_the_process_dies_after_its_commit(backend_flow):
    flow = backend_flow
    engine = make_engine(database_url(flow.settings, "ledger"), eventlet.sleep)
    Base.metadata.create_all(engine)
    # one after the other, so that whoever dies has committed
    worker = flow.run(LEDGER, arguments=("--config", "config.yml"), MAX_WORKERS="1")
    flow.send_many([("entry.made", {"n": n, "dies": n == 2}) for n in range(5)])

    def all_are_completed():
        if worker.process.poll() is not None:
            worker.restart()
        return flow.stats().get("completed") == 5

    wait_until(all_are_completed, 60, lambda: str(flow.stats()))

    with engine.begin() as connection:
        entries = connection.execute(select(Entry.n)).scalars().all()
    engine.dispose()
    assert sorted(entries) == list(range(5))
    assert [effect["n"] for effect in flow.effects.all(what="died")] == [2]
    assert sorted(effect["n"] for effect in flow.effects.all(what="ran")) == list(range(5))


def test_a_wrong_name_ends_the_start_with_one_line(flow):
    process = flow.run(LEDGER, wait=False, INBOX="nope")

    assert process.process.wait(20) == 2
    lines = process.output().strip().splitlines()
    assert lines[-1] == (
        "Error: ledger.book: inbox must name a DatabaseSession of the service (db), not 'nope'"
    )
    assert "Traceback" not in process.output()
