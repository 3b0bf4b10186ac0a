"""The pump whose provider works in the log's own tables: one transaction does it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from shared.clock import monotonic
from shared.database import CommitUncertainError, Transaction
from shared.errors import ProviderError, QueueError
from shared.events.commands import Ask, Call, Check, Consume, StopConsuming
from shared.events.pump import RECONNECT_SECONDS, SIGN_SECONDS, Pump, Turn
from shared.native import select as wait_readable
from shared.store import attempts, moving, subscriptions
from shared.store.limits import Grant
from shared.store.log import IN_LOG, Handover
from shared.store.summary import refresh
from shared.types import Delivery, Lease, Subscription


@dataclass(slots=True)
class JoinedTurn(Turn):
    """A turn, and what it reserves."""

    leases: list[Lease] = field(default_factory=list)
    resumed: list[Lease] = field(default_factory=list)
    """What runs here already: it lost its lease, and has another one."""
    grants: dict[int, Grant] = field(default_factory=dict)
    """By subscription, of those with limits."""
    had_settled: bool = False
    """Whether some of what was reserved is not to run, so that there is room for more."""


class JoinedPump(Pump):
    """See the module's docstring."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._batches: dict[int, int] = {}
        self._workers = 0
        self._may_have_more = False
        self._renew_at = 0.0

    _handover: Handover = IN_LOG

    # --- waiting

    def _wait(self) -> None:
        if self._may_have_more and self._room() > 0:
            return
        interrupt = self._mailbox.inbox.fileno()
        timeout = max(0.0, self._next_timer() - monotonic())
        if self._connected:
            self._provider.wait(timeout, interrupt, hungry=self._room() > 0)
        else:
            wait_readable([interrupt], [], [], timeout)

    def _next_timer(self) -> float:
        is_behind = self._unsaved or (self._consuming and not self._connected)
        timers = [monotonic() + RECONNECT_SECONDS if is_behind else self._next_duty()]
        if self._die_at is not None:
            timers.append(self._die_at)
        return min(timers)

    def _next_duty(self) -> float:
        signs = [self._sign_at] if self._mine else [monotonic() + SIGN_SECONDS]
        if self._mine:
            signs.append(self._gate.look_at)
        if self._gate.limited and self._room() > 0:
            signs.append(self._gate.ask_at)
        return min(signs + ([self._renew_at] if self._active else []))

    def look_again(self) -> None:
        self._mailbox.inbox.ring()

    def _room(self) -> int:
        """Return how many workers are free."""
        if not self._mine:
            return 0
        busy: Counter[int] = Counter(x.delivery.subscription_id for x in self._active.values())
        own = sum(-(-n // self._batches.get(x, 1)) for x, n in busy.items())
        return self._workers - own - self.elsewhere()

    # --- one turn

    def _obey(self, command: Any) -> None:
        match command:
            case Check():
                is_up = self._connected and self._provider.health_check()
                self._mailbox.answer(command.promise.resolve, is_up)
            case Ask():
                self._ask(command)
            case Consume():
                self._consuming, self._workers = command, command.workers
            case StopConsuming():
                self._workers = 0

    def _ask(self, command: Ask) -> None:
        try:
            self._mailbox.answer(command.promise.resolve, command.function(self._provider))
        except ProviderError as exc:
            self._mailbox.answer(command.promise.reject, exc)

    def _connect(self) -> None:
        if not self._connected:
            self._prepare_tables()
            self._provider.initialize()
            self._connected = True
        # again after each interruption: it may be another database by now
        if self._consuming is not None and not self._is_registered:
            self._register(self._consuming)

    def _register(self, wanted: Consume) -> None:
        mine = self._register_by(subscriptions.register, wanted.subscriptions)
        self._provider.declare(mine)
        self._mine, self._is_registered = mine, True
        self._batches = {x.id: size for x, size in zip(mine, wanted.batches, strict=True)}
        self._sign_at = monotonic() + SIGN_SECONDS
        self._hear_of_limits()
        self._may_have_more = True
        self._mailbox.answer(wanted.on_registered, mine)

    def _do_once(self, turn: Turn) -> None:
        if not turn.appends and not turn.outcomes and self._room() <= 0:
            return
        full = JoinedTurn(turn.appends, turn.outcomes, firsts=turn.firsts)
        began = monotonic()
        try:
            # an outcome lost to a power failure is a delivery that comes again
            self._database.run(partial(self._all_steps, full), durable=bool(turn.appends))
        except CommitUncertainError:
            self._rouse(full)  # who looks in vain at worst
            raise
        self.counts.flushed(monotonic() - began, full.size)
        self._answer(full)
        turn.appends, turn.outcomes = full.appends, full.outcomes
        self._rouse(full)

    def _rouse(self, turn: JoinedTurn) -> None:
        """Wake who may have something to do now."""
        if turn.new:
            self._provider.published(turn.new)
        if self._gate.limited:
            self._gate.told(turn.grants)
            self._rouse_others(turn)

    def _all_steps(self, turn: JoinedTurn, tx: Transaction) -> None:
        # first of all: so those that wait for each other have nothing else that others wait for
        turn.grants = self._ask_limits(tx) if self._gate.limited else {}
        self._store(tx, turn)
        self._move(tx, turn)
        self._begin(tx, turn)
        if turn.grants:
            self._gate.keep(tx, turn.grants)
        refresh(tx, turn.touched)

    def _ask_limits(self, tx: Transaction) -> dict[int, Grant]:
        room = max(self._room(), 0)
        return self._gate.ask(tx, self._held(), {x: room * n for x, n in self._batches.items()})

    def _move(self, tx: Transaction, turn: JoinedTurn) -> None:
        turn.leases, turn.resumed = [], []
        if turn.new:
            self._provider.publish(turn.new, tx)
        if turn.stored:
            self._provider.settle([outcome.settlement() for outcome in turn.stored], tx)
        room = self._room()
        if room > 0:
            limits = {x.id: room * self._batches[x.id] for x in self._mine}
            most = max(limits.values())
            limits |= {x: grant.target for x, grant in turn.grants.items()}
            turn.leases = self._provider.reserve(limits, most, tx)

    def _begin(self, tx: Transaction, turn: JoinedTurn) -> None:
        reserved = _count(turn.leases) if turn.grants else {}
        self._run_what_is_fit(tx, turn)
        if turn.grants:
            running = _count(turn.leases)
            for each, grant in turn.grants.items():
                grant.use(reserved[each], running[each])

    def _run_what_is_fit(self, tx: Transaction, turn: JoinedTurn) -> None:
        if not turn.leases:
            return
        turn.touched |= {lease.delivery.message.id for lease in turn.leases}
        running = self._active.keys()
        started = attempts.start(tx, turn.leases, self._worker, running=running)
        turn.leases, turn.resumed = started.run, started.resumed
        if turn.leases and self._settings.drain:
            moving.mark(tx, [lease.delivery.seq for lease in turn.leases], None)
        turn.had_settled = bool(started.settled or started.resumed)
        if started.settled:
            self._provider.settle(started.settled, tx)

    def _answer(self, turn: JoinedTurn) -> None:
        self._may_have_more = turn.had_settled
        self._confirm(turn)
        self._active |= {lease.delivery.seq: lease for lease in turn.resumed}
        if turn.leases:
            if not self._active:
                self._renew_at = monotonic() + self._settings.lease / 3
            self._active |= {lease.delivery.seq: lease for lease in turn.leases}
            self._mailbox.answer(self._on_leases, turn.leases)

    def _rouse_others(self, turn: JoinedTurn) -> None:
        """Wake who may go on now that attempts ended here, and none began in their place."""
        begun = _count(turn.leases)
        ended = [each.lease.delivery for each in turn.stored]
        free = [
            each
            for each in ended
            if each.subscription_id in turn.grants and not begun[each.subscription_id]
        ]
        if free:
            self._provider.published(free)

    # --- limits

    def _hear_of_limits(self) -> None:
        if self._gate.hear(self._look_at_limits()) and self._gate.limited:
            self._hold()
            self._gate.ask_at = 0.0

    def _hold(self) -> None:
        self._database.run(partial(self._gate.hold, held=self._held()), durable=False)
        self._gate.renewed()

    # --- leases and signs of life

    def _keep_up(self) -> None:
        now = monotonic()
        if self._mine and now >= self._gate.look_at:
            self._hear_of_limits()
        if self._active and now >= self._renew_at:
            self._renew_at = now + self._settings.lease / 3
            leases = list(self._active.values())
            extend = partial(self._provider.extend, leases)
            self._say_lost(self._database.run(extend, durable=False))
            if self._gate.limited:
                self._hold()
        if self._mine and now >= self._sign_at:
            self._sign_at = now + SIGN_SECONDS
            self._database.run(self._sign, durable=False)

    def _sign(self, tx: Transaction) -> None:
        subscriptions.sign(tx, [subscription.id for subscription in self._mine])
        subscriptions.retire_forgotten(tx)

    # --- single calls

    def _call(self, call: Call) -> None:
        try:
            value, new = self._database.run(partial(self._call_and_publish, call))
            if new:
                self._provider.published(new)
        except (QueueError, SQLAlchemyError) as exc:
            self._mailbox.answer(call.promise.reject, exc)
        else:
            self._mailbox.answer(call.promise.resolve, value)

    def _call_and_publish(self, call: Call, tx: Transaction) -> tuple[Any, Sequence[Delivery]]:
        value, new = call.function(tx)
        if new:
            self._provider.publish(new, tx)
        return value, new

    # --- the end

    def _consume_nothing(self) -> None:
        self._workers = 0

    def _retire(self, own: list[Subscription]) -> None:
        self._database.run(lambda tx: subscriptions.retire(tx, [s.id for s in own]))

    def _close(self) -> None:
        self._provider.close()


def _count(leases: Sequence[Lease]) -> Counter[int]:
    return Counter(lease.delivery.subscription_id for lease in leases)
