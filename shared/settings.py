"""All settings, read once, all checked, frozen.

A value comes from the environment, else from nameko's configuration (``config.yml``
under the same name), else from the default that docs/settings.md lists.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from environs import Env, EnvError

from shared.errors import PayloadError, SettingsError
from shared.lifecycle import Backoff
from shared.types import MAX_RETRIES_LIMIT, check_name

BUILT_IN_PROVIDERS = ("embedded", "redis", "rabbitmq")

NAMEKO_BROKER = "pyamqp://guest:guest@localhost"
"""What nameko's command line takes for AMQP_URI when nobody said anything."""

LARGEST_SECONDS = 86_400.0
"""A day: nobody waits longer for a lease, a stop or a retry."""

MOST_WORKERS = 10_000
"""Of a service; each takes memory, and a connection of its own to what it talks to."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service listens for HTTP."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Database:
    """How to reach MySQL or MariaDB."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    name: str


@dataclass(frozen=True, slots=True)
class Retries:
    """How failed attempts are repeated: how often, and after which time."""

    limit: int
    backoff: Backoff


@dataclass(frozen=True, slots=True)
class Alerting:
    """When operations are alerted: thresholds, of which 0 means never, and how.

    :param every: seconds from one look to the next; 0 means never.
    :param failures: percent of the messages of a queue.
    :param oldest: seconds for which work is due.
    :param dead: dead letters of a queue.
    :param silent: subscriptions of a queue without a consumer.
    :param schedules: schedules of a queue that could not dispatch the last time.
    :param mail_to: empty: no mail.
    :param webhook: empty: none. It may hold a secret.
    """

    every: float
    failures: float
    oldest: float
    dead: int
    silent: int
    schedules: int
    mail_to: str
    webhook: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one process; times in seconds, sizes in bytes."""

    provider: str
    # the provider that is moved away from; empty: none is
    drain: str
    data_dir: Path
    log: bool
    max_payload_bytes: int
    sources: Mapping[str, str]
    lease: float
    grace: float
    audit: float
    retries: Retries
    inbox_days: float
    # for ever: 0
    completed_days: float
    dead_days: float
    alerting: Alerting
    addresses: Mapping[str, Address]
    # None: no metrics of this process
    metrics_address: Address | None
    admin_auth: str
    admin_tokens: tuple[str, ...] = field(repr=False)
    # it may hold a password
    mail_url: str = field(repr=False)
    mail_from: str
    redis_host: str
    redis_port: int
    redis_password: str = field(repr=False)
    redis_db: int
    # it may hold a password
    redis_url: str = field(repr=False)
    redis_prefix: str
    rabbitmq_host: str
    rabbitmq_port: int
    rabbitmq_username: str
    rabbitmq_password: str = field(repr=False)
    rabbitmq_vhost: str
    # it may hold a password
    amqp_uri: str = field(repr=False)
    rabbitmq_queue_type: str
    rabbitmq_consumer_timeout: float
    database: Database | None

    @property
    def rabbitmq_uri(self) -> str:
        """Where RabbitMQ is: ``AMQP_URI``, or made of the single variables."""
        if self.amqp_uri:
            return self.amqp_uri
        host = f"[{self.rabbitmq_host}]" if ":" in self.rabbitmq_host else self.rabbitmq_host
        user, password, vhost = (
            quote(each, safe="")
            for each in (self.rabbitmq_username, self.rabbitmq_password, self.rabbitmq_vhost)
        )
        return f"amqp://{user}:{password}@{host}:{self.rabbitmq_port}/{vhost}"

    def queue_of(self, source: str) -> str:
        """Return the queue that the events of service ``source`` form."""
        return self.sources.get(source, source)

    def source_of(self, queue: str) -> str:
        """Return the service whose events form ``queue``."""
        for source, name in self.sources.items():
            if name == queue:
                return source
        return queue


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _number(lowest: float, highest: float, kind: type = int) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        try:
            number = kind(_text(value))
        except ValueError:
            number = None
        if number is None or not lowest <= number <= highest:
            what = "a whole number" if kind is int else "a number"
            raise EnvError(f"must be {what} from {lowest:.10g} to {highest:.10g}")
        return number

    return parse


def _days(value: Any) -> float:
    try:
        days = float(_text(value))
    except ValueError:
        days = -1.0
    # of what ended sooner a broker may still bring a copy
    if days != 0 and not 1 <= days <= 3660:
        raise EnvError("must be 0, or a number from 1 to 3660")
    return days


def _choice(*words: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in words:
            raise EnvError(f"must be one of {', '.join(words)}")
        return str(value)

    return parse


def _switch(value: Any) -> bool:
    # YAML reads a bare on or off as a boolean
    words = {"on": True, "off": False, "true": True, "false": False}
    known = words.get(_text(value).lower())
    if known is None:
        raise EnvError("must be on or off")
    return known


def _needed(value: Any) -> str:
    if not _text(value):
        raise EnvError("must not be empty")
    return _text(value)


def _host(value: Any) -> str:
    host = _needed(value)
    try:
        if ":" in host:
            ipaddress.IPv6Address(host)
        elif not re.fullmatch(r"[\w.-]+", host):
            raise ValueError
    except ValueError:
        wanted = "must be the name or the address of a host alone: its port is a setting of its own"
        raise EnvError(wanted) from None
    return host


def _host_or_none(value: Any) -> str:
    return _host(value) if _text(value) else ""


def _provider(value: Any) -> str:
    name = _text(value)
    if name in BUILT_IN_PROVIDERS:
        return name
    wanted = f"must be one of {', '.join(BUILT_IN_PROVIDERS)}, or package.module:Class"
    match = re.fullmatch(r"([\w.]+):(\w+)", name)
    if match is None:
        raise EnvError(wanted)
    try:
        getattr(import_module(match[1]), match[2])
    except Exception as exc:  # whatever its import may raise
        raise EnvError(f"{wanted}; {exc}") from exc
    return name


def provider_name(value: str) -> str:
    """Return the name of a provider.

    :raises SettingsError: when it is none.
    """
    try:
        return _provider(value)
    except EnvError as exc:
        raise SettingsError(str(exc)) from exc


def _provider_or_none(value: Any) -> str:
    return _provider(value) if _text(value) else ""


def _address(value: Any) -> Address:
    match = re.fullmatch(r"(?:\[?([0-9A-Za-z.:-]*?)\]?:)?(\d{1,5})", _text(value))
    if match is None or not int(match[2]) <= 65535:
        raise EnvError("must be host:port, such as 127.0.0.1:3005")
    return Address(match[1] or "127.0.0.1", int(match[2]))


def _address_or_none(value: Any) -> Address | None:
    return _address(value) if _text(value) else None


def _sources(value: Any) -> Mapping[str, str]:
    wanted = "must be pairs source=queue, separated by commas"
    pairs = [pair.strip() for pair in _text(value).split(",") if pair.strip()]
    sources: dict[str, str] = {}
    for pair in pairs:
        source, equals, queue = pair.partition("=")
        if not equals or source in sources:
            raise EnvError(f"{wanted}, each source once")
        try:
            sources[check_name(source, "a source")] = check_name(queue, "a queue")
        except PayloadError as exc:
            raise EnvError(f"{wanted}; {exc}") from exc
    if len(set(sources.values())) < len(sources):
        raise EnvError(f"{wanted}; two sources cannot share one queue")
    return MappingProxyType(sources)


def _mail_url(value: Any) -> str:
    try:
        url = urlsplit(_text(value))
        port_fits = url.port is None or url.port > 0
    except ValueError:  # brackets without their other half; a port that is none
        fits = False
    else:
        is_server = bool(url.scheme in ("smtp", "smtps") and url.hostname and port_fits)
        fits = is_server or bool(url.scheme == "file" and url.path)
    if not fits:
        raise EnvError("must be file:/path, smtp://[user:password@]host[:port] or smtps://…")
    return _text(value)


def _mail_from(value: Any) -> str:
    if not re.fullmatch(r"[^@\s\x00-\x1f]+@[^@\s\x00-\x1f]+", _text(value)):
        raise EnvError("must be a mail address, such as noreply@example.com")
    return _text(value)


def _mail_to(value: Any) -> str:
    return _mail_from(value) if _text(value) else ""


_WEBHOOK_URL = re.compile(
    r"(https?://(?:[^\s/@?#\\:\[\]]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?)([/?][^\s#]*)?"
)
"""Its host, and what nobody may see of it."""


def _webhook_url(value: Any) -> str:
    text = _text(value)
    if text and not _WEBHOOK_URL.fullmatch(text):
        raise EnvError("must be http://host[:port]/path or https://…")
    return text


_REDIS_HOST = r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?"
_REDIS_HOSTS = rf"{_REDIS_HOST}(?:,{_REDIS_HOST})*"
# what else redis-py knows of TLS needs certificates or code beside it
_REDIS_OPTION = (
    r"(?:(?:ssl_(?:ca_certs|ca_path|certfile|keyfile|password|ciphers)"
    r"|sentinel_(?:username|password))=[^&\s]+"
    r"|ssl_cert_reqs=(?:none|optional|required)|ssl_check_hostname=(?:yes|no|true|false))"
)
_REDIS_URL = re.compile(
    r"rediss?(?:"
    rf"://(?:[^@/\s]*@)?{_REDIS_HOST}(?:/\d*)?"
    rf"|\+sentinel://(?:[^@/\s]*@)?{_REDIS_HOSTS}/[A-Za-z0-9_.-]+(?:/\d*)?"
    rf"|\+cluster://(?:[^@/\s]*@)?{_REDIS_HOSTS}/?"
    rf")(?:\?{_REDIS_OPTION}(?:&{_REDIS_OPTION})*)?"
)
_TLS_IN_VAIN = re.compile(r"redis[:+].*[?&]ssl_|rediss?(?!\+sentinel).*[?&]sentinel_")
"""Options of what the scheme says is not used."""


def _redis_url(value: Any) -> str:
    text = _text(value)
    fits = _REDIS_URL.fullmatch(text) and not _TLS_IN_VAIN.match(text)
    hosts = urlsplit(text).netloc.rpartition("@")[2] if fits else ":0"
    ports = re.findall(r":(\d+)(?:,|$)", hosts)
    if text and not all(0 < int(port) <= 65535 for port in ports):
        raise EnvError(
            "must be redis://[user:password@]host[:port][/db], rediss://…, "
            "redis+sentinel://…host,host/service[/db] or redis+cluster://…host,host"
        )
    return text


def _redis_prefix(value: Any) -> str:
    # braces would be a hash tag, and decide the node of every queue
    if not re.fullmatch(r"[A-Za-z0-9._:-]{1,100}", _text(value)):
        raise EnvError("must be 1 to 100 of A-Z a-z 0-9 . _ : -")
    return _text(value)


_AMQP_OPTION = (
    r"(?:ssl_(?:ca_certs|certfile|keyfile)=[^&\s;]+|ssl_cert_reqs=(?:none|optional|required))"
)
_AMQP_URI = re.compile(
    r"(?:py)?amqps?://(?:[^@/\s;]*@)?(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?"
    rf"(?:/[^/?@\s;]*)?(?:\?{_AMQP_OPTION}(?:&{_AMQP_OPTION})*)?"
)


def _amqp_uri(value: Any) -> str:
    text = _text(value)
    if text in ("", NAMEKO_BROKER):
        return ""
    found = [_AMQP_URI.fullmatch(each) for each in text.split(";")]
    if not all(each and 0 < int(each[1] or 5672) <= 65535 for each in found):
        raise EnvError("must be amqp://[user:password@]host[:port][/vhost] or amqps://…")
    return text


def _tokens(value: Any) -> tuple[str, ...]:
    """Tokens separated by commas or lines, or @/path of a file of them; a name may precede each."""
    text = _text(value)
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text()
        except (OSError, ValueError) as exc:
            raise EnvError(f"cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    tokens = tuple(token.strip() for token in re.split(r"[,\n]", text) if token.strip())
    if any(len(token.rpartition(":")[2]) < 16 for token in tokens):
        raise EnvError("must be tokens of 16 characters or more, separated by commas, or @/file")
    return tokens


def load_settings(config: Mapping[str, Any] | None = None) -> Settings:
    """Read and check every setting.

    :param config: nameko's configuration; the environment goes before it.
    :raises SettingsError: with one line for the first value that may not be.
    """
    return _Reader(config or {}).read()


@dataclass(frozen=True, slots=True)
class Checked:
    """One setting as it is found.

    :param value: with what is secret hidden.
    :param origin: ``environment``, ``configuration`` or ``default``.
    :param wrong: what it must be; ``None`` where it is that.
    """

    name: str
    value: str
    origin: str
    wrong: str | None = None


def check_settings(
    config: Mapping[str, Any] | None = None,
) -> tuple[list[Checked], Settings | None, list[str]]:
    """Check every setting, and go on after one that is wrong.

    :param config: as for :func:`load_settings`.
    :returns: the settings as they are found; all together, if none of them is wrong; and what is
        wrong, a line each.
    """
    reader = _Checker(config or {})
    settings: Settings | None = None
    try:
        settings = reader.read()
    except SettingsError as exc:
        # of several that do not fit together
        reader.wrong.append(str(exc))
    if reader.wrong:
        settings = None
    return reader.checked, settings, reader.wrong


_OURS = ("QUEUE_", "ALERT_")
"""What only names of settings begin with, as far as anybody knows."""


def unknown_names(known: Iterable[str], config: Mapping[str, Any] | None = None) -> list[str]:
    """Return a line for each variable that is named like a setting and is none.

    Other programs may have such variables, so that they are not wrong: Kubernetes gives every
    container some by the names of its services.

    :param known: the names of the settings.
    :param config: as for :func:`load_settings`.
    """
    names = set(known)
    # a key of the configuration may be anything
    given = {each for each in (*os.environ, *(config or {})) if str(each).startswith(_OURS)}
    return [_unknown(each, names) for each in sorted(given - names)]


def _unknown(name: str, known: set[str]) -> str:
    nearest = get_close_matches(name, sorted(known), 1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{name}: is no setting{hint}"


class _Reader:
    """Reads variables through environs, with the configuration as their default."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._env = Env()

    def get(self, name: str, default: Any, parse: Callable[[Any], Any]) -> Any:
        parser = f"parse_{name}"
        self._env.add_parser(parser, parse)
        try:
            return getattr(self._env, parser)(name, self._config.get(name, default))
        except EnvError as exc:
            said = exc.args[0].split("invalid: ", 1)[-1]
            raise SettingsError(f"{name}: {said}") from exc

    def read(self) -> Settings:
        data_dir = Path(self.get("QUEUE_DATA_DIR", "./var", _needed))
        admin = self.get("QUEUE_ADMIN_ADDRESS", "127.0.0.1:3005", _address)
        settings = Settings(
            provider=self.get("QUEUE_PROVIDER", "embedded", _provider),
            drain=self.get("QUEUE_PROVIDER_DRAIN", "", _provider_or_none),
            data_dir=data_dir,
            log=self.get("QUEUE_LOG", "on", _switch),
            max_payload_bytes=self.get("QUEUE_MAX_PAYLOAD_BYTES", 1_048_576, _number(1, 1 << 30)),
            sources=self.get("QUEUE_SOURCES", "auth_events=user-events", _sources),
            lease=self.seconds("QUEUE_LEASE_SECONDS", 30, lowest=1),
            grace=self.seconds("QUEUE_GRACE_SECONDS", 8),
            audit=self.seconds("QUEUE_AUDIT_SECONDS", 60),
            retries=Retries(
                limit=self.get("QUEUE_MAX_RETRIES", 3, _number(0, MAX_RETRIES_LIMIT)),
                backoff=Backoff(
                    base=self.seconds("QUEUE_RETRY_BASE_SECONDS", 1),
                    factor=self.get("QUEUE_RETRY_FACTOR", 2, _number(1, 100, float)),
                    cap=self.seconds("QUEUE_RETRY_CAP_SECONDS", 300),
                ),
            ),
            inbox_days=self.get("QUEUE_INBOX_DAYS", 30, _number(1, 3660, float)),
            completed_days=self.get("QUEUE_KEEP_COMPLETED_DAYS", 30, _days),
            dead_days=self.get("QUEUE_KEEP_DEAD_DAYS", 0, _days),
            alerting=self.alerting(),
            addresses=MappingProxyType(
                {
                    "auth_events": self.get("AUTH_EVENTS_ADDRESS", "127.0.0.1:3001", _address),
                    "company": self.get("COMPANY_ADDRESS", "127.0.0.1:3002", _address),
                    "queue_admin": admin,
                }
            ),
            metrics_address=self.get("QUEUE_METRICS_ADDRESS", "", _address_or_none),
            admin_auth=self.get(
                "QUEUE_ADMIN_AUTH",
                "none" if admin.is_loopback else "token",
                _choice("none", "token"),
            ),
            admin_tokens=self.get("QUEUE_ADMIN_TOKENS", "", _tokens),
            mail_url=self.get("MAIL_URL", f"file:{data_dir.absolute() / 'mail'}", _mail_url),
            mail_from=self.get("MAIL_FROM", "noreply@example.com", _mail_from),
            redis_host=self.get("REDIS_HOST", "127.0.0.1", _host),
            redis_port=self.get("REDIS_PORT", 6379, _number(1, 65535)),
            redis_password=self.get("REDIS_PASSWORD", "", _text),
            redis_db=self.get("REDIS_DB", 1, _number(0, 1 << 20)),
            redis_url=self.get("REDIS_URL", "", _redis_url),
            redis_prefix=self.get("REDIS_PREFIX", "nameko", _redis_prefix),
            rabbitmq_host=self.get("RABBITMQ_HOST", "127.0.0.1", _host),
            rabbitmq_port=self.get("RABBITMQ_PORT", 5672, _number(1, 65535)),
            rabbitmq_username=self.get("RABBITMQ_USERNAME", "guest", _needed),
            rabbitmq_password=self.get("RABBITMQ_PASSWORD", "guest", _text),
            rabbitmq_vhost=self.get("RABBITMQ_VHOST", "/", _needed),
            amqp_uri=self.get("AMQP_URI", "", _amqp_uri),
            rabbitmq_queue_type=self.get(
                "RABBITMQ_QUEUE_TYPE", "classic", _choice("classic", "quorum")
            ),
            rabbitmq_consumer_timeout=self.seconds(
                "RABBITMQ_CONSUMER_TIMEOUT_SECONDS", 1800, lowest=1
            ),
            database=self.database(),
        )
        self.check_workers()
        self.check_together(settings)
        return settings

    def seconds(self, name: str, default: float, lowest: float = 0) -> float:
        return float(self.get(name, default, _number(lowest, LARGEST_SECONDS, float)))

    def alerting(self) -> Alerting:
        return Alerting(
            every=self.seconds("QUEUE_ALERT_SECONDS", 10),
            failures=self.get("QUEUE_ALERT_FAILURE_PERCENT", 10, _number(0, 100, float)),
            oldest=self.get("QUEUE_ALERT_OLDEST_SECONDS", 300, _number(0, 1e9, float)),
            dead=self.get("QUEUE_ALERT_DEAD_LETTERS", 10, _number(0, 10**9)),
            silent=self.get("QUEUE_ALERT_SILENT_CONSUMERS", 1, _number(0, 10**9)),
            schedules=self.get("QUEUE_ALERT_FAILING_SCHEDULES", 1, _number(0, 10**9)),
            mail_to=self.get("ALERT_MAIL_TO", "", _mail_to),
            webhook=self.get("ALERT_WEBHOOK_URL", "", _webhook_url),
        )

    def database(self) -> Database | None:
        host = self.get("DB_HOST", "", _host_or_none)
        database = Database(
            host=host,
            port=self.get("DB_PORT", 3306, _number(1, 65535)),
            user=self.get("DB_USER", "queue_user", _needed),
            password=self.get("DB_PASSWORD", "", _text),
            name=self.get("DB_NAME", "queue_service", _needed),
        )
        return database if host else None

    def check_workers(self) -> None:
        """Check what nameko reads itself, with a traceback where it may not be."""
        given = self._config.get("max_workers")
        if given is None:
            return
        try:
            _number(1, MOST_WORKERS)(given)
        except EnvError as exc:
            raise SettingsError(f"MAX_WORKERS, in the configuration max_workers: {exc}") from exc

    def check_together(self, settings: Settings) -> None:
        ports = [address.port for address in settings.addresses.values() if address.port]
        if len(set(ports)) < len(ports):
            raise SettingsError("QUEUE_ADMIN_ADDRESS: each service must have a port of its own")
        metrics = settings.metrics_address
        if metrics is not None and metrics.port in ports:
            raise SettingsError("QUEUE_METRICS_ADDRESS: must have a port of its own")
        if not settings.log and settings.provider == "embedded":
            raise SettingsError(
                "QUEUE_LOG: must be on where QUEUE_PROVIDER is embedded, whose queue is in the log"
            )
        if settings.drain == settings.provider:
            raise SettingsError(
                "QUEUE_PROVIDER_DRAIN: must be another than QUEUE_PROVIDER, or empty"
            )
        if settings.drain and not settings.log:
            raise SettingsError(
                "QUEUE_PROVIDER_DRAIN: must be empty where QUEUE_LOG is off: what moves goes "
                "through the log"
            )
        if settings.admin_auth == "token" and not settings.admin_tokens:
            raise SettingsError(
                "QUEUE_ADMIN_TOKENS: must hold a token where QUEUE_ADMIN_AUTH is token, its "
                "default off loopback; QUEUE_ADMIN_AUTH=none opens it to everyone"
            )


class _Checker(_Reader):
    """Notes each variable, and reads on with the default in place of one that is wrong."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.checked: list[Checked] = []
        self.wrong: list[str] = []

    def get(self, name: str, default: Any, parse: Callable[[Any], Any]) -> Any:
        try:
            value, wrong = super().get(name, default, parse), None
        except SettingsError as exc:
            self.wrong.append(str(exc))
            value, wrong = parse(default), str(exc).partition(": ")[2]
        given, origin = default, "default"
        if name in os.environ:
            given, origin = os.environ[name], "environment"
        elif name in self._config:
            given, origin = self._config[name], "configuration"
        self.checked.append(Checked(name, hidden(name, _text(given)), origin, wrong))
        return value


_WITH_USER = re.compile(r"\A([a-z+]*:?/*).*@", re.DOTALL)
"""What a URL has before its host."""


def hidden(name: str, value: str) -> str:
    """Return a setting's value without what is secret of it."""
    if name.endswith(("PASSWORD", "TOKENS")):
        # of a file it is no secret which one it is
        return value if not value or value.startswith("@") else "***"
    if name == "ALERT_WEBHOOK_URL":
        # who knows its path may post there
        if found := _WEBHOOK_URL.fullmatch(value):
            return f"{found[1]}/***" if found[2] else value
        # which part of what is none is a secret, nothing tells
        scheme = re.match(r"https?://", value)
        return f"{scheme[0] if scheme else ''}***" if value else value
    if name.endswith(("URL", "URI")):
        value = _WITH_USER.sub(r"\1***@", value)
        return re.sub(r"(password=)[^&\s]+", r"\1***", value)
    return value


def settings_or_exit(config: Mapping[str, Any]) -> Settings:
    """Return the settings for a service that starts, or end the process with status 2.

    nameko's own way to refuse a configuration ends with status 0.
    """
    try:
        settings = load_settings(config)
        check_data_dir(settings)
    except SettingsError as exc:
        refuse_start(exc)
    return settings


def check_data_dir(settings: Settings) -> None:
    """Make the data folder, where it is needed and not there yet.

    :raises SettingsError: when it cannot be made, or not be written.
    """
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=settings.data_dir):
            pass
    except OSError as exc:
        said = f"{settings.data_dir}: {exc.strerror}"
        raise SettingsError(
            f"QUEUE_DATA_DIR: must be a folder that can be written; {said}"
        ) from exc


def refuse_start(reason: object) -> NoReturn:
    """End the process before it serves anything: one line on standard error, status 2."""
    print(f"Error: {reason}", file=sys.stderr)
    raise SystemExit(2)
