"""Runs a service with a fault at each point, and compares what it leaves."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import eventlet
from sqlalchemy import select, update

from shared.database import Database, database_url
from shared.events import EventDispatcher, EventHandler
from shared.events.dispatcher import make_envelope
from shared.lifecycle import FINAL, DeliveryStatus
from shared.tables import deliveries, subscriptions
from shared.testing.chaos.forks import in_child, in_children, is_killed
from shared.testing.chaos.points import Crossing, Point, Trace, Watcher, distinct
from shared.testing.chaos.report import Report, Unsafe
from shared.testing.chaos.world import (
    EFFECTS,
    Comparison,
    World,
    look,
    payload_text,
    tables_of,
    volatile,
)
from shared.testing.running import RunningService, TableFiles
from shared.testing.virtual import VirtualClock
from shared.types import Envelope

LONGEST_SECONDS = 86_400.0
"""How far the clock goes on for what is retried."""

MOST_STEPS = 1000
"""How often the clock goes to what is due next: some retry without end."""


class Source:
    """Who dispatches what the handlers are to handle."""

    name = "chaos-source"

    dispatch = EventDispatcher()


@dataclass(frozen=True, slots=True)
class Result:
    """What one run left, and which points it came by."""

    world: World
    crossings: list[Crossing]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to befall a handler: ``work`` has it happen, in a process of its own."""

    handler: str
    point: Point
    effect: str
    event: str
    folder: Path
    work: Callable[[], Result | None]


class ChaosRunner:
    """Runs a service again and again, each time in a new folder and a process of its own.

    :param folder: for all of that.
    """

    def __init__(self, folder: Path, tables: TableFiles) -> None:
        self._folder = folder
        self._tables = tables
        self._numbers = itertools.count()

    def __call__(
        self,
        service: type,
        events: Sequence[Sequence[Any]],
        *,
        effects: Callable[[], Any] | None = None,
        config: Mapping[str, Any] | None = None,
        dependencies: Mapping[str, Any] | None = None,
    ) -> Report:
        """Run ``service`` with a fault at each point that its handlers come by.

        :param events: ``(source, event_type, payload)`` each, in the order of an undisturbed
            run; a fourth value may give the options of its dispatch.
        :param effects: returns what handlers did elsewhere, as something that can be compared;
            a list is compared element by element, in any order.
        :param config: nameko's configuration, over the kit's own.
        :param dependencies: what to inject in the place of dependencies, by their attributes.
            What they are to remember has to be in files: each process has them anew.
        :raises ValueError: when no handler of the service takes one of the events.
        :raises ChildError: when a run cannot be made, or two undisturbed ones differ.
        """
        folder = self._folder / str(next(self._numbers))
        run = _Run(folder, self._tables, service, effects, config or {}, dependencies or {})
        try:
            return run.report(events)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _Run:
    def __init__(
        self,
        folder: Path,
        tables: TableFiles,
        service: type,
        effects: Callable[[], Any] | None,
        config: Mapping[str, Any],
        dependencies: Mapping[str, Any],
    ) -> None:
        self._folder = folder
        self._tables = tables
        self._service = service
        self._effects = effects
        self._config = {"max_workers": 1, **config}
        self._dependencies = dependencies
        self._numbers = itertools.count()
        self._start = datetime.now(UTC)
        self._envelopes: list[Envelope] = []

    def report(self, events: Sequence[Sequence[Any]]) -> Report:
        """Make all runs."""
        model = self._make(self._new_folder(), VirtualClock())
        self._lease = model.settings.lease
        self._envelopes = [self._envelope(model, *event) for event in events]
        handled = _handled(model, self._envelopes)
        start = self._prepare(self._envelopes)
        undisturbed = self._play_apart(self._copy(start))
        faults = self._faulty(start, handled, undisturbed)
        results = in_children([(fault.work, fault.folder) for fault in faults])
        # as late as can be, by either clock, so that all that goes by a clock is another
        again = self._play_apart(self._copy(start), later=True)
        comparison = _comparison(model, undisturbed.world, again.world)
        found: dict[tuple[str, Point, str], Unsafe] = {}
        for fault, result in zip(faults, results, strict=True):
            if result is None:
                continue
            expected, got = comparison.difference(undisturbed.world, result.world)
            if expected or got:
                key = fault.handler, fault.point, fault.effect
                found.setdefault(key, Unsafe(*key, fault.event, expected, got))
        return Report(sorted(handled), len(faults), list(found.values()))

    def _play_apart(self, folder: Path, *, later: bool = False) -> Result:
        result: Result = in_child(partial(self._play, folder, Trace(), later=later), folder)
        return result

    # --- the faults

    def _faulty(
        self, start: Path, handled: Mapping[str, list[Envelope]], undisturbed: Result
    ) -> list[Fault]:
        """Return what befalls the handlers, each fault in a folder of its own."""
        shown = {x.id: f"handling {x.type} {payload_text(x.payload)}" for x in self._envelopes}
        return [
            # what the service sends itself has another id in each run
            *[
                self._kill(start, at, shown[at.message_id])
                for at in distinct(undisturbed.crossings)
                if at.message_id in shown
            ],
            *[self._deliver_twice(start, *each) for each in handled.items()],
            *[fault for each in handled.items() for fault in self._reorder(*each)],
        ]

    def _kill(self, start: Path, at: Crossing, event: str) -> Fault:
        folder = self._copy(start)

        def work() -> Result | None:
            if not is_killed(partial(self._play, folder, Trace(at)), folder):
                return None  # it did not come by this point again
            return self._play(folder, Trace(), later=True)

        return Fault(at.subscriber, at.point, at.effect, event, folder, work)

    def _deliver_twice(self, start: Path, handler: str, its: list[Envelope]) -> Fault:
        folder = self._copy(start)
        work = partial(self._play, folder, Trace(), again=handler)
        event = f"{_types(its)} once more after the others"
        return Fault(handler, Point.DELIVERED_TWICE, "", event, folder, work)

    def _reorder(self, handler: str, its: list[Envelope]) -> Iterator[Fault]:
        order = _reordered(self._envelopes, its)
        if order != self._envelopes:
            folder = self._prepare(order)
            event = f"{_types(its)} {'last' if order[-1] in its else 'first'}, the newest before"
            work = partial(self._play, folder, Trace())
            yield Fault(handler, Point.OUT_OF_ORDER, "", event, folder, work)

    # --- runs

    def _prepare(self, envelopes: list[Envelope]) -> Path:
        """Make a folder in which these events wait for the service."""
        folder = self._new_folder()
        self._make(folder, VirtualClock()).put_tables()
        in_child(partial(self._store, folder, envelopes), folder)
        return folder

    def _store(self, folder: Path, envelopes: list[Envelope]) -> None:
        clock = VirtualClock(self._start)
        clock.install()
        registered = self._make(folder, clock)
        registered.start()
        registered.stop()
        source = RunningService(Source, folder / "var", clock, self._tables, {}, {})
        source.start()
        source.append(envelopes)
        source.stop()

    def _play(self, folder: Path, trace: Trace, *, later: bool = False, again: str = "") -> Result:
        """Let the service do all that waits.

        :param later: after the leases of a process that died are over.
        :param again: a subscriber whose outcomes are lost then, as to a power failure.
        """
        clock = VirtualClock(self._start + timedelta(seconds=self._lease + 1 if later else 0))
        clock.install()
        service = self._make(folder, clock)
        watcher = Watcher(trace).bind(service.container, "chaos_watcher")
        service.container.dependencies.add(watcher)
        service.start()
        self._finish(service)
        if again:
            _forget_outcomes(service, again)
            clock.advance(0)
            self._finish(service)
        sent = {each.id for each in self._envelopes}
        # it is not stopped: its process ends
        return Result(look(service, sent, self._effects), trace.crossings)

    def _finish(self, service: RunningService) -> None:
        end = service.clock.seconds + LONGEST_SECONDS
        for _ in range(MOST_STEPS):
            is_over = all(d["status"] in FINAL for _, d in service.deliveries)
            if is_over or service.clock.seconds > end or not service.clock.go_to_next():
                return

    def _make(self, folder: Path, clock: VirtualClock) -> RunningService:
        made = RunningService(
            self._service, folder / "var", clock, self._tables, self._config, self._dependencies
        )
        # what is not to survive its process need not survive a fault
        made.keep(lambda each: isinstance(each, EventHandler) and each.reliable_delivery)
        return made

    def _envelope(
        self,
        model: RunningService,
        source: str,
        event_type: str,
        payload: Any,
        options: Mapping[str, Any] | None = None,
    ) -> Envelope:
        queue = model.settings.queue_of(source)
        return make_envelope(model.settings, queue, event_type, payload, **(options or {}))

    def _new_folder(self) -> Path:
        folder = self._folder / str(next(self._numbers))
        folder.mkdir(parents=True)
        return folder

    def _copy(self, folder: Path) -> Path:
        copy = self._folder / str(next(self._numbers))
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("wake*"))
        return copy


def _handled(model: RunningService, envelopes: Sequence[Envelope]) -> dict[str, list[Envelope]]:
    """Return which events each handler gets."""
    handlers = [each for each in model.container.entrypoints if isinstance(each, EventHandler)]
    found: dict[str, list[Envelope]] = {}
    for envelope in envelopes:
        its = [each for each in handlers if _is_for(model, envelope, each)]
        if not its:
            source = model.settings.source_of(envelope.queue)
            name = model.container.service_name
            raise ValueError(f"no handler of {name} takes {envelope.type} of {source}")
        for handler in its:
            found.setdefault(handler._subscriber(), []).append(envelope)
    return found


def _is_for(model: RunningService, envelope: Envelope, handler: EventHandler) -> bool:
    queue = model.settings.queue_of(handler.source_service)
    return (envelope.queue, envelope.type) == (queue, handler.event_type)


def _comparison(model: RunningService, first: World, second: World) -> Comparison:
    left_out = volatile(first, second)
    for name, rows in first.items():
        if len(rows) != len(second[name]) or ((name, "effect") in left_out and name == EFFECTS):
            raise ValueError(
                f"two undisturbed runs differ in {name}, so that a fault could not be told: "
                f"{rows} and {second[name]}"
            )
    tables = [
        table
        for dependency in model.sessions
        for table in tables_of(model.container.service_name, dependency)
    ]
    return Comparison(tables, left_out)


def _reordered(envelopes: list[Envelope], its: list[Envelope]) -> list[Envelope]:
    """Return the events with some of them last, or else first, the newest of them before."""
    others = [each for each in envelopes if each not in its]
    last = others + its[::-1]
    return last if last != envelopes else its[::-1] + others


def _types(envelopes: list[Envelope]) -> str:
    return ", ".join(sorted({each.type for each in envelopes}))


def _forget_outcomes(service: RunningService, subscriber: str) -> None:
    """Have messages delivered again to one handler."""
    database = Database(database_url(service.settings), eventlet.sleep)
    its = select(subscriptions.c.id).where(subscriptions.c.subscriber == subscriber)
    again = {"status": DeliveryStatus.PENDING, "attempts": 0, "processed_at": None, "ready": True}
    with database.transaction() as tx:
        tx.connection.execute(
            update(deliveries)
            .where(
                deliveries.c.subscription_id.in_(its),
                deliveries.c.status == DeliveryStatus.COMPLETED,
            )
            .values(**again)
        )
    database.close()
