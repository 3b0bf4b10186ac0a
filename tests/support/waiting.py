"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

PROMPTLY = 3.0
"""Seconds within which something that needs no wait is done, on a machine that others use too.

Enough to tell a timer or a push from a poll; how fast it is, benchmarks/ say.
"""


def wait_until(
    condition: Callable[[], object],
    timeout: float,
    message: str | Callable[[], str],
    every: float = 0.01,
) -> None:
    """Wait until ``condition()`` is true; fail after ``timeout`` seconds with ``message``.

    :param every: seconds between two looks: more where a look takes time from what is waited for.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            said = message() if callable(message) else message
            raise AssertionError(f"waited {timeout} s in vain for: {said}")
        time.sleep(every)
