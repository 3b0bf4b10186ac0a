"""The tests run as the services do: on eventlet's hub, and with no settings but their own."""

import os

# for the processes that tests start: every server has an address, and to import what eventlet
# resolves names with takes a sixth of the time that a service needs to start
os.environ["EVENTLET_NO_GREENDNS"] = "yes"

import eventlet

eventlet.monkey_patch()

import contextlib  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Generator, Iterator, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from shared.database import database_url, make_engine  # noqa: E402
from shared.settings import load_settings  # noqa: E402
from shared.store.migrate import LOG, upgrade, upgrade_sqlite  # noqa: E402
from shared.testing.servers import (  # noqa: E402
    MariaDBDatabase,
    MariaDBServer,
    ProgramMissingError,
    RabbitMQServer,
    RedisCluster,
    RedisServer,
)

OURS = (
    "QUEUE_", "ALERT_", "AUTH_EVENTS_", "COMPANY_", "MAIL_",
    "REDIS_", "RABBITMQ_", "AMQP_", "DB_",
)  # fmt: skip
"""What the names of our settings begin with."""

for _name in [name for name in os.environ if name.startswith(OURS)]:
    del os.environ[_name]

# hundreds of processes are started, each of which would compile the suite again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@contextlib.contextmanager
def _skipping() -> Iterator[None]:
    """Skip a test whose server is not installed, or fail it where ``CI`` is true."""
    try:
        yield
    except ProgramMissingError as exc:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(str(exc))
        pytest.skip(str(exc))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None]:
    with _skipping():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    with _skipping():
        return (yield)


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDBServer]:
    """A MariaDB for all tests of the run; who stops it starts it again."""
    server = MariaDBServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A Redis for all tests of the run; who stops it starts it again."""
    yield from _started_redis()


@pytest.fixture(scope="session")
def shared_redis_server() -> Iterator[RedisServer]:
    """A Redis for what outlives a test: the other one is emptied by who needs it so."""
    yield from _started_redis()


def _started_redis() -> Iterator[RedisServer]:
    server = RedisServer(password="p@ss:w/ord?#%'\"")
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisCluster]:
    """A cluster of three nodes for all tests of the run."""
    cluster = RedisCluster()
    try:
        cluster.make()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[RabbitMQServer]:
    """A RabbitMQ for all tests of the run; who stops it starts it again."""
    server = RabbitMQServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def mariadb_database(mariadb_server: MariaDBServer) -> MariaDBDatabase:
    """An empty database of the test's own."""
    return mariadb_server.create_database()


@pytest.fixture(scope="session")
def migrated_mariadb(mariadb_server: MariaDBServer) -> MariaDBDatabase:
    """The database that ``mariadb_log`` empties: to migrate one takes longer than most tests."""
    database = mariadb_server.create_database()
    migrate(database.environment)
    return database


@pytest.fixture
def mariadb_log(
    tmp_path: Path, mariadb_server: MariaDBServer, migrated_mariadb: MariaDBDatabase
) -> Mapping[str, str]:
    """The settings of an empty message log on MariaDB."""
    mariadb_server.empty(migrated_mariadb)
    return {"QUEUE_DATA_DIR": str(tmp_path / "var"), **migrated_mariadb.environment}


@pytest.fixture(scope="session")
def new_mariadb_log(
    mariadb_server: MariaDBServer, migrated_mariadb: MariaDBDatabase
) -> Callable[[], Mapping[str, str]]:
    """Makes an empty message log on MariaDB, for what outlives a test.

    To copy the tables takes far less than to migrate.
    """

    def make() -> Mapping[str, str]:
        source, made = migrated_mariadb.name, mariadb_server.create_database()
        tables = [name for (name,) in mariadb_server.execute(f"SHOW TABLES IN {source}")]
        shown = [mariadb_server.execute(f"SHOW CREATE TABLE {source}.{name}") for name in tables]
        mariadb_server.execute(
            f"USE {made.name}",
            # by name, children may come before their parents
            "SET foreign_key_checks = 0",
            *(creation for [(_, creation)] in shown),
            *(
                f"INSERT INTO {name} SELECT * FROM {source}.{name}"
                for name in tables
                if name.endswith("_version")
            ),
        )
        return made.environment

    return make


@pytest.fixture(params=["sqlite", "mariadb"])
def log_settings(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """The settings of an empty message log, once on each database."""
    settings: Mapping[str, str] = request.getfixturevalue(f"{request.param}_log")
    return settings


def migrate(config: Mapping[str, str]) -> None:
    """Make the tables of the message log."""
    engine = make_engine(database_url(load_settings(config)), eventlet.sleep)
    if engine.dialect.name == "sqlite":
        upgrade_sqlite(engine, LOG)
    else:
        upgrade(engine, LOG)
    engine.dispose()
