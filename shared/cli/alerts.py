"""``queuectl alerts``: which there are, and from when on there are any."""

from __future__ import annotations

from typing import Any

import click

from shared.cli.printing import print_json, print_rows, with_json
from shared.cli.working import NumberRange, actor, name, operations
from shared.events.direct import DirectAlerts
from shared.settings import Settings
from shared.store.measures import Rule

COLUMNS = ("id", "status", "beganAt", "endedAt", "sentence")
THRESHOLDS = (
    "failurePercent", "oldestSeconds", "deadLetters", "silentConsumers", "failingSchedules",
)  # fmt: skip

_A_COUNT = click.IntRange(0, 10**9)


@click.group()
def alerts() -> None:
    """Show which alerts there are, and set from when on a queue alerts."""


@alerts.command("list")
@with_json
@click.pass_obj
def list_alerts(settings: Settings, is_json: bool) -> None:
    """List the alerts that go on, and the newest of those that are over."""
    with operations(settings) as opened:
        found = DirectAlerts(opened.client).alerts()
    if is_json:
        print_json(found)
    else:
        all_ = [*found["firing"], *found["resolved"]]
        print_rows(COLUMNS, [[each[key] for key in COLUMNS] for each in all_])


@alerts.command()
@with_json
@click.pass_obj
def thresholds(settings: Settings, is_json: bool) -> None:
    """Show from when on each queue alerts; 0 means never.

    Those that are a queue's own are named; the others go with the settings.
    """
    with operations(settings) as opened:
        found = DirectAlerts(opened.client).thresholds()
    if is_json:
        print_json(found)
    else:
        _print([{"queueName": "usual", **found["usual"], "own": []}, *found["queues"]])


@alerts.command("set")
@click.argument("queue", type=name)
@click.option("--failure-percent", type=NumberRange(0, 100), help="Of the newest messages.")
@click.option("--oldest-seconds", type=NumberRange(0, 1e9), help="For which work is due.")
@click.option("--dead-letters", type=_A_COUNT, help="Of the queue.")
@click.option("--silent-consumers", type=_A_COUNT, help="Subscriptions that nobody consumes.")
@click.option("--failing-schedules", type=_A_COUNT, help="That could not dispatch the last time.")
@click.option("--none", "is_none", is_flag=True, help="Take all that it has of its own away.")
@with_json
@click.pass_obj
def set_thresholds(
    settings: Settings,
    queue: str,
    failure_percent: float | None,
    oldest_seconds: float | None,
    dead_letters: int | None,
    silent_consumers: int | None,
    failing_schedules: int | None,
    is_none: bool,
    is_json: bool,
) -> None:
    """Set all thresholds of QUEUE; 0 means never, and what is left out is as usual again."""
    given = {
        Rule.FAILURE_PERCENT: failure_percent,
        Rule.OLDEST_SECONDS: oldest_seconds,
        Rule.DEAD_LETTERS: dead_letters,
        Rule.SILENT_CONSUMERS: silent_consumers,
        Rule.FAILING_SCHEDULES: failing_schedules,
    }
    own = {rule: threshold for rule, threshold in given.items() if threshold is not None}
    if bool(own) == is_none:
        raise click.UsageError("--none, or at least one threshold")
    with operations(settings) as opened:
        changed = DirectAlerts(opened.client).set_thresholds(actor(), queue, own)
    if is_json:
        print_json(changed)
    else:
        _print([changed])


def _print(rows: list[dict[str, Any]]) -> None:
    print_rows(
        ("queue", *THRESHOLDS, "own"),
        [[x["queueName"], *[x[k] for k in THRESHOLDS], ", ".join(x["own"]) or None] for x in rows],
    )
