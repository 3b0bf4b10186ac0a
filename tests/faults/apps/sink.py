"""A service whose handlers do what the payload says, and append a line each time they run."""

from __future__ import annotations

import os
import time
from typing import Any

import eventlet

from shared.events import Backoff, MessageContext, event_handler
from tests.faults.apps.source import append

FAST = Backoff(base=0.05, factor=2, cap=1)


class ToldToFailError(Exception):
    """Raised since the payload says so."""


class Sink:
    """Three subscriptions; two of them for the same events."""

    name = "sink"

    message = MessageContext()

    @event_handler("source", "unit.sent")
    def note(self, payload: Any) -> None:
        self._note("note", "ran", self.message, payload)

    @event_handler("source", "unit.sent", backoff=FAST, expected_exceptions=ToldToFailError)
    def obey(self, payload: Any) -> None:
        self._note("obey", "ran", self.message, payload)
        if self.message.attempt <= payload.get("fail", 0):
            raise ToldToFailError(f"attempt {self.message.attempt}")
        eventlet.sleep(payload.get("sleep", 0))
        end = time.monotonic() + payload.get("burn", 0)
        while time.monotonic() < end:
            pass
        self._note("obey", "done", self.message, payload)

    @event_handler("source", "unit.grouped", batch_size=10, batch_timeout=0.1)
    def group(self, payloads: list[Any]) -> None:
        for message, payload in zip(self.message, payloads, strict=True):
            self._note("group", "ran", message, payload)

    @staticmethod
    def _note(handler: str, what: str, message: Any, payload: Any) -> None:
        line = {"handler": handler, "what": what, "id": message.id, "n": payload["n"]}
        append(
            os.environ["EFFECTS"],
            **line,
            attempt=message.attempt,
            pid=os.getpid(),
            at=time.time(),
        )
