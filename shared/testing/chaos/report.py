"""What a run with faults found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.testing.chaos.points import Point


@dataclass(frozen=True, slots=True)
class Unsafe:
    """A handler that is not safe to repeat, and where it broke.

    :param handler: ``service.method``.
    :param effect: what has its effect at this point: ``db``, or a dependency and its method.
    :param event: the event that it handled, as text.
    :param expected: what an undisturbed run leaves and this one did not.
    :param got: what this one left instead, or besides.
    """

    handler: str
    point: Point
    effect: str
    event: str
    expected: Sequence[str]
    got: Sequence[str]

    def __str__(self) -> str:
        at = f"{self.point} ({self.effect})" if self.effect else str(self.point)
        lines = [f"{self.handler}: {_BEFALLS.get(self.point, 'killed ')}{at}, {self.event}"]
        lines += [f"  expected  {line}" for line in self.expected or ["nothing more"]]
        lines += [f"  got       {line}" for line in self.got or ["nothing"]]
        return "\n".join(lines)


_BEFALLS = {Point.DELIVERED_TWICE: "", Point.OUT_OF_ORDER: ""}


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the handlers.

    :param handlers: those that had events, ``service.method`` each.
    :param faults: how many runs had a fault.
    :param unsafe: the first finding for each handler, point and effect.
    """

    handlers: Sequence[str]
    faults: int
    unsafe: Sequence[Unsafe]

    @property
    def safe(self) -> bool:
        """Whether each handler leaves the same, whatever befell it."""
        return not self.unsafe

    def assert_safe(self) -> None:
        """See that all handlers are safe to repeat.

        :raises AssertionError: whose text is the report.
        """
        __tracebackhide__ = True  # the report says it all
        if self.unsafe:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        broken = sorted({each.handler for each in self.unsafe})
        verdict = f"not safe to repeat: {', '.join(broken)}" if broken else "safe to repeat"
        head = f"{_count(self.handlers, 'handler')}, {self.faults} faults; {verdict}"
        return "\n\n".join([head, *map(str, self.unsafe)])


def _count(things: Sequence[str], word: str) -> str:
    return f"{len(things)} {word}{'s' * (len(things) != 1)}"
