"""A service that dispatches all the while, and records what it was told of each event.

Before each call it appends what it is about to dispatch, and after it what came of that; so
what has no second line was being dispatched when the process was killed.
"""

from __future__ import annotations

import json
import os
import random
import uuid
from pathlib import Path
from typing import Any

import eventlet
from nameko.testing.services import once

from shared.errors import DispatchError, DispatchUncertainError
from shared.events import EventDispatcher

PRIORITIES = ["low", "normal", "normal", "normal", "high", "urgent"]

PAUSE_SECONDS = float(os.environ.get("PAUSE_SECONDS", "0.1"))


def append(path: str, **line: Any) -> None:
    """Append a line in one piece, which is there even when the process is killed next."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(line) + "\n").encode())
    os.close(descriptor)


class Source:
    """Dispatches until the file ``STOP`` is there."""

    name = "source"

    dispatch = EventDispatcher()

    @once
    def run(self) -> None:
        stop, record = Path(os.environ["STOP"]), os.environ["RECORD"]
        while not stop.exists():
            events = [_event() for _ in range(random.choice([1, 1, 1, 5, 30]))]
            self._dispatch(record, events)
            eventlet.sleep(random.uniform(0, 2 * PAUSE_SECONDS))
        append(record, what="stopped", pid=os.getpid())

    def _dispatch(self, record: str, events: list[tuple[str, dict[str, Any], Any]]) -> None:
        names = [payload["n"] for _, payload, _ in events]
        append(record, what="dispatching", events=[payload for _, payload, _ in events])
        try:
            if len(events) == 1:
                [(event_type, payload, options)] = events
                ids = [self.dispatch(event_type, payload, **options)]
            else:
                # in one call all have the same options
                ids = self.dispatch.many([event[:2] for event in events], **events[0][2])
        except DispatchUncertainError as exc:
            append(record, what="uncertain", names=names, ids=list(exc.message_ids))
        except DispatchError as exc:
            append(record, what="raised", names=names, error=str(exc))
        except Exception as exc:
            append(record, what="surprised", names=names, error=repr(exc))
        else:
            append(record, what="stored", names=names, ids=ids)


def _event() -> tuple[str, dict[str, Any], dict[str, Any]]:
    payload: dict[str, Any] = {"n": uuid.uuid4().hex}
    options: dict[str, Any] = {"priority": random.choice(PRIORITIES), "max_retries": 3}
    kind = random.random()
    if kind < 0.1:
        # one more than it is tried: a dead letter
        payload["fail"] = random.choice([1, 1, 2, 3, 9])
    elif kind < 0.2:
        payload["sleep"] = random.choice([0.05, 0.3, 1, 3])
    elif kind < 0.21:
        payload["burn"] = 0.5
    elif kind < 0.3:
        options["delay"] = random.uniform(0.1, 3)
    return random.choice(["unit.sent", "unit.sent", "unit.grouped"]), payload, options
