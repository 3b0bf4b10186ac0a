"""Schedules: from a service or from the command line, and who dispatches what is due."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from shared.database import Transaction, utc_now
from shared.errors import PayloadError, ScheduleNotFoundError
from shared.events.client import QueueClient
from shared.events.cron import Cron, Due
from shared.events.dispatcher import make_envelope
from shared.events.operations import HubTimer, LogClient, LogReader, Reader
from shared.observe.traces import Dispatching
from shared.store import log, schedules, trail
from shared.store.queries import iso
from shared.store.trail import Deed
from shared.types import Delivery, Envelope, check_name

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often it is looked whether somebody made or changed a schedule, here or elsewhere."""

BUSY_SECONDS = 0.05
"""How soon what others dispatch at this moment is looked at again."""

LONGEST_ERROR = 1000
"""Characters that are kept of why something could not be dispatched."""

SCHEDULE = "schedule"
"""The key of a message's metadata that says which schedule and occurrence it is of."""


class Schedules:
    """Makes, shows and changes schedules, and dispatches what is due.

    ``actor`` says who does it, for the audit log.
    """

    client: LogClient
    reader: Reader

    def schedules(self) -> list[dict[str, Any]]:
        """Return the schedules, by name."""
        return [_shown(row) for row in self.reader.read(schedules.list_schedules)]

    def schedule(self, name: str) -> dict[str, Any]:
        """Return a schedule.

        :raises ScheduleNotFoundError: when there is none of that name.
        """
        return _shown(self.reader.read(schedules.find, name))

    def put(
        self,
        actor: str,
        name: str,
        *,
        queue_name: str,
        message_type: str,
        payload: Any,
        cron: str,
        time_zone: str = "UTC",
        priority: str = "normal",
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Make a schedule, or change the one of that name; return it.

        One that is paused stays so. Its next occurrence is another one where ``cron`` or
        ``time_zone`` is.

        :param cron: see :class:`Cron`.
        :raises PayloadError: when what it would dispatch cannot be, breaks its contract, or
            never would be.
        """
        check_name(name, "name")
        when = Cron(cron, time_zone)
        made = make_envelope(
            self.client.settings,
            queue_name,
            message_type,
            payload,
            priority=priority,
            metadata=metadata,
        )
        if SCHEDULE in (metadata or {}):
            raise PayloadError({f"metadata.{SCHEDULE}": "is reserved"})
        values = {
            "queue_name": queue_name,
            "message_type": message_type,
            "payload": made.body,
            "priority": made.priority.value,
            "metadata": json.dumps(metadata, ensure_ascii=False) if metadata else None,
            "cron": cron,
            "time_zone": time_zone,
            "error": None,
            "error_at": None,
        }

        def step(tx: Transaction) -> tuple[None, list[Delivery]]:
            next_at = when.after(tx.now)
            if next_at is None:
                raise PayloadError({"cron": "has no occurrence in the next 50 years"})
            kept = _kept(tx, name, values, next_at)
            schedules.add(tx, name, actor, **values, **kept)
            detail = {"cron": cron, "timeZone": time_zone, "messageType": message_type}
            trail.note(tx, Deed(actor, "schedule", f"schedule {name}", detail))
            return None, []

        self.client.call(step)
        return self.schedule(name)

    def remove(self, actor: str, name: str) -> None:
        """Remove a schedule; what it dispatched goes on.

        :raises ScheduleNotFoundError: when there is none of that name.
        """

        def step(tx: Transaction) -> tuple[None, list[Delivery]]:
            schedules.remove(tx, name)
            trail.note(tx, Deed(actor, "remove", f"schedule {name}"))
            return None, []

        self.client.call(step)

    def pause(self, actor: str, name: str) -> dict[str, Any]:
        """Have nothing more dispatched by a schedule; return it.

        :raises ScheduleNotFoundError: when there is none of that name.
        """

        def step(tx: Transaction) -> tuple[None, list[Delivery]]:
            schedules.change(tx, name, actor, enabled=False, next_at=None)
            trail.note(tx, Deed(actor, "pause", f"schedule {name}"))
            return None, []

        self.client.call(step)
        return self.schedule(name)

    def resume(self, actor: str, name: str) -> dict[str, Any]:
        """Take back a pause, and return the schedule; what was meanwhile is not made up for.

        :raises ScheduleNotFoundError: when there is none of that name.
        """

        def step(tx: Transaction) -> tuple[None, list[Delivery]]:
            row = schedules.find(tx.connection, name, locks=True)
            if not row.enabled:
                next_at = Cron(row.cron, row.time_zone).after(tx.now)
                schedules.change(tx, name, actor, enabled=True, next_at=next_at)
            trail.note(tx, Deed(actor, "resume", f"schedule {name}"))
            return None, []

        self.client.call(step)
        return self.schedule(name)

    def run(self, actor: str, name: str) -> str:
        """Dispatch what a schedule dispatches, now; return the message id.

        Its occurrences stay as they are, and it may be paused.

        :raises ScheduleNotFoundError: when there is none of that name.
        :raises PayloadError: when it breaks its contract by now.
        """
        row, now = self.reader.read(_found, name)
        with Dispatching(row.queue_name, {}) as dispatching:
            envelope = self._envelope(row, now, dispatching.headers)
            dispatching.note([envelope])

            def step(tx: Transaction) -> tuple[None, list[Delivery]]:
                schedules.set_values(tx, name, **schedules.dispatched(now, envelope.id))
                trail.note(tx, Deed(actor, "run", f"schedule {name}", {"messageId": envelope.id}))
                return None, self._append(tx, envelope)

            self.client.call(step)
        self._count(envelope)
        return envelope.id

    def carry_on(self) -> float:
        """Dispatch what is due; return in how many seconds to come again."""
        rows, soonest, now = self.reader.read(_due)
        if not rows:
            return min(LOOK_SECONDS, LOOK_SECONDS if soonest is None else soonest)
        moved = [self._move_on(row, now) for row in rows]
        # each of them may be due again by now
        return 0.0 if any(moved) else BUSY_SECONDS

    def _move_on(self, row: Any, now: datetime) -> bool:
        """Dispatch the latest occurrence of one that is due; say whether nobody else did."""
        try:
            due = Cron(row.cron, row.time_zone).due(row.next_at, now)
        except PayloadError as exc:
            # the zone is there no longer, say: without it nobody knows when the next one is
            return self._note_error(row, Due(row.next_at, 0, None), exc)
        with Dispatching(row.queue_name, {}) as dispatching:
            try:
                envelope = self._envelope(row, due.occurrence, dispatching.headers)
            except PayloadError as exc:
                return self._note_error(row, due, exc)
            dispatching.note([envelope])
            try:
                is_done = bool(self.client.call(partial(self._dispatch, row, due, envelope)))
            except SQLAlchemyError as exc:
                # the database works, and does not take this one
                return self._note_error(row, due, exc.__cause__ or exc)
            if is_done:
                self._count(envelope)
            return is_done

    def _count(self, envelope: Envelope) -> None:
        """Have a dispatch counted, where somebody counts."""

    def _dispatch(
        self, row: Any, due: Due, envelope: Envelope, tx: Transaction
    ) -> tuple[bool, list[Delivery]]:
        if not schedules.take(tx, row):
            return False, []
        outcome = schedules.dispatched(due.occurrence, envelope.id)
        schedules.move_on(tx, row.name, due.next, due.skipped, **outcome)
        return True, self._append(tx, envelope)

    def _note_error(self, row: Any, due: Due, error: BaseException) -> bool:
        def step(tx: Transaction) -> tuple[bool, list[Delivery]]:
            if not schedules.take(tx, row):
                return False, []
            outcome = {"error": str(error)[:LONGEST_ERROR], "error_at": tx.now}
            schedules.move_on(tx, row.name, due.next, due.skipped, **outcome)
            return True, []

        is_moved = bool(self.client.call(step))
        if is_moved:
            _log.error("schedule %s could not be dispatched: %s", row.name, error)
        return is_moved

    def _envelope(self, row: Any, at: datetime, context: Mapping[str, Any]) -> Envelope:
        shown = schedules.shown(row, "")
        return make_envelope(
            self.client.settings,
            row.queue_name,
            row.message_type,
            shown["payload"],
            priority=row.priority,
            metadata={**shown["metadata"], SCHEDULE: {"name": row.name, "occurrence": iso(at)}},
            context=context,
        )

    def _append(self, tx: Transaction, envelope: Envelope) -> list[Delivery]:
        limit = self.client.settings.retries.limit
        return log.append(tx, [envelope], limit, handover=self.client.handover)


class ScheduleTimer(Schedules, HubTimer):
    """Injects :class:`Schedules`, and dispatches what is due. Of several processes any one does.

    What is due is found on the hub, where contracts are checked, and dispatched by the pump.
    """

    work = "schedules"
    client = QueueClient()
    reader = LogReader()

    def _count(self, envelope: Envelope) -> None:
        self.client.counts.count_dispatched([envelope])


def _kept(
    tx: Transaction, name: str, values: Mapping[str, Any], next_at: datetime
) -> dict[str, Any]:
    """Return what a change leaves as it is: a pause, and the next occurrence of the same ones."""
    try:
        row = schedules.find(tx.connection, name, locks=True)
    except ScheduleNotFoundError:
        return {"enabled": True, "next_at": next_at}
    if not row.enabled:
        return {}
    is_same = (row.cron, row.time_zone) == (values["cron"], values["time_zone"])
    # what is due already is dispatched still
    return {} if is_same and row.next_at else {"next_at": next_at}


def _shown(row: Any) -> dict[str, Any]:
    try:
        sentence = Cron(row.cron, row.time_zone).sentence
    except PayloadError as exc:
        sentence = str(exc)
    return schedules.shown(row, sentence)


def _found(connection: Connection, name: str) -> tuple[Any, datetime]:
    return schedules.find(connection, name), utc_now(connection)


def _due(connection: Connection) -> tuple[list[Any], float | None, datetime]:
    now = utc_now(connection)
    return *schedules.due(connection, now), now
