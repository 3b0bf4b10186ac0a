"""Starts the four services on their configured addresses, and leaves them running."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any
from urllib.parse import urlsplit

from rich.console import Console

from services.demo import report
from services.demo.client import HEALTH, Client, url_of
from services.demo.processes import (
    SERVICES,
    START_SECONDS,
    DemoError,
    Services,
    check_free,
    read_config,
)
from services.demo.servers import running
from shared.settings import Settings, settings_or_exit

FOREVER = float("inf")

LAST_WORDS_SECONDS = 1.0
"""How long the output of a service that ended is waited for."""

Follow = Callable[[str, Any], None]

HINTS = """
Data is in {data}, mails go to {mail}. Try:

  curl {auth_events}/auth/register -H 'Content-Type: application/json' -d '{form}'
  curl {queue_admin}/queue/stats/{queue}{token}

Ctrl-C ends them.
"""

FORM = (
    '{"email": "ada@example.com", "password": "difference engine", "first_name": "Ada", '
    '"last_name": "Lovelace", "company_name": "Engines", "company_domain": "engines.example"}'
)


def main() -> int:
    """Run the services until Ctrl-C; return 0 then, 1 if one ends by itself."""
    console = report.make_console()
    try:
        with (
            running(console, settings_or_exit(read_config())),
            _following(console) as follow,
            Services() as services,
        ):
            _run(console, settings_or_exit(read_config()), services, follow)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 0
    except DemoError as exc:
        report.trouble(console, exc)
    return 1


def _run(console: Console, settings: Settings, services: Services, follow: Follow) -> None:
    client = Client(settings.addresses)
    for service, address in settings.addresses.items():
        check_free(service, address)
    for service in SERVICES:
        follow(service, services.start(service).stdout)

    def are_up() -> bool:
        return all(map(client.is_up, HEALTH))

    services.wait_until(are_up, START_SECONDS, "the services to answer")
    _say_where(console, settings)
    services.wait_until(lambda: False, FOREVER, "nothing")


@contextlib.contextmanager
def _following(console: Console) -> Iterator[Follow]:
    """Give a function that prints the lines of a service's output as they come, with its name."""
    threads = []

    def print_lines(service: str, output: IO[str]) -> None:
        for line in output:
            # when nobody reads us any more the services must not notice
            with contextlib.suppress(SystemExit):
                console.print(f"{service:<13} | {line.rstrip()}", soft_wrap=True)

    def follow(service: str, output: IO[str]) -> None:
        # a daemon: should a service leave children with its output, they do not keep us
        threads.append(threading.Thread(target=print_lines, args=(service, output), daemon=True))
        threads[-1].start()

    try:
        yield follow
    finally:
        for thread in threads:
            thread.join(LAST_WORDS_SECONDS)


def _say_where(console: Console, settings: Settings) -> None:
    console.print()
    urls = {service: url_of(settings.addresses[service]) for service in HEALTH}
    for service in SERVICES:
        console.print(f"{service:<13} {urls.get(service, 'no HTTP')}")
    hints = HINTS.format(
        data=_data_place(settings),
        mail=_mail_place(settings.mail_url),
        form=FORM,
        queue=settings.queue_of("auth_events"),
        token=" -H 'Authorization: Bearer …'" if settings.admin_auth == "token" else "",
        **urls,
    )
    console.print(hints, soft_wrap=True)


def _data_place(settings: Settings) -> str:
    if settings.database is None:
        return str(settings.data_dir.absolute())
    return f"MySQL or MariaDB at {settings.database.host}:{settings.database.port}"


def _mail_place(url: str) -> str:
    """Return where mails go, without the password that the URL may hold."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return parts.path
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
