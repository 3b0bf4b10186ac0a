"""The fixtures of the suite: a plugin of pytest."""

from __future__ import annotations

import eventlet

# as the services do, and before anything is imported that would keep what it found
eventlet.monkey_patch()

import shutil  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from shared.database import database_url, make_engine  # noqa: E402
from shared.settings import load_settings  # noqa: E402
from shared.store.migrate import LOG, upgrade_sqlite  # noqa: E402
from shared.types import Subscription  # noqa: E402

pytest.register_assert_rewrite("shared.testing.conformance.lab")
pytest.register_assert_rewrite("shared.testing.conformance.process")

from shared.testing.conformance.lab import ProviderLab, Worker, lab_class  # noqa: E402
from shared.testing.conformance.process import Process  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lab", help="run the conformance tests in package.module:Class")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    named = metafunc.config.getoption("--lab")
    if named and "lab" in metafunc.fixturenames:
        metafunc.parametrize("lab", [named], indirect=True)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that ``sqlite_log`` copies."""
    folder = tmp_path_factory.mktemp("migrated")
    settings = load_settings({"QUEUE_DATA_DIR": str(folder)})
    engine = make_engine(database_url(settings), eventlet.sleep)
    upgrade_sqlite(engine, LOG)
    engine.dispose()
    return folder / "queue.db"


@pytest.fixture
def sqlite_log(tmp_path: Path, migrated_sqlite: Path) -> Mapping[str, str]:
    """The settings of an empty message log on SQLite."""
    folder = tmp_path / "var"
    folder.mkdir()
    shutil.copy(migrated_sqlite, folder)
    return {"QUEUE_DATA_DIR": str(folder)}


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[ProviderLab]:
    if not hasattr(request, "param"):
        raise pytest.UsageError("which provider? --lab package.module:Class")
    made = lab_class(request.param).from_fixtures(request)
    yield made
    made.clear()


@pytest.fixture
def new_worker(lab: ProviderLab) -> Iterator[Callable[..., Worker]]:
    """Makes workers: connected, and with the subscriptions given declared."""
    made: list[Worker] = []

    def make(*declared: Subscription) -> Worker:
        made.append(Worker(lab, f"worker {len(made)}"))
        return made[-1].open(*declared)

    yield make
    for worker in made:
        worker.close()


@pytest.fixture
def worker(new_worker: Callable[..., Worker]) -> Worker:
    """A worker with a subscription to ``placed``."""
    made = new_worker()
    made.subscribe("placed")
    return made


@pytest.fixture
def placed(worker: Worker) -> Subscription:
    """The subscription of ``worker``."""
    return worker.declared[0]


@pytest.fixture
def other(new_worker: Callable[..., Worker], placed: Subscription) -> Worker:
    """Another instance, which consumes the same."""
    return new_worker(placed)


@pytest.fixture(scope="session")
def idle_processes() -> Iterator[list[Process]]:
    """Processes that nobody needs just now: to start one takes longer than most tests."""
    idle: list[Process] = []
    yield idle
    for process in idle:
        process.kill()


@pytest.fixture
def new_process(
    lab: ProviderLab, idle_processes: list[Process]
) -> Iterator[Callable[..., Process]]:
    """Makes processes, each with an instance that has the subscriptions given declared."""
    used: list[Process] = []

    def make(*declared: Subscription) -> Process:
        process = idle_processes.pop() if idle_processes else Process()
        used.append(process)
        process.open(lab, *declared)
        return process

    yield make
    for process in used:
        if not process.is_killed:
            process.ask("close")
            idle_processes.append(process)
