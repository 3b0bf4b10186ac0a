"""What must be true in the end, and what differs from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from services.demo.client import Client
from services.demo.mail_server import Mailbox
from services.demo.people import POSTPONED, REFUSED, Person

SUBSCRIBERS = {
    "user.registered": {"company.handle_user_registered", "notifications.send_welcome"},
    "user.logged_in": {"company.handle_user_logged_in"},
    "user.logged_out": {"company.handle_user_logged_out"},
}
"""Who gets which events."""

MAILER = "notifications.send_welcome"

FAILURES = {REFUSED: ["failed"], POSTPONED: ["retry"]}
"""Which attempts fail before the one that succeeds, of the mail to whom."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a person did.

    :param message: as ``GET /queue/messages/<id>`` shows it.
    """

    person: Person
    message: dict[str, Any]

    @property
    def type(self) -> str:
        """Such as ``user.registered``."""
        return str(self.message["messageType"])

    def milliseconds_until(self, time: str) -> int:
        """Return how long after the dispatch something was; its id tells when that was."""
        dispatched = UUID(self.message["messageId"]).int >> 80  # RFC 9562, 5.7
        return round(datetime.fromisoformat(time).timestamp() * 1000) - dispatched


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that must be true.

    :param differences: why it is not; empty where it is.
    """

    text: str
    differences: list[str]


def judge(
    client: Client,
    queue: str,
    people: list[Person],
    events: list[Event],
    mailbox: Mailbox,
    before: Mapping[str, Any],
) -> list[Claim]:
    """Compare how everything is with how it has to be.

    :param before: the statistics of the queue from before it all began.
    """
    logins = _last_logins(events)
    known = [line for person in people for line in _about(person, client, logins)]
    ended = [line for event in events for line in _deliveries(event)]
    if len(events) != events_of(people):
        ended.append(f"the log has {len(events)} events, not {events_of(people)}")
    return [
        Claim(f"{len(people)} people known to company: role, company, last login, sessions", known),
        Claim(f"{len(people)} mails delivered, exactly one to each", _mails(people, mailbox)),
        Claim(f"{len(events)} events at all their subscribers, after the right attempts", ended),
        Claim(
            f"statistics of {queue}: all completed, none failed",
            _stats(people, client.stats(queue) or {}, before),
        ),
        Claim("queue healthy", _health(client.health())),
    ]


def events_of(people: list[Person]) -> int:
    """Return how many events people make."""
    return sum(1 + person.logins + person.logouts for person in people)


def _last_logins(events: list[Event]) -> dict[str, datetime]:
    """Return when each user logged in the last time, as the events tell it."""
    times = [
        (event.person.user_id, datetime.fromisoformat(event.message["payload"]["occurred_at"]))
        for event in events
        if event.type == "user.logged_in"
    ]
    return dict(sorted(times))


def _about(person: Person, client: Client, logins: Mapping[str, datetime]) -> Iterator[str]:
    expected = {
        "email": person.email,
        "first_name": person.form["first_name"],
        "last_name": person.form["last_name"],
        "role": person.role,
        "company": person.company,
        "last_login_at": logins.get(person.user_id),
        "open_sessions": person.open_sessions,
    }
    shown = client.user(person.user_id)
    if not shown:
        return iter([f"{person.name}: unknown"])
    if shown.get("last_login_at"):
        shown["last_login_at"] = datetime.fromisoformat(shown["last_login_at"])
    return _differences(person.name, expected, shown)


def _mails(people: list[Person], mailbox: Mailbox) -> list[str]:
    wanted = Counter(person.mail_address for person in people)
    delivered = Counter(mailbox.recipients)
    return [
        f"{address}: got {delivered[address]} mails, not {wanted[address]}"
        for address in wanted | delivered
        if delivered[address] != wanted[address]
    ]


def _deliveries(event: Event) -> Iterator[str]:
    what = f"{event.type} of {event.person.name}"
    found = {each["subscriber"]: each for each in event.message["deliveries"]}
    wanted = SUBSCRIBERS[event.type]
    if set(found) != wanted:
        yield f"{what}: went to {sorted(found)}, not to {sorted(wanted)}"
    for subscriber, delivery in found.items():
        failures = FAILURES.get(event.person.address, []) if subscriber == MAILER else []
        expected = {"status": "completed", "attempts": 1 + failures.count("retry")}
        yield from _differences(f"{what} at {subscriber}", expected, delivery)
        ended = [attempt["outcome"] for attempt in delivery["history"]]
        if ended != failures:
            yield f"{what} at {subscriber}: failed as {ended}, not as {failures}"


def _stats(people: list[Person], stats: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    total = events_of(people)
    new = {"total": total, "completed": total}
    unchanged = ("pending", "processing", "failed", "retry", "unrouted")
    expected = {key: before[key] + new.get(key, 0) for key in (*new, *unchanged)}
    return list(_differences("stats", expected, stats))


def _health(health: Mapping[str, Any]) -> list[str]:
    return [] if health["status"] == "healthy" else [str(health)]


def _differences(what: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for key, value in expected.items():
        if found.get(key) != value:
            yield f"{what}: {key} is {found.get(key)}, not {value}"
