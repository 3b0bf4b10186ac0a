"""The demo: thirty sign-ups, what became of each event, and whether that is right."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import Progress
from sqlalchemy import select

from services.demo import report
from services.demo.client import Client
from services.demo.mail_server import Mailbox, serving
from services.demo.people import POSTPONED, REFUSED, Person, read_people
from services.demo.processes import (
    HOST,
    SERVICES,
    START_SECONDS,
    DemoError,
    Services,
    read_config,
)
from services.demo.servers import running
from services.demo.verdict import SUBSCRIBERS, Claim, Event, events_of, judge
from shared.database import database_url, disposing, make_reader
from shared.settings import Settings, settings_or_exit
from shared.tables import messages
from shared.testing.servers import free_port

SETTLE_SECONDS = 60.0
"""How long the deliveries may take, in which case something is wrong; usually it is one."""

RETRY_BASE_SECONDS = 0.5
"""A retry comes within this time, so that nobody has to wait for the demo."""

LOCK = "demo.lock"

IN_HAND = ("pending", "processing", "retry")


def main() -> int:
    """Show the demo; return 0 if everything ended as it had to, else 1."""
    console = report.make_console()
    try:
        with _own_folder() as folder:
            return _show(console, folder)
    except DemoError as exc:
        report.trouble(console, exc)
    except KeyboardInterrupt:
        console.print("Interrupted; the services were stopped.")
    return 1


def _show(console: Console, folder: Path) -> int:
    started = time.monotonic()
    mail_port, *ports = (free_port() for _ in range(4))
    _set_environment(folder, mail_port, ports)
    with running(console, settings_or_exit(read_config())):
        return _tell(console, folder, mail_port, started)


def _tell(console: Console, folder: Path, mail_port: int, started: float) -> int:
    settings = settings_or_exit(read_config())
    people = read_people("" if settings.database is None else f"{int(time.time()):x}")
    address_of = {person.address: person.mail_address for person in people}
    mailbox = Mailbox(folder / "mails", address_of[REFUSED], address_of[POSTPONED])
    with serving(mailbox, mail_port), Services(folder) as services:
        story = Story(console, settings, services, Client(settings.addresses), mailbox, people)
        try:
            claims, events = story.tell()
        except DemoError as exc:
            report.trouble(console, services.explain(exc), services.last_lines)
            return 1
        is_right = report.verdict(console, claims)
        if not is_right:
            report.logs(console, SERVICES, services.last_lines)
    report.ending(console, events, is_right, time.monotonic() - started, folder)
    return 0 if is_right else 1


@dataclass(frozen=True)
class Story:
    """What happens, in order."""

    console: Console
    settings: Settings
    services: Services
    client: Client
    mailbox: Mailbox
    people: list[Person]

    @property
    def queue(self) -> str:
        """The queue of the events that auth_events dispatches."""
        return self.settings.queue_of("auth_events")

    def tell(self) -> tuple[list[Claim], list[Event]]:
        """Do it all; return what must be true now, and the events.

        :raises DemoError: when it cannot go on.
        """
        self._start()
        before = self._stats()
        self._check_idle(before)
        with report.progress(self.console) as progress:
            self._sign_up(progress.track(self.people, description="Signing up"))
            active = [person for person in self.people if person.logins]
            self._log_in_and_out(progress.track(active, description="Logging in and out"))
            self._wait_for_deliveries(progress, before)
        report.timeline(self.console, self._events())
        report.stats(self.console, self._stats())
        self._revive_dead_letter()
        events = self._events()
        claims = judge(self.client, self.queue, self.people, events, self.mailbox, before)
        return claims, events

    def _start(self) -> None:
        provider, folder = self.settings.provider, self.settings.data_dir
        self.console.print(f"Starting the four services: provider {provider}, data in {folder}")
        for service in SERVICES:
            self.services.start(service)
        with self.console.status("Waiting until they answer"):
            self.services.wait_until(self._is_ready, START_SECONDS, f"the services{self._hint()}")

    def _hint(self) -> str:
        if self.settings.database is None:
            return ""
        return "; has queuectl db upgrade made the tables?"

    def _is_ready(self) -> bool:
        if not all(map(self.client.is_up, self.settings.addresses)):
            return False
        stats = self.client.stats(self.queue) or {"subscriptions": []}
        known = {each["subscriber"] for each in stats["subscriptions"]}
        return known >= set().union(*SUBSCRIBERS.values())

    def _stats(self) -> dict[str, Any]:
        stats = self.client.stats(self.queue)
        if stats is None:
            raise DemoError(f"the statistics of {self.queue} are not to be had")
        return stats

    def _check_idle(self, stats: dict[str, Any]) -> None:
        busy = sum(stats[status] for status in IN_HAND)
        if busy:
            raise DemoError(f"{self.queue} of this database is in use: {busy} messages wait in it")

    def _sign_up(self, people: Iterable[Person]) -> None:
        for person in people:
            self.services.check()
            answer = self.client.register(person.form)
            person.user_id = answer["user"]["user_id"]
            person.message_id = answer["message_id"]

    def _log_in_and_out(self, people: Iterable[Person]) -> None:
        for person in people:
            self.services.check()
            password = person.form["password"]
            tokens = [self.client.login(person.email, password) for _ in range(person.logins)]
            for token in tokens[: person.logouts]:
                self.client.logout(token)

    def _wait_for_deliveries(self, progress: Progress, before: dict[str, Any]) -> None:
        expected = events_of(self.people)
        task = progress.add_task("Delivering events", total=expected)

        def are_done() -> bool:
            stats = self._stats()
            done = sum(stats[status] - before[status] for status in ("completed", "failed"))
            progress.update(task, completed=done)
            return done == expected

        self.services.wait_until(are_done, SETTLE_SECONDS, f"{expected} events to be delivered")

    def _events(self) -> list[Event]:
        people = {person.user_id: person for person in self.people}
        found = map(self.client.message, self._message_ids())
        return [
            Event(people[message["payload"]["user_id"]], message)
            for message in found
            if message["payload"].get("user_id") in people
        ]

    def _message_ids(self) -> list[str]:
        # of logins and logouts only the log tells the ids; they sort by age
        first = min(person.message_id for person in self.people)
        own = make_reader(database_url(self.settings), time.sleep)
        of_ours = select(messages.c.id).where(
            messages.c.queue_name == self.queue, messages.c.id >= first
        )
        with disposing(own) as engine, engine.connect() as connection:
            return list(connection.scalars(of_ours.order_by(messages.c.id)))

    def _revive_dead_letter(self) -> None:
        person = next(each for each in self.people if each.address == REFUSED)
        dead = Event(person, self.client.message(person.message_id))
        if dead.message["status"] != "failed":
            return  # which the verdict finds
        report.dead_letter(self.console, dead)
        self.mailbox.accept(person.mail_address)
        retried = self.client.retry(person.message_id)
        self.services.wait_until(
            lambda: self.client.message(person.message_id)["status"] in ("completed", "failed"),
            SETTLE_SECONDS,
            "the dead letter to be delivered",
        )
        revived = Event(person, self.client.message(person.message_id))
        report.revived(self.console, revived, retried)


def _set_environment(folder: Path, mail_port: int, ports: list[int]) -> None:
    """Set what the services read, and we with them, over what is set already."""
    auth_events, company, queue_admin = (f"{HOST}:{port}" for port in ports)
    os.environ.update(
        QUEUE_DATA_DIR=str(folder),
        QUEUE_LOG="on",
        QUEUE_RETRY_BASE_SECONDS=str(RETRY_BASE_SECONDS),
        QUEUE_ADMIN_AUTH="none",
        AUTH_EVENTS_ADDRESS=auth_events,
        COMPANY_ADDRESS=company,
        QUEUE_ADMIN_ADDRESS=queue_admin,
        MAIL_URL=f"smtp://{HOST}:{mail_port}",
    )


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """Empty the folder of the demo, and keep other demos out of it for as long as it is used."""
    folder = Path(os.environ.get("QUEUE_DATA_DIR") or "var") / "demo"
    try:
        lock = _locked(folder)
        _empty(folder)
    except BlockingIOError as exc:
        raise DemoError(f"another demo is using {folder}") from exc
    except OSError as exc:
        raise DemoError(f"cannot use {folder}: {exc}") from exc
    with lock:
        yield folder


def _locked(folder: Path) -> TextIO:
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    if any(folder.iterdir()) and not lock.exists():
        raise DemoError(f"{folder} holds what is not the demo's; it would be deleted")
    held = lock.open("w")
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return held


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
