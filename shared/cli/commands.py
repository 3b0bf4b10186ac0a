"""The commands of ``queuectl``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from sqlalchemy import URL, Connection, func, select
from sqlalchemy.exc import SQLAlchemyError

from shared.cli import changing, looking
from shared.cli.alerts import alerts
from shared.cli.audit import audit
from shared.cli.config import config
from shared.cli.failures import Failure, WrongArgument
from shared.cli.limits import limit
from shared.cli.migrate import migrate
from shared.cli.rabbitmq import rabbitmq
from shared.cli.ramps import ramp
from shared.cli.schedules import schedules
from shared.cli.transfer import export_messages, import_messages
from shared.database import (
    database_url,
    disposing,
    make_engine,
    make_reader,
    seconds_between,
    utc_now,
)
from shared.errors import SettingsError
from shared.settings import Settings, check_data_dir, load_settings
from shared.store.migrate import LOG, Migrations, all_migrations, upgrade
from shared.store.subscriptions import SILENT_AFTER_SECONDS
from shared.tables import subscriptions


class _Brief(click.Group):
    """Says in one line what is wrong with how it was called, and where help is."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _in_one_line():
            return super().make_context(*args, **options)

    def invoke(self, context: click.Context) -> Any:
        with _in_one_line():
            return super().invoke(context)


_SHOWS_HELP: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""What click 8.2 and later raise for a command that is called without anything."""


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except _SHOWS_HELP:
        raise
    except click.UsageError as exc:
        said = " ".join(exc.format_message().split()).rstrip(".")
        path = exc.ctx.command_path if exc.ctx is not None else "queuectl"
        raise WrongArgument(f"{said}; see {path} --help") from exc


@click.group(cls=_Brief, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def main(context: click.Context) -> None:
    """Look after the queue.

    Takes the same environment variables as the services. Ends with status 0, with 1
    when something failed, and with 2 when a setting or an argument is wrong.
    """
    if context.invoked_subcommand == config.name:
        return  # which says all that is wrong, and not the first alone
    try:
        context.obj = load_settings()
        check_data_dir(context.obj)
    except SettingsError as exc:
        raise WrongArgument(str(exc)) from exc


for _command in (
    alerts,
    audit,
    changing.cancel,
    changing.discard,
    changing.pause,
    changing.prune,
    changing.publish,
    changing.replay,
    changing.resume,
    changing.retire,
    changing.retry,
    config,
    export_messages,
    import_messages,
    limit,
    looking.failures,
    looking.messages,
    looking.show,
    looking.stats,
    looking.subscriptions,
    looking.watch,
    looking.why,
    migrate,
    rabbitmq,
    ramp,
    schedules,
):
    main.add_command(_command)


@main.command()
@click.argument("service")
@click.pass_obj
def alive(settings: Settings, service: str) -> None:
    """See whether an instance of SERVICE consumes. For those that answer no HTTP."""
    url = database_url(settings)
    try:
        with disposing(make_reader(url, time.sleep)) as engine, engine.connect() as connection:
            silent = _seconds_silent(connection, service)
    except SQLAlchemyError as exc:
        said = getattr(exc, "orig", None) or exc
        raise Failure(f"{_shown(url)}: {said}") from exc
    if silent is None or silent > SILENT_AFTER_SECONDS:
        raise Failure(f"nobody consumes for {service}")
    click.echo(f"{service}: alive")


def _seconds_silent(connection: Connection, service: str) -> float | None:
    """Return how long ago any instance of a service signed for a subscription."""
    newest = func.max(subscriptions.c.seen_at)
    its = subscriptions.c.subscriber.startswith(f"{service}.", autoescape=True)
    seconds = seconds_between(connection, newest, utc_now(connection))
    return connection.execute(select(seconds).where(its)).scalar()


@main.group()
def db() -> None:
    """The tables."""


@db.command("upgrade")
@click.pass_obj
def db_upgrade(settings: Settings) -> None:
    """Bring the tables of the message log and of all services to the newest version."""
    known = list(all_migrations())
    if known == [LOG]:
        click.echo("no service is installed here: only the message log has tables", err=True)
    for migrations in known:
        url = _url(settings, migrations)
        try:
            with disposing(make_engine(url, time.sleep)) as engine:
                reached = upgrade(engine, migrations)
        except SQLAlchemyError as exc:
            said = getattr(exc, "orig", None) or exc
            raise Failure(f"{migrations.name}: {_shown(url)}: {said}") from exc
        state = "up to date" if reached is None else f"upgraded to {reached}"
        click.echo(f"{migrations.name}: {state}")


def _url(settings: Settings, migrations: Migrations) -> URL:
    return database_url(settings, "queue" if migrations is LOG else migrations.name)


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True)
