"""``queuectl schedules``: events that are dispatched at the times of a cron expression."""

from __future__ import annotations

import sys
from typing import Any

import click

from shared.cli.changing import as_json, say
from shared.cli.printing import print_json, print_rows, with_json
from shared.cli.working import PRIORITY, actor, name, operations
from shared.events.direct import DirectSchedules
from shared.settings import Settings

COLUMNS = (
    "name", "queueName", "messageType", "cron", "timeZone", "nextAt", "lastAt", "lastMessageId",
    "error",
)  # fmt: skip


@click.group()
def schedules() -> None:
    """Dispatch events at the times of cron expressions, by queue_admin."""


@schedules.command("list")
@with_json
@click.pass_obj
def list_schedules(settings: Settings, is_json: bool) -> None:
    """List the schedules: when they are next, and what each dispatched last."""
    with operations(settings) as opened:
        found = DirectSchedules(opened.client).schedules()
    if is_json:
        print_json({"schedules": found})
        return
    rows = [[each[key] for key in COLUMNS] for each in found]
    for row, each in zip(rows, found, strict=True):
        row[COLUMNS.index("nextAt")] = each["nextAt"] if each["enabled"] else "paused"
    print_rows(COLUMNS, rows)


@schedules.command("set")
@click.argument("schedule", type=name)
@click.argument("cron")
@click.argument("queue", type=name)
@click.argument("message_type", metavar="TYPE", type=name)
@click.argument("payload", default="{}")
@click.option("--time-zone", default="UTC", show_default=True, help="Such as Europe/Berlin.")
@click.option("--priority", type=PRIORITY, default="normal", show_default=True)
@click.option("--metadata", help="A JSON object that travels along.")
@with_json
@click.pass_obj
def set_schedule(
    settings: Settings,
    /,
    schedule: str,
    cron: str,
    queue: str,
    message_type: str,
    payload: str,
    metadata: str | None,
    is_json: bool,
    **options: Any,
) -> None:
    """Make SCHEDULE, or change it: it dispatches TYPE into QUEUE at the times of CRON.

    CRON is one argument, such as "30 6 * * MON-FRI". PAYLOAD is JSON, and - reads it from
    standard input.
    """
    body = as_json("PAYLOAD", sys.stdin.read() if payload == "-" else payload)
    kept = None if metadata is None else as_json("--metadata", metadata)
    with operations(settings) as opened:
        made = DirectSchedules(opened.client).put(
            actor(),
            schedule,
            queue_name=queue,
            message_type=message_type,
            payload=body,
            cron=cron,
            metadata=kept,
            **options,
        )
    say(is_json, made, f"{schedule}: {made['sentence']}; {_next(made)}")


def _next(made: dict[str, Any]) -> str:
    return f"next at {made['nextAt']}" if made["enabled"] else "paused"


@schedules.command()
@click.argument("schedule", type=name)
@with_json
@click.pass_obj
def remove(settings: Settings, schedule: str, is_json: bool) -> None:
    """Remove SCHEDULE; what it dispatched goes on."""
    with operations(settings) as opened:
        DirectSchedules(opened.client).remove(actor(), schedule)
    say(is_json, {"name": schedule, "removed": True}, f"{schedule}: removed")


@schedules.command()
@click.argument("schedule", type=name)
@with_json
@click.pass_obj
def run(settings: Settings, schedule: str, is_json: bool) -> None:
    """Dispatch what SCHEDULE dispatches, now, beside its occurrences."""
    with operations(settings) as opened:
        message_id = DirectSchedules(opened.client).run(actor(), schedule)
    say(is_json, {"messageId": message_id}, message_id)


@schedules.command()
@click.argument("schedule", type=name)
@with_json
@click.pass_obj
def pause(settings: Settings, schedule: str, is_json: bool) -> None:
    """Have nothing more dispatched by SCHEDULE."""
    with operations(settings) as opened:
        paused = DirectSchedules(opened.client).pause(actor(), schedule)
    say(is_json, paused, f"{schedule}: {_next(paused)}")


@schedules.command()
@click.argument("schedule", type=name)
@with_json
@click.pass_obj
def resume(settings: Settings, schedule: str, is_json: bool) -> None:
    """Take back a pause; what was meanwhile is not made up for."""
    with operations(settings) as opened:
        resumed = DirectSchedules(opened.client).resume(actor(), schedule)
    say(is_json, resumed, f"{schedule}: {_next(resumed)}")
