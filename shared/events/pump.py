"""The native thread of a service: it alone holds the connections of log and provider.

One turn of it stores what gathered since the last one (a group commit: what was
dispatched, and how attempts ended), tells the provider, and reserves as much as
there are free workers. Between turns it waits to be woken; it never polls, where
the provider can push.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from shared.database import (
    CommitUncertainError,
    Database,
    Transaction,
    database_url,
    worker_name,
)
from shared.errors import (
    DispatchError,
    DispatchUncertainError,
    ProviderError,
    QueueError,
    StoreUnavailableError,
)
from shared.lifecycle import DeliveryStatus
from shared.native import Mailbox, Promise, sleep
from shared.native import select as wait_readable
from shared.providers import QueueProvider, make_provider
from shared.settings import Settings
from shared.store import attempts, log, subscriptions
from shared.store.migrate import LOG, missing, upgrade_sqlite
from shared.store.summary import refresh
from shared.types import Delivery, Envelope, Failure, Lease, Outcome, Settlement, Subscription

SIGN_SECONDS = 10.0
"""How often the log is told that the subscriptions have a live consumer: a third of
the time after which they count as silent."""

RECONNECT_SECONDS = 0.5
"""How long to wait before a database or broker that went away is tried again."""

UNCERTAIN_SECONDS = 10.0
"""How long the fate of a COMMIT is looked for before the caller is told that it is unknown."""


@dataclass(slots=True)
class Append:
    """Store these events; the promise is resolved once they are."""

    envelopes: Sequence[Envelope]
    promise: Promise
    again: bool = False


@dataclass(slots=True)
class Call:
    """Do something within a transaction of its own; deliveries that it returns are published."""

    function: Callable[[Transaction], tuple[Any, list[Delivery]]]
    promise: Promise


@dataclass(slots=True)
class Consume:
    """Consume these subscriptions, with so many workers; tell the hub once they are registered.

    ``batches`` says for each how many of its deliveries one worker takes together.
    """

    subscriptions: Sequence[Subscription]
    batches: Sequence[int]
    workers: int
    on_registered: Callable[[list[Subscription]], None]


@dataclass(slots=True)
class Check:
    """Say whether the provider answers."""

    promise: Promise


@dataclass(slots=True)
class StopConsuming:
    """Reserve nothing more."""


@dataclass(slots=True)
class Finish:
    """Store what is left, hand back what still runs, and end."""


@dataclass(slots=True)
class Turn:
    """What one turn has to do, and what came of it."""

    appends: list[Append] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    new: list[Delivery] = field(default_factory=list)
    settlements: list[Settlement] = field(default_factory=list)
    refused: list[Outcome] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    had_settled: bool = False
    """Whether some of what was reserved is not to run, so that there is room for more."""


class Pump:
    """See the module's docstring.

    :param on_leases: called on the hub with deliveries to be handled.
    :param say: called on the hub with a logging level, a format and its arguments.
    :param on_crash: called on the hub with an exception that nobody expected.
    """

    def __init__(
        self,
        settings: Settings,
        mailbox: Mailbox,
        on_leases: Callable[[list[Lease]], None],
        say: Callable[..., None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._mailbox = mailbox
        self._on_leases = on_leases
        self._say_on_hub = say
        self._on_crash = on_crash
        self._database = Database(database_url(settings), sleep)
        self._provider: QueueProvider = make_provider(settings)
        self._worker = worker_name()
        self._consuming: Consume | None = None
        self._is_registered = False
        self._mine: list[Subscription] = []
        self._batches: dict[int, int] = {}
        self._workers = 0
        self._active: dict[int, Lease] = {}
        self._unsaved: list[Outcome] = []
        # what a provider with storage of its own was not told yet
        self._unpublished: list[Delivery] = []
        self._unsettled: list[Settlement] = []
        self._connected = False
        self._trouble: str | None = None
        self._finishing = False
        self._may_have_more = False
        self._renew_at = 0.0
        self._sign_at = 0.0
        self._die_at: float | None = None

    def die_by(self, deadline: float) -> None:
        """Signal handler: end the process at ``deadline``, a monotonic time, come what may."""
        self._die_at = deadline
        self._mailbox.to_thread.ring()

    def run(self) -> None:
        """Work until told to finish: the thread's main function."""
        try:
            while not self._finishing:
                self._wait()
                self._turn()
            self._end()
        except BaseException as exc:
            self._mailbox.answer(self._on_crash, exc)
        finally:
            self._provider.close()
            self._database.close()

    # --- waiting

    def _wait(self) -> None:
        if self._may_have_more and self._room() > 0:
            return
        interrupt = self._mailbox.to_thread.fileno()
        timeout = max(0.0, self._next_timer() - monotonic())
        if self._connected and self._room() > 0:
            self._provider.wait(timeout, interrupt)
        else:
            wait_readable([interrupt], [], [], timeout)

    def _next_timer(self) -> float:
        timers = [self._next_reconnect() if self._is_behind() else self._next_duty()]
        if self._die_at is not None:
            timers.append(self._die_at)
        return min(timers)

    def _next_duty(self) -> float:
        signs = [self._sign_at] if self._mine else [monotonic() + SIGN_SECONDS]
        return min(signs + ([self._renew_at] if self._active else []))

    @staticmethod
    def _next_reconnect() -> float:
        return monotonic() + RECONNECT_SECONDS

    def _is_behind(self) -> bool:
        """Whether something waits for a connection."""
        is_owing = self._unsaved or self._unpublished or self._unsettled
        return bool(is_owing or (self._consuming and not self._connected))

    def _room(self) -> int:
        """Return how many workers are free."""
        if not self._mine:
            return 0
        busy: Counter[int] = Counter(x.delivery.subscription_id for x in self._active.values())
        return self._workers - sum(-(-n // self._batches.get(x, 1)) for x, n in busy.items())

    # --- one turn

    def _turn(self) -> None:
        turn, calls = self._take()
        if self._die_at is not None and monotonic() >= self._die_at:
            self._die(turn)
        try:
            self._connect()
            self._keep_leases()
            self._do_together_or_singly(turn)
        except (StoreUnavailableError, ProviderError) as exc:
            self._put_off(turn, calls, exc)
            return
        for call in calls:
            self._call(call)

    def _take(self) -> tuple[Turn, list[Call]]:
        turn, calls = Turn(outcomes=self._unsaved), []
        self._unsaved = []
        for command in self._mailbox.take():
            match command:
                case Append():
                    turn.appends.append(command)
                case Outcome():
                    self._active.pop(command.lease.delivery.seq, None)
                    turn.outcomes.append(command)
                case Call():
                    calls.append(command)
                case _:
                    self._obey(command)
        return turn, calls

    def _obey(self, command: Check | Consume | StopConsuming | Finish) -> None:
        match command:
            case Check():
                is_up = self._connected and self._provider.health_check()
                self._mailbox.answer(command.promise.resolve, is_up)
            case Consume():
                self._consuming, self._workers = command, command.workers
            case StopConsuming():
                self._workers = 0
            case Finish():
                self._finishing = True

    def _connect(self) -> None:
        if not self._connected:
            self._prepare_tables()
            self._provider.initialize()
            self._connected = True
            if self._trouble is not None:
                self._say(logging.WARNING, "log and provider are reachable again")
                self._trouble = None
        # again after each interruption: it may be another database by now
        if self._consuming is not None and not self._is_registered:
            self._register(self._consuming)

    def _prepare_tables(self) -> None:
        engine = self._database.engine
        try:
            if self._database.is_sqlite:
                upgrade_sqlite(engine, LOG)
            elif lack := missing(engine, LOG):
                raise StoreUnavailableError(lack)
        except (SQLAlchemyError, OSError) as exc:
            raise StoreUnavailableError(str(getattr(exc, "orig", None) or exc)) from exc

    def _register(self, wanted: Consume) -> None:
        mine = self._database.run(lambda tx: subscriptions.register(tx, wanted.subscriptions))
        self._provider.declare(mine)
        self._mine, self._is_registered = mine, True
        self._batches = {x.id: size for x, size in zip(mine, wanted.batches, strict=True)}
        self._sign_at = monotonic() + SIGN_SECONDS
        self._may_have_more = True
        self._mailbox.answer(wanted.on_registered, mine)

    def _do_together_or_singly(self, turn: Turn) -> None:
        """Do a turn; when not all of it can be stored together, find out what cannot."""
        try:
            self._do(turn)
        except QueueError:
            raise
        except Exception as exc:
            if not turn.appends and not turn.outcomes:
                raise  # it is not what was to be stored that is wrong
            self._say(logging.ERROR, "could not be stored together: %s", exc)
            self._store_appends_singly(turn.appends)
            self._store_outcomes_singly(turn.outcomes)

    def _store_appends_singly(self, appends: list[Append]) -> None:
        while appends:
            try:
                self._do(Turn(appends=appends[:1]))
            except QueueError:
                raise  # what is left of the turn is put off
            except Exception as exc:
                error = DispatchError(f"nothing was stored: {exc}")
                self._mailbox.answer(appends[0].promise.reject, error)
            del appends[0]

    def _store_outcomes_singly(self, outcomes: list[Outcome]) -> None:
        while outcomes:
            try:
                self._do(Turn(outcomes=outcomes[:1]))
            except QueueError:
                raise
            except Exception as exc:
                why = Failure(type(exc).__name__, f"the outcome could not be stored: {exc}")
                dead = Outcome(outcomes[0].lease, DeliveryStatus.FAILED, why)
                self._do(Turn(outcomes=[dead]))
            del outcomes[0]

    def _do(self, turn: Turn) -> None:
        is_owing = self._unpublished or self._unsettled
        if not turn.appends and not turn.outcomes and not is_owing and self._room() <= 0:
            return
        try:
            self._pass_on(turn)
        except CommitUncertainError as exc:
            self._resolve_uncertain(turn, exc)
        else:
            self._answer(turn)
        if turn.new:
            self._provider.published(turn.new)

    def _pass_on(self, turn: Turn) -> None:
        """Take events and outcomes their one way: log, provider, and what is to be handled next."""
        if self._provider.capabilities.joins_log:
            self._in_transaction(turn, self._store, self._move, self._begin, self._refresh)
        else:
            self._in_transaction(turn, self._store, self._refresh)
            self._confirm(turn)
            self._owe(turn)
            self._move(None, turn)
            self._unpublished, self._unsettled = [], []
            self._in_transaction(turn, self._begin, self._refresh)

    def _in_transaction(self, turn: Turn, *steps: Callable[[Transaction, Turn], None]) -> None:
        def all_steps(tx: Transaction) -> None:
            for step in steps:
                step(tx, turn)

        # an outcome lost to a power failure is a delivery that comes again
        self._database.run(all_steps, durable=bool(turn.appends))

    def _store(self, tx: Transaction, turn: Turn) -> None:
        turn.new, turn.settlements, turn.refused, turn.touched = [], [], [], set()
        limit = self._settings.retries.limit
        for again in (False, True):
            envelopes = [e for a in turn.appends if a.again is again for e in a.envelopes]
            if envelopes:
                turn.new += log.append(tx, envelopes, limit, again=again)
        if turn.outcomes:
            stored, turn.refused = attempts.record(tx, turn.outcomes)
            turn.settlements = [outcome.settlement() for outcome in stored]
            turn.touched |= {outcome.lease.delivery.message.id for outcome in stored}

    def _move(self, tx: Transaction | None, turn: Turn) -> None:
        turn.leases = []
        if turn.new:
            self._provider.publish(turn.new, tx)
        if turn.settlements:
            self._provider.settle(turn.settlements, tx)
        room = self._room()
        if room > 0:
            limits = {x.id: room * self._batches[x.id] for x in self._mine}
            turn.leases = self._provider.reserve(limits, max(limits.values()), tx)

    def _begin(self, tx: Transaction, turn: Turn) -> None:
        if not turn.leases:
            return
        turn.touched |= {lease.delivery.message.id for lease in turn.leases}
        started = attempts.start(tx, turn.leases, self._worker)
        turn.leases = started.run
        turn.had_settled = bool(started.settled)
        if started.settled:
            self._provider.settle(started.settled, tx)

    def _refresh(self, tx: Transaction, turn: Turn) -> None:
        refresh(tx, turn.touched)

    def _confirm(self, turn: Turn) -> None:
        """Tell what is stored: it stays so, whatever becomes of the rest of the turn."""
        for append in turn.appends:
            self._mailbox.answer(append.promise.resolve, None)
        for outcome in turn.refused:
            self._say_refused(outcome)
        turn.appends, turn.outcomes, turn.refused = [], [], []

    def _owe(self, turn: Turn) -> None:
        """Have the provider told what it missed before, too, and keep it until it was told."""
        turn.new = self._unpublished = self._unpublished + turn.new
        turn.settlements = self._unsettled = self._unsettled + turn.settlements

    def _answer(self, turn: Turn) -> None:
        self._may_have_more = turn.had_settled
        self._confirm(turn)
        if turn.leases:
            if not self._active:
                self._renew_at = monotonic() + self._settings.lease / 3
            self._active |= {lease.delivery.seq: lease for lease in turn.leases}
            self._mailbox.answer(self._on_leases, turn.leases)

    def _say_refused(self, outcome: Outcome) -> None:
        self._say(
            logging.WARNING,
            "lease lost, outcome not stored message_id=%s status=%s",
            outcome.lease.delivery.message.id,
            outcome.status,
        )

    # --- leases

    def _keep_leases(self) -> None:
        now = monotonic()
        if self._active and now >= self._renew_at:
            self._renew_at = now + self._settings.lease / 3
            self._renew()
        if self._mine and now >= self._sign_at:
            self._sign_at = now + SIGN_SECONDS
            self._database.run(self._sign, durable=False)

    def _sign(self, tx: Transaction) -> None:
        subscriptions.sign(tx, [subscription.id for subscription in self._mine])
        subscriptions.retire_forgotten(tx)

    def _renew(self) -> None:
        leases = list(self._active.values())
        if self._provider.capabilities.joins_log:
            lost = self._database.run(lambda tx: self._provider.extend(leases, tx), durable=False)
        else:
            lost = self._provider.extend(leases)
        for lease in lost:
            self._say(logging.WARNING, "lease lost message_id=%s", lease.delivery.message.id)

    # --- trouble

    def _put_off(self, turn: Turn, calls: Sequence[Call], exc: QueueError) -> None:
        """Tell who dispatches that nothing was stored; keep outcomes until they are."""
        if self._connected or self._trouble is None:
            self._say(logging.ERROR, "log or provider unreachable: %s", exc)
        self._connected = self._is_registered = False
        self._trouble = str(exc)
        self._unsaved = turn.outcomes
        for append in turn.appends:
            error = DispatchError(f"nothing was stored: {exc}")
            self._mailbox.answer(append.promise.reject, error)
        for call in calls:
            self._mailbox.answer(call.promise.reject, exc)

    def _resolve_uncertain(self, turn: Turn, exc: CommitUncertainError) -> None:
        """Find out whether a COMMIT took place, by the ids that the client made."""
        self._unsaved = turn.outcomes
        ids = [envelope.id for append in turn.appends for envelope in append.envelopes]
        stored = self._stored(ids) if ids else set()
        for append in turn.appends:
            its = [envelope.id for envelope in append.envelopes]
            if stored is None:
                error: DispatchError = DispatchUncertainError(its, str(exc))
                self._mailbox.answer(append.promise.reject, error)
            elif stored.issuperset(its):
                self._mailbox.answer(append.promise.resolve, None)
            else:
                error = DispatchError(f"nothing was stored: {exc}")
                self._mailbox.answer(append.promise.reject, error)

    def _stored(self, ids: Sequence[str]) -> set[str] | None:
        deadline = monotonic() + UNCERTAIN_SECONDS
        while monotonic() < deadline:
            try:
                with self._database.transaction() as tx:
                    return log.stored_ids(tx, ids)
            except StoreUnavailableError:
                sleep(RECONNECT_SECONDS / 5)
        return None

    def _say(self, level: int, text: str, *args: Any) -> None:
        self._mailbox.answer(self._say_on_hub, level, text, *args)

    # --- single calls

    def _call(self, call: Call) -> None:
        try:
            value, new = self._database.run(partial(self._call_and_publish, call))
            if new and not self._provider.capabilities.joins_log:
                self._provider.publish(new)
            if new:
                self._provider.published(new)
        except (QueueError, SQLAlchemyError) as exc:
            self._mailbox.answer(call.promise.reject, exc)
        else:
            self._mailbox.answer(call.promise.resolve, value)

    def _call_and_publish(self, call: Call, tx: Transaction) -> tuple[Any, list[Delivery]]:
        value, new = call.function(tx)
        if new and self._provider.capabilities.joins_log:
            self._provider.publish(new, tx)
        return value, new

    # --- the end

    def _end(self) -> None:
        """Hand back what still runs, and end what lives only as long as this instance."""
        self._workers = 0
        released = Failure("Released", "the worker stopped")
        turn = Turn(
            outcomes=self._unsaved
            + [Outcome(x, DeliveryStatus.PENDING, released) for x in self._active.values()]
        )
        own = [s.id for s in self._mine if not s.reliable and s.handler_type == "broadcast"]
        with contextlib.suppress(StoreUnavailableError, ProviderError):
            self._connect()
            self._do(turn)
            if own:
                self._database.run(lambda tx: subscriptions.retire(tx, own))
        self._active = {}

    def _die(self, turn: Turn) -> None:
        self._unsaved = turn.outcomes
        self._end()
        os.write(2, b"grace time over: what still ran was handed back\n")
        os._exit(0)
