"""The states, the moves between them, and how long a retry waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.lifecycle import (
    FINAL,
    MOVES,
    WAITING,
    Backoff,
    DeliveryStatus,
    MessageStatus,
    message_status,
    retries_made,
    sources_of,
)

COMPLETED, DISCARDED, FAILED, PENDING, PROCESSING, RETRY = (
    DeliveryStatus.COMPLETED,
    DeliveryStatus.DISCARDED,
    DeliveryStatus.FAILED,
    DeliveryStatus.PENDING,
    DeliveryStatus.PROCESSING,
    DeliveryStatus.RETRY,
)

LEGAL = {
    PENDING: {PROCESSING, DISCARDED},
    RETRY: {PROCESSING, DISCARDED},
    PROCESSING: {COMPLETED, RETRY, FAILED, PENDING, DISCARDED},
    FAILED: {PENDING, DISCARDED},
    COMPLETED: set(),
    DISCARDED: set(),
}

statuses = st.sampled_from(DeliveryStatus)
seconds = st.floats(0, 86_400)
backoffs = st.builds(Backoff, base=seconds, factor=st.floats(1, 100), cap=seconds)


class TestMoves:
    @pytest.mark.parametrize("before", DeliveryStatus)
    def test_are_these_and_no_others(self, before: DeliveryStatus) -> None:
        assert MOVES[before] == LEGAL[before]

    @pytest.mark.parametrize("after", DeliveryStatus)
    def test_are_guarded_by_where_they_come_from(self, after: DeliveryStatus) -> None:
        assert set(sources_of(after)) == {before for before in LEGAL if after in LEGAL[before]}

    def test_lead_from_waiting_to_processing_alone(self) -> None:
        assert set(sources_of(PROCESSING)) == WAITING

    def test_leave_what_is_final_by_an_operator_alone(self) -> None:
        by_worker = {PROCESSING, COMPLETED, RETRY, FAILED}
        assert all(not MOVES[before] & by_worker for before in FINAL)

    def test_leave_no_state_that_is_neither_waiting_running_nor_final(self) -> None:
        assert WAITING | {PROCESSING} | FINAL == set(DeliveryStatus)
        assert not WAITING & FINAL


class TestMessageStatus:
    @pytest.mark.parametrize(
        ("deliveries", "status"),
        [
            ([], "completed"),
            ([COMPLETED], "completed"),
            ([COMPLETED, DISCARDED], "completed"),
            ([DISCARDED], "completed"),
            ([PENDING], "pending"),
            ([PENDING, COMPLETED], "pending"),
            ([PENDING, DISCARDED], "pending"),
            ([PROCESSING, PENDING, COMPLETED], "processing"),
            ([RETRY, PROCESSING, PENDING, COMPLETED], "retry"),
            ([FAILED, RETRY, PROCESSING, PENDING, COMPLETED], "failed"),
            ([FAILED, DISCARDED], "failed"),
        ],
    )
    def test_is_that_of_the_loudest(self, deliveries: list[DeliveryStatus], status: str) -> None:
        assert message_status(deliveries) == status
        assert message_status(reversed(deliveries)) == status

    @given(st.lists(statuses, min_size=1))
    def test_is_final_once_every_delivery_is(self, deliveries: list[DeliveryStatus]) -> None:
        is_final = message_status(deliveries) in (MessageStatus.COMPLETED, MessageStatus.FAILED)
        assert is_final == (set(deliveries) <= FINAL or FAILED in deliveries)


class TestRetriesMade:
    @pytest.mark.parametrize(
        ("status", "attempts", "retries"),
        [
            (PENDING, 0, 0),
            (PROCESSING, 0, 0),
            (RETRY, 1, 1),
            (PROCESSING, 1, 1),
            (RETRY, 3, 3),
            (COMPLETED, 1, 0),
            (COMPLETED, 3, 2),
            (FAILED, 4, 3),
            (DISCARDED, 0, 0),
        ],
    )
    def test_are_the_attempts_after_the_first(
        self, status: DeliveryStatus, attempts: int, retries: int
    ) -> None:
        assert retries_made(status, attempts) == retries


class TestBackoff:
    def test_grows_up_to_the_cap(self) -> None:
        ceilings = [Backoff(base=1, factor=2, cap=300).ceiling(n) for n in range(11)]
        assert ceilings == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]

    def test_is_by_default_what_is_promised(self) -> None:
        assert Backoff() == Backoff(base=1, factor=2, cap=300)

    @given(backoffs, st.integers(0, 10**9))
    def test_never_leaves_its_bounds(self, backoff: Backoff, retries: int) -> None:
        assert 0 <= backoff.delay(retries) <= backoff.ceiling(retries) <= backoff.cap

    @given(backoffs, st.integers(0, 1000))
    def test_never_shrinks(self, backoff: Backoff, retries: int) -> None:
        assert backoff.ceiling(retries) <= backoff.ceiling(retries + 1)

    @given(st.floats(0.001, 1000), st.integers(0, 20))
    def test_has_the_ceiling_of_the_formula(self, base: float, retries: int) -> None:
        backoff = Backoff(base=base, factor=3, cap=300)
        assert backoff.ceiling(retries) == pytest.approx(min(300, base * 3**retries))

    def test_uses_the_whole_range(self) -> None:
        """Full jitter: from nothing to the ceiling, and evenly."""
        backoff = Backoff(base=8)
        tenths = [int(backoff.delay(0) / 0.8) for _ in range(5000)]
        assert all(350 < tenths.count(tenth) < 650 for tenth in range(10))
