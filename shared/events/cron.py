"""When a schedule's occurrences are: cron expressions in time zones.

Times are naive UTC outside of here, as everywhere in the suite.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import NamedTuple
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from cronsim.cronsim import Field

from shared.errors import PayloadError

MOST_COUNTED = 10_000
"""Missed occurrences that are counted at once; finding one takes some 10 µs."""

LONGEST = 255
"""Characters of an expression, and of a zone's name."""


class Due(NamedTuple):
    """What is to be done at a time at which a schedule is due.

    :param occurrence: the latest one, which stands for those before it.
    :param skipped: how many those are, :data:`MOST_COUNTED` at most.
    :param next: the first one after that time; ``None`` when there is none any more.
    """

    occurrence: datetime
    skipped: int
    next: datetime | None


class Cron:
    """A cron expression, by the clock of a time zone.

    :param expression: five fields as Debian's cron has them, or six, of which the first is
        the second.
    :param zone: a name of the time zone database, such as ``Europe/Berlin``.
    :raises PayloadError: naming ``cron`` or ``timeZone``, and what is wrong with it.
    """

    def __init__(self, expression: str, zone: str = "UTC") -> None:
        self._zone = _zone(zone)
        self._expression = expression
        if len(expression) > LONGEST:
            raise PayloadError({"cron": f"must have {LONGEST} characters at most"})
        try:
            CronSim(expression, datetime(2000, 1, 1))
        except CronSimError as exc:
            raise PayloadError({"cron": _trouble(expression, exc)}) from exc

    def after(self, time: datetime) -> datetime | None:
        """Return the first occurrence after a time; ``None`` for one in no 50 years."""
        return next(self._walk(time), None)

    def due(self, first: datetime, now: datetime) -> Due:
        """Say what is to be done now.

        :param first: the first occurrence that was not dispatched, which ``now`` is not before.
        """
        missed = [first]
        for each in islice(self._walk(first), MOST_COUNTED):
            if each > now:
                return Due(missed[-1], len(missed) - 1, each)
            missed.append(each)
        if len(missed) <= MOST_COUNTED:
            return Due(missed[-1], len(missed) - 1, None)
        return Due(self._latest(missed[-1], now), MOST_COUNTED, self.after(now))

    @property
    def sentence(self) -> str:
        """What it means, in English, such as ``At 09:00 every day``."""
        said: str = CronSim(self._expression, datetime(2000, 1, 1)).explain()
        for pattern, better in _BETTER:
            said = pattern.sub(better, said)
        return said

    def _walk(self, time: datetime) -> Iterator[datetime]:
        """Yield the occurrences after a time, each once."""
        last = time
        # beyond the year 9999 there is no time
        with suppress(OverflowError):
            for each in CronSim(self._expression, self._local(time)):
                found = _plain(each)
                # of an hour that comes twice it gives the first one, from within the second, too
                if found > last:
                    last = found
                    yield found

    def _latest(self, least: datetime, now: datetime) -> datetime:
        """Return the latest occurrence up to ``now`` that can be found from there."""
        # a moment later: one of this very moment counts, too
        moment = self._local(now + timedelta(microseconds=1))
        backwards = CronSim(self._expression, moment, reverse=True)
        found = _plain(next(backwards, self._local(least)))
        return max(found, least)

    def _local(self, time: datetime) -> datetime:
        return time.replace(tzinfo=UTC).astimezone(self._zone)


def _trouble(expression: str, error: CronSimError) -> str:
    """Say what is wrong with an expression."""
    if str(error) == Field.DAY.msg() and _is_day(expression.split()[-3]):
        return "has no occurrence: no month that it names has such a day"
    return f"is no cron expression: {error}"


def _is_day(field: str) -> bool:
    try:
        Field.DAY.parse(field.upper())
    except CronSimError:
        return False
    return True


def _plain(time: datetime) -> datetime:
    return time.astimezone(UTC).replace(tzinfo=None)


def _zone(name: str) -> ZoneInfo:
    try:
        if name in _OF_THE_MACHINE or name.startswith(_COPIES):
            raise ValueError(name)
        return ZoneInfo(name)
    # by what the name is, the file that it stands for may be anything
    except (KeyError, ValueError, OSError) as exc:
        raise PayloadError({"timeZone": "must be a time zone such as Europe/Berlin"}) from exc


_OF_THE_MACHINE = ("localtime", "posixrules", "Factory")
"""Zones that may be another on each machine that dispatches; the last is of who was given none."""

_COPIES = ("posix/", "right/")
"""What some machines have all zones once more under; ``right/`` counts leap seconds as well."""

_ORDINALS = ("second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
_SUFFIXES = {1: "st", 2: "nd", 3: "rd"}


def _ordinal(number: int) -> str:
    suffix = "th" if number % 100 in (11, 12, 13) else _SUFFIXES.get(number % 10, "th")
    return f"{number}{suffix}"


_BETTER: Sequence[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = (
    (re.compile(r"\b(\d+)th\b"), lambda found: _ordinal(int(found[1]))),
    # such as every second second
    (
        re.compile(rf"\b([Ee]very) ({'|'.join(_ORDINALS)})(?= (?:second|minute|hour|day|month)\b)"),
        lambda found: f"{found[1]} {_ordinal(_ORDINALS.index(found[2]) + 2)}",
    ),
    (re.compile(r"\bday of (week|month)\b"), r"day of the \1"),
    (re.compile(r"\AAt minute 0 past every\b"), "At the start of every"),
)
"""What cronsim says in odd words, and what is said instead."""
