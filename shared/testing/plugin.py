"""Fixtures for tests of services: a plugin of pytest, there wherever the suite is installed.

Nothing of the suite is imported before a fixture is asked for: nameko's own plugin has
everything patched by eventlet first, and a run that needs none of this pays nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from shared.testing.chaos import ChaosRunner
    from shared.testing.running import RunningService, TableFiles
    from shared.testing.virtual import VirtualClock

SETTINGS = ("QUEUE_", "DB_", "MAIL_")
"""What the settings begin with that the kit makes itself."""


@pytest.fixture(scope="session")
def service_tables(tmp_path_factory: pytest.TempPathFactory) -> TableFiles:
    """Files with the tables of services, made once a run."""
    from shared.testing.running import TableFiles

    return TableFiles(tmp_path_factory.mktemp("service-tables"))


@pytest.fixture
def service_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no setting of the environment go before those of the kit."""
    for name in [name for name in os.environ if name.startswith(SETTINGS)]:
        monkeypatch.delenv(name)


@pytest.fixture
def virtual_clock() -> Iterator[VirtualClock]:
    """The clock that the services of a test run by; it stands still until it is moved."""
    from shared.testing.virtual import VirtualClock

    clock = VirtualClock()
    clock.install()
    yield clock
    clock.uninstall()


@pytest.fixture
def run_service(
    tmp_path: Path,
    virtual_clock: VirtualClock,
    service_tables: TableFiles,
    service_environment: None,
) -> Iterator[Callable[..., RunningService]]:
    """Runs services in this process, on one message log; see docs/testing.md."""
    from shared.testing.running import RunningService

    running: list[RunningService] = []

    def run(
        service: type,
        *,
        config: Mapping[str, Any] | None = None,
        dependencies: Mapping[str, Any] | None = None,
    ) -> RunningService:
        made = RunningService(
            service,
            tmp_path / "services",
            virtual_clock,
            service_tables,
            config or {},
            dependencies or {},
        )
        running.append(made)
        made.start()
        return made

    yield run
    for each in reversed(running):
        each.stop()


@pytest.fixture
def chaos_runner(
    tmp_path: Path, service_tables: TableFiles, service_environment: None
) -> ChaosRunner:
    """Runs a service with a fault at each point; see docs/testing.md."""
    from shared.testing.chaos import ChaosRunner

    return ChaosRunner(tmp_path / "chaos", service_tables)
