"""The commands that look and change nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from time import sleep
from typing import Any

import click

from shared.cli.failures import Failure
from shared.cli.limits import limits_text
from shared.cli.printing import make_console, make_table, print_json, print_rows, with_json
from shared.cli.working import NumberRange, limit_option, name, operations, with_filters
from shared.settings import Settings
from shared.store.listing import MOST_LISTED, Filters

STATS = ("pending", "processing", "completed", "failed", "retry", "total", "unrouted")
DELIVERIES = ("waiting", "active", "scheduled", "dead")
LISTED = ("messageId", "queueName", "messageType", "status", "retryCount", "createdAt")


@click.command()
@click.argument("queue", type=name, required=False)
@with_json
@click.pass_obj
def stats(settings: Settings, queue: str | None, is_json: bool) -> None:
    """Count the messages of QUEUE, or of all queues, and the deliveries of each subscription."""
    with operations(settings) as opened:
        found = _stats(opened, queue)
    if is_json:
        print_json(found[0] if queue else {"queues": found})
    else:
        for columns, rows in _stats_tables(found):
            print_rows(columns, rows)
            click.echo()


def _stats(opened: Any, queue: str | None) -> list[dict[str, Any]]:
    found = [opened.stats(each) for each in ([queue] if queue else opened.queues())]
    if queue and found == [None]:
        raise Failure(f"no queue {queue}")
    return [each for each in found if each is not None]


def _stats_tables(found: Sequence[dict[str, Any]]) -> list[tuple[Sequence[str], list[list[Any]]]]:
    queues = [[each["queueName"], *[each[key] for key in STATS]] for each in found]
    by_subscriber = [
        [each["queueName"], its["subscriber"], *[its[key] for key in DELIVERIES]]
        for each in found
        for its in each["subscriptions"]
    ]
    return [
        (("queue", *STATS), queues),
        (("queue", "subscriber", *DELIVERIES), by_subscriber),
    ]


@click.command()
@click.argument("queue", type=name, required=False)
@click.option(
    "--interval",
    type=NumberRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--count", type=click.IntRange(1), help="End after so many looks.")
@with_json
@click.pass_obj
def watch(
    settings: Settings, queue: str | None, interval: float, count: int | None, is_json: bool
) -> None:
    """Show the statistics again and again, until Ctrl-C.

    With --json, a line for each look.
    """
    with operations(settings) as opened:
        try:
            _watch(opened, queue, interval, count, is_json)
        except KeyboardInterrupt:
            return


def _watch(
    opened: Any, queue: str | None, interval: float, count: int | None, is_json: bool
) -> None:
    from rich.console import Group
    from rich.live import Live

    console = make_console()
    is_live = console.is_terminal and not is_json
    live: Any = Live(console=console, auto_refresh=False) if is_live else nullcontext()
    with live:
        looks = 0
        while True:
            found = _stats(opened, queue)
            shown = Group(*[make_table(*each) for each in _stats_tables(found)])
            if is_json:
                click.echo(json.dumps({"queues": found}, ensure_ascii=False))
            elif is_live:
                live.update(shown, refresh=True)
            else:
                console.print(shown)
            looks += 1
            if looks == count:
                return
            sleep(interval)


@click.command()
@with_filters(has_status=True)
@click.option("--cursor", help="Go on from the nextCursor of the last page.")
@limit_option(MOST_LISTED, 50)
@with_json
@click.pass_obj
def messages(
    settings: Settings, filters: Filters, cursor: str | None, limit: int, is_json: bool
) -> None:
    """List the messages that fit all filters, newest first.

    A call looks through a bounded number of messages, so a page may be short before the end.
    """
    with operations(settings) as opened:
        page = opened.messages(filters, cursor, limit)
    if is_json:
        print_json(page)
        return
    print_rows(LISTED, [[each[key] for key in LISTED] for each in page["messages"]])
    if page["nextCursor"]:
        click.echo(f"\nmore: --cursor {page['nextCursor']}")


@click.command()
@click.argument("message_id")
@with_json
@click.pass_obj
def show(settings: Settings, message_id: str, is_json: bool) -> None:
    """Show a message, what became of it at each subscriber, its cause and effects."""
    with operations(settings) as opened:
        message = opened.message(message_id)
    if is_json:
        print_json(message)
        return
    deliveries, payload = message.pop("deliveries"), message.pop("payload")
    its = [[key, _plain(value)] for key, value in message.items() if value not in (None, [])]
    print_rows(("", ""), [*its, ["payload", json.dumps(payload, ensure_ascii=False)]])
    names = ("subscriber", "status", "attempts", "availableAt", "processedAt", "errorMessage")
    click.echo()
    print_rows(names, [[each[key] for key in names] for each in deliveries])
    for each in deliveries:
        for attempt in each["history"]:
            _print_attempt(each["subscriber"], attempt)


def _plain(value: Any) -> Any:
    is_structured = isinstance(value, dict | list)
    return json.dumps(value, ensure_ascii=False) if is_structured else value


def _print_attempt(subscriber: str, attempt: dict[str, Any]) -> None:
    its = f"{subscriber}, attempt {attempt['attempt']}: {attempt['outcome']} at"
    click.echo(f"\n{its} {attempt['endedAt']}")
    if attempt["traceback"]:
        click.echo(attempt["traceback"].rstrip())


@click.command()
@click.argument("message_id")
@with_json
@click.pass_obj
def why(settings: Settings, message_id: str, is_json: bool) -> None:
    """Say for each subscription what became of a message, or what it waits for."""
    with operations(settings) as opened:
        found = opened.why(message_id)
    if is_json:
        print_json(found)
        return
    for each in found["reasons"]:
        click.echo(f"{each['subscriber'] or 'nobody'}: {each['sentence']}")


@click.command()
@with_json
@click.pass_obj
def failures(settings: Settings, is_json: bool) -> None:
    """Show the groups of dead letters, the largest first."""
    with operations(settings) as opened:
        found = opened.failures()
    if is_json:
        print_json({"failures": found})
        return
    names = ("fingerprint", "count", "errorType", "place", "lastSeenAt")
    rows = [[*[each[key] for key in names], each["example"]["messageId"]] for each in found]
    print_rows((*names, "example"), rows)


@click.command()
@click.argument("queue", type=name, required=False)
@with_json
@click.pass_obj
def subscriptions(settings: Settings, queue: str | None, is_json: bool) -> None:
    """Show the subscriptions: who consumes, what waits, and who paused."""
    with operations(settings) as opened:
        found = opened.subscriptions(queue)
    if is_json:
        print_json({"subscriptions": found})
        return
    names = ("id", "queueName", "messageType", "subscriber", "consumer", *DELIVERIES, "pausedBy")
    rows = [
        [
            *[each[key] for key in names],
            "" if each["limits"] is None else limits_text(each["limits"]),
        ]
        for each in found
    ]
    print_rows((*names, "limits"), rows)
