"""A service whose handler ends in every way but a good one."""

import sys

import eventlet
from greenlet import GreenletExit

from shared.errors import Retry
from shared.events import event_handler


class NoTextError(Exception):
    def __str__(self):
        raise RuntimeError("no text either")


def time_out():
    with eventlet.Timeout(0.01):
        eventlet.sleep(5)


def throw(error):
    raise error


def fail(level):
    try:
        if level:
            fail(level - 1)
    finally:
        raise ValueError(f"level {level}")


ENDS = {
    "nothing": lambda: None,
    "eventlet timeout": time_out,
    "system exit": lambda: sys.exit(3),
    "greenlet exit": lambda: throw(GreenletExit()),
    "retry never": lambda: throw(Retry(after=float("inf"))),
    "retry at no time": lambda: throw(Retry(after=float("nan"))),
    "no text": lambda: throw(NoTextError()),
    "half a character": lambda: throw(ValueError("\ud800\x00")),
    "huge text": lambda: throw(ValueError("x" * 5_000_000)),
    "wrong signature": lambda: fail(),
    "long chain": lambda: fail(99),
}


class Saboteur:
    name = "saboteur"

    @event_handler("source", "job.given")
    def do(self, payload):
        ENDS[payload["what"]]()
