"""Migrations: the message log's own, and those of each service that has tables."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from shared.database import Database, reading
from shared.errors import StoreUnavailableError
from shared.tables import metadata

ENTRY_POINT_GROUP = "queue_service.tables"
"""``name = package.models:Base``: a service's tables; its migrations lie beside the module."""

ENVIRONMENT = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class Migrations:
    """A set of migrations that belong together: versions, and where the current one is kept."""

    name: str
    versions: Path
    metadata: MetaData

    @property
    def version_table(self) -> str:
        """The table that holds the version that a database is at."""
        return f"{self.name}_version"

    def newest(self) -> str:
        """Return the newest version: the number that its file's name begins with.

        Empty where there are no migrations: somebody else makes those tables.
        """
        files = self.versions.glob("[0-9]*_*.py")
        return max((file.name.split("_")[0] for file in files), default="")

    def current(self, connection: Connection) -> str | None:
        """Return the version that the database is at; ``None`` before the first."""
        if not inspect(connection).has_table(self.version_table):
            return None
        found = connection.execute(text(f"SELECT version_num FROM {self.version_table}"))  # noqa: S608
        version: str | None = found.scalar()
        return version


LOG = Migrations("queue", ENVIRONMENT / "versions", metadata)


def service_migrations(name: str, base: Any) -> Migrations:
    """Return the migrations of a service whose declarative base is ``base``."""
    module = import_module(base.__module__)
    return Migrations(name, Path(str(module.__file__)).parent / "migrations", base.metadata)


def all_migrations() -> Iterator[Migrations]:
    """Yield the log's migrations and those of every installed service."""
    yield LOG
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda each: each.name):
        yield service_migrations(point.name, point.load())


def missing(engine: Engine, migrations: Migrations) -> str | None:
    """Say in one line what to do about tables that are not there or old; ``None`` if all is well.

    :raises SQLAlchemyError: when the database does not answer.
    """
    current = _current(engine, migrations)
    if (current or "") >= migrations.newest():
        return None
    state = "are missing" if current is None else f"are at version {current}"
    todo = "run queuectl db upgrade"
    if migrations.name not in (LOG.name, *entry_points(group=ENTRY_POINT_GROUP).names):
        todo = f"name them among the entry points {ENTRY_POINT_GROUP!r} of a package, and {todo}"
    return f"the tables of {migrations.name} {state}: {todo}"


def see_log(database: Database) -> None:
    """See that there is a message log, with the tables of this release; make none.

    :raises StoreUnavailableError: when there is none, or the database does not answer.
    """
    file = database.engine.url.database
    if database.is_sqlite and not Path(str(file)).exists():
        raise StoreUnavailableError(f"{file}: there is no message log; see QUEUE_DATA_DIR")
    try:
        lack = missing(database.engine, LOG)
    except SQLAlchemyError as exc:
        raise StoreUnavailableError(str(getattr(exc, "orig", None) or exc)) from exc
    if lack:
        raise StoreUnavailableError(lack)


def _current(engine: Engine, migrations: Migrations) -> str | None:
    # past the write lock, which somebody may hold for long: what is up to date starts all the same
    with reading(engine) as connection:
        return migrations.current(connection)


def upgrade(engine: Engine, migrations: Migrations) -> str | None:
    """Bring a database to the newest version; return it, or ``None`` if it was there already."""
    newest = migrations.newest()
    # a database from a newer release is left alone: its tables still fit
    if (_current(engine, migrations) or "") >= newest:
        return None
    with engine.connect() as connection:
        _run(connection, migrations)
        connection.commit()
        return newest


def upgrade_sqlite(engine: Engine, migrations: Migrations) -> None:
    """Like :func:`upgrade`, when several processes may start on one file at once."""
    with _locked(Path(str(engine.url.database) + ".migrate.lock")):
        upgrade(engine, migrations)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(connection: Connection, migrations: Migrations) -> None:
    # it tells of each of its plug-ins, and belongs to no service
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # imported only where there is something to do: it takes longer than a start should
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(ENVIRONMENT))
    config.set_main_option("version_locations", str(migrations.versions))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    config.attributes["metadata"] = migrations.metadata
    config.attributes["version_table"] = migrations.version_table
    command.upgrade(config, "head")
