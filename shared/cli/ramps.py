"""``queuectl ramp``: dead letters of a group, retried step by step."""

from __future__ import annotations

from time import sleep
from typing import Any

import click

from shared.cli.failures import Failure
from shared.cli.printing import print_json, print_rows, progress, with_json
from shared.cli.working import actor, operations
from shared.events.direct import DirectRamps
from shared.settings import Settings
from shared.store.ramps import HIGHEST_RATE, USUAL_RATE, RampStatus

LOOK_SECONDS = 0.5
"""How often is looked how far a ramp is that somebody waits for."""

COLUMNS = ("id", "fingerprint", "status", "step", "retried", "completed", "remaining", "sentence")


@click.group()
def ramp() -> None:
    """Retry the dead letters of a group in steps of 1, 10, 100, … as long as that goes well."""


@ramp.command()
@click.argument("fingerprint")
@click.option(
    "--rate",
    type=click.IntRange(1, HIGHEST_RATE),
    default=USUAL_RATE,
    show_default=True,
    help="Dead letters a second, at most.",
)
@click.option("--wait", is_flag=True, help="Until it ends; with status 1 if it stopped.")
@with_json
@click.pass_obj
def start(settings: Settings, fingerprint: str, rate: int, wait: bool, is_json: bool) -> None:
    """Begin a ramp of the group FINGERPRINT, which queue_admin carries on."""
    with operations(settings) as opened:
        its = DirectRamps(opened.client)
        found = its.begin(actor(), fingerprint, rate)
        if wait:
            found = _followed(its, found)
    _say(found, is_json)
    if wait and found["status"] != RampStatus.COMPLETED:
        raise Failure(f"ramp {found['id']} {found['status']}")


def _followed(its: DirectRamps, found: dict[str, Any]) -> dict[str, Any]:
    with progress(f"ramp {found['id']}", found["total"]) as shown:
        while found["status"] == RampStatus.RUNNING:
            sleep(LOOK_SECONDS)
            found = its.ramp(found["id"])
            shown.update(shown.task_ids[0], completed=found["completed"])
    return found


@ramp.command("list")
@with_json
@click.pass_obj
def list_ramps(settings: Settings, is_json: bool) -> None:
    """List the ramps, the newest first."""
    with operations(settings) as opened:
        found = DirectRamps(opened.client).ramps()
    if is_json:
        print_json({"ramps": found})
    else:
        print_rows(COLUMNS, [[each[key] for key in COLUMNS] for each in found])


@ramp.command()
@click.argument("ramp_id", metavar="ID", type=click.IntRange(1))
@with_json
@click.pass_obj
def show(settings: Settings, ramp_id: int, is_json: bool) -> None:
    """Show how far the ramp ID is, and why it ended."""
    with operations(settings) as opened:
        found = DirectRamps(opened.client).ramp(ramp_id)
    _say(found, is_json)


@ramp.command()
@click.argument("ramp_id", metavar="ID", type=click.IntRange(1))
@with_json
@click.pass_obj
def cancel(settings: Settings, ramp_id: int, is_json: bool) -> None:
    """End the ramp ID; what it retried goes on."""
    with operations(settings) as opened:
        found = DirectRamps(opened.client).cancel(actor(), ramp_id)
    _say(found, is_json)


def _say(found: dict[str, Any], is_json: bool) -> None:
    if is_json:
        print_json(found)
    else:
        click.echo(f"ramp {found['id']} {found['status']}: {found['sentence']}")
