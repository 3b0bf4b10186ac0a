"""Who counts on how many messages long queues have, a little at a time."""

from __future__ import annotations

from functools import partial

from sqlalchemy import Connection

from shared.database import Transaction, utc_now
from shared.events.client import QueueClient
from shared.events.operations import HubTimer, LogReader
from shared.store import totals
from shared.types import Delivery

LOOK_SECONDS = 10.0
"""How often it is looked whether there is enough to count."""

PAUSE_SECONDS = 0.05
"""Between two steps: who waits for the lock of an SQLite file gets it then."""


class TotalsTimer(HubTimer):
    """Counts on, step by step. Of several processes any may: each step is a transaction."""

    work = "totals"
    client = QueueClient()
    reader = LogReader()

    def carry_on(self) -> float:
        """Take a step for each queue that has enough; return in how many seconds to come again."""
        names = self.reader.read(_due)
        for name in names:
            self.client.call(partial(_advance, queue=name))
        return PAUSE_SECONDS if names else LOOK_SECONDS


def _due(connection: Connection) -> list[str]:
    return totals.queues_due(connection, utc_now(connection))


def _advance(tx: Transaction, queue: str) -> tuple[None, list[Delivery]]:
    totals.advance(tx, queue)
    return None, []
