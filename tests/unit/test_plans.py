"""Every statement of an event's way finds what it looks for by an index."""

import re
from collections.abc import Iterator

import pytest
from sqlalchemy import event, text

from shared.database import database_url, make_reader, utc_now
from shared.providers import embedded
from shared.settings import load_settings
from shared.statements import Prepared
from shared.store import (
    adoption,
    alerts,
    attempts,
    backlog,
    causes,
    consumers,
    failures,
    limits,
    listing,
    log,
    measures,
    moving,
    overview,
    queries,
    ramps,
    repair,
    replay,
    retention,
    schedules,
    stats,
    subscriptions,
    summary,
    totals,
    trail,
)
from shared.store.gauges import log_gauges
from shared.store.listing import Filters, Place
from shared.store.replay import Stretch
from shared.store.why import Provider, why
from shared.types import Failure
from tests.unit.message_log import FAILED, Log
from tests.unit.message_log import event as an_event

MODULES = (
    embedded,
    adoption,
    attempts,
    backlog,
    causes,
    consumers,
    failures,
    limits,
    listing,
    log,
    moving,
    ramps,
    repair,
    retention,
    replay,
    schedules,
    stats,
    subscriptions,
    summary,
    totals,
)


def statements() -> Iterator[tuple[str, Prepared]]:
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, Prepared):
                yield f"{module.__name__}.{name}", value
    yield "embedded._looking_at", embedded._looking_at(2)


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


ALL_FILTERS = Filters(
    queue="orders",
    message_type="placed",
    status="failed",
    subscriber="audit.note",
    priority="normal",
    exception_type="ValueError",
    text="{",
    payload_path="$.a",
    payload_value=1,
)

QUESTIONS = {
    "list": lambda c, _: listing.list_messages(c, Filters()),
    "search": lambda c, _: listing.list_messages(c, ALL_FILTERS),
    "message": queries.message,
    "causes": causes.caused_by,
    "effects": causes.caused,
    "why": lambda c, id_: why(c, id_, utc_now(c), Provider("embedded", True, True)),
    "failures": lambda c, _: failures.groups(c),
    "group": lambda c, _: failures.seqs_of(c, "0" * 16, 10, of_the_living=True),
    "subscriptions": lambda c, _: consumers.list_subscriptions(c, utc_now(c)),
    "health": lambda c, _: queries.silent_subscriptions(c, utc_now(c)),
    "stats": lambda c, _: stats.queue_stats(c, "orders"),
    "totals": lambda c, _: totals.due(c, "orders", utc_now(c)),
    "overview": lambda c, _: overview.overview(c, utc_now(c)),
    "audit log": lambda c, _: trail.entries(c, 10, 50),
    "measures": lambda c, _: measures.measure(c, utc_now(c)),
    "alerts": lambda c, _: (alerts.list_alerts(c), alerts.own_thresholds(c)),
    "replay": lambda c, id_: (
        replay.look(c, consumers.of_queue(c, "orders")[0], Stretch(), Place(listing.FIRST, "")),
        replay.lacking(c, 1, [id_], 0),
        replay.newest(c),
    ),
    "due": lambda c, _: schedules.due(c, utc_now(c)),
    "limits": lambda c, _: limits.usages(c, [1], utc_now(c)),
    "metrics": lambda c, _: log_gauges(c, joins_log=False),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_operations_ask_uses_an_index(sqlite_log, name):
    store = Log(sqlite_log)
    store.subscribe()
    [delivery] = store.append(an_event())
    store.attempt(delivery, FAILED, Failure("ValueError", "boom"))
    asked = []
    engine = make_reader(store.database.engine.url, lambda _: None)
    with engine.connect() as connection:
        event.listen(engine, "before_cursor_execute", lambda *a: asked.append((a[2], a[3])))
        QUESTIONS[name](connection, delivery.message.id)
        statements = [each for each in asked if "queue_" in each[0]]
        for statement, parameters in statements:
            explained = f"EXPLAIN QUERY PLAN {statement}"
            plan = [row[3] for row in connection.exec_driver_sql(explained, parameters)]
            # of groups, subscriptions, pauses, schedules and ramps there are few, and the log is
            # read by its end
            few = r"SCAN queue_(failures USING COVERING|subscriptions|pauses|audit_log|alert)"
            few += r"|SCAN queue_schedules"
            if name == "metrics":
                few += r"|SCAN queue_ramps"
            assert not [x for x in plan if x.startswith("SCAN queue") and not re.match(few, x)], (
                plan
            )
    engine.dispose()
    store.database.close()
    assert statements
