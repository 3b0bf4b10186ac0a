"""``queuectl rabbitmq``: queues with priorities, and back to those of plain nameko."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
from sqlalchemy.exc import SQLAlchemyError

from shared.cli.failures import Failure, WrongArgument
from shared.database import database_url, disposing, make_reader
from shared.errors import ProviderError, QueueNotFoundError
from shared.settings import Settings
from shared.store import subscriptions
from shared.types import Subscription

if TYPE_CHECKING:
    from shared.providers.rabbitmq.upgrade import Redeclaration, Report


@click.group()
def rabbitmq() -> None:
    """The queues in RabbitMQ."""


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--force", is_flag=True, help="Even where plain workers consume: they end."),
        click.option("--dry-run", is_flag=True, help="Only say what would be done."),
        click.option("--source", help="The service whose events --queue has."),
        click.option("--queue", "names", multiple=True, metavar="NAME", help="This one alone."),
    ):
        command = option(command)
    return click.pass_obj(command)


@rabbitmq.command("upgrade-queues")
@_options
def upgrade_queues(settings: Settings, **options: Any) -> None:
    """Declare the queues of plain nameko anew, with priorities and dead letters.

    Takes those of all subscriptions in the message log, or those named. They keep their
    messages and their bindings. Run it again if it was interrupted.
    """
    _redeclare(settings, is_upgrade=True, **options)


@rabbitmq.command("downgrade-queues")
@_options
def downgrade_queues(settings: Settings, **options: Any) -> None:
    """Declare queues anew as plain nameko does, so that it starts on them.

    Takes the same as upgrade-queues, and keeps as much.
    """
    _redeclare(settings, is_upgrade=False, **options)


def _redeclare(
    settings: Settings,
    *,
    is_upgrade: bool,
    names: Sequence[str],
    source: str | None,
    dry_run: bool,
    force: bool,
) -> None:
    # its driver takes longer to import than most commands take
    from shared.providers.rabbitmq.upgrade import Redeclaration

    if not names and not settings.log:
        raise WrongArgument("--queue: must name the queues where QUEUE_LOG is off")
    if source and len(names) != 1:
        raise WrongArgument("--source: must come with one --queue")
    wanted = [] if names else _subscriptions(settings)
    try:
        redeclaration = Redeclaration(
            settings, is_upgrade=is_upgrade, is_forced=force, is_dry=dry_run
        )
    except ProviderError as exc:
        raise Failure(str(exc)) from exc
    try:
        wanted = wanted or [redeclaration.subscription_of(name, source) for name in names]
        _do_all(redeclaration, wanted)
    except QueueNotFoundError as exc:
        raise WrongArgument(f"--queue: {exc}") from exc
    except ProviderError as exc:
        raise Failure(f"{exc}; nothing is lost, run this again") from exc
    finally:
        redeclaration.close()


def _subscriptions(settings: Settings) -> list[Subscription]:
    url = database_url(settings)
    try:
        with disposing(make_reader(url, time.sleep)) as engine, engine.connect() as connection:
            return subscriptions.active(connection)
    except SQLAlchemyError as exc:
        said = getattr(exc, "orig", None) or exc
        raise Failure(f"{url.render_as_string(hide_password=True)}: {said}") from exc


def _do_all(redeclaration: Redeclaration, wanted: Sequence[Subscription]) -> None:
    from shared.providers.rabbitmq.layout import queue_name

    width = max([len(queue_name(each)) for each in wanted], default=0)
    click.echo(f"{'queue':{width}}  messages  what was done")
    failures = 0
    for subscription in wanted:
        report: Report = redeclaration.do(subscription)
        click.echo(f"{report.queue:{width}}  {report.messages:8}  {report.what}")
        failures += report.is_failure
    if failures:
        raise Failure(f"{failures} of {len(wanted)} refused")
