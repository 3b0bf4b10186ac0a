"""The company service alone, on a real SQLite database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import permutations
from pathlib import Path
from typing import Any

import eventlet
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from nameko.testing.services import worker_factory
from sqlalchemy import URL, Engine, StaticPool, select
from sqlalchemy.orm import Session

from services.company import CompanyService
from services.company.models import Activity, Base, Company, Kind, User, UserSession
from shared.database import make_engine
from shared.errors import Reject
from shared.events import Message
from shared.store.migrate import service_migrations, upgrade
from shared.types import Priority
from shared.web import Problem

START = datetime(2026, 3, 1, 12)


@dataclass(frozen=True, eq=False)
class Event:
    """A message as it would reach the service."""

    id: str
    type: str
    payload: dict[str, Any]
    created_at: datetime = START

    @property
    def message(self) -> Message:
        return Message(
            id=self.id,
            queue="user-events",
            type=self.type,
            subscriber="company.handler",
            attempt=1,
            priority=Priority.NORMAL,
            metadata={},
            created_at=self.created_at,
        )


def registered(id: str = "m1", **payload: Any) -> Event:
    person = {"user_id": "u1", "email": "ada@acme.example", "first_name": "Ada", "last_name": "L"}
    return Event(id, "user.registered", {**person, **payload})


def logged_in(id: str = "m2", second: int = 10, **payload: Any) -> Event:
    return _activity(id, "user.logged_in", second, payload)


def logged_out(id: str = "m3", second: int = 20, **payload: Any) -> Event:
    return _activity(id, "user.logged_out", second, payload)


def _activity(id: str, type: str, second: int, payload: dict[str, Any]) -> Event:
    at = (START + timedelta(seconds=second)).isoformat() + "Z"
    person = {"user_id": "u1", "email": "ada@acme.example", "occurred_at": at}
    return Event(id, type, {**person, **payload})


class House:
    """The service and its database; each event is handled by a worker of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        Base.metadata.create_all(engine)

    def empty(self) -> None:
        with self.engine.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(table.delete())

    def worker(self, db: Session, message: Message | None = None) -> CompanyService:
        return worker_factory(CompanyService, db=db, message=message)

    def handle(self, *events: Event) -> None:
        for event in events:
            with Session(self.engine) as db:
                handler = "handle_" + event.type.replace(".", "_")
                getattr(self.worker(db, event.message), handler)(event.payload)

    def user(self, user_id: str = "u1") -> dict[str, Any]:
        with Session(self.engine) as db:
            user = self.worker(db).get_user(user_id)
            assert user is not None
            return user

    def list_users(self, **arguments: Any) -> list[str]:
        with Session(self.engine) as db:
            return [user["user_id"] for user in self.worker(db).list_users(**arguments)]

    def rows(self, model: type[Base]) -> list[Any]:
        with Session(self.engine, expire_on_commit=False) as db:
            return list(db.scalars(select(model)).all())

    def state(self) -> Any:
        """Everything that is known, but for the numbers that rows were given."""
        with Session(self.engine) as db:
            users = self.worker(db).list_users(limit=1000)
            companies = sorted((c.identity, c.name, c.domain) for c in db.scalars(select(Company)))
            sessions = sorted(
                (s.user_id, s.session_id, s.opened_at, s.closed_at, s.ip_address)
                for s in db.scalars(select(UserSession))
            )
            activity = sorted((a.message_id, a.kind) for a in db.scalars(select(Activity)))
        return users, companies, sessions, activity


def in_memory() -> House:
    url = URL.create("sqlite", database=":memory:")
    return House(make_engine(url, eventlet.sleep, poolclass=StaticPool))


@pytest.fixture
def house() -> Iterator[House]:
    house = in_memory()
    yield house
    house.engine.dispose()


@pytest.fixture(scope="module")
def reused() -> Iterator[House]:
    """A house for tests that look at many histories, one after the other."""
    house = in_memory()
    yield house
    house.engine.dispose()


def state_after(house: House, events: Sequence[Event]) -> Any:
    house.empty()
    house.handle(*events)
    return house.state()


class TestRegistration:
    def test_creates_the_user_and_the_company(self, house: House) -> None:
        house.handle(registered(role="admin", company_name="Acme", company_domain="ACME.example"))
        assert house.user() == {
            "user_id": "u1",
            "email": "ada@acme.example",
            "first_name": "Ada",
            "last_name": "L",
            "role": "admin",
            "company": {"name": "Acme", "domain": "acme.example"},
            "last_login_at": None,
            "open_sessions": 0,
        }

    def test_needs_no_company_and_no_role(self, house: House) -> None:
        house.handle(registered())
        assert house.user()["company"] is None
        assert house.user()["role"] is None
        assert house.rows(Company) == []

    def test_takes_blank_names_of_companies_for_none(self, house: House) -> None:
        house.handle(registered(company_name="  ", company_domain=" "))
        assert house.user()["company"] is None

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"company_domain": "Acme.Example"}, {"company_domain": "acme.example"}),
            ({"company_name": "Größe"}, {"company_name": "GRÖSSE"}),
            ({"company_name": "Caf\u00e9"}, {"company_name": "Cafe\u0301"}),
            (
                {"company_domain": "acme.example", "company_name": "Acme"},
                {"company_domain": "acme.example", "company_name": "Acme Ltd"},
            ),
        ],
    )
    def test_brings_colleagues_together(
        self, house: House, one: dict[str, str], other: dict[str, str]
    ) -> None:
        house.handle(registered(**one), registered("m2", user_id="u2", **other))
        assert len(house.rows(Company)) == 1
        assert house.user("u1")["company"] == house.user("u2")["company"]

    def test_keeps_companies_of_one_name_and_two_domains_apart(self, house: House) -> None:
        house.handle(
            registered(company_name="Acme", company_domain="acme.example"),
            registered("m2", user_id="u2", company_name="Acme", company_domain="acme.test"),
        )
        assert len(house.rows(Company)) == 2

    def test_of_the_same_user_again_is_right_in_any_order(self, reused: House) -> None:
        old = registered("m1", last_name="Byron", company_name="Acme")
        new = replace(
            registered("m2", last_name="Lovelace"), created_at=START + timedelta(seconds=1)
        )
        assert (
            state_after(reused, [old, new])
            == state_after(reused, [new, old])
            == state_after(reused, [new, old, new])
        )
        assert state_after(reused, [new, old])[0][0]["last_name"] == "Lovelace"
        assert state_after(reused, [new, old])[0][0]["company"] is None

    def test_lets_unknown_fields_pass(self, house: House) -> None:
        house.handle(registered(shoe_size=44))
        assert house.user()["first_name"] == "Ada"

    def test_that_breaks_its_contract_is_rejected(self, house: House) -> None:
        with pytest.raises(Reject, match="first_name"):
            house.handle(registered(first_name=None))
        assert house.rows(User) == []

    def test_finds_the_row_of_who_was_faster(self, house: House) -> None:
        house.handle(registered(company_name="Acme"))
        event = registered("m2", first_name="Augusta", company_name="Acme")
        with Session(house.engine) as db:
            real, looked_for = db.scalar, set()

            def blind_at_first(query: Any) -> Any:
                if (text := str(query)) in looked_for:
                    return real(query)
                looked_for.add(text)
                return None

            db.scalar = blind_at_first  # type: ignore[method-assign]
            house.worker(db, event.message).handle_user_registered(event.payload)
        assert len(looked_for) == 2
        assert house.user()["first_name"] == "Augusta"
        assert len(house.rows(User)) == len(house.rows(Company)) == 1

    def test_many_at_once_make_one_company(self, tmp_path: Path) -> None:
        url = URL.create("sqlite", database=str(tmp_path / "company.db"))
        house = House(make_engine(url, eventlet.sleep))
        events = [
            registered(f"m{n}", user_id=f"u{n % 10}", company_domain="acme.example")
            for n in range(40)
        ]
        workers = [eventlet.spawn(house.handle, event) for event in events]
        for worker in workers:
            worker.wait()
        assert len(house.rows(Company)) == 1
        assert len(house.rows(User)) == 10
        house.engine.dispose()


class TestSessions:
    @pytest.mark.parametrize("session", [{"session_id": "s1"}, {}])
    def test_are_right_in_every_order_and_however_often(
        self, reused: House, session: dict[str, str]
    ) -> None:
        events = [registered(company_name="Acme"), logged_in(**session), logged_out(**session)]
        wanted = state_after(reused, events)
        assert wanted[0][0]["open_sessions"] == 0
        assert wanted[0][0]["last_login_at"] == "2026-03-01T12:00:10.000Z"
        for order in set(permutations(events * 2)):
            assert state_after(reused, order) == wanted

    def test_are_open_from_login_to_logout(self, house: House) -> None:
        house.handle(registered(), logged_in(session_id="s1", ip_address="192.0.2.1"))
        assert house.user()["open_sessions"] == 1
        assert house.rows(UserSession)[0].ip_address == "192.0.2.1"
        house.handle(logged_out(session_id="s1"))
        assert house.user()["open_sessions"] == 0
        assert house.rows(UserSession)[0].closed_at == START + timedelta(seconds=20)

    def test_of_a_logout_before_its_login_are_closed(self, house: House) -> None:
        house.handle(logged_out(session_id="s1"))
        assert house.user()["open_sessions"] == 0
        house.handle(logged_in(session_id="s1"))
        assert house.user()["open_sessions"] == 0

    def test_stay_closed_when_the_clock_of_the_logout_was_slow(self, house: House) -> None:
        house.handle(logged_in(second=20, session_id="s1"), logged_out(second=10, session_id="s1"))
        assert house.user()["open_sessions"] == 0

    def test_of_other_users_are_not_touched(self, house: House) -> None:
        house.handle(
            logged_in("m1", session_id="s1"),
            logged_in("m2", session_id="s1", user_id="u2"),
            logged_out("m3", session_id="s1"),
        )
        assert house.user("u1")["open_sessions"] == 0
        assert house.user("u2")["open_sessions"] == 1

    def test_a_logout_that_names_none_closes_the_one_opened_last_before_it(
        self, house: House
    ) -> None:
        house.handle(
            logged_in("m1", 10, session_id="old"),
            logged_in("m2", 20, session_id="new"),
            logged_in("m3", 40, session_id="later"),
            logged_out("m4", 30),
        )
        closed = {s.session_id for s in house.rows(UserSession) if s.closed_at}
        assert closed == {"new"}

    def test_a_login_before_the_registration_is_not_lost(self, house: House) -> None:
        house.handle(logged_in(session_id="s1"))
        assert house.user()["email"] == "ada@acme.example"
        assert house.user()["first_name"] is None
        house.handle(registered())
        assert house.user()["first_name"] == "Ada"
        assert house.user()["open_sessions"] == 1
        assert house.user()["last_login_at"] == "2026-03-01T12:00:10.000Z"

    def test_an_older_login_does_not_take_the_last_one_back(self, house: House) -> None:
        house.handle(logged_in("m1", 10), logged_in("m2", 5))
        assert house.user()["last_login_at"] == "2026-03-01T12:00:10.000Z"

    def test_without_a_time_of_their_own_take_the_message_s(self, house: House) -> None:
        event = replace(logged_in(), created_at=START + timedelta(hours=1))
        house.handle(replace(event, payload={**event.payload, "occurred_at": None}))
        assert house.user()["last_login_at"] == "2026-03-01T13:00:00.000Z"

    def test_take_times_of_any_zone(self, house: House) -> None:
        house.handle(logged_in(occurred_at="2026-03-01T17:30:00.123456+05:30"))
        assert house.user()["last_login_at"] == "2026-03-01T12:00:00.123Z"

    def test_a_time_beyond_the_calendar_is_rejected(self, house: House) -> None:
        with pytest.raises(Reject, match="occurred_at"):
            house.handle(logged_in(occurred_at="0001-01-01T00:00:00+14:00"))

    def test_every_event_is_one_row_of_activity(self, house: House) -> None:
        house.handle(registered(), logged_in(), logged_in(), logged_out(), registered())
        kinds = sorted(row.kind for row in house.rows(Activity))
        assert kinds == sorted(Kind)


def open_in_the_end(events: Sequence[Event]) -> int:
    """What the sessions of one user come to, told as simply as it can be."""
    opened: dict[str, None] = {}
    seen, closed = set[str](), set[str]()
    for event in sorted(events, key=lambda each: (each.payload["occurred_at"], each.id)):
        name = event.payload.get("session_id")
        if event.type == "user.logged_in":
            name = name or event.id
            if name not in seen | closed:
                opened[name] = None
            seen.add(name)
        elif name:
            closed.add(name)
            opened.pop(name, None)
        elif opened:
            opened.popitem()
    return len(opened)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Event], list[Event]]:
    """Events of one user in two orders, the second with some of them twice."""
    count = draw(st.integers(1, 8))
    events = []
    for n in range(count):
        make = draw(st.sampled_from([logged_in, logged_out]))
        session = draw(st.sampled_from([None, None, "s1", "s2", "s3"]))
        second = draw(st.integers(10, 15))
        events.append(make(f"m{n}", second, session_id=session))
    again = draw(st.lists(st.sampled_from(events), max_size=3))
    return events, draw(st.permutations(events + again))


@given(history=histories())
@settings(max_examples=100, deadline=None)
def test_any_history_in_any_order_comes_out_the_same(
    reused: House, history: tuple[list[Event], list[Event]]
) -> None:
    events, shuffled = history
    state = state_after(reused, shuffled)
    assert state == state_after(reused, events)
    assert state[0][0]["open_sessions"] == open_in_the_end(events)


class TestUsers:
    def test_are_listed_in_pages(self, house: House) -> None:
        house.handle(*(registered(f"m{n}", user_id=f"u{n}") for n in range(5)))
        assert house.list_users(limit=2) == ["u0", "u1"]
        assert house.list_users(limit=2, after="u1") == ["u2", "u3"]
        assert house.list_users(limit=2, after="u3") == ["u4"]

    def test_are_listed_by_company(self, house: House) -> None:
        house.handle(
            registered("m1", company_domain="acme.example"),
            registered("m2", user_id="u2", company_domain="other.example"),
            registered("m3", user_id="u3"),
        )
        assert house.list_users(company_domain="ACME.example") == ["u1"]
        assert house.list_users(company_domain="nobody.example") == []

    @pytest.mark.parametrize("limit", [0, 1001, -1])
    def test_are_listed_up_to_a_limit(self, house: House, limit: int) -> None:
        with pytest.raises(ValueError, match="1 to 1000"):
            house.list_users(limit=limit)

    def test_unknown_ones_are_none(self, house: House) -> None:
        with Session(house.engine) as db:
            assert house.worker(db).get_user("nobody") is None


class TestHttp:
    def test_answers_with_a_user(self, house: House) -> None:
        house.handle(registered())
        with Session(house.engine) as db:
            answer = house.worker(db).show_user(None, user_id="u1")
        assert answer == (200, house.user())

    def test_answers_404_for_an_unknown_user(self, house: House) -> None:
        with Session(house.engine) as db, pytest.raises(Problem) as problem:
            house.worker(db).show_user(None, user_id="nobody")
        assert problem.value.status == 404

    def test_is_healthy_while_the_database_answers(self, house: House) -> None:
        with Session(house.engine) as db:
            assert house.worker(db).health(None) == (200, {"status": "ok"})


def test_the_migrations_make_the_tables_of_the_models(tmp_path: Path) -> None:
    engine = make_engine(URL.create("sqlite", database=str(tmp_path / "c.db")), eventlet.sleep)
    upgrade(engine, service_migrations("company", Base))
    with engine.connect() as connection:
        ours = {"include_object": lambda _, name, kind, *__: not name.endswith("_version")}
        context = MigrationContext.configure(connection, opts=ours)
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()
