"""The pump beside a provider with storage of its own, which has a thread of its own.

What is dispatched is stored, confirmed to who dispatched it, and then published. What is
published and what ends is told to the other side only after it is stored, so that a
crash in between repeats something and loses nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from time import monotonic
from typing import Any, NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from shared.database import CommitUncertainError, Transaction
from shared.errors import QueueError, StoreUnavailableError
from shared.events.carrier import Carrier
from shared.events.commands import (
    Allow,
    Allowed,
    Ask,
    Call,
    Check,
    Consume,
    Crashed,
    Declare,
    Declared,
    Detach,
    Doubt,
    Down,
    Finish,
    Forget,
    Free,
    Keep,
    Lost,
    Noticed,
    Prepare,
    Publish,
    Published,
    Refused,
    Reserved,
    Revive,
    Settle,
    StopConsuming,
    Stuck,
    Unpublished,
    Up,
)
from shared.events.gate import ApartGate
from shared.events.pump import RECONNECT_SECONDS, SIGN_SECONDS, Pump, Turn
from shared.events.watch import Watch
from shared.lifecycle import DeliveryStatus
from shared.native import Thread
from shared.providers import QueueProvider, draining_class
from shared.store import adoption, attempts, backlog, log, moving, subscriptions
from shared.store.log import Handover
from shared.store.summary import refresh
from shared.types import Delivery, Envelope, Lease, Outcome, SettleAction, Settlement, Subscription

SWEEP_SECONDS = 10.0
"""How often deliveries are looked for that were in the hands of who died."""

AGAIN_SECONDS = 0.5
"""How long after the provider refused something it is offered again; and how long what is left
waits for others who publish what is older."""

ALONE_SECONDS = 60.0
"""How often messages are looked for that no subscription wants and nobody published."""

MOST_ALONE = 10_000
"""How many ids of such messages a dispatcher keeps, to publish them sooner than others would."""

HANGING_LOOKS = 6
"""How often in turn, every ``SIGN_SECONDS``, the provider's thread may be found where it was before
it counts as hanging: several answers of a server may each come at the last moment."""

FINISH_SECONDS = 3.0
"""How long the provider may take for what is left to be told to it."""


MOST_NAMED = 20
"""Message ids in one line of the log."""

UNBEGUN_SECONDS = 0.2
"""How long a handler may run before the log is told that it began: most are over by then."""

OUTCOME_SECONDS = 0.02
"""How long outcomes gather to be stored together. Nobody waits for them: their workers are free,
and what a crash takes comes again."""

MOST_OUTCOMES = 100
"""Outcomes that are stored sooner than that."""

PUBLISHED_SECONDS = 0.2
"""How long it may take to note what is published: many at once, and most are done with by then."""

MOST_PUBLISHED = 500
"""Deliveries that are noted to be published sooner than that."""


@dataclass(slots=True)
class Reports:
    """What the provider's thread said since the last turn that was stored."""

    unpublished: list[Delivery] = field(default_factory=list)
    reserved: list[Lease] = field(default_factory=list)
    strays: list[Delivery] = field(default_factory=list)
    """What no queue got though a subscription wants it: its queue may be unbound."""

    def __bool__(self) -> bool:
        return bool(self.unpublished or self.reserved or self.strays)


@dataclass(slots=True)
class ApartTurn(Turn):
    """A turn, with what the provider's thread reported."""

    reports: Reports = field(default_factory=Reports)
    unbegun: list[Lease] = field(default_factory=list)
    published: list[Delivery] = field(default_factory=list)
    has_sweep: bool = False
    started: attempts.Started = field(default_factory=attempts.Started)
    adopted: set[Any] = field(default_factory=set)
    taken: list[Delivery] = field(default_factory=list)
    strays: list[Delivery] = field(default_factory=list)
    """Those reported, as they go to their subscriptions alone."""
    recover_in: float = 0.0
    """Seconds until somebody may be found to have died."""
    is_held_up: bool = False
    """Whether what is left waits for others to publish what is older."""
    asked: list[str] = field(default_factory=list)
    """Messages that no subscription wants, of those that this pump is to publish."""

    @property
    def has_work(self) -> bool:
        """Whether there is anything to be stored."""
        given = self.appends or self.outcomes or self.unbegun or self.published
        return bool(given or self.reports or self.has_sweep)

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to be stored but events, for the first time."""
        others = self.outcomes or self.unbegun or self.published or self.reports or self.has_sweep
        return not others and not any(append.again for append in self.appends)


class Opening(NamedTuple):
    """How the hub may store an event itself.

    :param setbacks: to be published with, as :class:`Publish` says.
    """

    handover: Handover
    setbacks: int


class ApartPump(Pump):
    """See the module's docstring."""

    _gate: ApartGate

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # whether another provider may have copies: then each is claimed in the log before it runs
        self._is_moving = bool(self._settings.drain)
        # the other one works in the log's tables: what it has is seen to from here
        self._inherits = self._is_moving and draining_class(self._settings).capabilities.joins_log
        self._start_with(self._provider)
        self._watch = Watch()
        self._is_stopping = False
        self._look_at = monotonic() + SIGN_SECONDS
        self._turned_at = 0.0
        self._same_looks = 0
        self._log_keeps_leases = self._is_moving or not self._provider.capabilities.leases_expire
        self._reports = Reports()
        self._published: list[Delivery] = []
        self._is_up = False
        self._is_first = True
        self._is_declared = False
        self._is_activated = False
        self._was_down = False
        self._has_backlog = True
        self._is_sweeping = False
        # by number, when it was reserved; and what only the log keeps
        self._began: dict[int, float] = {}
        # of these the log does not know that they began
        self._unbegun: dict[int, Lease] = {}
        self._detached: set[int] = set()
        # handled here, while their provider knows nothing of it any more
        self._lost: set[int] = set()
        self._renew_at = 0.0
        # outcomes that gather, of those unsaved; and until when
        self._known = 0
        self._store_at = 0.0
        self._begin_at = 0.0
        self._publish_at = 0.0
        self._sweep_at = 0.0
        self._alone_at = 0.0
        # messages that no subscription in the log wants: stored here, and not published so far
        self._alone: dict[str, None] = {}
        # what the provider is to forget, as soon as it is there
        self._retired: list[Subscription] = []
        # queues and types of events for which there was a subscription
        self._wanted: set[tuple[str, str]] = set()
        self._handlers: dict[type, Callable[[Any], None]] = {
            Published: self._take_published,
            Unpublished: self._take_unpublished,
            Refused: self._take_refused,
            Reserved: self._take_reserved,
            Up: self._take_up,
            Down: self._take_down,
            Declared: self._take_declared,
            Crashed: self._take_crashed,
            Noticed: self._take_notice,
            Lost: self._take_lost,
            Allowed: self._take_allowed,
            Stuck: self._take_stuck,
            Consume: self._take_consume,
            Ask: self._tell,
            Check: self._tell,
            Forget: self._take_forget,
            StopConsuming: self._stop_consuming,
            Doubt: self._take_doubt,
        }
        # while it waits: what was published before this is known to the carrier
        self._is_resting = False

    def _make_gate(self) -> ApartGate:
        return ApartGate(self._settings.lease)

    def _start_with(self, provider: QueueProvider) -> None:
        self._provider = provider
        self._carrier = Carrier(
            self._settings,
            provider,
            self._report,
            self._mailbox.answer,
            lambda: self.elsewhere(),
        )
        self._is_prepared = not self._is_moving
        self._setbacks = 0
        self._thread = Thread(self._carrier.run, "queue-carrier")

    def run(self) -> None:
        self._thread.start()
        super().run()

    @property
    def _handover(self) -> Handover:
        return Handover(
            backlog.PUBLISH_SECONDS,
            is_open=not self._is_direct,
            fans_out=self._provider.capabilities.fans_out,
        )

    @property
    def _is_direct(self) -> bool:
        """Whether what is dispatched now may be published next: nothing older waits."""
        return self._is_up and not self._has_backlog

    @property
    def _may_sweep(self) -> bool:
        return self._is_up and not self._is_sweeping

    # --- waiting

    def look_again(self) -> None:
        if self._carrier.is_full:
            self._carrier.inbox.ring()

    def _wait(self) -> None:
        self._is_resting = True
        self._mailbox.inbox.wait(max(0.0, self._next_timer() - monotonic()))
        self._is_resting = False

    # --- the hub's shortcut

    def opening(self, envelope: Envelope) -> Opening | None:
        """Hub: say how to store this, where this thread would now do nothing but that.

        :returns: ``None`` where it is for this thread to do.
        """
        is_at_rest = self._is_resting and not self._mailbox.inbox.has_commands()
        is_able = self._connected and self._trouble is None and self._is_direct
        # a handler may use the processor without a pause: the hub would publish only after that
        if not (is_at_rest and is_able and not self._active and self._are_wanted([envelope])):
            return None
        # MySQL and what has a schedule need more than one round trip
        is_plain = self._database.engine.dialect.insert_returning and envelope.dedupe is None
        if not is_plain or envelope.scheduled_at is not None or envelope.delay is not None:
            return None
        return Opening(self._handover, self._setbacks)

    def is_unwanted(self, envelope: Envelope) -> None:
        """Hub: note that no subscription wants this any more."""
        self._wanted.discard((envelope.queue, envelope.type))

    def publish(self, new: list[Delivery], setbacks: int) -> None:
        """Have the carrier publish what is stored; from the hub, too."""
        self._carrier.inbox.send_quietly(Publish(new, setbacks=setbacks))
        # in this order: it is awake, or will look once more before it sleeps for long
        if not self._carrier.is_gathering:
            self._carrier.inbox.ring()

    def _take_doubt(self, doubt: Doubt) -> None:
        self._say_unreachable(doubt.error)
        self._fate.resolve([doubt.append], {}, doubt.error)

    def _next_timer(self) -> float:
        is_cut_off = self._trouble is not None and not self._connected
        # whatever is due needs the log
        timers = [monotonic() + RECONNECT_SECONDS] if is_cut_off else list(self._duties())
        if self._die_at is not None:
            timers.append(self._die_at)
        return min(timers)

    def _duties(self) -> Iterator[float]:
        yield self._sweep_at if self._may_sweep else monotonic() + SWEEP_SECONDS
        if not self._connected or self._reports or (self._unsaved and not self._known):
            yield monotonic() + RECONNECT_SECONDS
        if self._known:
            yield self._store_at
        if self._mine:
            yield from (self._sign_at, self._limits_at)
        if self._has_leases:
            yield self._renew_at
        if self._unbegun:
            yield self._begin_at
        if self._published:
            yield self._publish_at

    # --- one turn

    def _take(self) -> tuple[Turn, list[Call]]:
        turn, calls = super()._take()
        new = turn.outcomes[self._known :]
        if new:
            self._free(new)
            if not self._known:
                self._store_at = monotonic() + OUTCOME_SECONDS
        for outcome in new:
            self._unbegun.pop(outcome.lease.delivery.seq, None)
        self._known = 0
        if turn.outcomes and self._may_wait(turn):
            self._unsaved, self._known = turn.outcomes, len(turn.outcomes)
            turn.outcomes = []
        return turn, calls

    def _free(self, ended: list[Outcome]) -> None:
        """Have more reserved while outcomes are stored."""
        if self._gate.limited:
            self._gate.ended([outcome.lease for outcome in ended])
        inbox, now = self._carrier.inbox, monotonic()
        began = [self._began.get(outcome.lease.delivery.seq, now) for outcome in ended]
        inbox.send_quietly(Free([outcome.lease.key for outcome in ended], now - min(began)))
        if self._carrier.is_full:
            inbox.ring()

    def _may_wait(self, turn: Turn) -> bool:
        """Whether outcomes may still gather: nobody waits for them."""
        is_few = len(turn.outcomes) < MOST_OUTCOMES and not turn.appends
        is_early = is_few and monotonic() < self._store_at and not self._finishing
        return is_early and not self._has_come_again(turn.outcomes)

    def _has_come_again(self, outcomes: list[Outcome]) -> bool:
        """Whether the provider handed out again what ended, and would run again unless stored."""
        ended = {_which(x.lease) for x in outcomes} if self._reports.reserved else ()
        return any(_which(lease) in ended for lease in self._reports.reserved)

    def _obey(self, command: Any) -> None:
        self._handlers[type(command)](command)

    def _take_published(self, report: Published) -> None:
        self._is_sweeping &= not report.is_backlog
        homeless = {id(each) for each in report.homeless}
        if not self._published:
            self._publish_at = monotonic() + PUBLISHED_SECONDS
        fans_out = self._provider.capabilities.fans_out
        for each in report.deliveries:
            # what no subscription wants is done with; what has one is tried again later
            if id(each) not in homeless or not each.seq:
                self._published.append(each)
            elif fans_out and each.to is None:
                self._reports.strays.append(each)

    def _take_unpublished(self, report: Unpublished) -> None:
        self._is_sweeping &= not report.is_backlog
        self._setbacks = report.setbacks
        self._reports.unpublished += report.deliveries
        self._note_alone(report.deliveries)
        self._has_backlog = True
        self._sweep_at = monotonic() + AGAIN_SECONDS

    def _take_refused(self, _report: Refused) -> None:
        """Leave them in hand: they are published again when that is over, and no sooner.

        Each time, other queues may get a further copy.
        """

    def _take_reserved(self, report: Reserved) -> None:
        self._reports.reserved += report.leases
        self._watch.came(report.leases)
        if self._gate.limited:
            self._gate.took(report.leases)

    def _take_up(self, _report: Up) -> None:
        if self._was_down:
            self._say(logging.WARNING, "provider is reachable again")
        self._is_up, self._was_down = True, False
        self._has_backlog, self._sweep_at = True, 0.0
        self._gate.rouse()

    def _take_allowed(self, report: Allowed) -> None:
        self._gate.answered(report.number)

    def _take_down(self, report: Down) -> None:
        self._is_up, self._was_down = False, True
        self._say(logging.ERROR, "provider unreachable: %s", report.reason)

    def _take_declared(self, _report: Declared) -> None:
        self._is_declared = True

    def _take_consume(self, command: Consume) -> None:
        self._consuming = command

    def _take_lost(self, report: Lost) -> None:
        """Keep in the log what a provider lost that was to keep it: nobody else would know."""
        self._lost |= {lease.delivery.seq for lease in report.leases}
        self._renew_at = 0.0

    def _take_stuck(self, report: Stuck) -> None:
        names = ", ".join(f"{each.event_type} {each.subscriber}" for each in report.subscriptions)
        self._say(logging.ERROR, "work waits and does not come, connecting anew: %s", names)
        self._watch.is_stuck(report.subscriptions)

    def _take_forget(self, command: Forget) -> None:
        self._retired += command.subscriptions

    def _stop_consuming(self, command: StopConsuming) -> None:
        self._is_stopping = True
        self._tell(command)

    def _take_notice(self, report: Noticed) -> None:
        self._say(logging.WARNING, "%s", report.text)

    def _take_crashed(self, report: Crashed) -> None:
        raise report.error

    def _connect(self) -> None:
        if not self._connected:
            self._prepare_tables()
            self._connected = True
        if not self._is_prepared:
            self._prepare()
        if self._consuming is None:
            return
        if not self._is_registered:
            self._announce(self._consuming)
        if self._is_declared and not self._is_activated:
            self._activate(self._consuming)

    def _prepare(self) -> None:
        """Have the provider ready for who was not restarted yet: all publish into it from now."""
        wanted = self._database.read(
            lambda tx: Prepare(
                subscriptions.active(tx.connection), subscriptions.paused(tx.connection)
            )
        )
        self._tell(wanted)
        self._is_prepared = True

    def _announce(self, wanted: Consume) -> None:
        # the provider has to have its queues before anybody dispatches to them
        mine = self._register_by(subscriptions.announce, wanted.subscriptions)
        self._is_first |= mine != self._mine
        self._mine = mine
        # before anything may be reserved
        self._hear_of_limits()
        if self._is_first:
            self._is_first = self._is_declared = False
            self._carrier.inbox.send(Declare(mine, wanted.batches, wanted.workers))
        self._is_registered, self._is_activated = True, False

    def _activate(self, wanted: Consume) -> None:
        self._database.run(lambda tx: subscriptions.activate(tx, self._mine))
        self._is_activated = True
        self._sign_at = monotonic() + SIGN_SECONDS
        self._mailbox.answer(wanted.on_registered, self._mine)

    def _do_once(self, turn: Turn) -> None:
        reports, self._reports = self._reports, Reports()
        if reports.reserved:
            reports.reserved = self._run_what_is_fit(reports, turn.outcomes)
        full = self._filled(turn, reports)
        if not full.has_work:
            return
        began = monotonic()
        try:
            self._database.run(partial(self._all_steps, full), durable=bool(turn.appends))
        except CommitUncertainError:
            # perhaps they are taken, and nobody else will publish them for long
            reports.unpublished += full.taken
            self._reports = reports
            raise
        except BaseException:
            self._reports = reports
            raise
        self.counts.flushed(monotonic() - began, full.size)
        self._answer(full)
        turn.appends, turn.outcomes = full.appends, full.outcomes

    def _filled(self, turn: Turn, reports: Reports) -> ApartTurn:
        """Return the turn with all that it is time for."""
        now = monotonic()
        full = ApartTurn(turn.appends, turn.outcomes, firsts=turn.firsts, reports=reports)
        full.has_sweep = self._may_sweep and now >= self._sweep_at
        if self._unbegun and now >= self._begin_at:
            full.unbegun = list(self._unbegun.values())
        # at the end nobody notes it later: it would count as in hand, as if this process had died
        is_due = self._finishing or now >= self._publish_at
        is_due |= len(self._published) >= MOST_PUBLISHED
        # what is not noted to be published keeps others from what is newer
        if self._published and (is_due or full.has_sweep):
            full.published = self._published
        return full

    def _run_what_is_fit(self, reports: Reports, ended: list[Outcome]) -> list[Lease]:
        """Hand out what may run at once; return what has to be started in the log before."""
        if self._is_moving:
            return reports.reserved
        known = self._active.keys() | {outcome.lease.delivery.seq for outcome in ended}
        query = partial(attempts.fit, leases=reports.reserved, known=known)
        try:
            fit, others = self._database.read(query)
        except StoreUnavailableError:
            self._reports = reports
            raise
        if fit and not self._unbegun:
            self._begin_at = monotonic() + UNBEGUN_SECONDS
        self._unbegun |= {lease.delivery.seq: lease for lease in fit}
        self._hand_out(fit)
        return others

    def _hand_out(self, leases: list[Lease]) -> None:
        if not leases:
            return
        now = monotonic()
        if not self._active:
            self._renew_at = now + self._settings.lease / 3
        self._began |= {lease.delivery.seq: now for lease in leases}
        self._active |= {lease.delivery.seq: lease for lease in leases}
        self._mailbox.answer(self._on_leases, leases)

    def _record(self, tx: Transaction, turn: Turn) -> None:
        turn.stored, turn.refused, turn.superseded = attempts.finish(
            tx, turn.outcomes, self._worker, self._held_for
        )

    @property
    def _held_for(self) -> float:
        """Seconds for which the log keeps a lease; 0 where the provider does."""
        return self._settings.lease if self._log_keeps_leases else 0.0

    def _all_steps(self, turn: ApartTurn, tx: Transaction) -> None:
        if turn.is_plain:
            envelopes = [envelope for append in turn.appends for envelope in append.envelopes]
            self._store(tx, turn, is_last=self._are_wanted(envelopes))
            return
        self._store(tx, turn)
        again = [x.lease.delivery for x in turn.stored if self._is_again(x)]
        if again:
            self._put_back(tx, again)
        if turn.unbegun:
            attempts.begin(tx, turn.unbegun, self._worker, self._held_for)
        if turn.published:
            to = self._settings.provider if self._is_moving else None
            backlog.published(tx, turn.published, to)
        if turn.reports.unpublished:
            backlog.give_back(tx, turn.reports.unpublished)
        if turn.reports.strays:
            turn.strays = backlog.addressed(tx, turn.reports.strays)
        self._begin(tx, turn)
        if turn.has_sweep:
            self._sweep(tx, turn)
        refresh(tx, turn.touched)

    def _are_wanted(self, envelopes: Sequence[Envelope]) -> bool:
        """Whether no message will have to be finished for want of a subscription, most likely."""
        return self._provider.capabilities.fans_out or all(
            (each.queue, each.type) in self._wanted for each in envelopes
        )

    def _is_again(self, outcome: Outcome) -> bool:
        """Whether nobody but the log has it, and it is to be handled again."""
        is_open = outcome.status in (DeliveryStatus.RETRY, DeliveryStatus.PENDING)
        return is_open and outcome.lease.delivery.seq in self._detached

    def _begin(self, tx: Transaction, turn: ApartTurn) -> None:
        turn.started = attempts.Started()
        reserved = turn.reports.reserved
        if not reserved:
            return
        leases = adoption.adopt(tx, reserved, self._settings.retries.limit)
        turn.adopted = {x.key for x in reserved if not x.delivery.seq}
        turn.touched |= {lease.delivery.message.id for lease in leases}
        turn.started = attempts.start(
            tx,
            leases,
            self._worker,
            running=self._active.keys(),
            held_for=self._held_for,
            is_moving=self._is_moving,
        )
        if turn.started.again:
            self._put_back(tx, turn.started.again)
        if turn.started.run and self._is_moving:
            self._note_where(tx, turn.started.run)

    def _put_back(self, tx: Transaction, deliveries: list[Delivery]) -> None:
        backlog.give_back(tx, deliveries)

    def _note_where(self, tx: Transaction, leases: list[Lease]) -> None:
        """Note that this provider has what is tried again."""
        moving.mark(tx, [lease.delivery.seq for lease in leases], self._settings.provider)

    def _sweep(self, tx: Transaction, turn: ApartTurn) -> None:
        turn.recover_in = backlog.recover(tx)
        if self._inherits:
            ids = [each.id for each in subscriptions.active(tx.connection)]
            due_in = moving.inherit(tx, ids, self._settings.provider)
            turn.recover_in = min(turn.recover_in, due_in, AGAIN_SECONDS)
        turn.taken = backlog.take(tx)
        turn.is_held_up = not turn.taken and backlog.waits(tx)
        is_time = bool(self._alone) or monotonic() >= self._alone_at
        if self._provider.capabilities.fans_out and is_time:
            turn.asked = list(self._alone)[: backlog.MOST_AT_ONCE]
            found = backlog.alone(tx, turn.asked)
            has_more = len(found) >= backlog.MOST_AT_ONCE
            self._alone_at = 0.0 if has_more else monotonic() + ALONE_SECONDS
            turn.taken += found

    def _note_alone(self, deliveries: list[Delivery]) -> None:
        its = [each.message.id for each in deliveries if not each.seq]
        self._alone |= dict.fromkeys(its[: MOST_ALONE - len(self._alone)])

    # --- what follows, once it is stored

    def _answer(self, turn: ApartTurn) -> None:
        self._confirm(turn)
        self._publish(turn)
        self._settle(turn)
        if turn.started.unknown:
            self._say_unknown([x.delivery.message.id for x in turn.started.unknown])
        self._resume(turn.started.resumed)
        self._detach([x for x in turn.started.run if x.key in turn.adopted])
        self._hand_out(turn.started.run)
        if self._gate.limited and turn.started.settled:
            self._gate.ended([each.lease for each in turn.started.settled])
        for lease in turn.unbegun:
            self._unbegun.pop(lease.delivery.seq, None)
        del self._published[: len(turn.published)]
        self._wanted |= {(each.message.queue, each.message.type) for each in turn.new}
        if turn.alone:
            self._wanted -= {(each.queue, each.type) for each in turn.alone}
            ids = [each.id for each in turn.alone]
            self._database.run(lambda tx: log.finish(tx, ids))

    def _publish(self, turn: ApartTurn) -> None:
        if turn.new and self._is_direct:
            self.publish(turn.new, self._setbacks)
        elif turn.new:
            self._note_alone(turn.new)
        if turn.strays:
            self._tell(Publish(turn.strays, is_stray=True))
        if turn.has_sweep:
            self._relay(turn)

    def _take_back(self, tx: Transaction, message_ids: Sequence[str]) -> None:
        backlog.take_back(tx, message_ids)
        if self._provider.capabilities.fans_out:  # else nothing is published without a subscription
            self._alone |= dict.fromkeys(message_ids[: MOST_ALONE - len(self._alone)])
        self._has_backlog, self._sweep_at = True, 0.0

    def _say_unknown(self, ids: list[str]) -> None:
        more = f" and {len(ids) - MOST_NAMED} more" if len(ids) > MOST_NAMED else ""
        self._say(
            logging.WARNING,
            "dropped what came and is not in this log, an older one or another, message_id=%s%s",
            ", ".join(ids[:MOST_NAMED]),
            more,
        )

    def _relay(self, turn: ApartTurn) -> None:
        for each in turn.asked:
            self._alone.pop(each, None)
        self._is_sweeping = bool(turn.taken)
        if turn.taken:
            self._tell(Publish(turn.taken, is_backlog=True))
        self._has_backlog = bool(turn.taken or self._alone or turn.is_held_up)
        if turn.taken or self._alone:
            self._sweep_at = 0.0
        elif turn.is_held_up:
            self._sweep_at = monotonic() + AGAIN_SECONDS
        else:
            # so often that each lease is seen before it runs out, and then when it does
            longest = min(SWEEP_SECONDS, self._settings.lease / 3)
            self._sweep_at = monotonic() + min(max(turn.recover_in, AGAIN_SECONDS), longest)

    def _settle(self, turn: ApartTurn) -> None:
        """Tell the provider how attempts ended; a refused one comes again, for the log to say.

        Not where the provider has another copy: whoever lost this one would take that over from
        its living worker, which then did the same, and so on until it is a dead letter.
        """
        settlements = [x.settlement() for x in turn.stored if not self._is_detached(x)]
        for x in turn.refused:
            is_superseded = x.lease.key in turn.superseded
            action = SettleAction.ACKNOWLEDGE if is_superseded else SettleAction.RELEASE
            settlements.append(Settlement(x.lease, action))
        settlements += turn.started.settled
        if settlements:
            self._tell(Settle(settlements))
        detached = [x for x in turn.stored if self._is_detached(x)]
        if detached:
            self._tell(Free([x.lease.key for x in detached]))
            self._sweep_at = 0.0
        for outcome in [*turn.stored, *turn.refused]:
            self._detached.discard(outcome.lease.delivery.seq)
            # while its outcome gathered it may have come again, and run
            if outcome.lease.delivery.seq not in self._active:
                self._began.pop(outcome.lease.delivery.seq, None)
                self._lost.discard(outcome.lease.delivery.seq)

    def _is_detached(self, outcome: Outcome) -> bool:
        return outcome.lease.delivery.seq in self._detached

    def _resume(self, resumed: list[Lease]) -> None:
        """Go on with what was lost and came back to where it runs."""
        for lease in resumed:
            before = self._active[lease.delivery.seq]
            self._unbegun.pop(lease.delivery.seq, None)
            if before.key != lease.key:
                self._tell(Free([before.key]))
            self._active[lease.delivery.seq] = lease

    def _detach(self, leases: list[Lease]) -> None:
        if leases:
            self._detached |= {lease.delivery.seq for lease in leases}
            self._tell(Detach(leases))

    def _tell(self, command: Any) -> None:
        self._carrier.inbox.send(command)

    def _report(self, report: Any) -> None:
        """Carrier: tell the pump; what is published may be noted some time later."""
        is_usual = isinstance(report, Published) and not report.is_backlog
        is_usual = is_usual and not any(each.seq for each in report.homeless)
        inbox = self._mailbox.inbox
        (inbox.send_quietly if is_usual else inbox.send)(report)

    # --- leases

    def _keep_up(self) -> None:
        now = monotonic()
        if self._has_leases and now >= self._renew_at:
            self._renew_at = now + self._settings.lease / 3
            self._database.run(self._hold, durable=False)
            self._detach(self._overlong(now))
        if self._mine and now >= self._gate.look_at:
            self._hear_of_limits()
        if self._gate.limited:
            self._ask_for_more()
        if self._retired and self._is_up:
            self._forget_retired()
        if now >= self._look_at:
            self._look_at = now + SIGN_SECONDS
            self._look_after_carrier()
        if self._is_activated and now >= self._sign_at:
            self._sign_at = now + SIGN_SECONDS
            self._sign_and_watch()
        elif self._is_activated and self._watch.is_changed:
            self._database.run(self._sign, durable=False)
            self._watch.is_changed = False

    def _forget_retired(self) -> None:
        """Have the provider remove what was retired, but for what came back while it was away."""
        active = self._database.read(lambda tx: subscriptions.active(tx.connection))
        back = {each.id for each in active}
        gone, self._retired = [each for each in self._retired if each.id not in back], []
        if gone:
            self._tell(Forget(gone))

    # --- limits

    def _hear_of_limits(self) -> None:
        wanted = self._consuming.batches if self._consuming is not None else ()
        batches = {x.id: size for x, size in zip(self._mine, wanted, strict=False)}
        self._tell_allowed(self._gate.hear_for(self._look_at_limits(), batches))

    @property
    def _limits_at(self) -> float:
        if not (self._connected and self._is_registered):
            return inf
        return self._gate.next_at(self._workers_free) if self._gate.limited else self._gate.look_at

    def _ask_for_more(self) -> None:
        is_able = self._is_up and not self._is_stopping
        asks = self._gate.asks(self._held(), self._workers_free, is_able)
        if asks:
            began = monotonic()
            grants = self._database.run(partial(self._gate.step, asks), durable=False)
            self._tell_allowed(self._gate.granted(asks, grants, began))

    def _held(self) -> dict[int, int]:
        held = Counter(super()._held())
        held.update(lease.delivery.subscription_id for lease in self._reports.reserved)
        return held

    @property
    def _workers_free(self) -> int:
        workers = 0 if self._consuming is None else self._consuming.workers
        return workers - self._gate.workers_for(self._held())

    def _tell_allowed(self, allow: Allow | None) -> None:
        if allow is not None:
            self._tell(allow)

    # --- signs of life

    def _sign_and_watch(self) -> None:
        idle = self._watch.idle(self._mine) if self._should_get_more else []
        idle = [each for each in idle if not self._gate.may_wait(each)]

        def step(tx: Transaction) -> tuple[list[Subscription], dict[int, int]]:
            return self._sign(tx), backlog.oldest_due(tx, idle) if idle else {}

        gone, oldest = self._database.run(step, durable=False)
        if gone:
            self._tell(Forget(gone))
        suspects = self._watch.suspects(oldest)
        if suspects:
            self._tell(Revive([each for each in self._mine if each.id in suspects]))

    @property
    def _should_get_more(self) -> bool:
        if self._is_moving:
            return False  # what waits may be the other provider's to hand out
        has_room = self._consuming is not None and len(self._active) < self._consuming.workers
        return has_room and not self._reports and not self._is_stopping

    def _look_after_carrier(self) -> None:
        """Have a thread that hangs in a call replaced, though every call should end in time."""
        # counted and not timed: all of the process may have been frozen
        is_same = self._carrier.turned_at == self._turned_at
        self._turned_at, self._same_looks = (
            self._carrier.turned_at,
            is_same * (self._same_looks + 1),
        )
        if self._same_looks > HANGING_LOOKS:
            self._replace_carrier()
        elif self._same_looks > HANGING_LOOKS // 2:
            self._carrier.inbox.ring()  # it may only have nothing to do

    def _replace_carrier(self) -> None:
        self._say(logging.ERROR, "the provider does not come back from a call: replaced")
        self._carrier.abandon()
        self._start_with(type(self._provider)(self._settings))
        self._thread.start()
        self._tell_allowed(self._gate.reset())
        self._tell(Keep(list(self._active.values())))
        self._is_up = self._is_sweeping = self._is_registered = False
        self._is_first = self._was_down = True
        self._watch.is_stuck(self._mine)

    @property
    def _has_leases(self) -> bool:
        """Whether anything that is handled here is leased in the log."""
        return bool(self._active if self._log_keeps_leases else self._lost)

    def _hold(self, tx: Transaction) -> None:
        seqs = list(self._active if self._log_keeps_leases else self._lost)
        attempts.hold(tx, seqs, self._worker, self._settings.lease)

    def _overlong(self, now: float) -> list[Lease]:
        """Return what runs for so long that its server would take it back."""
        longest = self._provider.longest_lease
        return [
            lease
            for seq, lease in self._active.items()
            if longest and now - self._began[seq] > longest and seq not in self._detached
        ]

    def _sign(self, tx: Transaction) -> list[Subscription]:
        stuck = self._watch.stuck
        # who is not signed for in time is retired, where it is unreliable
        silent = [each.id for each in self._mine if each.id in stuck and each.reliable]
        subscriptions.sign(tx, [each.id for each in self._mine if each.id not in silent])
        if silent:
            subscriptions.unsign(tx, silent)
        return subscriptions.retire_forgotten(tx)

    # --- single calls

    def _call(self, call: Call) -> None:
        try:
            value, new = self._database.run(partial(self._call_and_queue, call))
        except (QueueError, SQLAlchemyError) as exc:
            self._mailbox.answer(call.promise.reject, exc)
        else:
            self._note_alone(new)
            self._sweep_at = 0.0
            self._mailbox.answer(call.promise.resolve, value)

    @staticmethod
    def _call_and_queue(call: Call, tx: Transaction) -> tuple[Any, list[Delivery]]:
        value, new = call.function(tx)
        backlog.give_back(tx, new)
        return value, new

    # --- the end

    def _end(self) -> None:
        self._reports.reserved.clear()  # not begun: they are handed back as they are
        self._unbegun.clear()  # what is handed back next must not begin after that
        super()._end()
        self._close()
        for command in self._mailbox.inbox.take():
            if isinstance(command, Published | Unpublished):
                self._obey(command)
        # whoever comes next tries them where they belong
        self._reports.unpublished += self._reports.strays
        self._reports.strays = []
        self._is_up = False
        with contextlib.suppress(StoreUnavailableError):
            self._do(Turn())

    def _consume_nothing(self) -> None:
        self._tell(StopConsuming())

    def _retire(self, own: list[Subscription]) -> None:
        self._database.run(lambda tx: subscriptions.retire(tx, [s.id for s in own]))
        self._tell(Forget(own))

    def _close(self) -> None:
        self._tell(Finish())
        self._thread.join_natively(FINISH_SECONDS)


def _which(lease: Lease) -> tuple[str, int]:
    """Return what a delivery is known by, whoever dispatched it."""
    return lease.delivery.message.id, lease.delivery.subscription_id
