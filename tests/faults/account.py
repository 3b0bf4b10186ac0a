"""Whether the promises were kept: what the driver knows, against what the message log says."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from shared.lifecycle import DeliveryStatus, message_status
from tests.faults.world import World

HANDLERS = {
    "unit.sent": ("sink.note", "sink.obey"),
    "unit.grouped": ("sink.group",),
    "unit.booked": ("sink.book",),
}

BOOKED = "sink.book"
"""Has an inbox, and fails whenever its database does: not by what the payload says."""

EARLY_SECONDS = 0.05
"""By how much an event may come before its time: clocks tick in milliseconds."""

TRIES = 4
"""Each dispatch says that it is to be retried three times."""


@dataclass(slots=True)
class Account:
    """What was found.

    :param wrong: each broken promise, in words.
    """

    stored: int = 0
    raised: int = 0
    uncertain: int = 0
    outboxed: int = 0
    rolled_back: int = 0
    booked: int = 0
    deliveries: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    doubled: int = 0
    takeovers: int = 0
    lost: int = 0
    put_back: int = 0
    """Deliveries that a provider had lost, as an audit found."""
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Account) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Record:
    """What the sources wrote down."""

    def __init__(self, path: Path) -> None:
        self.payloads: dict[str, Any] = {}
        self.stored: dict[str, str] = {}
        self.raised: dict[str, str] = {}
        self.maybe: dict[str, str] = {}
        """Of whose fate the source was told that it is unknown."""
        self.surprises: list[str] = []
        self.stopped = 0
        self.began: dict[str, float] = {}
        """When the dispatch began, by a clock that does not jump."""
        self.outboxed: set[str] = set()
        self.committed: dict[str, str] = {}
        self.rolled_back: set[str] = set()
        self.slowest = 0.0
        """Seconds that a dispatch took which stored something."""
        for line in path.read_text().splitlines():
            self._read(json.loads(line))

    def _read(self, line: dict[str, Any]) -> None:
        if line["what"] in ("dispatching", "committing"):
            self._begin(line)
        else:
            self._end(line)

    def _end(self, line: dict[str, Any]) -> None:
        match line["what"]:
            case "stored":
                self.stored |= dict(zip(line["names"], line["ids"], strict=True))
                self.slowest = max(self.slowest, line["at"] - self.began[line["names"][0]])
            case "committed":
                self.committed |= dict(zip(line["names"], line["ids"], strict=True))
            case "rolled back":
                self.rolled_back |= set(line["names"])
            case "raised":
                self.raised |= dict.fromkeys(line["names"], line["error"])
            case "uncertain":
                self.maybe |= dict(zip(line["names"], line["ids"], strict=True))
            case "surprised":
                self.surprises.append(line["error"])
            case "stopped":
                self.stopped += 1

    def _begin(self, line: dict[str, Any]) -> None:
        self.payloads |= {payload["n"]: payload for payload in line["events"]}
        self.began |= {payload["n"]: line["at"] for payload in line["events"]}
        if line["what"] == "committing":
            self.outboxed |= {payload["n"] for payload in line["events"]}

    @property
    def total(self) -> int:
        """How many were said to be stored."""
        return len(self.stored) + len(self.committed)

    @property
    def uncertain(self) -> set[str]:
        """Those of whose fate the source was not told: uncertain, or it was killed."""
        told = self.stored.keys() | self.raised.keys() | self.committed.keys() | self.rolled_back
        return self.payloads.keys() - told


def check(world: World, connection: Connection) -> Account:
    """Compare the log with what the sources and handlers wrote down."""
    return _Audit(world, connection).account


class _Audit:
    def __init__(self, world: World, connection: Connection) -> None:
        self.record = Record(world.record)
        self.effects = world.flow.effects.all()
        self.account = Account()
        self._read(connection)
        self._check_dispatches()
        for name, message in self.messages.items():
            self._check_message(name, message)
        self._check_effects()
        self._check_outbox(world)
        self._check_bookings(world)
        if not world.clock.has_moved:
            self._check_times()
        self._check_balance()

    def _read(self, connection: Connection) -> None:
        rows = connection.execute(
            text("SELECT id, message_type, payload, status, retry_count FROM queue_messages")
        ).all()
        self.messages = {json.loads(row.payload)["n"]: row for row in rows}
        if len(self.messages) < len(rows):
            self._wrong(f"{len(rows) - len(self.messages)} events are stored twice")
        self.deliveries: dict[str, list[Any]] = defaultdict(list)
        found = connection.execute(
            text(
                "SELECT d.seq, d.message_id, d.status, d.attempts, d.takeovers, d.ready,"
                " d.lease_expires_at, d.available_at, d.error_type, s.subscriber"
                " FROM queue_deliveries d JOIN queue_subscriptions s ON s.id = d.subscription_id"
            )
        )
        for row in found:
            self.deliveries[row.message_id].append(row)
        burnt = connection.execute(
            text(
                "SELECT delivery_seq, count(*) AS n FROM queue_attempts"
                " WHERE outcome IN ('retry', 'failed') GROUP BY delivery_seq"
            )
        )
        self.burnt = {row.delivery_seq: row.n for row in burnt}

    def _check_dispatches(self) -> None:
        record, account = self.record, self.account
        account.stored = len(record.stored) + len(record.committed)
        account.raised = len(record.raised)
        account.rolled_back = len(record.rolled_back)
        account.uncertain = len(record.uncertain)
        self._check_stored()
        for name in record.raised.keys() & self.messages.keys():
            self._wrong(f"{name}: dispatch raised {record.raised[name]}, and it is stored (P1)")
        for surprise in record.surprises:
            self._wrong(f"dispatch raised what is no DispatchError: {surprise}")
        for name in self.messages.keys() - record.payloads.keys():
            self._wrong(f"{name}: nobody dispatched it")

    def _check_stored(self) -> None:
        record, account = self.record, self.account
        for name, message_id in (record.stored | record.committed).items():
            if name not in self.messages:
                account.lost += 1
                self._wrong(f"{name}: dispatch returned {message_id}, and it is not stored (P1)")
            elif self.messages[name].id != message_id:
                self._wrong(f"{name}: is stored as {self.messages[name].id}, not {message_id}")
        for name, message_id in record.maybe.items():
            if name in self.messages and self.messages[name].id != message_id:
                self._wrong(f"{name}: is stored as {self.messages[name].id}, not {message_id} (P1)")

    def _check_message(self, name: str, message: Any) -> None:
        its = self.deliveries[message.id]
        wanted, got = HANDLERS[message.message_type], [row.subscriber for row in its]
        if sorted(got) != sorted(wanted):
            self.account.lost += 1
            self._wrong(f"{name}: is for {wanted}, and went to {got} (P4)")
        drawn = message_status(DeliveryStatus(row.status) for row in its)
        if drawn != message.status:
            self._wrong(f"{name}: is {message.status}, its deliveries {[r.status for r in its]}")
        retries = max((row.attempts - 1 for row in its), default=0)
        if message.retry_count != retries:
            self._wrong(f"{name}: has retry_count {message.retry_count}, not {retries}")
        for row in its:
            self._check_delivery(name, row)

    def _check_delivery(self, name: str, row: Any) -> None:
        account = self.account
        account.deliveries += 1
        account.statuses[row.status] += 1
        account.takeovers += row.takeovers
        fails = self.record.payloads.get(name, {}).get("fail", 0)
        fails = fails if row.subscriber == "sink.obey" else 0
        wanted = "failed" if fails >= TRIES else "completed"
        attempts = min(fails + 1, TRIES)
        what = f"{name} to {row.subscriber} (delivery {row.seq})"
        burnt = min(fails, TRIES)
        if row.subscriber == BOOKED:
            attempts, burnt = max(row.attempts, 1), row.attempts - 1
        if row.status != wanted:
            account.lost += 1
            self._wrong(f"{what}: is {row.status} ({row.error_type}), not {wanted} (P4)")
        elif row.attempts != attempts:
            self._wrong(f"{what}: has {row.attempts} attempts, not {attempts} (P8)")
        elif self.burnt.get(row.seq, 0) != burnt:
            self._wrong(f"{what}: has a history of {self.burnt.get(row.seq, 0)}, not {burnt}")
        if row.ready or row.lease_expires_at or row.available_at:
            self._wrong(f"{what}: is {row.status}, and still waits for something: {row}")

    def _check_effects(self) -> None:
        ran = Counter(
            (effect["id"], f"sink.{effect['handler']}", effect["attempt"])
            for effect in self.effects
            if effect["what"] == "ran"
        )
        self.account.runs = ran.total()
        self.account.doubled = ran.total() - len(ran)
        ids = {message.id for message in self.messages.values()}
        for message_id, subscriber, _ in ran:
            if message_id not in ids:
                self._wrong(f"{message_id}: was handled by {subscriber}, and is not stored (P1)")
        for message_id, its in self.deliveries.items():
            for row in its:
                if row.subscriber == BOOKED:
                    continue  # its rows tell
                tries = range(1, row.attempts + 1)
                missing = [n for n in tries if (message_id, row.subscriber, n) not in ran]
                if missing and row.status in ("completed", "failed"):
                    self.account.lost += 1
                    self._wrong(
                        f"{message_id}: is {row.status} for {row.subscriber},"
                        f" which did not run attempt {missing} (P4)"
                    )

    def _check_outbox(self, world: World) -> None:
        """P3: an event is stored if the row is there that was written with it, and only then."""
        with world.own_engine("source") as engine, engine.connect() as connection:
            rows = set(connection.execute(text("SELECT n FROM source_units")).scalars())
            left = connection.execute(text("SELECT count(*) FROM source_outbox")).scalar_one()
        record = self.record
        stored = self.messages.keys() & record.outboxed
        self.account.outboxed = len(rows)
        if left:
            self._wrong(f"{left} events are still in the outbox (P3)")
        for name in rows - stored:
            self.account.lost += 1
            self._wrong(f"{name}: its row is committed, and the event is not stored (P3)")
        for name in stored - rows:
            self._wrong(f"{name}: the event is stored, and its row was not committed (P3)")
        for name in record.committed.keys() - rows:
            self._wrong(f"{name}: was committed, and its row is not there")
        for name in record.rolled_back & rows:
            self._wrong(f"{name}: was rolled back, and its row is there")

    def _check_bookings(self, world: World) -> None:
        """P5: the effects in its database of a handler with an inbox happen exactly once."""
        with world.own_engine("sink") as engine, engine.connect() as connection:
            rows = Counter(connection.execute(text("SELECT n FROM sink_bookings")).scalars())
        wanted = {n for n, each in self.messages.items() if each.message_type == "unit.booked"}
        self.account.booked = rows.total()
        for name in wanted - rows.keys():
            self.account.lost += 1
            self._wrong(f"{name}: is completed, and not booked (P5)")
        for name, count in rows.items():
            if count > 1:
                self._wrong(f"{name}: is booked {count} times (P5)")
        for name in rows.keys() - wanted:
            self._wrong(f"{name}: is booked, and nobody dispatched it (P1)")

    def _check_times(self) -> None:
        """No event comes before its time."""
        for effect in self.effects:
            name = effect["n"]
            due = self.record.began[name] + self.record.payloads[name].get("delay", 0)
            if effect["at"] < due - EARLY_SECONDS:
                self._wrong(f"{name}: came {due - effect['at']:.3f} s before its time (P6)")

    def _check_balance(self) -> None:
        messages = sum(len(HANDLERS[m.message_type]) for m in self.messages.values())
        ended = self.account.statuses
        if messages != ended["completed"] + ended["failed"]:
            self._wrong(f"{messages} were dispatched, and ended so: {dict(ended)} (P11)")

    def _wrong(self, said: str) -> None:
        self.account.wrong.append(said)


TRACEBACK = re.compile(r"^Traceback .*\n(?:^(?:[ \t].*)?\n)+(^\S.*)$", re.MULTILINE)

CHAINED = re.compile(
    r"(?:^\S.*\n)+\n+(?:The above exception was|During handling of) .*\n+Traceback .*\n",
    re.MULTILINE,
)
"""What is between the tracebacks of an exception and of the one that it led to."""

OF_A_DATABASE = ("sqlalchemy.exc.", "pymysql.err.", "greenlet.GreenletExit")
"""How those of a database begin; the last is a worker that is ended while it waits for one."""

EXPECTED = ("ToldToFailError", "tests.faults.apps.sink.ToldToFailError")


def tracebacks(world: World) -> Counter[str]:
    """Count the errors in the logs of the processes that came with a traceback."""
    found: Counter[str] = Counter()
    for path in world.folder.glob("process-*.log"):
        found += unexpected(path.read_text(errors="replace"))
    return found


def unexpected(said: str) -> Counter[str]:
    """Count by their last lines the tracebacks in a log that nothing which was broken explains."""
    found: Counter[str] = Counter()
    for match in TRACEBACK.finditer(CHAINED.sub("  because of it\n", said)):
        # a handler whose own database fails says so, as any that raises; and so does its
        # pool, of a connection that it cannot even roll back
        is_own = any(each in match[0] for each in ("in _run_once", "in _finalize_fairy"))
        is_of_handler = is_own and match[1].startswith(OF_A_DATABASE)
        if not match[1].startswith(EXPECTED) and not is_of_handler:
            found[match[1][:200]] += 1
    return found
