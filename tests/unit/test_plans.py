"""Every statement of an event's way finds what it looks for by an index."""

import re
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from shared.database import database_url, make_reader
from shared.providers import embedded
from shared.settings import load_settings
from shared.statements import Prepared
from shared.store import adoption, attempts, backlog, log, subscriptions, summary


def statements() -> Iterator[tuple[str, Prepared]]:
    for module in (embedded, adoption, attempts, backlog, log, subscriptions, summary):
        for name, value in vars(module).items():
            if isinstance(value, Prepared):
                yield f"{module.__name__}.{name}", value


ALL = dict(statements())


@pytest.mark.parametrize("name", ALL)
def test_uses_an_index(sqlite_log, name):
    engine = make_reader(database_url(load_settings(sqlite_log)), lambda _: None)
    with engine.connect() as connection:
        sql = str(ALL[name].statement.compile(dialect=connection.dialect))
        # what the values are does not change the plan
        sql = re.sub(r"__\[POSTCOMPILE_\w+\]|\?", "1", sql)
        plan = [row[3] for row in connection.execute(text(f"EXPLAIN QUERY PLAN {sql}"))]
    engine.dispose()

    # of subscriptions there are as many as handlers
    plan = [step for step in plan if "queue_subscriptions" not in step]
    assert not [step for step in plan if step.startswith("SCAN")], plan


def test_finds_the_statements():
    assert len(ALL) > 20
