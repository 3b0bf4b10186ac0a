"""Attempts: how the deliveries that a worker has begin and end, in the message log.

All moves are guarded: a row changes only if it is still in a state that
``lifecycle.py`` lets go there. Who calls refreshes the messages that were touched
(:func:`shared.store.summary.refresh`), once for all steps of a transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import takewhile
from typing import Any, NamedTuple

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    bindparam,
    case,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from shared.database import Transaction
from shared.lifecycle import FINAL, MAX_TAKEOVERS, WAITING, DeliveryStatus, sources_of
from shared.statements import Prepared
from shared.store import failures
from shared.store.summary import lock, refresh, summarise
from shared.tables import attempts, deliveries
from shared.types import Delivery, Failure, Lease, Outcome, SettleAction, Settlement

c = deliveries.c

FIRST = 2
"""Tokens below it are of deliveries that were never handed out before."""

TAKEN_OVER = "taken_over"
"""What became of an attempt whose worker is taken to have died."""

EARLY_SECONDS = 0.05
"""By how much a provider's clock may be ahead of the log's before it is told to wait."""

LONGEST_ERROR = 16_000
"""Characters of an exception that are kept: TEXT has 65,535 bytes, and one takes up to four."""


@dataclass(slots=True)
class Started:
    """What :func:`start` found: what to run, what is settled already, what runs already."""

    run: list[Lease] = field(default_factory=list)
    settled: list[Settlement] = field(default_factory=list)
    resumed: list[Lease] = field(default_factory=list)
    again: list[Delivery] = field(default_factory=list)
    """What is to be published again: the log has moved on since it was."""
    unknown: list[Lease] = field(default_factory=list)
    """What is settled since this log has no such delivery: it is not the log that it is from, or
    an older state of it."""


def _may_become(status: DeliveryStatus) -> ColumnElement[bool]:
    return or_(*[c.status == before for before in sources_of(status)])


_SEQS: BindParameter[Any] = bindparam("seqs", expanding=True)

_STATE_COLUMNS = (
    c.seq,
    c.message_id,
    c.status,
    c.lease_token,
    c.attempts,
    c.takeovers,
    c.started_at,
    c.worker,
    c.available_at,
    c.ready,
    c.lease_expires_at,
)
_STATES = Prepared(select(*_STATE_COLUMNS).where(c.seq.in_(_SEQS)))
# nobody had them, and they are due; what is to be published again may come more than once
_FRESH = Prepared(
    select(c.seq, c.message_id).where(
        c.seq.in_(_SEQS),
        c.status == DeliveryStatus.PENDING,
        c.lease_token == 0,
        c.available_at.is_(None),
        c.ready.is_(False),
    )
)
_ALL_STATES = Prepared(
    select(*_STATE_COLUMNS, c.processed_at, c.error_message).where(
        c.message_id.in_(bindparam("ids", expanding=True))
    )
)


def _beginning(**values: Any) -> Prepared:
    return Prepared(
        update(deliveries)
        .where(
            c.seq.in_(_SEQS),
            # what was taken over is processing already, by a worker that is gone
            or_(_may_become(DeliveryStatus.PROCESSING), c.status == DeliveryStatus.PROCESSING),
            # who has an older lease may be late, and has lost it
            c.lease_token <= bindparam("token"),
        )
        .values(
            status=DeliveryStatus.PROCESSING,
            lease_token=bindparam("token"),
            worker=bindparam("by"),
            started_at=bindparam("now"),
            available_at=None,
            **values,
        )
    )


_BEGIN = _beginning()
_BEGIN_AND_HOLD = _beginning(ready=False, lease_expires_at=bindparam("until"))
_HOLD = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS), c.status == DeliveryStatus.PROCESSING, c.worker == bindparam("by"))
    .values(lease_expires_at=bindparam("until"))
)
_QUEUE_AGAIN = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS))
    .values(ready=True, lease_expires_at=None, lease_token=c.lease_token + 1, provider=None)
)
_LET_GO = Prepared(update(deliveries).where(c.seq.in_(_SEQS)).values(lease_expires_at=None))
_COUNT_TAKEOVER = Prepared(
    update(deliveries).where(c.seq == bindparam("its_seq")).values(takeovers=c.takeovers + 1)
)
_UNCOUNT_TAKEOVER = Prepared(
    update(deliveries)
    .where(c.seq == bindparam("its_seq"), c.takeovers > 0)
    .values(takeovers=c.takeovers - 1)
)
_LOST = Prepared(
    select(attempts.c.id, attempts.c.delivery_seq, attempts.c.lost_token).where(
        attempts.c.delivery_seq.in_(_SEQS), attempts.c.lost_token.is_not(None)
    )
)
_FORGET_LOST = Prepared(
    update(attempts)
    .where(attempts.c.id.in_(bindparam("ids", expanding=True)))
    .values(lost_token=None)
)
_COMPLETE = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS), _may_become(DeliveryStatus.COMPLETED))
    .values(
        status=DeliveryStatus.COMPLETED,
        attempts=c.attempts + 1,
        processed_at=bindparam("now"),
        error_type=None,
        error_message=None,
    )
)
_COMPLETE_APART = Prepared(
    update(deliveries)
    .where(
        c.seq.in_(_SEQS),
        # one that was short has begun without a word: both moves are made at once
        or_(_may_become(DeliveryStatus.PROCESSING), _may_become(DeliveryStatus.COMPLETED)),
    )
    .values(
        status=DeliveryStatus.COMPLETED,
        attempts=c.attempts + 1,
        started_at=func.coalesce(c.started_at, bindparam("now")),
        processed_at=bindparam("now"),
        worker=bindparam("by"),
        lease_token=bindparam("token"),
        ready=False,
        lease_expires_at=None,
        available_at=None,
        error_type=None,
        error_message=None,
    )
)
_HAND_BACK = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS), c.status == DeliveryStatus.PROCESSING)
    .values(
        status=case(
            (c.attempts > 0, literal(DeliveryStatus.RETRY.value)),
            else_=literal(DeliveryStatus.PENDING.value),
        )
    )
)


def _failing(status: DeliveryStatus, **values: Any) -> Prepared:
    return Prepared(
        update(deliveries)
        .where(c.seq == bindparam("its_seq"), _may_become(status))
        .values(
            status=status,
            attempts=c.attempts + 1,
            error_type=bindparam("its_error_type"),
            error_message=bindparam("its_error"),
            **values,
        )
    )


_TO_RETRY = _failing(DeliveryStatus.RETRY, available_at=bindparam("its_due"))
_TO_FAILED = _failing(DeliveryStatus.FAILED, processed_at=bindparam("its_end"))
_ADD_HISTORY = Prepared(insert(attempts), [c.name for c in attempts.c if c.name != "id"])


def start(
    tx: Transaction,
    leases: Sequence[Lease],
    worker: str,
    *,
    running: Collection[int] = (),
    held_for: float | None = None,
    is_moving: bool = False,
) -> Started:
    """Note that attempts begin, and sort out what is not to run.

    A delivery whose outcome is stored is settled as stored. One that was taken over
    too often is taken to be what kills its workers, and becomes a dead letter.

    :param running: what ``worker`` has in hand already: it lost the lease and got it again.
    :param held_for: seconds for which the log keeps the leases of a provider apart, 0 where
        that provider does it; ``None`` for a provider that works in these tables itself.
    :param is_moving: whether another provider may hand out copies of the same deliveries.
    """
    started = Started()
    copies = None if held_for is None else _Copies(tx, is_moving)
    # a provider in these tables cannot have forgotten that it handed something out before
    is_new = {lease.key for lease in leases if held_for is None and lease.token == 1}
    known = [lease for lease in leases if lease.key not in is_new]
    lock(tx, {lease.delivery.message.id for lease in leases})
    states = _states(tx, known) if known else {}
    seen: set[int] = set()
    for lease in leases:
        seq = lease.delivery.seq
        if lease.key not in is_new and not _is_of(states.get(seq), lease):
            started.unknown.append(lease)
            started.settled.append(Settlement(lease, SettleAction.ACKNOWLEDGE))
            continue
        if seq in seen:
            started.settled.append(Settlement(lease, SettleAction.ACKNOWLEDGE))
        elif lease.key in is_new:
            started.run.append(lease)
        else:
            _sort_out(tx, started, lease, states[seq], seq in running, copies)
        seen.add(seq)
    _begin(tx, started.run + started.resumed, worker, held_for)
    return started


def _sort_out(
    tx: Transaction,
    started: Started,
    lease: Lease,
    state: Any,
    is_running: bool,
    copies: _Copies | None,
) -> None:
    """Find out what to do with a delivery that may have been handed out before."""
    if state.status in FINAL:
        started.settled.append(Settlement(lease, _stored_action(state)))
        return
    is_other_copy = copies is not None and copies.is_other(lease, state)
    is_old_copy = copies is not None and copies.is_old(lease, state)
    lease = _as_stored(lease, state)
    wait = (state.available_at - tx.now).total_seconds() if state.available_at else 0.0
    if is_running:
        started.resumed.append(lease)
    elif is_other_copy:
        started.settled.append(Settlement(lease, SettleAction.ACKNOWLEDGE))
    elif is_old_copy:
        started.settled.append(Settlement(lease, SettleAction.ACKNOWLEDGE))
        started.again.append(lease.delivery)
    elif wait > EARLY_SECONDS:
        started.settled.append(_postponed(lease, wait))
    elif state.status != DeliveryStatus.PROCESSING or _take_over(tx, state):
        started.run.append(lease)
    else:
        if copies is not None:  # else its provider ends the lease
            _LET_GO.change(tx, {"seqs": [state.seq]})
        started.settled.append(Settlement(lease, SettleAction.DEAD_LETTER))


def _as_stored(lease: Lease, state: Any) -> Lease:
    """Return the lease with what the log knows better than the provider."""
    # by two: who had it before may have begun without the log's knowing, by the next one
    token = lease.token or state.lease_token + 2
    return replace(lease, token=token, delivery=replace(lease.delivery, attempts=state.attempts))


class _Copies(NamedTuple):
    """Tells copies of a delivery apart: a broker, or two of them, may have been given several.

    What is dropped is not lost: should the worker of the other copy die, that one comes again,
    or its lease in the log runs out.
    """

    tx: Transaction
    is_moving: bool

    def is_other(self, lease: Lease, state: Any) -> bool:
        """Whether somebody works on another copy."""
        if state.status != DeliveryStatus.PROCESSING:
            return False
        if state.lease_expires_at is None:
            # it is leased by a provider that keeps leases itself, which is not this one
            return not lease.token
        is_held: bool = state.lease_expires_at > self.tx.now
        # of two providers each knows only what itself handed out before
        return is_held and (self.is_moving or not lease.redelivered)

    @staticmethod
    def is_old(lease: Lease, state: Any) -> bool:
        """Whether the log has moved on since it was published: an outcome would be refused."""
        return state.status in WAITING and 0 < lease.token < state.lease_token


def _postponed(lease: Lease, seconds: float) -> Settlement:
    """Have it come again at its time, as the log has it: its copy burns an attempt less."""
    attempts = lease.delivery.attempts - 1
    return Settlement(
        replace(lease, delivery=replace(lease.delivery, attempts=attempts)),
        SettleAction.RETRY,
        seconds,
        is_early=True,
    )


def fit(
    tx: Transaction, leases: Sequence[Lease], known: Collection[int]
) -> tuple[list[Lease], list[Lease]]:
    """Part leases into those that may run at once, and those to be started in the log first.

    The first time that a delivery is handed out the log need not know before it has
    taken a while; it has to be asked, since meanwhile it may have been discarded, or
    handled by copy. What comes after one that has to be started waits with it, so that
    all are handed out in order.

    :param known: what the worker has in hand already, or had, and is about to store.
    """
    first = list(takewhile(_is_first, leases))
    found = _FRESH.fetch(tx, {"seqs": [x.delivery.seq for x in first]}) if first else ()
    fresh = {row.seq: row for row in found if row.seq not in known}
    good: dict[int, Lease] = {}
    for lease in first:
        seq = lease.delivery.seq
        if not _is_of(fresh.get(seq), lease) or seq in good:
            break
        good[seq] = replace(lease, token=lease.token or 1)
    return list(good.values()), list(leases[len(good) :])


def _is_first(lease: Lease) -> bool:
    """Whether the provider handed it out for the first time, as far as it knows."""
    is_new = lease.token < FIRST and not lease.redelivered
    return is_new and bool(lease.delivery.seq) and not lease.delivery.attempts


def begin(tx: Transaction, leases: Sequence[Lease], worker: str, held_for: float) -> None:
    """Note that attempts go on that began without a word."""
    lock(tx, {lease.delivery.message.id for lease in leases})
    _begin(tx, leases, worker, held_for)
    refresh(tx, {lease.delivery.message.id for lease in leases})


def finish(
    tx: Transaction, outcomes: Sequence[Outcome], worker: str, held_for: float
) -> tuple[list[Outcome], list[Outcome], set[Any]]:
    """Store how attempts ended, begun in the log or not; return those stored, and those refused.

    As :func:`record` does, and what the messages say of it, too. The third is the keys of those
    leases among the refused whose deliveries are superseded: the provider has another copy, or is
    to be given one, so that this one may go.
    """
    ids = {outcome.lease.delivery.message.id for outcome in outcomes}
    lock(tx, ids)
    rows = {row.seq: row for row in _ALL_STATES.fetch(tx, {"ids": list(ids)})}
    stored: list[Outcome] = []
    refused: list[Outcome] = []
    superseded = set()
    running = dict(rows)
    for outcome in outcomes:
        state = running.get(outcome.lease.delivery.seq)
        is_ours = state is not None and (
            _is_held(state, outcome.lease) or _is_unbegun(state, outcome.lease)
        )
        (stored if is_ours else refused).append(outcome)
        if is_ours:
            del running[outcome.lease.delivery.seq]  # another would end the same lease
        elif state is not None and _is_kept(state):
            superseded.add(outcome.lease.key)
    _acquit(tx, refused, rows)
    done = [x for x in stored if x.status == DeliveryStatus.COMPLETED]
    others = [x for x in stored if x.status != DeliveryStatus.COMPLETED]
    _complete_apart(tx, done, rows, worker)
    if others:
        unbegun = [x.lease for x in others if _is_unbegun(rows[x.lease.delivery.seq], x.lease)]
        _begin(tx, unbegun, worker, held_for)
        record(tx, others)
        let_go(tx, others)
        refresh(tx, ids)
    else:
        by_message = defaultdict(list)
        for row in rows.values():
            by_message[row.message_id].append(row)
        summarise(tx, by_message)
    return stored, refused, superseded


def _is_kept(state: Any) -> bool:
    """Whether the log keeps it: to be published, or under the lease of another worker."""
    return state.ready or state.lease_expires_at is not None


def _is_unbegun(state: Any, lease: Lease) -> bool:
    """Whether nobody had it since, nor has the log heard of its beginning."""
    return state.status in WAITING and state.lease_token < lease.token


def _complete_apart(
    tx: Transaction, done: Sequence[Outcome], rows: dict[int, Any], worker: str
) -> None:
    by_token = defaultdict(list)
    for outcome in done:
        by_token[outcome.lease.token].append(outcome.lease.delivery.seq)
    for token, seqs in by_token.items():
        values = {"seqs": seqs, "now": tx.now, "by": worker, "token": token}
        _COMPLETE_APART.change(tx, values)
        for seq in seqs:
            rows[seq] = rows[seq]._replace(
                status=DeliveryStatus.COMPLETED,
                attempts=rows[seq].attempts + 1,
                started_at=rows[seq].started_at or tx.now,
                processed_at=tx.now,
                error_message=None,
            )


def hold(tx: Transaction, seqs: Sequence[int], worker: str, seconds: float) -> None:
    """Renew the leases that the log keeps for ``worker``."""
    _HOLD.change(tx, {"seqs": seqs, "by": worker, "until": tx.later(seconds)})


def let_go(tx: Transaction, outcomes: Sequence[Outcome]) -> None:
    """End the leases that the log kept, once their outcomes are recorded."""
    _LET_GO.change(tx, {"seqs": [outcome.lease.delivery.seq for outcome in outcomes]})


def lose(tx: Transaction, seqs: Sequence[int]) -> None:
    """End attempts whose lease in the log ran out: what they had waits again, ready to go."""
    lock(tx, {state.message_id for state in _states_of(tx, seqs).values()})
    lost = [state for state in _states_of(tx, seqs).values() if _is_lost(tx, state)]
    again = [state.seq for state in lost if _take_over(tx, state)]
    _LET_GO.change(tx, {"seqs": [state.seq for state in lost]})
    _HAND_BACK.change(tx, {"seqs": again})
    _QUEUE_AGAIN.change(tx, {"seqs": again})
    refresh(tx, {state.message_id for state in lost})


def _is_lost(tx: Transaction, state: Any) -> bool:
    is_over = state.lease_expires_at is not None and state.lease_expires_at <= tx.now
    return is_over and state.status == DeliveryStatus.PROCESSING


def record(tx: Transaction, outcomes: Sequence[Outcome]) -> tuple[list[Outcome], list[Outcome]]:
    """Store how attempts ended; return those stored, and those refused.

    Refused is what comes from a worker whose lease was lost: by its token.
    """
    leases = [outcome.lease for outcome in outcomes]
    lock(tx, {lease.delivery.message.id for lease in leases})
    states = _states(tx, leases)
    stored: list[Outcome] = []
    refused: list[Outcome] = []
    ended: dict[DeliveryStatus, list[tuple[Any, Outcome]]] = defaultdict(list)
    for outcome in outcomes:
        state: Any = states.get(outcome.lease.delivery.seq)
        if not _is_of(state, outcome.lease) or not _is_held(state, outcome.lease):
            refused.append(outcome)
        else:
            del states[state.seq]  # another would end the same lease
            stored.append(outcome)
            ended[outcome.status].append((state, outcome))
    _acquit(tx, refused, states)
    for status, its in ended.items():
        _MOVES[status](tx, its)
    return stored, refused


def _acquit(tx: Transaction, refused: Sequence[Outcome], states: Mapping[int, Any]) -> None:
    """Take back that workers died with deliveries: they tell of them, and only were too late."""
    late = {
        (seq, outcome.lease.token)
        for outcome in refused
        if (seq := outcome.lease.delivery.seq) in states and states[seq].status not in FINAL
    }
    if not late:
        return
    lost = _LOST.fetch(tx, {"seqs": list({seq for seq, _ in late})})
    alive = [row for row in lost if (row.delivery_seq, row.lost_token) in late]
    if alive:
        _UNCOUNT_TAKEOVER.change_many(tx, [{"its_seq": row.delivery_seq} for row in alive])
        _FORGET_LOST.change(tx, {"ids": [row.id for row in alive]})


def _is_held(state: Any, lease: Lease) -> bool:
    is_running: bool = state.status == DeliveryStatus.PROCESSING
    return is_running and state.lease_token == lease.token


def _states(tx: Transaction, leases: Sequence[Lease]) -> dict[int, Any]:
    return _states_of(tx, [lease.delivery.seq for lease in leases])


def _states_of(tx: Transaction, seqs: Sequence[int]) -> dict[int, Any]:
    return {row.seq: row for row in _STATES.fetch(tx, {"seqs": seqs})}


def _is_of(state: Any, lease: Lease) -> bool:
    """Whether a row is a delivery's: a log that was restored from a backup uses numbers again."""
    return state is not None and state.message_id == lease.delivery.message.id


def _stored_action(state: Any) -> SettleAction:
    if state.status == DeliveryStatus.FAILED:
        return SettleAction.DEAD_LETTER
    return SettleAction.ACKNOWLEDGE


def _begin(tx: Transaction, leases: Sequence[Lease], worker: str, held_for: float | None) -> None:
    by_token = defaultdict(list)
    for lease in leases:
        by_token[lease.token].append(lease.delivery.seq)
    for token, seqs in by_token.items():
        values = {"seqs": seqs, "token": token, "by": worker, "now": tx.now}
        if held_for is None:
            _BEGIN.change(tx, values)
        else:
            until = tx.later(held_for) if held_for else None
            _BEGIN_AND_HOLD.change(tx, {**values, "until": until})


def _take_over(tx: Transaction, state: Any) -> bool:
    """Note that a worker died; say whether the delivery may have another."""
    _COUNT_TAKEOVER.change(tx, {"its_seq": state.seq})
    takeovers = state.takeovers + 1
    if takeovers < MAX_TAKEOVERS:
        lost = Failure("WorkerLost", f"{state.worker} stopped renewing its lease")
        _write_history(tx, [(state, TAKEN_OVER, lost, None)])
        return True
    lost = Failure("WorkerLost", f"{takeovers} workers died with it; the last was {state.worker}")
    _bury(tx, [(state, lost)])
    return False


def _complete(tx: Transaction, ended: list[tuple[Any, Outcome]]) -> None:
    _COMPLETE.change(tx, {"seqs": [state.seq for state, _ in ended], "now": tx.now})


def _hand_back(tx: Transaction, ended: list[tuple[Any, Outcome]]) -> None:
    """Give deliveries up unburnt: as if they had not been reserved."""
    _HAND_BACK.change(tx, {"seqs": [state.seq for state, _ in ended]})
    _write_history(tx, [(state, "released", x.failure, None) for state, x in ended])


def _retry(tx: Transaction, ended: list[tuple[Any, Outcome]]) -> None:
    rows = [{**_error_row(state, x.failure), "its_due": tx.later(x.delay)} for state, x in ended]
    _TO_RETRY.change_many(tx, rows)
    _write_history(tx, [(state, "retry", x.failure, tx.later(x.delay)) for state, x in ended])


def _fail(tx: Transaction, ended: list[tuple[Any, Outcome]]) -> None:
    _bury(tx, [(state, x.failure) for state, x in ended])


def _bury(tx: Transaction, dead: list[tuple[Any, Failure | None]]) -> None:
    """Make dead letters."""
    rows = [{**_error_row(state, failure), "its_end": tx.now} for state, failure in dead]
    _TO_FAILED.change_many(tx, rows)
    failures.add(tx, [(state.seq, *_group(failure)) for state, failure in dead])
    _write_history(tx, [(state, "failed", failure, None) for state, failure in dead])


_MOVES = {
    DeliveryStatus.COMPLETED: _complete,
    DeliveryStatus.RETRY: _retry,
    DeliveryStatus.FAILED: _fail,
    DeliveryStatus.PENDING: _hand_back,
}


def _error_row(state: Any, failure: Failure | None) -> dict[str, Any]:
    failure = failure or Failure("Unknown", "")
    return {
        "its_seq": state.seq,
        "its_error_type": _storable(failure.type, 255),
        "its_error": _storable(failure.message),
    }


def _group(failure: Failure | None) -> tuple[str, str]:
    failure = failure or Failure("Unknown", "")
    return _storable(failure.type, 255), _storable(failure.place, 255)


def _storable(words: str, length: int = LONGEST_ERROR) -> str:
    """Return what an exception says, fit for a column: not all text is valid UTF-8."""
    return words[:length].encode(errors="replace").decode()


def _write_history(
    tx: Transaction, ended: Iterable[tuple[Any, str, Failure | None, datetime | None]]
) -> None:
    rows = [
        {
            "delivery_seq": state.seq,
            "number": state.attempts + 1,
            "outcome": word,
            "started_at": state.started_at,
            "ended_at": tx.now,
            "retry_at": retry_at,
            "worker": state.worker,
            "error_type": _storable(failure.type, 255) if failure else None,
            "error_message": _storable(failure.message) if failure else None,
            # of a long one the end, where the error is
            "traceback": _storable(failure.traceback[-LONGEST_ERROR:]) or None if failure else None,
            "lost_token": state.lease_token if word == TAKEN_OVER else None,
        }
        for state, word, failure, retry_at in ended
    ]
    _ADD_HISTORY.change_many(tx, rows)
