"""Each test runs once in each lab; ``--lab package.module:Class`` runs them in that one alone."""

from __future__ import annotations

import pytest

LABS = {
    "embedded-sqlite": "tests.conformance.labs:EmbeddedOnSQLite",
    "embedded-mariadb": "tests.conformance.labs:EmbeddedOnMariaDB",
    "redis": "tests.conformance.labs:OnRedis",
    "redis-cluster": "tests.conformance.labs:OnRedisCluster",
    "rabbitmq": "tests.conformance.labs:OnRabbitMQ",
    "rabbitmq-quorum": "tests.conformance.labs:OnRabbitMQQuorum",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lab" in metafunc.fixturenames and not metafunc.config.getoption("--lab"):
        metafunc.parametrize("lab", list(LABS.values()), ids=list(LABS), indirect=True)
