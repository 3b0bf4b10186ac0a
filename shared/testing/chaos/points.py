"""Where a handler can be interrupted: found as it runs, and killed there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import groupby
from typing import Any

from nameko.extensions import DependencyProvider
from nameko_sqlalchemy import DatabaseSession
from sqlalchemy import TextClause, event
from wrapt import CallableObjectProxy, ObjectProxy

from shared.events import MessageContext, MessageLog

DATABASE = "db"

CHANGING = ("insert", "update", "delete", "replace")
"""How SQL begins that is given as text, and changes something."""


class Point(StrEnum):
    """When something befalls a handler."""

    AFTER_RESERVE = "after reserve"
    BEFORE_EFFECT = "before the effect"
    AFTER_EFFECT = "after the effect"
    AFTER_COMMIT = "after the commit"
    BEFORE_SETTLE = "before the settle"
    DELIVERED_TWICE = "delivered twice"
    OUT_OF_ORDER = "out of order"


@dataclass(frozen=True, slots=True)
class Crossing:
    """That a handler came by a point.

    :param effect: what has an effect there: ``db``, or a dependency and its method.
    :param number: of those that the handler came by with this message, from 0.
    """

    subscriber: str
    message_id: str
    point: Point
    effect: str
    number: int


def distinct(crossings: Sequence[Crossing]) -> list[Crossing]:
    """Return the crossings but for those that are like others: where a kill leaves the same.

    Of what is written between two commits a kill leaves nothing, so that the first and the
    last of it stand for the rest.
    """
    kept = []
    for _, its in groupby(crossings, lambda x: (x.subscriber, x.message_id)):
        stretch: list[Crossing] = []
        for crossing in its:
            stretch.append(crossing)
            if not _is_undone(crossing):
                kept += _ends(stretch)
                stretch = []
        kept += _ends(stretch)
    return kept


def _is_undone(crossing: Crossing) -> bool:
    """Whether a kill there undoes what was done since the last commit, and nothing else."""
    is_write = crossing.point in (Point.BEFORE_EFFECT, Point.AFTER_EFFECT)
    return is_write and crossing.effect == DATABASE


def _ends(stretch: list[Crossing]) -> list[Crossing]:
    """Return the first write of a stretch, the last one, and what is none."""
    writes = [x for x in stretch if _is_undone(x)]
    return [*writes[:1], *writes[1:][-1:], *[x for x in stretch if not _is_undone(x)]]


@dataclass(slots=True)
class Trace:
    """The points that handlers come by, one handler at a time.

    :param kill_at: where the process ends by SIGKILL.
    """

    kill_at: Crossing | None = None
    crossings: list[Crossing] = field(default_factory=list)
    _running: tuple[str, str] | None = None

    def run(self, subscriber: str, message_id: str, method: Callable[[], Any]) -> Any:
        """Return what a handler returns for a message."""
        self._running = subscriber, message_id
        self.cross(Point.AFTER_RESERVE)
        try:
            return method()
        finally:
            self.cross(Point.BEFORE_SETTLE)
            self._running = None

    def effect(self, name: str, act: Callable[[], Any]) -> Any:
        """Return what something returns that has an effect."""
        self.cross(Point.BEFORE_EFFECT, name)
        result = act()
        self.cross(Point.AFTER_EFFECT, name)
        return result

    def cross(self, point: Point, effect: str = "") -> None:
        """Come by a point."""
        if self._running is None:  # nobody handles anything
            return
        number = sum((x.subscriber, x.message_id) == self._running for x in self.crossings)
        crossing = Crossing(*self._running, point, effect, number)
        self.crossings.append(crossing)
        if crossing == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class Watcher(DependencyProvider):
    """Follows each handler, by what it is injected."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def worker_setup(self, worker_ctx: Any) -> None:
        if not getattr(worker_ctx, "leases", None):
            return
        service, trace = worker_ctx.service, self._trace
        for dependency in self.container.dependencies:
            self._watch(service, dependency)
        handler = worker_ctx.entrypoint
        subscriber = handler.subscription.subscriber
        message_id = worker_ctx.leases[0].delivery.message.id
        method = getattr(service, handler.method_name)

        def run(*args: Any, **kwargs: Any) -> Any:
            return trace.run(subscriber, message_id, partial(method, *args, **kwargs))

        setattr(service, handler.method_name, run)

    def _watch(self, service: Any, dependency: Any) -> None:
        value = getattr(service, dependency.attr_name)
        if isinstance(dependency, DatabaseSession):
            _watch_session(self._trace, value)
        elif not isinstance(dependency, Watcher | MessageContext | MessageLog):
            setattr(
                service, dependency.attr_name, _watched(self._trace, dependency.attr_name, value)
            )


def _watch_session(trace: Trace, session: Any) -> None:
    def on_execute(state: Any) -> Any:
        changes = state.is_insert or state.is_update or state.is_delete
        if not changes and not _is_changing_text(state.statement):
            return None
        return trace.effect(DATABASE, state.invoke_statement)

    event.listen(session, "do_orm_execute", on_execute)
    event.listen(session, "before_flush", lambda *_: trace.cross(Point.BEFORE_EFFECT, DATABASE))
    event.listen(session, "after_flush", lambda *_: trace.cross(Point.AFTER_EFFECT, DATABASE))
    event.listen(session, "after_commit", lambda _: trace.cross(Point.AFTER_COMMIT, DATABASE))


def _is_changing_text(statement: Any) -> bool:
    is_text = isinstance(statement, TextClause)
    return is_text and statement.text.lstrip().lower().startswith(CHANGING)


def _watched(trace: Trace, name: str, value: Any) -> Any:
    """Return something that does what ``value`` does, and whose calls are points."""
    if type(value).__module__ == "builtins":
        return value
    kind = _WatchedCallable if callable(value) else _Watched
    return kind(trace, name, value)


class _Watched(ObjectProxy):  # type: ignore[type-arg]
    """An object whose methods are watched."""

    def __init__(self, trace: Trace, name: str, value: Any) -> None:
        super().__init__(value)
        self._self_trace = trace
        self._self_name = name

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__wrapped__, name)
        if not callable(value) or name.startswith("_"):
            return value
        return _WatchedCallable(self._self_trace, f"{self._self_name}.{name}", value)


class _WatchedCallable(_Watched, CallableObjectProxy):  # type: ignore[type-arg]
    """A callable that is watched."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        act = partial(self.__wrapped__, *args, **kwargs)
        return self._self_trace.effect(self._self_name, act)
