"""``queuectl migrate``: what one provider has is carried over to another, with a receipt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

import click

from shared.cli.audit import report_of, shown
from shared.cli.failures import Failure, WrongArgument
from shared.cli.printing import print_json, progress, with_json
from shared.cli.working import NumberRange, actor
from shared.errors import QueueError, SettingsError
from shared.events.moving import Move, Result
from shared.settings import BUILT_IN_PROVIDERS, Settings, provider_name

WAIT_SECONDS = 600
"""How long it is waited by default until nothing is left at the old provider."""

PROVIDER = f"{', '.join(BUILT_IN_PROVIDERS)}, or package.module:Class"


@click.command()
@click.option("--from", "old", required=True, help=f"The provider to move away from: {PROVIDER}.")
@click.option("--to", "new", required=True, help="The one to move to.")
@click.option(
    "--wait",
    "seconds",
    type=NumberRange(0),
    default=WAIT_SECONDS,
    show_default=True,
    help="Seconds to wait at most until nothing is left at the old one.",
)
@click.option(
    "--receipt", type=click.File("w", encoding="utf-8", atomic=True), help="A file for it."
)
@with_json
@click.pass_obj
def migrate(
    settings: Settings, old: str, new: str, seconds: float, receipt: TextIO | None, is_json: bool
) -> None:
    """Carry over what waits at one provider to another, while services publish and consume.

    First restart all services with QUEUE_PROVIDER set to the new one, and QUEUE_PROVIDER_DRAIN to
    the old one. What breaks off is begun again by the same command, and taken back by the same
    with --from and --to exchanged. Prints for each subscription what became of all that was
    dispatched. Ends with status 0 when nothing is left at the old one and every delivery is
    accounted for, with 1 when not, or when a server does not answer. Names each service that goes
    on to dispatch without these settings, as far as that is seen.
    """
    began = datetime.now(UTC)
    with _move(settings, old, new) as move:
        result = _moved(move, seconds)
        report = _report(move, result, began)
    if receipt is not None:
        receipt.write(json.dumps(report, indent=2) + "\n")
    for each in _strays(move, result):
        click.echo(each, err=True)
    if is_json:
        print_json(report)
    else:
        click.echo(shown(report, _said(report, result)))
    if not report["isComplete"]:
        raise Failure(_said(report, result) if is_json else "the move is not complete")


@contextmanager
def _move(settings: Settings, old: str, new: str) -> Iterator[Move]:
    if not settings.log:
        raise WrongArgument("QUEUE_LOG: must be on for what goes through the message log")
    try:
        move = Move(settings, checked_provider(old, "--from"), checked_provider(new, "--to"))
    except SettingsError as exc:
        raise WrongArgument(str(exc)) from exc
    try:
        yield move
    except QueueError as exc:
        raise Failure(f"{exc}; what was done stays done: begin again, or go back") from exc
    finally:
        move.close()
        for notice in dict.fromkeys(move.notices):
            click.echo(notice, err=True)


def _moved(move: Move, seconds: float) -> Result:
    by = actor()
    move.begin(by)
    with progress(f"{move.route.old} to {move.route.new}", move.look()) as bar:
        task = bar.task_ids[0]
        for steps in (move.carry(), move.wait(seconds)):
            for done in steps:
                total = max(bar.tasks[0].total or 0, done.carried)
                bar.update(task, completed=done.carried, total=total)
        return move.end(by)


def _report(move: Move, result: Result, began: datetime) -> dict[str, Any]:
    audited = report_of(move.settings, result.accounts, result.findings, repair=False)
    for each, account in zip(audited["subscriptions"], _rows(result), strict=True):
        each["leftInOld"] = result.left.get(account, 0)
    return {
        "from": move.route.old,
        "to": move.route.new,
        "startedAt": began.isoformat(),
        "endedAt": datetime.now(UTC).isoformat(),
        "carried": result.progress.carried,
        "dropped": result.progress.dropped,
        "strays": result.strays,
        "isEmpty": result.is_empty,
        "isComplete": result.is_empty and audited["balanced"],
        **audited,
    }


def _strays(move: Move, result: Result) -> list[str]:
    """Say who was not restarted, as far as that can be seen."""
    old, new = move.route.old, move.route.new
    return [
        f"{service} dispatches without the settings of the move, {count} since it began: restart "
        f"its processes with QUEUE_PROVIDER={new} and QUEUE_PROVIDER_DRAIN={old}, and begin again"
        for service, count in sorted(result.strays.items())
    ]


def _rows(result: Result) -> list[int]:
    return [x.subscription.id for x in result.accounts if x.dispatched or not x.is_retired]


def _said(report: dict[str, Any], result: Result) -> str:
    left = "nothing is left" if result.is_empty else f"{sum(result.left.values())} are left"
    verdict = "moved" if report["isComplete"] else "not complete"
    return (
        f"{verdict}: {report['carried']} carried over, {left} at {report['from']}; "
        f"{result.findings}"
    )


def checked_provider(name: str, option: str) -> str:
    """Return the name of a provider.

    :raises WrongArgument: when it is none.
    """
    try:
        return provider_name(name)
    except SettingsError as exc:
        raise WrongArgument(f"{option}: {exc}") from exc
