"""The native thread of a service: it alone holds the connection of the message log.

One turn of it stores what gathered since the last one (a group commit: what was
dispatched, and how attempts ended), has the provider told, and what is to be handled
next handed to the hub. Between turns it waits to be woken; it never polls, where
somebody can push.

Here is what is common to both kinds: a provider that works in the log's own tables
takes part in its transactions (``joined.py``), and any other has a thread of its own
(``apart.py``).
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from shared.clock import monotonic
from shared.database import (
    CommitUncertainError,
    Database,
    Transaction,
    database_url,
    worker_name,
)
from shared.errors import (
    DispatchError,
    DispatchRefusedError,
    ProviderError,
    QueueError,
    StoreUnavailableError,
)
from shared.events.commands import Append, Call, Consume, Finish
from shared.events.fate import Fate
from shared.events.gate import Gate
from shared.lifecycle import DeliveryStatus
from shared.native import Mailbox, sleep
from shared.observe.counts import PumpCounts
from shared.providers import QueueProvider
from shared.settings import Settings
from shared.store import attempts, dedupe, log, subscriptions
from shared.store.dedupe import First
from shared.store.log import Handover
from shared.store.migrate import LOG, missing, upgrade_sqlite
from shared.types import Delivery, Envelope, Failure, Lease, Outcome, Subscription

SIGN_SECONDS = 10.0
"""How often the log is told that the subscriptions have a live consumer: a third of
the time after which they count as silent."""

RECONNECT_SECONDS = 0.5
"""How long to wait before a database that went away is tried again."""

RELEASED = Failure("Released", "the worker stopped")


@dataclass(slots=True)
class Turn:
    """What one turn has to store, and what came of it."""

    appends: list[Append] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    new: list[Delivery] = field(default_factory=list)
    stored: list[Outcome] = field(default_factory=list)
    refused: list[Outcome] = field(default_factory=list)
    superseded: set[Any] = field(default_factory=set)
    """The keys of those leases among the refused whose deliveries the log keeps for others."""
    touched: set[str] = field(default_factory=set)
    firsts: dict[str, First] = field(default_factory=dict)
    """By message id: what was dispatched with its key before."""
    alone: list[Envelope] = field(default_factory=list)
    """What no subscription wants, and is yet to be finished."""

    @property
    def size(self) -> int:
        """How many events and outcomes it has."""
        return sum(len(append.envelopes) for append in self.appends) + len(self.outcomes)


class Pump(ABC):
    """See the module's docstring.

    :param on_leases: called on the hub with deliveries to be handled.
    :param say: called on the hub with a logging level, a format and its arguments.
    :param on_crash: called on the hub with an exception that nobody expected.
    """

    def __init__(
        self,
        settings: Settings,
        provider: QueueProvider,
        mailbox: Mailbox,
        on_leases: Callable[[list[Lease]], None],
        say: Callable[..., None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._provider = provider
        self._mailbox = mailbox
        self._on_leases = on_leases
        self._say_on_hub = say
        self._on_crash = on_crash
        self.counts = PumpCounts()
        self._database = Database(database_url(settings), sleep)
        self._worker = worker_name()
        self._consuming: Consume | None = None
        self._is_registered = False
        self._mine: list[Subscription] = []
        self._active: dict[int, Lease] = {}
        self._unsaved: list[Outcome] = []
        self._connected = False
        self._trouble: str | None = None
        self._finishing = False
        self._fate = Fate(self._database, mailbox, self._store_again, self._take_back)
        self._gate = self._make_gate()
        self._sign_at = 0.0
        self._die_at: float | None = None
        self.is_over = False
        """Whether it has handed back all that it had."""
        self.elsewhere: Callable[[], int] = lambda: 0
        """Says how many of the same workers have what another pump handed out."""

    def die_by(self, deadline: float) -> None:
        """Signal handler: hand back everything at ``deadline``, a monotonic time."""
        self._die_at = deadline
        self._mailbox.inbox.ring()

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
            self._close()
            self._database.close()
            self.is_over = True

    def _make_gate(self) -> Gate:
        return Gate(self._settings.lease)

    # --- what the two kinds do each in its way

    @abstractmethod
    def _wait(self) -> None:
        """Wait until there may be something to do."""

    @abstractmethod
    def _obey(self, command: Any) -> None:
        """Take a command that is neither an event nor an outcome."""

    @abstractmethod
    def _connect(self) -> None:
        """Connect what is not, and register what is to be consumed."""

    @abstractmethod
    def _do_once(self, turn: Turn) -> None:
        """Store what a turn has, and whatever goes with it.

        :raises CommitUncertainError: when nobody knows whether it is stored.
        """

    @abstractmethod
    def _keep_up(self) -> None:
        """Renew leases and signs of life, when it is time."""

    @abstractmethod
    def _call(self, call: Call) -> None:
        """Do a single call."""

    @abstractmethod
    def _close(self) -> None:
        """Close what is the provider's. Never raises."""

    @property
    @abstractmethod
    def _handover(self) -> Handover:
        """What becomes of new deliveries."""

    # --- one turn

    def _turn(self) -> None:
        turn, calls = self._take()
        if self._die_at is not None and monotonic() >= self._die_at:
            # run() hands back what there is
            self._unsaved += turn.outcomes
            self._finishing = True
            return
        try:
            self._connect()
            self._keep_up()
            self._do_together_or_singly(turn)
        except (StoreUnavailableError, ProviderError) as exc:
            self._put_off(turn, calls, exc)
            return
        for call in calls:
            self._call(call)

    def _take(self) -> tuple[Turn, list[Call]]:
        turn, calls = Turn(outcomes=self._unsaved), []
        self._unsaved = []
        for command in self._mailbox.inbox.take():
            match command:
                case Append():
                    turn.appends.append(command)
                case Outcome():
                    turn.outcomes.append(self._ended(command))
                case Call():
                    calls.append(command)
                case Finish():
                    self._finishing = True
                case _:
                    self._obey(command)
        return turn, calls

    def _ended(self, outcome: Outcome) -> Outcome:
        """Take a lease out of hand: its attempt ended."""
        # the lease may have been lost and got again meanwhile
        lease = self._active.pop(outcome.lease.delivery.seq, outcome.lease)
        return outcome._replace(lease=lease)

    def _say_unreachable(self, exc: QueueError) -> None:
        if str(exc) != self._trouble:
            self._say(logging.ERROR, "log or provider unreachable: %s", exc)
            self._trouble = str(exc)

    def _say_reachable(self) -> None:
        if self._trouble is not None:
            self._say(logging.WARNING, "log and provider are reachable again")
            self._trouble = None

    def _prepare_tables(self) -> None:
        engine = self._database.engine
        try:
            if self._database.is_sqlite:
                upgrade_sqlite(engine, LOG)
            elif lack := missing(engine, LOG):
                raise StoreUnavailableError(lack)
        except (SQLAlchemyError, OSError) as exc:
            raise StoreUnavailableError(str(getattr(exc, "orig", None) or exc)) from exc

    def _do(self, turn: Turn) -> None:
        try:
            self._do_once(turn)
        except CommitUncertainError as exc:
            self._say_unreachable(exc)
            self._unsaved += turn.outcomes
            appends, turn.appends, turn.outcomes = turn.appends, [], []
            if appends:
                self._fate.resolve(appends, turn.firsts, exc)

    def _store_again(self, appends: list[Append]) -> None:
        self._do_once(Turn(appends))

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
                # a table that is not there is no fault of the event
                kind = DispatchError if isinstance(exc, ProgrammingError) else DispatchRefusedError
                error = kind(f"nothing was stored: {exc}")
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

    def _store(self, tx: Transaction, turn: Turn, *, is_last: bool = False) -> None:
        """Store what is new and what ended; ``is_last`` as in :func:`shared.store.log.append`."""
        turn.new, turn.stored, turn.refused, turn.touched = [], [], [], set()
        turn.firsts.clear()
        turn.alone = []
        limit = self._settings.retries.limit
        handover = self._handover
        for again in (False, True):
            envelopes = [e for a in turn.appends if a.again is again for e in a.envelopes]
            if any(envelope.dedupe for envelope in envelopes):
                envelopes = self._unknown(tx, turn, envelopes, again)
            if not envelopes:
                continue
            new = log.append(tx, envelopes, limit, again=again, handover=handover, is_last=is_last)
            turn.new += new
            if is_last:
                routed = {each.message.id for each in new}
                turn.alone = [each for each in envelopes if each.id not in routed]
        if turn.outcomes:
            self._record(tx, turn)

    @staticmethod
    def _unknown(
        tx: Transaction, turn: Turn, envelopes: Sequence[Envelope], again: bool
    ) -> list[Envelope]:
        """Return what no earlier dispatch had the key of; note what had it for the others."""
        stored = log.stored_ids(tx, [envelope.id for envelope in envelopes]) if again else ()
        turn.firsts |= dedupe.known(tx, [x for x in envelopes if x.id not in stored])
        return [envelope for envelope in envelopes if envelope.id not in turn.firsts]

    def _record(self, tx: Transaction, turn: Turn) -> None:
        turn.stored, turn.refused = attempts.record(tx, turn.outcomes)
        turn.touched |= {outcome.lease.delivery.message.id for outcome in turn.stored}

    def _confirm(self, turn: Turn) -> None:
        """Tell what is stored: it stays so, whatever becomes of the rest of the turn."""
        self._say_reachable()
        for append in turn.appends:
            self._mailbox.answer(append.promise.resolve, turn.firsts)
        for outcome in turn.refused:
            self._say_refused(outcome)
        self.counts.lost_leases += len(turn.refused)
        turn.appends, turn.outcomes = [], []

    def _register_by(
        self,
        step: Callable[[Transaction, Sequence[Subscription]], list[Subscription]],
        wanted: Sequence[Subscription],
    ) -> list[Subscription]:
        """Store what is to be consumed; say of what that changes the reliability."""
        changed, mine = self._database.run(
            lambda tx: (subscriptions.changed(tx, wanted), step(tx, wanted))
        )
        for each in changed:
            self._say(
                logging.WARNING,
                "%s %s is %s from now on, which it was not: all processes of a service are to have"
                " the same options",
                each.event_type,
                each.subscriber,
                "reliable" if each.reliable else "unreliable",
            )
        return mine

    def _say_refused(self, outcome: Outcome) -> None:
        self._say(
            logging.WARNING,
            "lease lost, outcome not stored message_id=%s status=%s",
            outcome.lease.delivery.message.id,
            outcome.status,
        )

    def _say_lost(self, lost: Sequence[Lease]) -> None:
        for lease in lost:
            self._say(logging.WARNING, "lease lost message_id=%s", lease.delivery.message.id)

    def _held(self) -> dict[int, int]:
        """Return how many of each subscription are in hand."""
        return Counter(x.delivery.subscription_id for x in self._active.values())

    def _look_at_limits(self) -> set[int]:
        ids = [each.id for each in self._mine]
        look = partial(self._gate.look, subscription_ids=ids)
        found = self._database.run(look, durable=False)
        if found != self._gate.limited:
            names = [
                f"{each.event_type} {each.subscriber}" for each in self._mine if each.id in found
            ]
            self._say(logging.INFO, "limits heard of: %s", ", ".join(names) or "none")
        return found

    # --- trouble

    def _put_off(self, turn: Turn, calls: Sequence[Call], exc: QueueError) -> None:
        """Tell who dispatches that nothing was stored; keep outcomes until they are."""
        self._say_unreachable(exc)
        self._connected = self._is_registered = False
        self._unsaved += turn.outcomes
        for append in turn.appends:
            error = DispatchError(f"nothing was stored: {exc}")
            self._mailbox.answer(append.promise.reject, error)
        for call in calls:
            self._mailbox.answer(call.promise.reject, exc)

    def _take_back(self, tx: Transaction, message_ids: Sequence[str]) -> None:  # noqa: B027
        """See to it that what was to be handed over next, when its COMMIT was lost, is so soon."""

    def _say(self, level: int, text: str, *args: Any) -> None:
        self._mailbox.answer(self._say_on_hub, level, text, *args)

    # --- the end

    def _end(self) -> None:
        """Hand back what still runs, and end what lives only as long as this instance."""
        self._consume_nothing()
        released = [Outcome(x, DeliveryStatus.PENDING, RELEASED) for x in self._active.values()]
        own = [s for s in self._mine if not s.reliable and s.handler_type == "broadcast"]
        with contextlib.suppress(StoreUnavailableError, ProviderError):
            self._connect()
            self._do(Turn(outcomes=self._unsaved + released))
            if own:
                self._retire(own)
            if self._gate.limited:
                self._database.run(self._gate.leave)
        self._active = {}

    @abstractmethod
    def look_again(self) -> None:
        """Hub: have it reserve more; a worker is free that another pump had."""

    @abstractmethod
    def _consume_nothing(self) -> None:
        """Reserve nothing more."""

    @abstractmethod
    def _retire(self, own: list[Subscription]) -> None:
        """End subscriptions that live only as long as this instance."""
