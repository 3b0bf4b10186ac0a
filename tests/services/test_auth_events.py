"""auth_events: alone on a real SQLite database, and over HTTP with its events."""

from __future__ import annotations

import json
import logging
import sqlite3
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import eventlet
import pytest
import requests
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from argon2 import PasswordHasher, extract_parameters
from nameko.containers import ServiceContainer
from nameko.testing.services import worker_factory
from nameko.testing.utils import get_extension
from sqlalchemy import URL, Engine, select, update
from sqlalchemy.orm import Session
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

from services.auth_events import AuthEventsService, passwords
from services.auth_events.models import Base, Company, User, UserSession
from services.auth_events.passwords import Password
from services.auth_events.schemas import LoginSchema, RegisterSchema
from services.auth_events.service import SESSION_SECONDS
from shared.contracts import contracts
from shared.database import make_engine
from shared.errors import DispatchError
from shared.store.migrate import service_migrations, upgrade
from shared.web import Problem, WebServer
from tests.support.waiting import wait_until

PASSWORD = "correct horse 🐎"
CHEAP = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)

ADA: dict[str, Any] = {
    "email": "ada@acme.example",
    "password": PASSWORD,
    "first_name": "Ada",
    "last_name": "Lovelace",
}


@pytest.fixture(autouse=True)
def _cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hasher(monkeypatch, CHEAP)


def use_hasher(monkeypatch: pytest.MonkeyPatch, hasher: PasswordHasher) -> None:
    monkeypatch.setattr(passwords, "_hasher", hasher)
    monkeypatch.setattr(passwords, "_NOBODYS", passwords._nobodys())


class House:
    """The service and its database; each request is answered by a worker of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.dispatch = Mock(return_value="message-1")

    def register(self, **fields: Any) -> Any:
        body = RegisterSchema().load({**ADA, **fields})
        return self._work(lambda service: service.register(request(), body))

    def login(self, email: str = ADA["email"], password: str = PASSWORD, **headers: str) -> Any:
        body = LoginSchema().load({"email": email, "password": password})
        return self._work(lambda service: service.login(request(**headers), body))

    def logout(self, token: str | None) -> Any:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self._work(lambda service: service.logout(request(**headers)))

    def session(self, token: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._work(lambda service: service.get_session(token))
        return found

    def rows(self, model: type[Base]) -> list[Any]:
        with Session(self.engine, expire_on_commit=False) as db:
            return list(db.scalars(select(model)).all())

    def role(self, email: str, **company: Any) -> str:
        _, answer = self.register(email=email, **company)
        role: str = answer["user"]["role"]
        return role

    def dispatched(self, event_type: str) -> list[dict[str, Any]]:
        calls = [each.args for each in self.dispatch.call_args_list]
        return [payload for dispatched, payload in calls if dispatched == event_type]

    def execute(self, statement: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(statement)

    def _work(self, task: Any) -> Any:
        with Session(self.engine) as db:
            return task(worker_factory(AuthEventsService, db=db, dispatch=self.dispatch))


def request(**headers: str) -> Request:
    environ = EnvironBuilder(
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        environ_overrides={"REMOTE_ADDR": "192.0.2.7"},
    )
    return Request(environ.get_environ())


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    engine = make_engine(URL.create("sqlite", database=str(tmp_path / "a.db")), eventlet.sleep)
    upgrade(engine, service_migrations("auth_events", Base))
    yield House(engine)
    engine.dispose()


class TestRegister:
    def test_creates_the_user(self, house: House) -> None:
        status, answer = house.register(company_name="Acme", company_domain="acme.example")
        assert status == 201
        assert answer["message_id"] == "message-1"
        shown = answer["user"]
        assert uuid.UUID(shown["user_id"]).version == 4
        assert shown == {
            "user_id": shown["user_id"],
            "email": "ada@acme.example",
            "first_name": "Ada",
            "last_name": "Lovelace",
            "role": "admin",
            "company_name": "Acme",
            "company_domain": "acme.example",
        }
        (user,) = house.rows(User)
        assert {name: getattr(user, name) for name in shown if name != "user_id"} == {
            name: value for name, value in shown.items() if name != "user_id"
        }
        assert user.id == shown["user_id"]

    def test_dispatches_in_the_same_transaction(self, house: House) -> None:
        _, answer = house.register()
        ((event_type, payload), options) = house.dispatch.call_args
        assert event_type == "user.registered"
        assert payload == answer["user"]
        assert isinstance(options["session"], Session)
        contracts.check("auth_events", event_type, payload, {"version": 1})

    def test_creates_nothing_when_the_dispatch_fails(self, house: House) -> None:
        house.dispatch.side_effect = DispatchError("no")
        with pytest.raises(DispatchError):
            house.register(company_name="Acme")
        assert house.rows(User) == house.rows(Company) == []

    def test_keeps_the_password_as_a_hash(self, house: House) -> None:
        house.register()
        (user,) = house.rows(User)
        assert user.password_hash.startswith("$argon2id$")
        assert CHEAP.verify(user.password_hash, PASSWORD)

    @pytest.mark.parametrize("email", ["ada@acme.example", "Ada@ACME.example"])
    def test_refuses_an_address_twice(self, house: House, email: str) -> None:
        house.register(company_name="Acme")
        with pytest.raises(Problem) as raised:
            house.register(email=email, company_name="Other")
        assert (raised.value.status, raised.value.type) == (409, "/problems/email-taken")
        assert len(house.rows(User)) == len(house.rows(Company)) == 1
        assert len(house.dispatched("user.registered")) == 1

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({"company_domain": "acme.example"}, {"company_domain": "ACME.example"}),
            (
                {"company_name": "Acme", "company_domain": "acme.example"},
                {"company_name": "Acme Ltd", "company_domain": "acme.example"},
            ),
            ({"company_name": "Straße AG"}, {"company_name": " STRASSE AG"}),
            ({"company_name": "Cafe\u0301"}, {"company_name": "CAFÉ"}),
        ],
    )
    def test_makes_the_first_of_a_company_its_admin(
        self, house: House, first: dict[str, Any], second: dict[str, Any]
    ) -> None:
        assert house.role("a@x", **first) == "admin"
        assert house.role("b@x", **second) == "user"

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({"company_name": "Acme"}, {"company_name": "Acme", "company_domain": "acme.example"}),
            ({"company_name": "acme.example"}, {"company_domain": "acme.example"}),
            ({"company_name": "Cafe"}, {"company_name": "Café"}),
        ],
    )
    def test_tells_companies_apart(
        self, house: House, first: dict[str, Any], second: dict[str, Any]
    ) -> None:
        assert house.role("a@x", **first) == "admin"
        assert house.role("b@x", **second) == "admin"

    @pytest.mark.parametrize("company", [{}, {"company_name": None, "company_domain": None}])
    def test_makes_nobody_admin_of_no_company(self, house: House, company: Any) -> None:
        assert house.role("a@x", **company) == "user"
        assert house.rows(Company) == []


class TestRegisterSchema:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("email", "josé@例え.jp"),
            ("email", "o'brien+tag@mail.example"),
            ("email", "x" * 64 + "@" + ".".join(["y" * 62] * 3)),
            ("password", "8 chars!"),
            ("password", "p" * 1024),
            ("password", "\u202e\n\tsecret"),
            ("first_name", "Þórdís"),
            ("first_name", "محمد"),
            ("last_name", "O'Neill-Ng 三世"),
            ("last_name", "x" * 100),
            ("company_name", None),
            ("company_domain", "bücher.example"),
        ],
    )
    def test_takes(self, field: str, value: Any) -> None:
        loaded = RegisterSchema().load({**ADA, field: value})[field]
        assert loaded == (Password(value) if field == "password" else value)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("email", "ada"),
            ("email", "@acme.example"),
            ("email", "ada@"),
            ("email", "a@b@c"),
            ("email", "a b@c.example"),
            ("email", "ada@acme.example\n"),
            ("email", "\rada@acme.example"),
            ("email", "ada@acme.example\r\nBcc: all@acme.example"),
            ("email", "ada\u2028@acme.example"),
            ("email", "ada\x7f@acme.example"),
            ("email", "x" * 150 + "@" + "y" * 104),
            ("email", ""),
            ("email", None),
            ("email", 5),
            ("email", ["ada@acme.example"]),
            ("password", "7 chars"),
            ("password", "p" * 1025),
            ("password", None),
            ("password", 12345678),
            ("first_name", ""),
            ("first_name", " \u3000"),
            ("first_name", "x" * 101),
            ("first_name", "Ada\n"),
            ("last_name", "\x1b[31m"),
            ("last_name", 5),
            ("company_name", "x" * 101),
            ("company_domain", "a b.example"),
            ("company_domain", "https://acme.example"),
            ("company_domain", ""),
            ("role", "admin"),
            ("user_id", "1"),
        ],
    )
    def test_refuses(self, field: str, value: Any) -> None:
        assert list(RegisterSchema().validate({**ADA, field: value})) == [field]

    def test_wants(self) -> None:
        assert set(RegisterSchema().validate({})) == set(ADA)

    def test_spells_alike_what_means_the_same(self) -> None:
        loaded = RegisterSchema().load(
            {
                **ADA,
                "email": "JOSE\u0301@Acme.Example",
                "first_name": " Jose\u0301 ",
                "company_domain": "Acme.EXAMPLE",
            }
        )
        assert loaded["email"] == "josé@acme.example"
        assert loaded["first_name"] == "José"
        assert loaded["company_domain"] == "acme.example"


class TestLogin:
    def test_opens_a_session(self, house: House) -> None:
        _, registered = house.register()
        status, answer = house.login("ADA@acme.example")
        assert status == 200
        assert answer == {
            "access_token": answer["access_token"],
            "token_type": "Bearer",
            "expires_in": SESSION_SECONDS,
            "user_id": registered["user"]["user_id"],
        }
        assert len(answer["access_token"]) >= 43
        (session,) = house.rows(UserSession)
        assert session.user_id == answer["user_id"]
        assert session.token_hash == sha256(answer["access_token"].encode()).hexdigest()
        assert session.expires_at - session.created_at == timedelta(seconds=SESSION_SECONDS)
        assert session.revoked_at is None

    def test_dispatches_in_the_same_transaction(self, house: House) -> None:
        _, registered = house.register()
        house.login(User_Agent="curl/8.5")
        assert isinstance(house.dispatch.call_args.kwargs["session"], Session)
        (payload,) = house.dispatched("user.logged_in")
        (session,) = house.rows(UserSession)
        assert payload == {
            "user_id": registered["user"]["user_id"],
            "email": "ada@acme.example",
            "session_id": session.id,
            "occurred_at": session.created_at.isoformat(timespec="milliseconds") + "+00:00",
            "ip_address": "192.0.2.7",
            "user_agent": "curl/8.5",
        }
        contracts.check("auth_events", "user.logged_in", payload, {"version": 1})

    def test_creates_nothing_when_the_dispatch_fails(self, house: House) -> None:
        house.register()
        house.dispatch.side_effect = DispatchError("no")
        with pytest.raises(DispatchError):
            house.login()
        assert house.rows(UserSession) == []

    @pytest.mark.parametrize(
        ("sent", "told"),
        [("x" * 600, "x" * 512), ("a\x00b\x1bc", "abc"), ("", None), ("ÿ", "ÿ")],
    )
    def test_tells_what_is_fit_of_the_user_agent(
        self, house: House, sent: str, told: str | None
    ) -> None:
        house.register()
        house.login(User_Agent=sent)
        (payload,) = house.dispatched("user.logged_in")
        assert payload["user_agent"] == told
        contracts.check("auth_events", "user.logged_in", payload, {"version": 1})

    def test_answers_alike_to_wrong_password_and_unknown_address(self, house: House) -> None:
        house.register()
        problems = []
        for email, password in ((ADA["email"], "wrong"), ("nobody@acme.example", PASSWORD)):
            with pytest.raises(Problem) as raised:
                house.login(email, password)
            problems.append(raised.value.as_response())
        assert problems[0].status_code == 401
        assert problems[0].data == problems[1].data
        assert problems[0].headers == problems[1].headers
        assert house.rows(UserSession) == house.dispatched("user.logged_in") == []

    @pytest.mark.parametrize("hasher", [CHEAP, PasswordHasher()], ids=["cheap", "real"])
    def test_works_as_hard_for_an_unknown_address(
        self, house: House, monkeypatch: pytest.MonkeyPatch, hasher: PasswordHasher
    ) -> None:
        use_hasher(monkeypatch, hasher)
        house.register()
        verify = Mock(wraps=hasher.verify)
        monkeypatch.setattr(passwords, "_hasher", Mock(wraps=hasher, verify=verify))
        for email in (ADA["email"], "nobody@acme.example"):
            with pytest.raises(Problem):
                house.login(email, "wrong")
        (known, unknown) = [extract_parameters(each.args[0]) for each in verify.call_args_list]
        assert known == unknown

    def test_knows_a_password_however_it_was_typed(self, house: House) -> None:
        house.register(password="cafe\u0301 du coin")
        assert house.login(password="café du coin")[0] == 200

    def test_renews_an_outdated_hash(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        house.register()
        stronger = PasswordHasher(time_cost=2, memory_cost=16, parallelism=1)
        use_hasher(monkeypatch, stronger)
        house.login()
        (user,) = house.rows(User)
        assert not stronger.check_needs_rehash(user.password_hash)
        assert house.login()[0] == 200
        assert house.rows(User)[0].password_hash == user.password_hash

    def test_holds_no_transaction_while_it_hashes(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        house.register()
        writers = []

        def write_meanwhile(*args: Any) -> Any:
            with sqlite3.connect(house.engine.url.database or "", timeout=0) as connection:
                connection.execute("BEGIN IMMEDIATE")
                writers.append(1)
            connection.close()
            return real(*args)

        real = passwords._in_thread
        monkeypatch.setattr(passwords, "_in_thread", write_meanwhile)
        house.login()
        house.register(email="bob@acme.example")
        use_hasher(monkeypatch, PasswordHasher(time_cost=2, memory_cost=16, parallelism=1))
        house.login()
        assert len(writers) == 4


class TestGetSession:
    def test_says_who_is_logged_in(self, house: House) -> None:
        house.register()
        token = house.login()[1]["access_token"]
        (session,) = house.rows(UserSession)
        assert house.session(token) == {
            "session_id": session.id,
            "user_id": session.user_id,
            "email": "ada@acme.example",
            "expires_at": session.expires_at.isoformat(timespec="milliseconds") + "+00:00",
        }

    def test_knows_no_session_that_is_over(self, house: House) -> None:
        house.register()
        revoked, expired = (house.login()[1]["access_token"] for _ in range(2))
        house.logout(revoked)
        house.execute(update(UserSession).values(expires_at=datetime(2020, 1, 1)))
        assert [house.session(token) for token in (revoked, expired, "none", "")] == [None] * 4


class TestLogout:
    @pytest.fixture
    def token(self, house: House) -> str:
        house.register()
        token: str = house.login()[1]["access_token"]
        return token

    def test_revokes_the_session(self, house: House, token: str) -> None:
        assert house.logout(token) == (204, None)
        (session,) = house.rows(UserSession)
        assert session.revoked_at >= session.created_at

    def test_dispatches_in_the_same_transaction(self, house: House, token: str) -> None:
        house.logout(token)
        assert isinstance(house.dispatch.call_args.kwargs["session"], Session)
        (payload,) = house.dispatched("user.logged_out")
        (session,) = house.rows(UserSession)
        assert payload == {
            "user_id": session.user_id,
            "email": "ada@acme.example",
            "session_id": session.id,
            "occurred_at": session.revoked_at.isoformat(timespec="milliseconds") + "+00:00",
        }
        contracts.check("auth_events", "user.logged_out", payload, {"version": 1})

    def test_revokes_nothing_when_the_dispatch_fails(self, house: House, token: str) -> None:
        house.dispatch.side_effect = DispatchError("no")
        with pytest.raises(DispatchError):
            house.logout(token)
        assert house.rows(UserSession)[0].revoked_at is None

    def test_leaves_other_sessions_open(self, house: House, token: str) -> None:
        other = house.login()[1]["access_token"]
        house.logout(token)
        assert house.logout(other) == (204, None)

    @pytest.mark.parametrize("token", [None, "unknown"])
    def test_refuses_without_a_session(self, house: House, token: str | None) -> None:
        with pytest.raises(Problem) as raised:
            house.logout(token)
        assert raised.value.status == 401
        challenge = 'Bearer error="invalid_token"' if token else "Bearer"
        assert raised.value.headers["WWW-Authenticate"] == challenge

    def test_refuses_a_revoked_session(self, house: House, token: str) -> None:
        house.logout(token)
        revoked_at = house.rows(UserSession)[0].revoked_at
        with pytest.raises(Problem, match="401"):
            house.logout(token)
        assert house.rows(UserSession)[0].revoked_at == revoked_at
        assert len(house.dispatched("user.logged_out")) == 1

    def test_refuses_an_expired_session(self, house: House, token: str) -> None:
        past = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=1)
        begun = past - timedelta(seconds=SESSION_SECONDS)
        house.execute(update(UserSession).values(created_at=begun, expires_at=past))
        with pytest.raises(Problem, match="401"):
            house.logout(token)

    def test_takes_no_hash_for_a_token(self, house: House, token: str) -> None:
        with pytest.raises(Problem, match="401"):
            house.logout(house.rows(UserSession)[0].token_hash)


class TestPasswords:
    def test_are_shown_nowhere(self) -> None:
        password = Password("do not show")
        assert "show" not in f"{password} {password!r} {[password]}"

    @pytest.mark.parametrize("schema", [RegisterSchema, LoginSchema])
    def test_are_not_in_what_is_loaded_or_refused(self, schema: Any) -> None:
        sent = {**ADA, "password": "do not show"}
        loaded = schema(unknown="exclude").load(sent)
        assert "show" not in repr(loaded)
        assert "show" not in repr(schema().validate({**sent, "password": "show" * 300}))

    def test_are_hashed_off_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        use_hasher(monkeypatch, PasswordHasher())
        hashing = eventlet.spawn(passwords.hash_password, Password(PASSWORD))
        turns = 0
        while not hashing.dead:
            eventlet.sleep(0)
            turns += 1
        assert turns > 20

    def test_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        running: set[str] = set()
        most = 0

        def hash_slowly(_function: Any, password: str) -> str:
            nonlocal most
            running.add(password)
            most = max(most, len(running))
            eventlet.sleep(0)
            running.remove(password)
            return password

        monkeypatch.setattr(passwords.tpool, "execute", hash_slowly)
        pool = eventlet.GreenPool()
        texts = [str(number) for number in range(20)]
        assert list(pool.imap(passwords.hash_password, map(Password, texts))) == texts
        assert most == passwords.HASHES_AT_A_TIME


class Site:
    """The service over HTTP."""

    def __init__(self, container: ServiceContainer, data_dir: Path) -> None:
        address = get_extension(container, WebServer).address
        self.url = f"http://{address.address}:{address.port}"
        self.data_dir = data_dir

    def post(self, path: str, body: Any = None, **headers: str) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, headers=headers, timeout=20)

    def register(self, **fields: Any) -> requests.Response:
        return self.post("/auth/register", {**ADA, **fields})

    def login(self, password: str = PASSWORD) -> requests.Response:
        return self.post("/auth/login", {"email": ADA["email"], "password": password})

    def logout(self, token: str) -> requests.Response:
        return self.post("/auth/logout", Authorization=f"Bearer {token}")

    def query(self, database: str, sql: str) -> list[Any]:
        connection = sqlite3.connect(self.data_dir / f"{database}.db", timeout=5)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def events(self) -> list[tuple[str, str, dict[str, Any]]]:
        """What the message log holds: id, type and payload, in the order of dispatch."""
        rows = self.query("queue", "SELECT id, message_type, payload FROM queue_messages")
        return sorted((id_, type_, json.loads(payload)) for id_, type_, payload in rows)

    def wait_for_events(self, count: int) -> list[tuple[str, str, dict[str, Any]]]:
        wait_until(lambda: len(self.events()) >= count, 20, f"{count} events in the log")
        return self.events()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    config = {"AUTH_EVENTS_ADDRESS": "127.0.0.1:0", "QUEUE_DATA_DIR": str(tmp_path)}
    container = ServiceContainer(AuthEventsService, config)
    container.start()
    yield Site(container, tmp_path)
    container.stop()


class TestOverHttp:
    def test_registers_logs_in_and_out(self, site: Site) -> None:
        registered = site.register(email="Ada@Acme.example", company_name="Ångström & Søn")
        assert registered.status_code == 201
        logged_in = site.login()
        assert logged_in.status_code == 200
        assert logged_in.headers["Cache-Control"] == "no-store"
        token = logged_in.json()["access_token"]
        assert site.logout(token).status_code == 204
        again = site.logout(token)
        assert again.status_code == 401
        assert again.headers["WWW-Authenticate"].startswith("Bearer")
        # and each was told of, once
        events = site.wait_for_events(3)
        kinds = ["user.registered", "user.logged_in", "user.logged_out"]
        assert [type_ for _, type_, _ in events] == kinds
        assert events[0][0] == registered.json()["message_id"]
        assert events[0][2] == registered.json()["user"]
        assert events[1][2]["ip_address"] == "127.0.0.1"
        assert events[1][2]["session_id"] == events[2][2]["session_id"]
        assert events[1][2]["occurred_at"] < events[2][2]["occurred_at"]
        assert {each[2]["user_id"] for each in events} == {logged_in.json()["user_id"]}

    def test_leaves_nothing_in_the_outbox(self, site: Site) -> None:
        site.register()
        site.wait_for_events(1)
        outbox = "SELECT count(*) FROM auth_events_outbox"
        wait_until(lambda: site.query("auth_events", outbox) == [(0,)], 20, "an empty outbox")

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("/auth/register", {**ADA, "role": "admin"}, 422),
            ("/auth/register", {**ADA, "email": "ada@acme.example\nBcc: x@y"}, 422),
            ("/auth/register", {**ADA, "password": "short"}, 422),
            ("/auth/register", [], 400),
            ("/auth/login", {"email": "nobody@acme.example", "password": "wrong"}, 401),
            ("/auth/login", {"email": "nobody@acme.example"}, 422),
            ("/auth/logout", None, 401),
            ("/auth/nowhere", None, 404),
        ],
    )
    def test_answers_bad_input(self, site: Site, path: str, body: Any, status: int) -> None:
        answer = site.post(path, body)
        assert answer.status_code == status
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert site.query("auth_events", "SELECT * FROM auth_events_users") == []
        assert site.events() == []

    def test_gives_an_address_to_one_of_many_at_once(self, site: Site) -> None:
        asking = [eventlet.spawn(site.register) for _ in range(5)]
        assert sorted(each.wait().status_code for each in asking) == [201, 409, 409, 409, 409]
        assert len(site.wait_for_events(1)) == 1

    def test_makes_one_of_many_at_once_the_admin(self, site: Site) -> None:
        asking = [
            eventlet.spawn(site.register, email=f"{number}@x", company_name="Acme")
            for number in range(5)
        ]
        roles = sorted(each.wait().json()["user"]["role"] for each in asking)
        assert roles == ["admin", "user", "user", "user", "user"]

    def test_is_healthy_while_the_database_answers(self, site: Site) -> None:
        answer = requests.get(f"{site.url}/health", timeout=10)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})

    def test_tells_secrets_to_nobody(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        site.register()
        token = site.login().json()["access_token"]
        site.login("do not show")
        site.logout(token)
        site.wait_for_events(3)
        site.query("auth_events", "PRAGMA wal_checkpoint")
        kept = b"".join(file.read_bytes() for file in site.data_dir.glob("*.db*"))
        assert b"Lovelace" in kept
        for secret in (PASSWORD, token, "do not show"):
            assert secret not in caplog.text
            assert secret.encode() not in kept
        assert "$argon2" not in caplog.text
        assert not [event for event in site.events() if "$argon2" in str(event)]

    def test_tells_no_secrets_when_the_database_fails(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        site.query("auth_events", "DROP TABLE auth_events_users")
        answer = site.register()
        assert answer.status_code == 503
        assert "no such table" in caplog.text
        assert "no such table" not in answer.text
        assert PASSWORD not in caplog.text
        assert "$argon2" not in caplog.text


def test_the_migrations_make_the_tables_of_the_models(house: House) -> None:
    with house.engine.connect() as connection:
        ours = {"include_object": lambda _, name, kind, *__: not name.endswith("_version")}
        context = MigrationContext.configure(connection, opts=ours)
        assert compare_metadata(context, Base.metadata) == []
