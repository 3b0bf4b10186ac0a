"""Breaks things in a world by a seed, and checks afterwards that its promises were kept."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import eventlet
from click.testing import CliRunner
from sqlalchemy import text

from shared.cli import main
from shared.database import database_url, make_reader
from shared.errors import ProviderError, StoreUnavailableError
from shared.events.audit import Audit, Lack
from shared.native import Signal
from shared.providers import make_provider
from shared.tables import SUBSCRIPTION_COLUMNS, subscription_of
from tests.faults.account import Account, Record, check, tracebacks
from tests.faults.faults import Step, always, catalogue, plan
from tests.faults.world import World
from tests.support.waiting import wait_until

RECOVER_SECONDS = 60.0
"""How long after a round it may take until anything is handled again."""

END_SECONDS = 120.0
"""How long after the last fault it may take until more is delivered, as long as any is left."""

IDLE_SECONDS = 3.0
"""How long a process is looked at that has nothing to do any more."""

IDLE_SHARE = 0.1
"""How much of one processor such a process may use; about 0.02 was seen."""


@dataclass(slots=True)
class Run:
    """What one run did, and found."""

    backend: str
    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest_recovery: float = 0.0
    account: Account = field(default_factory=Account)
    tracebacks: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        a = self.account
        return (
            f"{self.backend}, seed {self.seed}: {self.faults.total()} faults in"
            f" {self.seconds:.0f} s; {a.stored} events stored, {a.outboxed} of them by an outbox,"
            f" {a.raised} refused, {a.rolled_back} rolled back, {a.uncertain} uncertain;"
            f" {a.deliveries} deliveries: {dict(a.statuses)}; {a.lost} lost, {a.put_back} put back,"
            f" {a.doubled} of {a.runs} runs doubled, {a.takeovers} taken over;"
            f" slowest recovery {self.slowest_recovery:.1f} s"
        )


def run(
    folder: Path,
    backend: str,
    seed: int,
    faults: int,
    say: Callable[[str], None] = print,
    *,
    killed: Sequence[str] = (),
    events: int = 0,
    **env: str,
) -> Run:
    """Make a world, break so many things in it, and account for all that was dispatched.

    :param killed: what is killed besides, in any case.
    :param events: how many are stored at least, however soon all has broken that is to.
    """
    done = Run(backend, seed)
    world = World(folder, backend, **env)
    began = time.monotonic()
    try:
        world.start()
        refused: list[str] = []
        was_of_broker = True
        possible = catalogue(world)
        for steps in [*always(possible, killed), *plan(possible, seed, faults)]:
            say("; ".join(map(str, steps)))
            is_of_broker = all(step.fault.is_of_broker for step in steps)
            # what the round before broke may be felt for a while
            may_refuse = not (is_of_broker and was_of_broker)
            before = 0 if may_refuse else len(Record(world.record).raised)
            break_together(world, steps)
            done.faults.update(step.fault.name for step in steps)
            done.slowest_recovery = max(done.slowest_recovery, recover(world))
            if not may_refuse:
                refused += list(Record(world.record).raised.values())[before:]
            was_of_broker = is_of_broker
        wait_until(lambda: Record(world.record).total >= events, END_SECONDS, "events enough")
        done.account = settle(world)
        done.account.wrong += [f"the broker alone was broken: {each} (P2)" for each in refused]
        done.tracebacks = tracebacks(world)
    finally:
        world.close()
    done.seconds = time.monotonic() - began
    return done


def break_together(world: World, steps: list[Step]) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(len(steps)) as pool:
        for each in [pool.submit(_do_one, step, began) for step in steps]:
            each.result()


def _do_one(step: Step, began: float) -> None:
    eventlet.sleep(max(0.0, began + step.after - time.monotonic()))
    with step.fault.break_it(step.seconds):
        eventlet.sleep(step.seconds)


def recover(world: World) -> float:
    """Wait until handlers run again; return how many seconds it took."""
    began, before = time.monotonic(), world.handled()
    wait_until(
        lambda: world.handled() > before,
        RECOVER_SECONDS,
        lambda: f"anything to be handled again: {world.state()}",
    )
    return time.monotonic() - began


def settle(world: World) -> Account:
    """Let everything come to its end, and account for it."""
    world.stop_file.touch()
    wait_until(
        lambda: Record(world.record).stopped >= len(world.sources), END_SECONDS, "the sources"
    )
    reader = make_reader(database_url(world.flow.settings), eventlet.sleep)
    try:
        wait_until(
            lambda: not _in_outbox(world), END_SECONDS, "the outbox to be relayed", every=0.1
        )
        lost = Lost()
        repair = partial(_repair, world, reader, lost) if world.has_lost else None
        _wait_for_all(world, reader, repair)
        with reader.connect() as connection:
            account = check(world, connection)
            account.put_back = lost.put_back
            account.wrong += lost.wrong
            account.wrong += _left_at_the_provider(world, connection, account)
        account.wrong += _books(world, account)
        account.wrong += restless(world)
    finally:
        reader.dispose()
    return account


def _wait_for_all(world: World, reader: Any, repair: Callable[[], Any] | None) -> None:
    """Wait until nothing is left; how much there is depends on what broke, and on the machine."""

    def moves(before: int) -> bool:
        return world.handled() > before or not _left(reader, repair)

    while _left(reader, repair):
        wait_until(
            partial(moves, world.handled()), END_SECONDS, lambda: f"these: {_left(reader)}", every=1
        )


def _in_outbox(world: World) -> int:
    with world.own_engine("source") as engine, engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM source_outbox")).scalar_one())


@dataclass(slots=True)
class Lost:
    """What a provider had lost, as audits found."""

    put_back: int = 0
    wrong: list[str] = field(default_factory=list)


def _repair(world: World, reader: Any, lost: Lost) -> None:
    """Do as ``queue_admin`` does from time to time, unless what is missing may not be."""
    audit = Audit(world.flow.settings)
    try:
        found = audit.look()
        if found.lack.suspects:
            with reader.connect() as connection:
                lost.wrong += _not_to_be_lost(world, connection, found.lack)
            audit.repair(found)
            lost.put_back += found.lack.counts.total()
    except (ProviderError, StoreUnavailableError):
        pass  # the next one
    finally:
        audit.close()


_MAY_BE_LOST = text(
    "SELECT d.seq, d.subscription_id FROM queue_deliveries d"
    " JOIN queue_messages m ON m.id = d.message_id WHERE d.status <> 'completed'"
    " AND (d.available_at IS NOT NULL OR m.scheduled_at IS NOT NULL OR d.attempts > 1)"
)
"""What waited for a time, at least once."""


def _not_to_be_lost(world: World, connection: Any, lack: Lack) -> list[str]:
    """Say what a server lost that was killed, and may have lost only what waited for a time.

    RabbitMQ moves that from queue to queue as its time comes, and has it confirmed by nobody. All
    else it has confirmed, and a Redis that was wiped may lose all that it had.
    """
    if world.backend != "rabbitmq":
        return []
    waited = Counter(
        row.subscription_id for row in connection.execute(_MAY_BE_LOST) if row.seq in lack.suspects
    )
    more = lack.counts - waited
    return [f"lost at the broker, and never waited for a time: {dict(more)} (P4)"] if more else []


def _books(world: World, account: Account) -> list[str]:
    """Say where ``queuectl audit`` has other figures than those who dispatched (P11)."""
    said = CliRunner().invoke(main, ["audit", "--json"], env=world.flow.env)
    if said.exit_code:
        return [f"the audit ends with {said.exit_code}: {said.output} (P11)"]
    total = Counter[str]()
    for each in json.loads(said.output)["subscriptions"]:
        total.update({name: each[name] for name in ("dispatched", "completed", "dead")})
    mine = {
        "dispatched": account.deliveries,
        "completed": account.statuses["completed"],
        "dead": account.statuses["failed"],
    }
    return [] if total == mine else [f"the audit has {dict(total)}, and not {mine} (P11)"]


def _left(reader: Any, repair: Callable[[], Any] | None = None) -> list[Any]:
    """Return what has not ended yet, as counts."""
    if repair is not None:
        repair()
    with reader.connect() as connection:
        found = connection.execute(
            text(
                "SELECT status, ready, count(*), min(available_at), max(lease_expires_at)"
                " FROM queue_deliveries WHERE status NOT IN ('completed', 'failed', 'discarded')"
                " GROUP BY status, ready"
            )
        )
        rows: list[Any] = list(found.all())
        pending = connection.execute(
            text("SELECT count(*) FROM queue_messages WHERE status NOT IN ('completed', 'failed')")
        ).scalar_one()
    return rows or ([("messages", pending)] if pending else [])


def restless(world: World) -> list[str]:
    """Say who uses the processor, though nothing is left to do: a loop that something broke into
    and that does not end costs no event, and would be seen by nothing else.

    Twice, since who was started again by the last fault may have been about that the first time.
    """
    busy = _busy(world)
    return [each for name, each in _busy(world).items() if name in busy] if busy else []


def _busy(world: World) -> dict[str, str]:
    before = {member.name: member.process.processor_seconds() for member in world.members}
    eventlet.sleep(IDLE_SECONDS)
    shares = {
        member.name: (member.process.processor_seconds() - before[member.name]) / IDLE_SECONDS
        for member in world.members
    }
    return {
        name: f"{name} has nothing to do, and uses {share:.0%} of a processor"
        for name, share in shares.items()
        if share > IDLE_SHARE
    }


def _left_at_the_provider(world: World, connection: Any, account: Account) -> list[str]:
    """Say what the provider still has, though the log says that all has ended."""
    rows = connection.execute(text("SELECT * FROM queue_subscriptions")).all()
    names = [column.name for column in SUBSCRIPTION_COLUMNS]
    assert set(names) <= set(rows[0]._fields)
    subscriptions = [subscription_of(row) for row in rows]
    provider = make_provider(world.flow.settings)
    provider.initialize()
    signal = Signal()

    def left() -> list[str]:
        provider.wait(0.1, signal.fileno())
        stats = provider.get_queue_stats(subscriptions)
        return [str(x) for x in stats if x.waiting or x.active or x.scheduled]

    try:
        wait_until(lambda: not left(), END_SECONDS, "")
        return []
    except AssertionError:
        return [f"ended by the log, and still at the provider: {x}" for x in left()]
    finally:
        provider.close()
        signal.close()
