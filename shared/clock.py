"""The one place that time comes from, so that tests can put a clock of their own there."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Protocol


class Clock(Protocol):
    """What may stand in for the machine's clock and that of the database."""

    def monotonic(self) -> float:
        """Return seconds that only grow."""

    def utc_now(self) -> datetime:
        """Return the time, naive UTC, to the millisecond."""


_replacement: Clock | None = None


def replace(clock: Clock | None) -> None:
    """Take the time from ``clock``, or with ``None`` from machine and database again."""
    global _replacement
    _replacement = clock


def monotonic() -> float:
    """Return seconds that only grow, for waits and duties."""
    return time.monotonic() if _replacement is None else _replacement.monotonic()


def replaced_utc_now() -> datetime | None:
    """Return the time of the clock that stands in for the database's; mostly there is none."""
    return None if _replacement is None else _replacement.utc_now()
