"""What the commands share that work on the queue: who does it, how it ends, and filters."""

from __future__ import annotations

import math
import os
import pwd
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import wraps
from typing import Any

import click

from shared.cli.failures import Failure, WrongArgument
from shared.errors import PayloadError, QueueError
from shared.events.direct import DirectOperations
from shared.lifecycle import MessageStatus
from shared.settings import Settings
from shared.store.listing import ANY, PAYLOAD_PATH, Filters, scalar
from shared.types import NAME, Priority


def actor() -> str:
    """Return who gives the command, for the audit log: ``user@host``."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run as a number
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


@contextmanager
def operations(settings: Settings) -> Iterator[DirectOperations]:
    """Open the queue for a command; what fails within ends it with the status for that."""
    if not settings.log:
        raise WrongArgument("QUEUE_LOG: must be on for what works on the message log")
    try:
        opened = DirectOperations(settings)
    except QueueError as exc:
        raise Failure(str(exc)) from exc
    try:
        yield opened
    except PayloadError as exc:
        raise WrongArgument(str(exc)) from exc
    except QueueError as exc:
        raise Failure(str(exc)) from exc
    finally:
        opened.client.close()
        for notice in opened.client.notices:
            click.echo(notice, err=True)


def name(value: str) -> str:
    """Return the name of a queue or an event type.

    :raises BadParameter: when it cannot be one.
    """
    if not NAME.fullmatch(value):
        raise click.BadParameter("must match [A-Za-z0-9][A-Za-z0-9._-]*, 1 to 200 characters")
    return value


class NumberRange(click.FloatRange):
    """A range of numbers, in which NaN is not."""

    def convert(self, value: Any, *args: Any) -> float:
        number: float = super().convert(value, *args)
        if math.isnan(number):
            self.fail("must be a number", *args)
        return number


def time(value: str) -> datetime:
    """Return a time in UTC; MySQL's TIMESTAMP knows those from 1971 to 2037.

    :raises BadParameter: for any other, and for one without a zone.
    """
    try:
        given = datetime.fromisoformat(value)
        utc = given.astimezone(UTC)
    except (ValueError, OverflowError) as exc:
        said = "must be a time with its zone, such as 2030-01-01T00:00:00Z"
        raise click.BadParameter(said) from exc
    if given.tzinfo is None or not 1971 <= utc.year <= 2037:
        raise click.BadParameter("must have its zone, and lie between 1971 and 2037")
    return utc


def path(value: str) -> str:
    """Return a path into a payload.

    :raises BadParameter: when it cannot be one.
    """
    if not PAYLOAD_PATH.fullmatch(value):
        raise click.BadParameter("must be a path such as $.user.email or $.items[0].id")
    return value


PRIORITY = click.Choice([each.value for each in Priority])
STATUS = click.Choice([each.value for each in MessageStatus])

_OPTIONS = (
    click.option("--queue", type=name, help="Of this queue."),
    click.option("--type", "message_type", type=name, help="Of this event type."),
    click.option("--subscriber", help="With a delivery for it, such as company.note."),
    click.option("--priority", type=PRIORITY, help="Of this priority."),
    click.option("--created-from", type=time, help="Stored at this time or later."),
    click.option("--created-to", type=time, help="Stored before this time."),
    click.option("--exception-type", help="That failed by this exception last."),
    click.option("--text", help="Whose payload has these characters, as JSON writes them."),
    click.option("--payload-path", type=path, help="Whose payload has --payload-value there."),
    click.option("--payload-value", help="As JSON; what is no JSON is text."),
)


def with_filters(*, has_status: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options that say which messages are meant, as ``filters``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def gathering(*args: Any, **given: Any) -> Any:
            return command(*args, filters=_gather(given, has_status), **given)

        decorated: Callable[..., Any] = gathering
        status = click.option("--status", type=STATUS, help="Of this status.")
        for option in reversed((*((status,) if has_status else ()), *_OPTIONS)):
            decorated = option(decorated)
        return decorated

    return decorate


def _gather(given: dict[str, Any], has_status: bool) -> Filters:
    known = [
        "queue", "message_type", "subscriber", "priority", "created_from", "created_to",
        "exception_type", "text", "payload_path", "payload_value",
        *(["status"] if has_status else []),
    ]  # fmt: skip
    its = {each: given.pop(each) for each in known}
    if (its["payload_path"] is None) != (its["payload_value"] is None):
        raise click.UsageError("--payload-path and --payload-value must be given together")
    value = its.pop("payload_value")
    for each in ("created_from", "created_to"):
        if its[each] is not None:
            its[each] = its[each].replace(tzinfo=None)
    return Filters(**its, payload_value=ANY if value is None else scalar(value))


def are_none(filters: Filters) -> bool:
    """Say whether filters leave nothing out."""
    return filters == Filters()


def limit_option(most: int, default: int | None = None) -> Callable[..., Any]:
    """Give a command the option ``--limit``."""
    return click.option(
        "--limit",
        type=click.IntRange(1, most),
        default=default,
        show_default=default is not None,
        help="At most so many.",
    )
