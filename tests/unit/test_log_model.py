"""The message log against a small model of what becomes of a delivery, by any order of steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shared.errors import NothingToChangeError, NothingToRetryError
from shared.lifecycle import (
    FINAL,
    MAX_TAKEOVERS,
    WAITING,
    DeliveryStatus,
    message_status,
    retries_made,
)
from shared.store import repair
from shared.tables import failures
from shared.types import Delivery, Lease, Outcome, SettleAction
from tests.unit.message_log import (
    BOOM,
    COMPLETED,
    DISCARDED,
    FAILED,
    PENDING,
    PROCESSING,
    RETRY,
    Log,
    event,
)

picks = st.integers(0, 1 << 16)


@dataclass(slots=True)
class Known:
    """What the model knows of one delivery."""

    delivery: Delivery
    status: DeliveryStatus = PENDING
    attempts: int = 0
    takeovers: int = 0
    token: int = 0
    """Of the last lease; each is one more than the one before."""
    ended: int = 0
    """Attempts that did not complete, whatever became of them."""
    lost: set[int] = field(default_factory=set)
    """Tokens of leases that were taken over, of which no worker has told since."""

    def lease(self, token: int) -> Lease:
        return Lease(self.delivery, token)


class LogMachine(RuleBasedStateMachine):
    """A few messages, each for two subscriptions."""

    store: Log

    @initialize()
    def subscribe(self) -> None:
        self.known: list[Known] = []
        for subscriber in ("audit.note", "mail.send"):
            self.store.subscribe(subscriber=subscriber)
        self.dispatch()

    @precondition(lambda self: len(self.known) < 6)
    @rule()
    def dispatch(self) -> None:
        new = self.store.append(event())
        assert len(new) == 2
        self.known += [Known(delivery) for delivery in new]

    @rule(pick=picks, worker=st.sampled_from(["host:1", "host:2"]))
    def reserve(self, pick: int, worker: str) -> None:
        """As a provider does, of what it has not been told of, too."""
        its = self.known[pick % len(self.known)]
        if not its.token and its.status in FINAL:
            return  # a provider in these tables does not begin with what was cancelled
        its.token += 1
        before, is_first = its.status, its.token == 1
        started = self.store.start(its.lease(its.token), worker=worker)
        if before in FINAL:
            action = SettleAction.DEAD_LETTER if before is FAILED else SettleAction.ACKNOWLEDGE
            assert [x.action for x in started.settled] == [action]
            assert started.run == []
            # the log never heard of this lease
            its.token -= 1
            return
        if before is PROCESSING:
            its.takeovers += 1
            its.ended += 1
        if its.takeovers >= MAX_TAKEOVERS:
            assert [x.action for x in started.settled] == [SettleAction.DEAD_LETTER]
            its.status, its.attempts, its.token = FAILED, its.attempts + 1, its.token - 1
            return
        assert [lease.token for lease in started.run] == [its.token], is_first
        if before is PROCESSING:
            its.lost.add(its.token - 1)
        its.status = PROCESSING

    @rule(
        pick=picks,
        status=st.sampled_from([COMPLETED, RETRY, FAILED, PENDING]),
        late=st.sampled_from([0, 0, 0, 1, 1, 2]),
    )
    def end(self, pick: int, status: DeliveryStatus, late: int) -> None:
        """By the last worker, or by one of those before it: by so many leases."""
        its = self.known[pick % len(self.known)]
        token = its.token - late
        stored, refused = self.store.record(Outcome(its.lease(token), status, BOOM))
        if its.status is not PROCESSING or late:
            assert (len(stored), len(refused)) == (0, 1)
            if its.status not in FINAL and token in its.lost:
                # it lives, and is believed once
                its.lost.remove(token)
                its.takeovers = max(its.takeovers - 1, 0)
            return
        assert (len(stored), len(refused)) == (1, 0)
        its.ended += status is not COMPLETED
        if status is PENDING:
            its.status = RETRY if its.attempts else PENDING
        else:
            its.status, its.attempts = status, its.attempts + 1

    @rule(pick=picks)
    def retry(self, pick: int) -> None:
        message_id = self.known[pick % len(self.known)].delivery.message.id
        failed = [x for x in self._of(message_id) if x.status is FAILED]
        if not failed:
            with pytest.raises(NothingToRetryError):
                self.store.do(repair.retry_message, message_id)
            return
        again = self.store.do(repair.retry_message, message_id)
        assert [x.seq for x in again] == [x.delivery.seq for x in failed]
        for each in failed:
            each.status, each.attempts, each.takeovers = PENDING, 0, 0

    @rule(pick=picks, is_dead=st.booleans())
    def give_up(self, pick: int, is_dead: bool) -> None:
        """What failed is discarded, or what waits is cancelled."""
        message_id = self.known[pick % len(self.known)].delivery.message.id
        its = [x for x in self._of(message_id) if x.status in ({FAILED} if is_dead else WAITING)]
        step = repair.discard_message if is_dead else repair.cancel
        if not its:
            with pytest.raises(NothingToChangeError):
                self.store.do(step, message_id)
            return
        assert self.store.do(step, message_id) == len(its)
        for each in its:
            each.status = DISCARDED

    @invariant()
    def is_as_the_model_has_it(self) -> None:
        for each in getattr(self, "known", []):
            row = self.store.delivery(each.delivery.seq)
            assert (row.status, row.attempts, row.takeovers, row.lease_token) == (
                each.status,
                each.attempts,
                each.takeovers,
                each.token,
            )
            assert (row.processed_at is not None) == (each.status in FINAL)
            assert len(self.store.history(each.delivery.seq)) == each.ended
        self._check_groups()
        for message_id in {each.delivery.message.id for each in getattr(self, "known", [])}:
            its = self._of(message_id)
            message = self.store.message(message_id)
            assert message.status == message_status(each.status for each in its)
            assert message.retry_count == max(retries_made(x.status, x.attempts) for x in its)

    def _check_groups(self) -> None:
        """Each dead letter is in a group, and nothing else is."""
        known = {each.delivery.seq: each.status for each in getattr(self, "known", [])}
        grouped = {row.delivery_seq for row in self.store.rows(failures)}
        assert grouped & known.keys() == {seq for seq, its in known.items() if its is FAILED}

    def _of(self, message_id: str) -> list[Known]:
        return [each for each in self.known if each.delivery.message.id == message_id]


def test_the_log_does_what_the_model_does(sqlite_log: Any) -> None:
    store = Log(sqlite_log)

    class Machine(LogMachine):
        pass

    Machine.store = store
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=40,
            deadline=None,
            database=None,
            # to shrink takes minutes, with a database
            phases=[Phase.generate],
        ),
    )
    store.database.close()
