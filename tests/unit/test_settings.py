"""Each variable: its default, what it may be, and the one line for what it may not be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from shared.errors import SettingsError
from shared.settings import (
    Address,
    Database,
    Settings,
    check_settings,
    hidden,
    load_settings,
    settings_or_exit,
)
from tests.unit.test_house import setting_names

ROOT = Path(__file__).parents[2]

SECRET = "s3cret-that-nobody-may-see"

Read = Callable[[Settings], Any]


def _database(read: Callable[[Database], Any]) -> Read:
    def of(settings: Settings) -> Any:
        assert settings.database is not None
        return read(settings.database)

    return of


def _address(service: str) -> Read:
    return lambda settings: settings.addresses[service]


WITH_DATABASE = {"DB_HOST": "db"}
WITH_TOKEN = {"QUEUE_ADMIN_TOKENS": "0123456789abcdef"}

READ: Mapping[str, Read] = {
    "QUEUE_PROVIDER": lambda s: s.provider,
    "QUEUE_PROVIDER_DRAIN": lambda s: s.drain,
    "QUEUE_DATA_DIR": lambda s: s.data_dir,
    "QUEUE_LOG": lambda s: s.log,
    "QUEUE_MAX_PAYLOAD_BYTES": lambda s: s.max_payload_bytes,
    "QUEUE_SOURCES": lambda s: dict(s.sources),
    "QUEUE_LEASE_SECONDS": lambda s: s.lease,
    "QUEUE_GRACE_SECONDS": lambda s: s.grace,
    "QUEUE_AUDIT_SECONDS": lambda s: s.audit,
    "QUEUE_MAX_RETRIES": lambda s: s.retries.limit,
    "QUEUE_RETRY_BASE_SECONDS": lambda s: s.retries.backoff.base,
    "QUEUE_RETRY_FACTOR": lambda s: s.retries.backoff.factor,
    "QUEUE_RETRY_CAP_SECONDS": lambda s: s.retries.backoff.cap,
    "QUEUE_INBOX_DAYS": lambda s: s.inbox_days,
    "QUEUE_KEEP_COMPLETED_DAYS": lambda s: s.completed_days,
    "QUEUE_KEEP_DEAD_DAYS": lambda s: s.dead_days,
    "QUEUE_ALERT_SECONDS": lambda s: s.alerting.every,
    "QUEUE_ALERT_FAILURE_PERCENT": lambda s: s.alerting.failures,
    "QUEUE_ALERT_OLDEST_SECONDS": lambda s: s.alerting.oldest,
    "QUEUE_ALERT_DEAD_LETTERS": lambda s: s.alerting.dead,
    "QUEUE_ALERT_SILENT_CONSUMERS": lambda s: s.alerting.silent,
    "QUEUE_ALERT_FAILING_SCHEDULES": lambda s: s.alerting.schedules,
    "ALERT_MAIL_TO": lambda s: s.alerting.mail_to,
    "ALERT_WEBHOOK_URL": lambda s: s.alerting.webhook,
    "AUTH_EVENTS_ADDRESS": _address("auth_events"),
    "COMPANY_ADDRESS": _address("company"),
    "QUEUE_ADMIN_ADDRESS": _address("queue_admin"),
    "QUEUE_METRICS_ADDRESS": lambda s: s.metrics_address,
    "QUEUE_ADMIN_AUTH": lambda s: s.admin_auth,
    "QUEUE_ADMIN_TOKENS": lambda s: s.admin_tokens,
    "MAIL_URL": lambda s: s.mail_url,
    "MAIL_FROM": lambda s: s.mail_from,
    "REDIS_HOST": lambda s: s.redis_host,
    "REDIS_PORT": lambda s: s.redis_port,
    "REDIS_PASSWORD": lambda s: s.redis_password,
    "REDIS_DB": lambda s: s.redis_db,
    "REDIS_URL": lambda s: s.redis_url,
    "REDIS_PREFIX": lambda s: s.redis_prefix,
    "RABBITMQ_HOST": lambda s: s.rabbitmq_host,
    "RABBITMQ_PORT": lambda s: s.rabbitmq_port,
    "RABBITMQ_USERNAME": lambda s: s.rabbitmq_username,
    "RABBITMQ_PASSWORD": lambda s: s.rabbitmq_password,
    "RABBITMQ_VHOST": lambda s: s.rabbitmq_vhost,
    "RABBITMQ_QUEUE_TYPE": lambda s: s.rabbitmq_queue_type,
    "RABBITMQ_CONSUMER_TIMEOUT_SECONDS": lambda s: s.rabbitmq_consumer_timeout,
    "AMQP_URI": lambda s: s.amqp_uri,
    "DB_HOST": lambda s: s.database and s.database.host,
    "DB_PORT": _database(lambda d: d.port),
    "DB_USER": _database(lambda d: d.user),
    "DB_PASSWORD": _database(lambda d: d.password),
    "DB_NAME": _database(lambda d: d.name),
}
"""Where each variable ends up."""

BESIDE = {
    **{name: WITH_DATABASE for name in READ if name.startswith("DB_") and name != "DB_HOST"},
    "QUEUE_ADMIN_AUTH": WITH_TOKEN,
    "QUEUE_ADMIN_ADDRESS": WITH_TOKEN,
}
"""What else has to be set for a variable to matter."""

DEFAULTS = {
    "QUEUE_PROVIDER": "embedded",
    "QUEUE_PROVIDER_DRAIN": "",
    "QUEUE_DATA_DIR": Path("./var"),
    "QUEUE_LOG": True,
    "QUEUE_MAX_PAYLOAD_BYTES": 1048576,
    "QUEUE_SOURCES": {"auth_events": "user-events"},
    "QUEUE_LEASE_SECONDS": 30,
    "QUEUE_GRACE_SECONDS": 8,
    "QUEUE_AUDIT_SECONDS": 60,
    "QUEUE_MAX_RETRIES": 3,
    "QUEUE_RETRY_BASE_SECONDS": 1,
    "QUEUE_RETRY_FACTOR": 2,
    "QUEUE_RETRY_CAP_SECONDS": 300,
    "QUEUE_INBOX_DAYS": 30,
    "QUEUE_KEEP_COMPLETED_DAYS": 30,
    "QUEUE_KEEP_DEAD_DAYS": 0,
    "QUEUE_ALERT_SECONDS": 10,
    "QUEUE_ALERT_FAILURE_PERCENT": 10,
    "QUEUE_ALERT_OLDEST_SECONDS": 300,
    "QUEUE_ALERT_DEAD_LETTERS": 10,
    "QUEUE_ALERT_SILENT_CONSUMERS": 1,
    "QUEUE_ALERT_FAILING_SCHEDULES": 1,
    "ALERT_MAIL_TO": "",
    "ALERT_WEBHOOK_URL": "",
    "AUTH_EVENTS_ADDRESS": Address("127.0.0.1", 3001),
    "COMPANY_ADDRESS": Address("127.0.0.1", 3002),
    "QUEUE_ADMIN_ADDRESS": Address("127.0.0.1", 3005),
    "QUEUE_METRICS_ADDRESS": None,
    "QUEUE_ADMIN_AUTH": "none",
    "QUEUE_ADMIN_TOKENS": (),
    "MAIL_URL": f"file:{Path('var').absolute() / 'mail'}",
    "MAIL_FROM": "noreply@example.com",
    "REDIS_HOST": "127.0.0.1",
    "REDIS_PORT": 6379,
    "REDIS_PASSWORD": "",
    "REDIS_DB": 1,
    "REDIS_URL": "",
    "REDIS_PREFIX": "nameko",
    "RABBITMQ_HOST": "127.0.0.1",
    "RABBITMQ_PORT": 5672,
    "RABBITMQ_USERNAME": "guest",
    "RABBITMQ_PASSWORD": "guest",
    "RABBITMQ_VHOST": "/",
    "RABBITMQ_QUEUE_TYPE": "classic",
    "RABBITMQ_CONSUMER_TIMEOUT_SECONDS": 1800,
    "AMQP_URI": "",
    "DB_HOST": None,
    "DB_PORT": 3306,
    "DB_USER": "queue_user",
    "DB_PASSWORD": "",
    "DB_NAME": "queue_service",
}

REDIS_URLS = [
    "redis://redis",
    "redis://:p%40ss@redis:6380/2",
    "redis://user:p%3A%2F@[::1]:6380",
    "rediss://redis?ssl_ca_certs=/etc/ssl/redis.pem&ssl_check_hostname=no",
    "redis+sentinel://:p@a:26379,b/orders-redis/1?sentinel_password=q",
    "rediss+cluster://user:p@a:6379,b:6379,c/",
]

AMQP_URIS = [
    "amqp://rabbitmq",
    "pyamqp://us:p%40ss@rabbitmq:5673/shop",
    "amqp://us:p%3A%2F@[::1]:5673/%2F",
    "amqps://rabbitmq/?ssl_ca_certs=/etc/ssl/rabbitmq.pem&ssl_cert_reqs=optional",
    "amqp://us:p@a:5672/shop;amqp://us:p@b:5672/shop",
]

GOOD = [
    ("QUEUE_PROVIDER", "shared.providers.embedded:EmbeddedProvider", None),
    ("QUEUE_PROVIDER_DRAIN", "redis", "redis"),
    ("QUEUE_PROVIDER_DRAIN", "", ""),
    ("QUEUE_DATA_DIR", "/srv/queue", Path("/srv/queue")),
    ("QUEUE_LOG", "on", True),
    ("QUEUE_LOG", True, True),
    ("QUEUE_MAX_PAYLOAD_BYTES", "1", 1),
    ("QUEUE_MAX_PAYLOAD_BYTES", 2048, 2048),
    ("QUEUE_SOURCES", "", {}),
    ("QUEUE_SOURCES", " a=b , c=d,", {"a": "b", "c": "d"}),
    ("QUEUE_LEASE_SECONDS", "1", 1),
    ("QUEUE_LEASE_SECONDS", "2.5", 2.5),
    ("QUEUE_GRACE_SECONDS", "0", 0),
    ("QUEUE_AUDIT_SECONDS", "0", 0),
    ("QUEUE_MAX_RETRIES", "0", 0),
    ("QUEUE_MAX_RETRIES", "100", 100),
    ("QUEUE_RETRY_BASE_SECONDS", "0", 0),
    ("QUEUE_RETRY_FACTOR", "1", 1),
    ("QUEUE_RETRY_FACTOR", "1.5", 1.5),
    ("QUEUE_RETRY_CAP_SECONDS", "86400", 86400),
    ("QUEUE_INBOX_DAYS", "3660", 3660),
    ("QUEUE_KEEP_COMPLETED_DAYS", "0", 0),
    ("QUEUE_KEEP_COMPLETED_DAYS", "1.5", 1.5),
    ("QUEUE_KEEP_DEAD_DAYS", "3660", 3660),
    ("QUEUE_ALERT_SECONDS", "0", 0),
    ("QUEUE_ALERT_FAILURE_PERCENT", "0.5", 0.5),
    ("QUEUE_ALERT_OLDEST_SECONDS", "604800", 604800),
    ("QUEUE_ALERT_DEAD_LETTERS", "1", 1),
    ("QUEUE_ALERT_SILENT_CONSUMERS", "0", 0),
    ("QUEUE_ALERT_FAILING_SCHEDULES", "2", 2),
    ("ALERT_MAIL_TO", "ops@example.org", "ops@example.org"),
    ("ALERT_WEBHOOK_URL", "https://hooks.example.org/a/b?c=d", "https://hooks.example.org/a/b?c=d"),
    ("ALERT_WEBHOOK_URL", "http://127.0.0.1:8080", "http://127.0.0.1:8080"),
    ("AUTH_EVENTS_ADDRESS", "0.0.0.0:80", Address("0.0.0.0", 80)),
    ("AUTH_EVENTS_ADDRESS", 8080, Address("127.0.0.1", 8080)),
    ("COMPANY_ADDRESS", "[::1]:8080", Address("::1", 8080)),
    ("COMPANY_ADDRESS", "company.internal:65535", Address("company.internal", 65535)),
    ("QUEUE_ADMIN_ADDRESS", "0.0.0.0:3005", Address("0.0.0.0", 3005)),
    ("QUEUE_METRICS_ADDRESS", "0.0.0.0:9464", Address("0.0.0.0", 9464)),
    ("QUEUE_ADMIN_AUTH", "token", "token"),
    ("QUEUE_ADMIN_TOKENS", "0123456789abcdef, fedcba9876543210", None),
    ("MAIL_URL", "file:/srv/mail", "file:/srv/mail"),
    ("MAIL_URL", "smtp://user:p%40ss@mail:2525", "smtp://user:p%40ss@mail:2525"),
    ("MAIL_URL", "smtps://mail", "smtps://mail"),
    ("MAIL_FROM", "us@example.org", "us@example.org"),
    ("REDIS_HOST", "redis", "redis"),
    ("REDIS_PORT", "65535", 65535),
    ("REDIS_PASSWORD", "p@ss", "p@ss"),
    ("REDIS_DB", "0", 0),
    *(("REDIS_URL", url, url) for url in REDIS_URLS),
    ("REDIS_PREFIX", "shop:eu", "shop:eu"),
    ("RABBITMQ_HOST", "rabbitmq", "rabbitmq"),
    ("RABBITMQ_HOST", "2001:db8::1", "2001:db8::1"),
    ("DB_HOST", "db-1.orders_net", "db-1.orders_net"),
    ("RABBITMQ_PORT", "1", 1),
    ("RABBITMQ_USERNAME", "us", "us"),
    ("RABBITMQ_PASSWORD", "", ""),
    ("RABBITMQ_VHOST", "suite", "suite"),
    ("RABBITMQ_QUEUE_TYPE", "quorum", "quorum"),
    ("RABBITMQ_CONSUMER_TIMEOUT_SECONDS", "3600", 3600),
    *(("AMQP_URI", uri, uri) for uri in AMQP_URIS),
    ("AMQP_URI", "pyamqp://guest:guest@localhost", ""),
    ("DB_HOST", "db", "db"),
    ("DB_PORT", "3307", 3307),
    ("DB_USER", "us", "us"),
    ("DB_PASSWORD", 123, "123"),
    ("DB_NAME", "suite", "suite"),
]

AMQP = "must be amqp://[user:password@]host[:port][/vhost] or amqps://"
REDIS = "must be redis://[user:password@]host[:port][/db]"
WHOLE = "must be a whole number from"
PAIRS = "must be pairs source=queue, separated by commas"
MAIL = "must be file:/path, smtp://"
ADDRESS = "must be host:port, such as 127.0.0.1:3005"
TOKENS = "must be tokens of 16 characters or more"
PROVIDERS = "must be one of embedded"
WEBHOOK = "must be http://host[:port]/path or https://"

BAD = [
    ("QUEUE_PROVIDER", "", PROVIDERS),
    ("QUEUE_PROVIDER", "kafka", PROVIDERS),
    ("QUEUE_PROVIDER", "Embedded", PROVIDERS),
    ("QUEUE_PROVIDER", "no.such.module:Provider", PROVIDERS),
    ("QUEUE_PROVIDER", "shared.providers.embedded:NoSuchProvider", PROVIDERS),
    ("QUEUE_PROVIDER", "shared.providers.embedded", PROVIDERS),
    ("QUEUE_PROVIDER", ".relative:Provider", PROVIDERS),
    ("QUEUE_PROVIDER", "a..b:Provider", PROVIDERS),
    ("QUEUE_PROVIDER_DRAIN", "kafka", PROVIDERS),
    ("QUEUE_PROVIDER_DRAIN", "embedded", "must be another than QUEUE_PROVIDER, or empty"),
    ("QUEUE_DATA_DIR", "", "must not be empty"),
    ("QUEUE_LOG", "maybe", "must be on or off"),
    ("QUEUE_LOG", "", "must be on or off"),
    ("QUEUE_LOG", "off", "must be on where QUEUE_PROVIDER is embedded"),
    ("QUEUE_LOG", False, "must be on where QUEUE_PROVIDER is embedded"),
    ("QUEUE_MAX_PAYLOAD_BYTES", "0", f"{WHOLE} 1 to"),
    ("QUEUE_MAX_PAYLOAD_BYTES", "1MB", f"{WHOLE} 1 to"),
    ("QUEUE_MAX_PAYLOAD_BYTES", "1.5", f"{WHOLE} 1 to"),
    ("QUEUE_MAX_PAYLOAD_BYTES", "", f"{WHOLE} 1 to"),
    ("QUEUE_SOURCES", "a", PAIRS),
    ("QUEUE_SOURCES", "a=", PAIRS),
    ("QUEUE_SOURCES", "=b", PAIRS),
    ("QUEUE_SOURCES", "a=b c", PAIRS),
    ("QUEUE_SOURCES", "a=b,a=c", "each source once"),
    ("QUEUE_SOURCES", "a=b,c=b", "two sources cannot share one queue"),
    ("QUEUE_LEASE_SECONDS", "0.5", "must be a number from 1 to 86400"),
    ("QUEUE_LEASE_SECONDS", "nan", "must be a number from 1 to 86400"),
    ("QUEUE_LEASE_SECONDS", "inf", "must be a number from 1 to 86400"),
    ("QUEUE_GRACE_SECONDS", "-1", "must be a number from 0 to 86400"),
    ("QUEUE_AUDIT_SECONDS", "-1", "must be a number from 0 to 86400"),
    ("QUEUE_MAX_RETRIES", "-1", f"{WHOLE} 0 to 100"),
    ("QUEUE_MAX_RETRIES", "101", f"{WHOLE} 0 to 100"),
    ("QUEUE_RETRY_BASE_SECONDS", "fast", "must be a number from 0 to 86400"),
    ("QUEUE_RETRY_FACTOR", "0.5", "must be a number from 1 to 100"),
    ("QUEUE_RETRY_CAP_SECONDS", "86401", "must be a number from 0 to 86400"),
    ("QUEUE_INBOX_DAYS", "0", "must be a number from 1 to 3660"),
    ("QUEUE_KEEP_COMPLETED_DAYS", "0.5", "must be 0, or a number from 1 to 3660"),
    ("QUEUE_KEEP_COMPLETED_DAYS", "", "must be 0, or a number from 1 to 3660"),
    ("QUEUE_KEEP_DEAD_DAYS", "nan", "must be 0, or a number from 1 to 3660"),
    ("QUEUE_ALERT_SECONDS", "-1", "must be a number from 0 to 86400"),
    ("QUEUE_ALERT_FAILURE_PERCENT", "101", "must be a number from 0 to 100"),
    ("QUEUE_ALERT_OLDEST_SECONDS", "-1", "must be a number from 0 to"),
    ("QUEUE_ALERT_DEAD_LETTERS", "1.5", f"{WHOLE} 0 to"),
    ("QUEUE_ALERT_SILENT_CONSUMERS", "-1", f"{WHOLE} 0 to"),
    ("QUEUE_ALERT_FAILING_SCHEDULES", "-1", f"{WHOLE} 0 to"),
    ("ALERT_MAIL_TO", "nobody", "must be a mail address"),
    ("ALERT_WEBHOOK_URL", "hooks.example.org", WEBHOOK),
    ("ALERT_WEBHOOK_URL", "ftp://hooks.example.org", WEBHOOK),
    ("ALERT_WEBHOOK_URL", "https://us:pass@hooks.example.org", WEBHOOK),
    ("AUTH_EVENTS_ADDRESS", "", ADDRESS),
    ("AUTH_EVENTS_ADDRESS", "127.0.0.1", ADDRESS),
    ("COMPANY_ADDRESS", "host:65536", ADDRESS),
    ("COMPANY_ADDRESS", "host:http", ADDRESS),
    ("QUEUE_ADMIN_ADDRESS", "http://host:80", ADDRESS),
    ("QUEUE_METRICS_ADDRESS", "http://host:80", ADDRESS),
    ("QUEUE_METRICS_ADDRESS", "0.0.0.0:3001", "must have a port of its own"),
    ("QUEUE_ADMIN_AUTH", "basic", "must be one of none, token"),
    ("QUEUE_ADMIN_AUTH", "", "must be one of none, token"),
    ("QUEUE_ADMIN_TOKENS", SECRET[:15], TOKENS),
    ("QUEUE_ADMIN_TOKENS", f"{SECRET},short", TOKENS),
    ("QUEUE_ADMIN_TOKENS", "@/no/such/file", "cannot be read: No such file or directory"),
    ("QUEUE_ADMIN_TOKENS", f"@{sys.executable}", "cannot be read"),
    ("MAIL_URL", "", MAIL),
    ("MAIL_URL", "mail.example.com", MAIL),
    ("MAIL_URL", "http://mail", MAIL),
    ("MAIL_URL", "smtp://", MAIL),
    ("MAIL_URL", "smtp://mail:port", MAIL),
    ("MAIL_URL", "smtp://mail:99999", MAIL),
    ("MAIL_URL", "smtp://[mail", MAIL),
    ("MAIL_URL", "file:", MAIL),
    ("MAIL_FROM", "nobody", "must be a mail address"),
    ("MAIL_FROM", "a@b\nBcc: c@d", "must be a mail address"),
    ("REDIS_HOST", "", "must not be empty"),
    ("REDIS_PORT", "0", f"{WHOLE} 1 to 65535"),
    ("REDIS_PORT", "65536", f"{WHOLE} 1 to 65535"),
    ("REDIS_DB", "-1", f"{WHOLE} 0 to"),
    ("REDIS_DB", "one", f"{WHOLE} 0 to"),
    ("REDIS_URL", "redis", REDIS),
    ("REDIS_URL", "redis://", REDIS),
    ("REDIS_URL", "http://redis", REDIS),
    ("REDIS_URL", "unix:///run/redis.sock", REDIS),
    ("REDIS_URL", "redis://a,b", REDIS),
    ("REDIS_URL", "redis://redis:port", REDIS),
    ("REDIS_URL", "redis://redis:65536", REDIS),
    ("REDIS_URL", "redis://redis/one", REDIS),
    ("REDIS_URL", "redis://:p@ss/word@redis", REDIS),
    ("REDIS_URL", "redis://redis?max_connections=5", REDIS),
    ("REDIS_URL", "rediss://redis?ssl_nonsense=5", REDIS),
    ("REDIS_URL", "rediss://redis?ssl_cert_reqs=maybe", REDIS),
    ("REDIS_URL", "redis://redis?ssl_ca_certs=/etc/ssl/redis.pem", REDIS),
    ("REDIS_URL", "redis://redis?sentinel_password=q", REDIS),
    ("REDIS_URL", "redis+sentinel://a,b/shop?sentinel_nonsense=5", REDIS),
    ("REDIS_URL", "redis+sentinel://a,b", REDIS),
    ("REDIS_URL", "redis+cluster://a,b/1", REDIS),
    ("REDIS_PREFIX", "", "must be 1 to 100 of"),
    ("REDIS_PREFIX", "{shop}", "must be 1 to 100 of"),
    ("RABBITMQ_HOST", "", "must not be empty"),
    ("RABBITMQ_HOST", "127.0.0.1:2", "must be the name or the address of a host alone"),
    ("RABBITMQ_HOST", "amqp://127.0.0.1", "must be the name or the address of a host alone"),
    ("RABBITMQ_HOST", "[::1", "must be the name or the address of a host alone"),
    ("REDIS_HOST", "redis://cache", "must be the name or the address of a host alone"),
    ("DB_HOST", "db:3306", "must be the name or the address of a host alone"),
    ("DB_HOST", " ", "must be the name or the address of a host alone"),
    ("RABBITMQ_PORT", "amqp", f"{WHOLE} 1 to 65535"),
    ("RABBITMQ_USERNAME", "", "must not be empty"),
    ("RABBITMQ_VHOST", "", "must not be empty"),
    ("RABBITMQ_QUEUE_TYPE", "stream", "must be one of classic, quorum"),
    ("RABBITMQ_CONSUMER_TIMEOUT_SECONDS", "0", "must be a number from 1 to 86400"),
    ("AMQP_URI", "rabbitmq", AMQP),
    ("AMQP_URI", "amqp://", AMQP),
    ("AMQP_URI", "http://rabbitmq", AMQP),
    ("AMQP_URI", "amqp://:p@ss/word@rabbitmq", AMQP),
    ("AMQP_URI", "amqp://rabbitmq:65536", AMQP),
    ("AMQP_URI", "amqp://rabbitmq/a/b", AMQP),
    ("AMQP_URI", "amqp://rabbitmq;", AMQP),
    ("AMQP_URI", "amqp://rabbitmq?heartbeat=5", AMQP),
    ("AMQP_URI", "amqps://rabbitmq?ssl_cert_reqs=maybe", AMQP),
    ("DB_PORT", "0", f"{WHOLE} 1 to 65535"),
    ("DB_USER", "", "must not be empty"),
    ("DB_NAME", "", "must not be empty"),
]

ANYTHING_GOES = {"REDIS_PASSWORD", "RABBITMQ_PASSWORD", "DB_PASSWORD"}

SECRETS = {
    "QUEUE_ADMIN_TOKENS": SECRET,
    "REDIS_PASSWORD": SECRET,
    "RABBITMQ_PASSWORD": SECRET,
    "DB_PASSWORD": SECRET,
    "MAIL_URL": f"smtp://us:{SECRET}@mail",
    "REDIS_URL": f"redis://us:{SECRET}@redis",
    "AMQP_URI": f"amqp://us:{SECRET}@rabbitmq",
    "ALERT_WEBHOOK_URL": f"https://hooks.example.org/{SECRET}",
}


def load(name: str, value: Any) -> Settings:
    return load_settings({**BESIDE.get(name, {}), name: value})


class TestRabbitMQ:
    def test_is_where_the_single_variables_say(self) -> None:
        settings = load_settings(
            {
                "RABBITMQ_HOST": "::1",
                "RABBITMQ_PORT": "5673",
                "RABBITMQ_USERNAME": "us",
                "RABBITMQ_PASSWORD": "p@ss:w/ord?#%",
                "RABBITMQ_VHOST": "/",
            }
        )
        assert settings.rabbitmq_uri == "amqp://us:p%40ss%3Aw%2Ford%3F%23%25@[::1]:5673/%2F"

    def test_is_where_the_uri_says_if_there_is_one(self) -> None:
        beside = {"RABBITMQ_HOST": "elsewhere"}
        assert load_settings({**beside, "AMQP_URI": AMQP_URIS[0]}).rabbitmq_uri == AMQP_URIS[0]

    def test_is_not_where_namekos_command_line_says_unasked(self) -> None:
        config = {"RABBITMQ_HOST": "elsewhere", "AMQP_URI": "pyamqp://guest:guest@localhost"}
        assert "@elsewhere:5672/" in load_settings(config).rabbitmq_uri


class TestEachVariable:
    def test_is_tried_here(self) -> None:
        names = setting_names()
        assert set(READ) == set(DEFAULTS) == names
        assert {name for name, _, _ in GOOD} == names
        tried = {case.values[0] if hasattr(case, "values") else case[0] for case in BAD}
        assert tried == names - ANYTHING_GOES

    @pytest.mark.parametrize("name", READ)
    def test_has_its_default(self, name: str) -> None:
        beside = {} if name.startswith("QUEUE_ADMIN") else BESIDE.get(name, {})
        assert READ[name](load_settings(beside)) == DEFAULTS[name]

    @pytest.mark.parametrize(("name", "value", "expected"), GOOD)
    def test_takes(self, name: str, value: Any, expected: Any) -> None:
        if expected is None:
            expected = tuple(value.split(", ")) if "," in value else value
        assert READ[name](load(name, value)) == expected

    @pytest.mark.parametrize(("name", "value", "expected"), GOOD)
    def test_takes_it_from_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, expected: Any
    ) -> None:
        text = {True: "on"}.get(value, str(value)) if isinstance(value, bool) else str(value)
        expected = READ[name](load(name, value))
        monkeypatch.setenv(name, text)
        # the configuration comes second, wrong or not
        assert READ[name](load(name, object)) == expected
        assert READ[name](load(name, "\x01")) == expected

    @pytest.mark.parametrize(("name", "value", "said"), BAD)
    def test_refuses(self, name: str, value: Any, said: str) -> None:
        with pytest.raises(SettingsError) as raised:
            load(name, value)
        assert str(raised.value).startswith(f"{name}: ")
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(("name", "value", "said"), BAD)
    def test_refuses_it_from_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, said: str
    ) -> None:
        monkeypatch.setenv(name, str(value))
        with pytest.raises(SettingsError, match=rf"^{name}: "):
            load_settings(BESIDE.get(name, {}))

    @pytest.mark.parametrize("name", SECRETS)
    def test_is_not_shown_where_it_is_a_secret(self, name: str) -> None:
        settings = load(name, SECRETS[name])
        assert SECRET in str(READ[name](settings))
        assert SECRET not in repr(settings)
        assert SECRET not in repr(settings.database)

    @pytest.mark.parametrize("name", ["QUEUE_ADMIN_TOKENS", "MAIL_URL", "REDIS_URL"])
    def test_is_not_shown_when_it_is_refused(self, name: str) -> None:
        wrong = {
            "QUEUE_ADMIN_TOKENS": f"{SECRET},x",
            "MAIL_URL": f"smtp://us:{SECRET}@mail:x",
            "REDIS_URL": f"redis://us:{SECRET}@redis:x",
        }
        with pytest.raises(SettingsError) as raised:
            load_settings({name: wrong[name]})
        assert SECRET not in str(raised.value)


class TestHiddenWebhook:
    @pytest.mark.parametrize(
        "value",
        [
            f"http://user:{SECRET}@h/x",
            f"http://user:1/{SECRET}@h/x",
            f"http://{SECRET}@h",
            f"https://h#{SECRET}",
            f"https://h:1#{SECRET}",
            f"https://h:{SECRET}",
            f"https://h\\{SECRET}",
            f"https://h/\n{SECRET}",
            f"https://h/@{SECRET}",
            f"h/{SECRET}",
            SECRET,
        ],
    )
    def test_shows_no_secret_wherever_that_is(self, value: str) -> None:
        checked, *_ = check_settings({"ALERT_WEBHOOK_URL": value})
        [shown] = [each.value for each in checked if each.name == "ALERT_WEBHOOK_URL"]
        assert SECRET not in shown
        assert shown.endswith("***")

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            ("", ""),
            ("https://h", "https://h"),
            ("https://[::1]:8/x", "https://[::1]:8/***"),
            ("https://h?x", "https://h/***"),
        ],
    )
    def test_shows_the_host_of_one_that_may_be(self, value: str, shown: str) -> None:
        assert hidden("ALERT_WEBHOOK_URL", value) == shown


class TestKinds:
    """YAML has lists and maps, which no setting is."""

    @pytest.mark.parametrize("value", [[5], {"a": 1}])
    @pytest.mark.parametrize(
        "name",
        ["QUEUE_LEASE_SECONDS", "QUEUE_MAX_RETRIES", "QUEUE_PROVIDER", "QUEUE_LOG", "MAIL_URL"],
    )
    def test_a_list_or_a_map_is_refused(self, name: str, value: Any) -> None:
        with pytest.raises(SettingsError, match=rf"^{name}: must be"):
            load_settings({name: value})


class TestTogether:
    def test_nothing_moves_without_the_log(self) -> None:
        given = {"QUEUE_PROVIDER": "rabbitmq", "QUEUE_PROVIDER_DRAIN": "redis", "QUEUE_LOG": "off"}
        with pytest.raises(SettingsError, match=r"^QUEUE_PROVIDER_DRAIN: must be empty where"):
            load_settings(given)

    def test_tokens_are_needed_off_loopback(self) -> None:
        off_loopback = {"QUEUE_ADMIN_ADDRESS": "0.0.0.0:3005"}
        with pytest.raises(SettingsError, match=r"^QUEUE_ADMIN_TOKENS: must hold a token"):
            load_settings(off_loopback)
        assert load_settings({**off_loopback, **WITH_TOKEN}).admin_auth == "token"
        assert load_settings({**off_loopback, "QUEUE_ADMIN_AUTH": "none"}).admin_auth == "none"

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]"])
    def test_none_are_needed_on_loopback(self, host: str) -> None:
        assert load_settings({"QUEUE_ADMIN_ADDRESS": f"{host}:3005"}).admin_auth == "none"

    @pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "queue.internal"])
    def test_what_is_not_loopback(self, host: str) -> None:
        with pytest.raises(SettingsError, match=r"^QUEUE_ADMIN_TOKENS: "):
            load_settings({"QUEUE_ADMIN_ADDRESS": f"{host}:3005"})

    def test_tokens_come_from_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "tokens"
        file.write_text(f"{SECRET}\n\n{SECRET[::-1]}\n")
        settings = load_settings({"QUEUE_ADMIN_TOKENS": f"@{file}"})
        assert settings.admin_tokens == (SECRET, SECRET[::-1])

    def test_mail_goes_into_the_data_folder(self, tmp_path: Path) -> None:
        settings = load_settings({"QUEUE_DATA_DIR": str(tmp_path)})
        assert settings.mail_url == f"file:{tmp_path / 'mail'}"

    def test_without_a_host_there_is_no_database(self) -> None:
        assert load_settings({"DB_PORT": "3307", "DB_PASSWORD": "x"}).database is None

    def test_what_is_not_used_is_checked_all_the_same(self) -> None:
        with pytest.raises(SettingsError, match=r"^RABBITMQ_PORT: "):
            load_settings({"QUEUE_PROVIDER": "embedded", "RABBITMQ_PORT": "x"})

    def test_the_rest_of_the_configuration_is_nobodys_business(self) -> None:
        config = {"LOGGING": {"version": 1}, "max_workers": 10, "HANDLERS": [1], 5: None}
        assert load_settings(config) == load_settings({})  # type: ignore[arg-type]

    @pytest.mark.parametrize("given", [1, 10, 10_000, "7", None])
    def test_takes_as_many_workers_as_a_service_may_have(self, given: Any) -> None:
        assert load_settings({"max_workers": given}) == load_settings({})

    @pytest.mark.parametrize("given", ["abc", -1, 0, 2.5, 10_001, True, [3]])
    def test_refuses_other_numbers_of_workers_before_nameko_does(self, given: Any) -> None:
        with pytest.raises(SettingsError, match=f"^{WORKERS}$"):
            load_settings({"max_workers": given})

    def test_queues_and_sources_find_each_other(self) -> None:
        settings = load_settings({"QUEUE_SOURCES": "a=b"})
        assert (settings.queue_of("a"), settings.queue_of("x")) == ("b", "x")
        assert (settings.source_of("b"), settings.source_of("x")) == ("a", "x")


class TestFrozen:
    def test_nothing_changes_afterwards(self) -> None:
        settings = load_settings({"DB_HOST": "db"})
        for thing, name in (
            (settings, "provider"),
            (settings.retries, "limit"),
            (settings.retries.backoff, "base"),
            (settings.database, "password"),
            (settings.addresses["company"], "port"),
        ):
            with pytest.raises(FrozenInstanceError):
                setattr(thing, name, "other")
        assert isinstance(settings.sources, MappingProxyType)
        assert isinstance(settings.addresses, MappingProxyType)


WORKERS = "MAX_WORKERS, in the configuration max_workers: must be a whole number from 1 to 10000"


class TestStart:
    def test_ends_with_status_2_and_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as raised:
            settings_or_exit({"REDIS_PORT": "x"})
        assert raised.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == "Error: REDIS_PORT: must be a whole number from 1 to 65535\n"

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("QUEUE_LEASE_SECONDS", "0", "QUEUE_LEASE_SECONDS: must be a number from 1 to 86400"),
            ("MAX_WORKERS", "abc", WORKERS),
        ],
    )
    def test_of_a_service_is_refused(self, name: str, value: str, said: str) -> None:
        command = [Path(sys.executable).parent / "nameko", "run", "--config", "config.yml"]
        done = subprocess.run(
            [*command, "services.company"],
            cwd=ROOT,
            env={name: value, "PATH": os.defpath, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stderr == f"Error: {said}\n"
        assert done.returncode == 2
