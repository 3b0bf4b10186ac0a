"""Ramps of failure groups: from a service or from the command line, and who carries them on."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from sqlalchemy import Connection

from shared.database import Transaction, utc_now
from shared.events.client import QueueClient
from shared.events.operations import HubTimer, LogClient, LogReader, Reader
from shared.store import ramps
from shared.types import Delivery

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often it is looked whether somebody began a ramp, here or elsewhere."""


class Ramps:
    """Begins, shows and ends ramps.

    ``actor`` says who does it, for the audit log.
    """

    client: LogClient
    reader: Reader

    def begin(self, actor: str, group: str, rate: int) -> dict[str, Any]:
        """Begin to retry the dead letters of a group in steps; return the ramp.

        :param rate: dead letters a second, at most.
        :raises NothingToRetryError: when there is no such group.
        :raises RampRunningError: when the group has a ramp that runs.
        """

        def step(tx: Transaction) -> tuple[int, list[Delivery]]:
            return ramps.start(tx, group, actor, rate), []

        return self.ramp(int(self.client.call(step)))

    def ramps(self, limit: int = ramps.MOST_LISTED) -> list[dict[str, Any]]:
        """Return the ramps, the newest first, ``limit`` at most."""
        return self.reader.read(ramps.list_ramps, limit)

    def ramp(self, ramp_id: int) -> dict[str, Any]:
        """Return how far a ramp is.

        :raises RampNotFoundError: when there is none of that id.
        """
        return self.reader.read(ramps.ramp, ramp_id)

    def cancel(self, actor: str, ramp_id: int) -> dict[str, Any]:
        """End a ramp, and return it; what it retried goes on.

        :raises RampNotFoundError: when there is none of that id.
        :raises NothingToChangeError: when it has ended.
        """

        def step(tx: Transaction) -> tuple[None, list[Delivery]]:
            ramps.cancel(tx, ramp_id, actor)
            return None, []

        self.client.call(step)
        return self.ramp(ramp_id)

    def carry_on(self) -> float:
        """Do what is due for all ramps that run; return in how many seconds to come again."""
        ids, soonest = self.reader.read(_due)
        for ramp_id in ids:
            self.client.call(partial(_advance, ramp_id=ramp_id))
        # each of them may have more to do by now
        return 0.0 if ids else min(LOOK_SECONDS, LOOK_SECONDS if soonest is None else soonest)


class RampTimer(Ramps, HubTimer):
    """Injects :class:`Ramps`, and carries them on. Of several processes any one does so."""

    work = "ramps"
    client = QueueClient()
    reader = LogReader()


def _due(connection: Connection) -> tuple[list[int], float | None]:
    return ramps.due(connection, utc_now(connection))


def _advance(tx: Transaction, ramp_id: int) -> tuple[None, list[Delivery]]:
    return None, ramps.advance(tx, ramp_id)
