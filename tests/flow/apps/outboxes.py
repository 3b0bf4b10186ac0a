"""Sells what goes through an outbox: in several processes at once, or in ones that are killed.

``python -m tests.flow.apps.outboxes sell 100``: until the count in the database is 100, takes
the next number, and commits it with its event.

``python -m tests.flow.apps.outboxes die 20``: does so in 20 processes, each of which is killed
at a random moment after its commit; then relays what they left.
"""

from __future__ import annotations

import os
import random
import signal
import sys

import eventlet

eventlet.monkey_patch()

from nameko.containers import ServiceContainer  # noqa: E402
from nameko.testing.services import dummy, entrypoint_hook  # noqa: E402
from sqlalchemy import func, select  # noqa: E402
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column  # noqa: E402

from shared.database import database_url, make_engine  # noqa: E402
from shared.events import EventDispatcher  # noqa: E402
from shared.settings import load_settings  # noqa: E402
from shared.store import DatabaseSession, backlog  # noqa: E402
from shared.store.outbox import outbox_table  # noqa: E402

LATEST_SECONDS = 0.03
"""How long after its commit a process lives at most: some are through with the event by then."""


class Base(DeclarativeBase):
    pass


class Counter(Base):
    """One row, locked by whoever sells: so the commits are in the order of the numbers."""

    __tablename__ = "source_counter"

    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]


outbox = outbox_table(Base.metadata, "source")


class Source:
    name = "source"

    db = DatabaseSession(Base)
    dispatch = EventDispatcher()

    @dummy
    def sell(self, most: int) -> bool:
        counter = self.db.scalars(select(Counter).with_for_update()).one()
        if counter.n >= most:
            return False
        self.dispatch("unit.sent", {"n": counter.n}, session=self.db)
        counter.n += 1
        self.db.commit()
        return True


def make_tables(settings):
    engine = make_engine(database_url(settings, "source"), eventlet.sleep)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(Counter.__table__.insert(), [{"id": 1, "n": 0}])
    engine.dispose()


def left(settings):
    engine = make_engine(database_url(settings, "source"), eventlet.sleep)
    with engine.begin() as connection:
        found = connection.execute(select(func.count()).select_from(outbox)).scalar_one()
    engine.dispose()
    return found


def start():
    container = ServiceContainer(Source, {})
    container.start()
    return container


def sell_all(most):
    container = start()
    print("queue ready", flush=True)
    with entrypoint_hook(container, "sell") as sell:
        while sell(most):
            # the others shall get the lock, too
            eventlet.sleep(random.uniform(0, 0.002))
    container.stop()


def sell_one_and_die(most):
    container = start()
    with entrypoint_hook(container, "sell") as sell:
        assert sell(most)
        eventlet.sleep(random.choice([0, random.uniform(0, LATEST_SECONDS)]))
        os.kill(os.getpid(), signal.SIGKILL)


def die(times):
    for n in range(times):
        pid = os.fork()
        if pid == 0:
            try:
                sell_one_and_die(times)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"process {n} was not killed"
    print(f"left {left(load_settings({}))}", flush=True)
    container = start()
    while left(load_settings({})):
        eventlet.sleep(0.01)
    container.stop()
    print("all relayed", flush=True)


if __name__ == "__main__":
    # what a dead process had in hand for its broker is not waited for so long
    backlog.PUBLISH_SECONDS = 1.0
    {"sell": sell_all, "die": die}[sys.argv[1]](int(sys.argv[2]))
