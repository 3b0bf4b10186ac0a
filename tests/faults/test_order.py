"""The order in which one worker handles what waits, while servers and connections fail (P7)."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
from sqlalchemy import text

from shared.database import database_url, make_reader
from shared.native import sleep
from tests.faults.driver import break_together, recover, settle
from tests.faults.faults import Fault, catalogue, plan
from tests.faults.world import BACKENDS, World

pytestmark = pytest.mark.flow

SEED = int(os.environ.get("FAULT_SEED", "7"))

FAULTS = int(os.environ.get("ORDER_FAULTS", "6"))


def keeps_order(fault: Fault) -> bool:
    """Whether it happens to who dispatches alone: what is in a worker's hands may come later."""
    return fault.target.startswith("source-0 to ") or fault.target in ("queue", "source")


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_what_waits_is_handled_by_priority_and_in_order(backend, tmp_path):
    world = World(tmp_path, backend, MAX_WORKERS="1", TROUBLES="no")
    try:
        world.start(sources=1, sinks=1)
        possible = [fault for fault in catalogue(world) if keeps_order(fault)]
        for steps in plan(possible, SEED, FAULTS):
            print("; ".join(map(str, steps)))
            break_together(world, steps)
            recover(world)
        account = settle(world)
        assert account.wrong == []
        found = inversions(world)
    finally:
        world.close()
    assert found == []


def inversions(world: World) -> list[str]:
    """Return what first ran after something that was dispatched later and is as urgent."""
    ran: dict[str, float] = {}
    for effect in world.flow.effects.all(handler="note", what="ran"):
        ran.setdefault(effect["id"], effect["at"])
    reader = make_reader(database_url(world.flow.settings), sleep)
    with reader.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT d.seq, d.message_id, m.priority, m.scheduled_at FROM queue_deliveries d"
                " JOIN queue_messages m ON m.id = d.message_id"
                " JOIN queue_subscriptions s ON s.id = d.subscription_id"
                " WHERE s.subscriber = 'sink.note' ORDER BY d.seq"
            )
        ).all()
    reader.dispose()
    found, by_priority = [], defaultdict(list)
    for row in rows:
        if row.scheduled_at is None:
            by_priority[row.priority].append(row)
    for priority, its in by_priority.items():
        print(priority, len(its))
        latest = its[0]
        for row in its[1:]:
            if ran[row.message_id] < ran[latest.message_id]:
                found.append(
                    f"{priority}: {latest.seq} {latest.message_id} after {row.seq}"
                    f" {row.message_id} by {ran[latest.message_id] - ran[row.message_id]:.3f} s"
                )
            else:
                latest = row
    return found
