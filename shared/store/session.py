"""A session of a service's own database for each worker."""

from __future__ import annotations

import contextlib
from typing import Any

import eventlet
from nameko_sqlalchemy import DB_URIS_KEY
from nameko_sqlalchemy import DatabaseSession as NamekoDatabaseSession
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import sessionmaker

from shared.database import database_url, make_engine
from shared.settings import refuse_start, settings_or_exit
from shared.store.migrate import Migrations, missing, service_migrations, upgrade_sqlite


class DatabaseSession(NamekoDatabaseSession):
    """nameko-sqlalchemy's, with a URI from the settings where the config has no ``DB_URIS``.

    On SQLite it makes the service's tables at start, and a transaction takes the
    file's write lock when it begins: hold none open over a call that may be slow.
    """

    def setup(self) -> None:
        if DB_URIS_KEY in self.container.config:
            super().setup()
            return
        service = self.container.service_name
        url = database_url(settings_or_exit(self.container.config), service)
        self.engine: Any = make_engine(url, eventlet.sleep, **self.engine_options)
        self.Session = sessionmaker(bind=self.engine, **self.session_options)
        migrations = service_migrations(service, self.declarative_base)
        if self.engine.dialect.name == "sqlite":
            upgrade_sqlite(self.engine, migrations)
        else:
            self._check_tables(migrations)

    def _check_tables(self, migrations: Migrations) -> None:
        # a database that does not answer yet may do so later
        with contextlib.suppress(OperationalError):
            if lack := missing(self.engine, migrations):
                refuse_start(lack)
