"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object], timeout: float, message: str | Callable[[], str]
) -> None:
    """Wait until ``condition()`` is true; fail after ``timeout`` seconds with ``message``."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            said = message() if callable(message) else message
            raise AssertionError(f"waited {timeout} s in vain for: {said}")
        time.sleep(0.01)
