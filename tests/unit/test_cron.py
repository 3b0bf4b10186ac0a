"""When the occurrences of a schedule are, also where the clock is put forward or back."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import PayloadError
from shared.events.cron import MOST_COUNTED, Cron, Due

BERLIN = "Europe/Berlin"


def occurrences(cron: Cron, start: str, count: int) -> list[str]:
    found, time = [], datetime.fromisoformat(start)
    for _ in range(count):
        after = cron.after(time)
        assert after is not None
        assert after > time
        found.append(after.isoformat(sep=" ", timespec="minutes"))
        time = after
    return found


def test_goes_by_the_clock_of_its_zone() -> None:
    assert occurrences(Cron("30 6 * * MON-FRI", BERLIN), "2026-01-02 12:00", 2) == [
        "2026-01-05 05:30", "2026-01-06 05:30",
    ]  # fmt: skip
    assert occurrences(Cron("30 6 * * *", BERLIN), "2026-07-01 12:00", 1) == ["2026-07-02 04:30"]
    assert occurrences(Cron("30 6 * * *"), "2026-07-01 12:00", 1) == ["2026-07-02 06:30"]
    assert occurrences(Cron("0 0 L * *"), "2026-02-03 12:00", 1) == ["2026-02-28 00:00"]


class TestWhenTheClockIsPut:
    # in Berlin on 2026-03-29 at 01:00 UTC from 02:00 to 03:00, on 2026-10-25 at 01:00 UTC back

    def test_a_time_that_is_skipped_is_made_up_for_at_once(self) -> None:
        found = occurrences(Cron("30 2 * * *", BERLIN), "2026-03-28 00:00", 3)
        assert found == ["2026-03-28 01:30", "2026-03-29 01:00", "2026-03-30 00:30"]

    def test_a_time_that_comes_twice_is_the_first(self) -> None:
        cron = Cron("30 2 * * *", BERLIN)
        found = occurrences(cron, "2026-10-24 12:00", 2)
        assert found == ["2026-10-25 00:30", "2026-10-26 01:30"]
        # asked between the two
        assert occurrences(cron, "2026-10-25 01:15", 1) == ["2026-10-26 01:30"]

    def test_what_comes_more_often_than_hourly_just_goes_on(self) -> None:
        cron = Cron("*/30 * * * *", BERLIN)
        assert occurrences(cron, "2026-10-25 00:15", 3) == [
            "2026-10-25 00:30", "2026-10-25 01:00", "2026-10-25 01:30",
        ]  # fmt: skip
        assert occurrences(cron, "2026-03-29 00:45", 2) == ["2026-03-29 01:00", "2026-03-29 01:30"]

    def test_every_other_hour_goes_by_the_clock_as_it_is(self) -> None:
        """Given a step after a star; the same hours as a range are as they are by name."""
        star, range_ = Cron("0 */2 * * *", BERLIN), Cron("0 0-23/2 * * *", BERLIN)
        # midnight, then 02:00, which there is not, or twice, then 04:00
        assert occurrences(star, "2026-03-28 22:30", 2) == ["2026-03-28 23:00", "2026-03-29 02:00"]
        assert occurrences(star, "2026-10-24 21:30", 4) == [
            "2026-10-24 22:00", "2026-10-25 00:00", "2026-10-25 01:00", "2026-10-25 03:00",
        ]  # fmt: skip
        assert occurrences(range_, "2026-03-28 22:30", 3) == [
            "2026-03-28 23:00", "2026-03-29 01:00", "2026-03-29 02:00",
        ]  # fmt: skip
        assert occurrences(range_, "2026-10-24 21:30", 3) == [
            "2026-10-24 22:00", "2026-10-25 00:00", "2026-10-25 03:00",
        ]  # fmt: skip

    def test_with_seconds_the_clock_is_taken_as_it_is(self) -> None:
        cron = Cron("0 30 2 * * *", BERLIN)
        assert occurrences(cron, "2026-03-28 12:00", 1) == ["2026-03-30 00:30"]
        found = occurrences(cron, "2026-10-24 12:00", 2)
        assert found == ["2026-10-25 00:30", "2026-10-25 01:30"]


class TestDue:
    START = datetime(2026, 1, 1)

    def due(self, expression: str, seconds: float) -> Due:
        return Cron(expression).due(self.START, self.START + timedelta(seconds=seconds))

    def at(self, seconds: int) -> datetime:
        return self.START + timedelta(seconds=seconds)

    def test_in_time_stands_for_itself(self) -> None:
        assert self.due("* * * * *", 0) == Due(self.START, 0, self.at(60))
        assert self.due("* * * * *", 59.9) == Due(self.START, 0, self.at(60))

    def test_the_latest_stands_for_those_that_were_missed(self) -> None:
        assert self.due("* * * * *", 60) == Due(self.at(60), 1, self.at(120))
        assert self.due("* * * * *", 3700) == Due(self.at(3660), 61, self.at(3720))

    @pytest.mark.parametrize("rest", [0, 0.5])
    def test_so_many_are_not_counted_and_the_latest_is_found_all_the_same(
        self, rest: float
    ) -> None:
        days = 86_400 * 30
        due = self.due("* * * * * *", days + rest)
        assert due == Due(self.at(days), MOST_COUNTED, self.at(days + 1))

    def test_where_the_counting_ends_nothing_is_lost(self) -> None:
        for more in (-1, 0, 1, 2):
            due = self.due("* * * * * *", MOST_COUNTED + more)
            assert (due.occurrence, due.next) == (
                self.at(MOST_COUNTED + more), self.at(MOST_COUNTED + more + 1),
            )  # fmt: skip
            assert due.skipped == MOST_COUNTED + min(more, 0)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "Wrong number of fields"),
        ("* * * *", "Wrong number of fields"),
        ("61 * * * *", "Bad minute"),
        ("* * * * MOON", "Bad day-of-week"),
        ("0 0 32 * *", "is no cron expression: Bad day-of-month"),
        ("0 0 0 * *", "is no cron expression: Bad day-of-month"),
        ("0 0 30 2 *", "cron: has no occurrence: no month that it names has such a day"),
        ("0 0 0 31 FEB,apr *", "cron: has no occurrence: no month that it names has such a day"),
        ("@daily", "Wrong number of fields"),
        ("*," * 200 + "* * * * *", "must have 255 characters at most"),
    ],
)
def test_refuses_what_is_no_expression(expression: str, said: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Cron(expression)
    assert list(caught.value.errors) == ["cron"]
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "zone",
    [
        "", "Mars", "Europe", "../etc/passwd", "/etc/passwd", "U\0TC", "A" * 300, "localtime",
        "right/Europe/Berlin", "posix/Europe/Berlin", "posix/UTC", "Factory",
    ],
)  # fmt: skip
def test_refuses_what_is_no_zone(zone: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Cron("* * * * *", zone)
    assert caught.value.errors == {"timeZone": "must be a time zone such as Europe/Berlin"}


def test_says_so_when_there_is_none_any_more() -> None:
    assert Cron("* * */20 * 1L").after(datetime(2026, 1, 1)) is None
    assert Cron("* * * * *").after(datetime(9999, 12, 31, 23, 59)) is None


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("0 9 * * 1-5", "At 09:00 on Monday through Friday"),
        ("*/2 * * * *", "Every 2nd minute of every hour"),
        ("*/21 * * * *", "Every 21st minute of every hour"),
        ("*/2 * * * * *", "Every 2nd second of every minute"),
        ("1-10 * * * * *", "Every second from 1 through 10 of every minute"),
        ("0 */2 * * *", "At the start of every 2nd hour"),
        ("0 9-17 * * *", "At the start of every hour from 9 through 17"),
        ("0 0 1 */3 *", "At 00:00 on the first day of every 3rd month"),
        ("0 0 22 * *", "At 00:00 on the 22nd day of every month"),
        ("0 0 11,23,31 * *", "At 00:00 on the 11th, the 23rd, and the 31st day of the month"),
        ("0 0 * * MON#2", "At 00:00 on the second Monday of the month"),
    ],
)
def test_says_what_it_means(expression: str, said: str) -> None:
    assert Cron(expression).sentence == said


_FIELD = st.text("0123456789*/-,L#WMONJAN", min_size=1, max_size=6)


@given(
    st.lists(_FIELD, min_size=5, max_size=6).map(" ".join) | st.text(max_size=20),
    st.sampled_from([BERLIN, "UTC", "Australia/Lord_Howe", "America/St_Johns"]),
    st.datetimes(datetime(2020, 1, 1), datetime(2037, 1, 1)),
)
def test_whatever_is_given_is_refused_or_goes_forward(
    expression: str, zone: str, time: datetime
) -> None:
    try:
        cron = Cron(expression, zone)
    except PayloadError:
        return
    assert isinstance(cron.sentence, str)
    after = cron.after(time)
    if after is not None:
        assert after > time
        due = cron.due(after, after)
        assert (due.occurrence, due.skipped) == (after, 0)
        assert due.next is None or due.next > after
