"""Each test runs once in each lab; ``--lab package.module:Class`` runs them in that one alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shared.types import Subscription
from tests.conformance.lab import ProviderLab, Worker, lab_class
from tests.conformance.process import Process

LABS = {
    "embedded-sqlite": "tests.conformance.labs:EmbeddedOnSQLite",
    "embedded-mariadb": "tests.conformance.labs:EmbeddedOnMariaDB",
    "redis": "tests.conformance.labs:OnRedis",
    "redis-cluster": "tests.conformance.labs:OnRedisCluster",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lab", help="run the conformance tests in package.module:Class")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lab" in metafunc.fixturenames:
        named = metafunc.config.getoption("--lab", default=None)
        labs = {named: named} if named else LABS
        metafunc.parametrize("lab", list(labs.values()), ids=list(labs), indirect=True)


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[ProviderLab]:
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
