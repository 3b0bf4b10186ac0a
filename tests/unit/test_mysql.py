"""What a connection to MySQL or MariaDB writes into its statements."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pymysql.converters import encoders, escape_datetime

from shared.mysql import NativeConnection


@pytest.mark.parametrize(
    "time",
    [
        datetime(2026, 11, 30, 9, 5, 7),
        datetime(2026, 11, 30, 9, 5, 7, 42_000),
        datetime(971, 1, 2),
        datetime(2026, 11, 30, tzinfo=UTC),
    ],
)
def test_a_time_is_written_as_pymysql_writes_it(time: datetime) -> None:
    connection = NativeConnection.__new__(NativeConnection)
    connection.server_status, connection.encoding, connection.encoders = 0, "utf8", encoders
    assert connection.literal(time) == escape_datetime(time)
