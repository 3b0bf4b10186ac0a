"""Fixtures of the unit tests."""

from collections.abc import Iterator, Mapping

import pytest

from tests.unit.message_log import Log


@pytest.fixture
def store(request: pytest.FixtureRequest, log_settings: Mapping[str, str]) -> Iterator[Log]:
    has_server = "DB_HOST" in log_settings
    made = Log(log_settings, request.getfixturevalue("mariadb_server") if has_server else None)
    yield made
    made.database.close()
