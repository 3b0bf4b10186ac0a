"""``queuectl audit``: whether every delivery is accounted for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from shared.cli.failures import Failure, WrongArgument
from shared.errors import ProviderError, SettingsError, StoreUnavailableError
from shared.events.audit import Audit, Findings
from shared.providers import check_provider
from shared.settings import Settings
from shared.store.audit import Account

COLUMNS = {
    "queue": "queue",
    "messageType": "event type",
    "subscriber": "subscriber",
    "dispatched": "dispatched",
    "completed": "completed",
    "dead": "dead",
    "discarded": "discarded",
    "waiting": "waiting",
    "removed": "removed",
    "inLog": "in log",
    "inProvider": "in provider",
    "missing": "missing",
}


@click.command("audit")
@click.option("--repair", is_flag=True, help="Put right what the provider lost.")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def audit(settings: Settings, repair: bool, is_json: bool) -> None:
    """Compare what was dispatched with what became of it, and with what the provider has.

    Ends with status 0 where every delivery is accounted for, or is again after --repair;
    with 1 where some are missing, or where that could not be found out.
    """
    if not settings.log:
        raise WrongArgument("QUEUE_LOG: must be on for an audit of the message log")
    try:
        check_provider(settings)
    except SettingsError as exc:
        raise WrongArgument(str(exc)) from exc
    accounts, found = _audited(settings, repair)
    report = report_of(settings, accounts, found, repair)
    verdict = "balanced" if found.are_none else "repaired" if repair else "not balanced"
    click.echo(json.dumps(report, indent=2) if is_json else shown(report, f"{verdict}: {found}"))
    if verdict == "not balanced":
        raise click.exceptions.Exit(1)


def _audited(settings: Settings, repair: bool) -> tuple[list[Account], Findings]:
    audit = Audit(settings)
    try:
        found = audit.look()
        accounts = audit.accounts()
        if repair:
            audit.repair(found)
    except (ProviderError, StoreUnavailableError) as exc:
        raise Failure(str(exc)) from exc
    finally:
        audit.close()
    return accounts, found


def report_of(
    settings: Settings, accounts: Sequence[Account], found: Findings, repair: bool
) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    return {
        "provider": settings.provider,
        "balanced": found.are_none,
        "subscriptions": [
            _row(settings, each, found)
            for each in accounts
            # of broadcast ones that are over there may be any number
            if each.dispatched or not each.is_retired
        ],
        "missing": found.lack.counts.total(),
        "misdrawn": len(found.misdrawn),
        "unpaused": len(found.unpaused),
        "withheld": len(found.withheld),
        "orphaned": found.orphaned.total(),
        "repaired": repair and not found.are_none,
    }


def _row(settings: Settings, account: Account, found: Findings) -> dict[str, Any]:
    its = account.subscription
    missing = found.lack.counts[its.id]
    in_provider = found.held.get(its.id, 0)
    in_log = account.in_log
    if settings.provider == "embedded":
        in_log, in_provider = 0, account.waiting - missing
    return {
        "queue": its.queue,
        "messageType": its.event_type,
        "subscriber": its.subscriber,
        "retired": account.is_retired,
        "dispatched": account.dispatched,
        "completed": account.completed,
        "dead": account.dead,
        "discarded": account.discarded,
        "waiting": account.waiting,
        "removed": account.removed,
        "inLog": in_log,
        "inProvider": in_provider,
        "missing": missing,
    }


def shown(report: dict[str, Any], said: str) -> str:
    """Return a report as a table, and what it comes to."""
    rows = [list(COLUMNS.values())]
    for each in report["subscriptions"]:
        rows.append(["-" if each[key] is None else str(each[key]) for key in COLUMNS])
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    names = 3
    lines = [
        "  ".join(
            word.ljust(width) if place < names else word.rjust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", said])
