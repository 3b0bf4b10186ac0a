"""The notifications service alone, on a real database and with real mail servers."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import string
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTP, SMTPUTF8, default
from pathlib import Path
from smtplib import quoteaddr
from typing import Any

import eventlet
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from eventlet.event import Event as Signal
from hypothesis import given, settings
from hypothesis import strategies as st
from nameko.testing.services import worker_factory
from sqlalchemy import URL, Engine, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from services.notifications import NotificationsService, episodes, outgoing, service, webhook
from services.notifications.letters import alert, welcome
from services.notifications.mail import (
    Mailer,
    MailRefusedError,
    MailUnavailableError,
    Server,
    make_mailer,
    recipient_of,
)
from services.notifications.models import AlertRecord, Base, MailRecord, Status
from services.notifications.schemas import NewUser, read_alert, read_new_user
from shared.contracts.user import UserRegistered
from shared.database import database_url, make_engine
from shared.errors import Reject
from shared.events import Message
from shared.settings import Address, load_settings
from shared.store.migrate import service_migrations, upgrade
from shared.testing.servers import MariaDBDatabase
from shared.types import Priority
from tests.support.waiting import wait_until

HERE = Path(__file__).parent
CERTIFICATE = HERE / "localhost.pem"
SENDER = "noreply@example.com"
MESSAGE_ID = "0198a6f0-0000-7000-8000-000000000001"


class MailServer:
    """A mail server in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.mails_file = folder / "mails.jsonl"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            fd = str(listener.fileno())
            command = [sys.executable, str(HERE / "smtp_server.py"), "--fd", fd]
            command += ["--mails", str(self.mails_file), "--certificate", str(CERTIFICATE)]
            self.process = subprocess.Popen([*command, *options], pass_fds=[listener.fileno()])

    def url(self, scheme: str = "smtp", login: str = "") -> str:
        return f"{scheme}://{login}127.0.0.1:{self.port}"

    @property
    def mails(self) -> list[dict[str, Any]]:
        if not self.mails_file.exists():
            return []
        return [json.loads(line) for line in self.mails_file.read_text().splitlines()]

    @property
    def letters(self) -> list[EmailMessage]:
        return [read_letter(mail["content"].encode("latin-1")) for mail in self.mails]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def read_letter(content: bytes) -> EmailMessage:
    letter = message_from_bytes(content, policy=default)
    assert isinstance(letter, EmailMessage)
    return letter


@pytest.fixture
def mail_server(tmp_path: Path) -> Iterator[Callable[..., MailServer]]:
    servers: list[MailServer] = []

    def start(*options: str) -> MailServer:
        servers.append(MailServer(tmp_path, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


class House:
    """The service and its database; each message is handled by a worker of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        Base.metadata.create_all(engine)

    def register(
        self, mailer: Mailer, email: str = "ada@example.org", id: str = MESSAGE_ID, **payload: Any
    ) -> None:
        with Session(self.engine) as db:
            self.handle(db, mailer, email, id, **payload)

    def handle(
        self, db: Session, mailer: Mailer, email: str, id: str = MESSAGE_ID, **payload: Any
    ) -> None:
        message = Message(
            id=id,
            queue="user-events",
            type="user.registered",
            subscriber="notifications.send_welcome",
            attempt=1,
            priority=Priority.NORMAL,
            metadata={},
            created_at=datetime(2026, 3, 1, 12),
        )
        person = {"user_id": "u1", "email": email, "first_name": "Ada", "last_name": "Lovelace"}
        service = worker_factory(NotificationsService, db=db, mail=mailer, message=message)
        service.send_welcome({**person, **payload})

    @property
    def record(self) -> MailRecord:
        with Session(self.engine) as db:
            return db.scalars(select(MailRecord)).one()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    url = URL.create("sqlite", database=str(tmp_path / "notifications.db"))
    house = House(make_engine(url, eventlet.sleep))
    yield house
    house.engine.dispose()


def smtp(server: MailServer) -> Mailer:
    return make_mailer(server.url(), SENDER)


class Recorder:
    """A mailer that takes each mail as it is told to."""

    sender = SENDER

    def __init__(self, take: Callable[[], Any] = lambda: None) -> None:
        self.take = take
        self.letters: list[EmailMessage] = []

    def send(self, message: EmailMessage) -> None:
        self.letters.append(message)
        self.take()


def letter(**changes: Any) -> EmailMessage:
    person = {"email": "ada@example.org", "first_name": "Ada", "last_name": "Lovelace"}
    composed = welcome(NewUser(**{**person, **changes}), MESSAGE_ID, SENDER)
    policy = SMTP if recipient_of(composed).isascii() else SMTPUTF8
    return read_letter(composed.as_bytes(policy=policy))


def text_of(letter: EmailMessage, kind: str) -> str:
    part = letter.get_body((kind,))
    assert part is not None
    return str(part.get_content()).replace("\r\n", "\n")


class TestLetter:
    def test_says_who_and_where_in_text_and_html(self) -> None:
        mail = letter(company_name="Acme")
        assert mail["To"] == "ada@example.org"
        assert mail["From"] == SENDER
        assert mail["Subject"] == "Welcome, Ada"
        assert mail["Message-ID"] == f"<{MESSAGE_ID}.welcome@example.com>"
        assert mail["Auto-Submitted"] == "auto-generated"
        for kind in ("plain", "html"):
            assert "Acme" in text_of(mail, kind)
            assert "ada@example.org" in text_of(mail, kind)

    def test_needs_no_company(self) -> None:
        assert text_of(letter(), "plain").startswith(
            "Hello Ada Lovelace,\n\nyour account is ready. Log in with this address:"
        )

    def test_escapes_names_in_html_alone(self) -> None:
        mail = letter(first_name="<script>alert(1)</script>", company_name='"A" & B')
        assert "<script>" not in text_of(mail, "html")
        assert "&lt;script&gt;" in text_of(mail, "html")
        assert "&#34;A&#34; &amp; B" in text_of(mail, "html")
        assert '"A" & B' in text_of(mail, "plain")

    def test_does_not_run_names_as_templates(self) -> None:
        assert letter(first_name="{{ 7 * 7 }}")["Subject"] == "Welcome, {{ 7 * 7 }}"

    @pytest.mark.parametrize(
        "end", ["\r\n", "\n", "\r", "\x85", "\u2028", "\u2029", "\x0b", "\x0c"]
    )
    @pytest.mark.parametrize("field", ["first_name", "last_name", "company_name"])
    def test_takes_no_headers_from_names(self, field: str, end: str) -> None:
        mail = letter(**{field: f"Eve{end}Bcc: victim@example.net{end}{end}Hello"})
        assert set(mail.keys()) == set(letter().keys())
        assert [each.addr_spec for each in mail["To"].addresses] == ["ada@example.org"]

    def test_writes_domains_as_the_name_system_knows_them(self) -> None:
        assert letter(email="jürgen@straße.de")["To"].addresses[0].domain == "xn--strae-oqa.de"

    @pytest.mark.parametrize("email", ["a@b,c", "a@b>", "a@b..c", "a@-b", "a@b_c", "a@" + "b" * 64])
    def test_cannot_go_to_what_is_no_domain(self, email: str) -> None:
        with pytest.raises(MailRefusedError, match="not an address"):
            letter(email=email)


local_parts = st.text(
    st.sampled_from(string.ascii_letters + string.digits + string.punctuation.replace("@", "")),
    min_size=1,
    max_size=190,
)
names = st.text(min_size=1, max_size=100)


@given(email=st.builds("{}@example.org".format, local_parts), first_name=names, last_name=names)
@settings(deadline=None)
def test_any_name_makes_a_letter_to_one_address(
    email: str, first_name: str, last_name: str
) -> None:
    mail = letter(email=email, first_name=first_name, last_name=last_name)
    assert set(mail.keys()) == set(letter().keys())
    assert [each.username + "@example.org" for each in mail["To"].addresses] == [email]
    # what smtplib makes of it for RCPT
    assert quoteaddr(recipient_of(mail)) == f"<{recipient_of(mail)}>"


ALERT = {
    "alert_id": 7,
    "status": "firing",
    "queue_name": "user-events",
    "rule": "dead_letters",
    "value": 12.0,
    "threshold": 10.0,
    "began_at": "2026-03-01T12:00:00.000Z",
    "ended_at": None,
    "subscribers": ["notifications.send_welcome"],
    "summary": "user-events has 12 dead letters; 10 is the threshold.",
}


RESOLVED = {**ALERT, "status": "resolved", "ended_at": "2026-03-01T12:10:00.000Z"}


class TestAlert:
    def test_says_what_began_and_that_it_is_over(self) -> None:
        mail = self.letter()
        assert (mail["To"], mail["Subject"]) == (
            "ops@example.org", "Alert: user-events, dead_letters",
        )  # fmt: skip
        assert mail["Message-ID"] == f"<{MESSAGE_ID}.alert@example.com>"
        assert mail["Auto-Submitted"] == "auto-generated"
        for kind in ("plain", "html"):
            text = text_of(mail, kind)
            assert ALERT["summary"] in text
            assert "2026-03-01T12:00:00.000Z. You will get another mail" in text
        over = self.letter(status="resolved", summary="Over: <b>it</b>.")
        assert over["Subject"] == "Over: user-events, dead_letters"
        assert "another mail" not in text_of(over, "plain")
        assert "<b>it" not in text_of(over, "html")
        assert "Over: <b>it</b>." in text_of(over, "plain")

    def letter(self, **changes: Any) -> EmailMessage:
        told = read_alert({**ALERT, **changes})
        composed = alert(told, "ops@example.org", MESSAGE_ID, SENDER)
        return read_letter(composed.as_bytes(policy=SMTP))

    def test_that_is_broken_is_rejected(self) -> None:
        with pytest.raises(Reject, match="status"):
            read_alert({**ALERT, "status": "odd"})
        assert read_alert({**ALERT, "more": 1}).alert_id == "7"

    def test_is_sent_once_and_only_where_somebody_is_to_get_it(self, house: House) -> None:
        mailer = Recorder()
        for mail_to in ("", "ops@example.org", "ops@example.org"):
            self.service(house, mailer, mail_to=mail_to).mail_alert(ALERT)
        assert [letter["To"] for letter in mailer.letters] == ["ops@example.org"]
        assert (house.record.kind, house.record.status) == ("alert", Status.SENT)

    def test_is_posted_only_where_there_is_a_webhook(self, house: House) -> None:
        self.service(house, Recorder()).post_alert(ALERT)

    @pytest.mark.parametrize("by", ["mail", "webhook"])
    def test_is_not_told_to_fire_once_its_end_is(
        self, house: House, monkeypatch: pytest.MonkeyPatch, by: str, caplog: Any
    ) -> None:
        """Whoever tried to tell of it first failed, and comes again after the end was told."""
        caplog.set_level("INFO")
        told = Told(self, house, monkeypatch, by)
        told.fails = True
        with pytest.raises(MailUnavailableError):
            told.tell(ALERT)
        told.fails = False
        told.tell(RESOLVED)
        told.tell(ALERT)
        assert told.statuses == ["resolved"]
        assert f"alert 7 is over, and is not told by {by} any more" in caplog.text
        # another episode, whose id a database gave once more
        told.tell({**ALERT, "began_at": "2026-03-02T12:00:00.000Z"})
        assert told.statuses == ["resolved", "firing"]

    @pytest.mark.parametrize("by", ["mail", "webhook"])
    def test_has_its_end_told_after_what_is_on_its_way(
        self, house: House, monkeypatch: pytest.MonkeyPatch, by: str
    ) -> None:
        monkeypatch.setattr(outgoing, "POLL_SECONDS", 0.01)
        told = Told(self, house, monkeypatch, by)
        told.is_slow = True
        first = eventlet.spawn(told.tell, ALERT)
        told.began.wait()
        second = eventlet.spawn(told.tell, RESOLVED)
        wait_until(lambda: told.is_known_as_over, 20, "the end noted")
        # it comes again from elsewhere, as after the death of a worker
        third = eventlet.spawn(told.tell, ALERT)
        third.wait()
        assert told.statuses == []
        told.go_on.send()
        first.wait()
        second.wait()
        assert told.statuses == ["firing", "resolved"]

    def test_has_its_end_as_the_last_word_on_mariadb_as_well(
        self, tmp_path: Path, mariadb_database: MariaDBDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = {"QUEUE_DATA_DIR": str(tmp_path), **mariadb_database.environment}
        url = database_url(load_settings(config), "notifications")
        house = House(make_engine(url, eventlet.sleep))
        told = Told(self, house, monkeypatch, "webhook")
        for payload in (ALERT, ALERT, RESOLVED, ALERT):
            told.tell(payload)
        assert told.statuses == ["firing", "firing", "resolved"]
        house.engine.dispose()

    def test_is_told_anew_when_who_told_of_it_died(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(outgoing, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(episodes, "CLAIM_SECONDS", 0.2)
        monkeypatch.setattr(episodes, "_give_back", lambda *_: None)
        told = Told(self, house, monkeypatch, "webhook")
        told.tell(ALERT)
        told.tell(RESOLVED)
        assert told.statuses == ["firing", "resolved"]

    def service(
        self, house: House, mailer: Mailer, *, mail_to: str = "", webhook: str = ""
    ) -> NotificationsService:
        message = Message(
            id=MESSAGE_ID,
            queue="queue_admin",
            type="queue.alert",
            subscriber="notifications.mail_alert",
            attempt=1,
            priority=Priority.URGENT,
            metadata={},
            created_at=datetime(2026, 3, 1, 12),
        )
        alerted = load_settings({"ALERT_MAIL_TO": mail_to, "ALERT_WEBHOOK_URL": webhook}).alerting
        made: NotificationsService = worker_factory(
            NotificationsService,
            db=Session(house.engine),
            mail=mailer,
            message=message,
            alerted=alerted,
        )
        return made


class Told:
    """What comes of telling of an alert, by mail or by the webhook."""

    def __init__(
        self, test: TestAlert, house: House, monkeypatch: pytest.MonkeyPatch, by: str
    ) -> None:
        self.test, self.house, self.by = test, house, by
        self.statuses: list[str] = []
        self.fails = self.is_slow = False
        self.began, self.go_on = Signal(), Signal()
        monkeypatch.setattr(service, "post_json", lambda _url, body, _key: self.take(body))
        monkeypatch.setattr(
            service.NotificationsService,
            "_send",
            lambda _self, _kind, _to, compose: self.take({"status": compose.args[0].status}),
        )

    def tell(self, payload: dict[str, Any]) -> None:
        made = self.test.service(
            self.house, Recorder(), mail_to="ops@example.org", webhook="http://127.0.0.1:9"
        )
        with made.db:
            (made.mail_alert if self.by == "mail" else made.post_alert)(payload)

    def take(self, body: dict[str, Any]) -> None:
        if self.fails:
            raise MailUnavailableError
        if self.is_slow:
            self.is_slow = False
            self.began.send()
            self.go_on.wait()
        self.statuses.append(body["status"])

    @property
    def is_known_as_over(self) -> bool:
        with Session(self.house.engine) as db:
            return db.scalars(select(AlertRecord.is_over)).one()


class TestWebhook:
    """What it says of an address that cannot be posted to is its host alone."""

    def test_that_is_not_there_says_so(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.check_refused(port, "127.0.0.1: ConnectionError")

    @pytest.mark.parametrize(
        ("status", "said"),
        [
            ("302 Found\r\nLocation: http://127.0.0.1:1/", "HTTP status 302"),
            ("429 Too Many Requests", "HTTP status 429"),
            ("500 Oops", "HTTP status 500"),
        ],
    )
    def test_that_does_not_take_it_says_so(self, status: str, said: str) -> None:
        listener = eventlet.listen(("127.0.0.1", 0))

        def answer() -> None:
            client, _ = listener.accept()
            client.recv(65536)
            client.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
            client.close()

        serving = eventlet.spawn(answer)
        self.check_refused(listener.getsockname()[1], f"127.0.0.1: {said}")
        serving.wait()
        listener.close()

    def test_that_does_not_answer_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(webhook, "POST_SECONDS", 0.2)
        listener = eventlet.listen(("127.0.0.1", 0))
        self.check_refused(listener.getsockname()[1], "127.0.0.1: ")
        listener.close()

    def check_refused(self, port: int, said: str) -> None:
        url = f"http://127.0.0.1:{port}/s3cret"
        with pytest.raises(webhook.WebhookError, match=f"^{said}") as raised:
            webhook.post_json(url, ALERT, MESSAGE_ID)
        assert "s3cret" not in "".join(traceback.format_exception(raised.value))


class TestContract:
    def test_lets_unknown_fields_pass(self) -> None:
        user = read_new_user(
            {"user_id": "1", "email": "a@b", "first_name": "A", "last_name": "B", "x": 1}
        )
        assert user == NewUser(email="a@b", first_name="A", last_name="B")

    def test_that_is_broken_is_rejected(self) -> None:
        with pytest.raises(Reject, match="email"):
            read_new_user({"user_id": "1", "email": "a@b\r\nBcc: c@d", "first_name": "A"})
        assert UserRegistered().validate({"user_id": "1"})


class TestFolder:
    def test_takes_a_mail_as_one_file(self, house: House, tmp_path: Path) -> None:
        mailer = make_mailer(f"file:{tmp_path}/some mail/here", SENDER)
        house.register(mailer)
        (file,) = (tmp_path / "some mail" / "here").iterdir()
        assert file.name == f"{MESSAGE_ID}.welcome@example.com.eml"
        assert read_letter(file.read_bytes())["To"] == "ada@example.org"

    def test_takes_addresses_beyond_ascii(self, house: House, tmp_path: Path) -> None:
        house.register(make_mailer(f"file://{tmp_path}/mail", SENDER), "用户@例子.测试")
        (file,) = (tmp_path / "mail").iterdir()
        assert "用户@xn--fsqu00a.xn--0zwm56d" in file.read_text()

    def test_that_cannot_be_written_is_tried_again(self, house: House, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("not a folder")
        with pytest.raises(MailUnavailableError, match="taken"):
            house.register(make_mailer(f"file:{tmp_path}/taken", SENDER))
        assert house.record.status == Status.SENDING


class TestServer:
    def test_takes_a_mail_once(self, house: House, mail_server: Callable[..., MailServer]) -> None:
        server = mail_server()
        house.register(smtp(server))
        house.register(smtp(server))
        (mail,) = server.mails
        assert mail["from"] == SENDER
        assert mail["to"] == ["ada@example.org"]
        assert server.letters[0]["Message-ID"] == house.record.rfc_message_id
        assert house.record.status == Status.SENT
        assert house.record.sent_at is not None
        assert house.record.recipient == "ada@example.org"

    @pytest.mark.parametrize("name", ["refused", "unwanted"])
    def test_that_refuses_makes_a_dead_letter(
        self, house: House, mail_server: Callable[..., MailServer], name: str
    ) -> None:
        server = mail_server()
        with pytest.raises(Reject, match=r"55[04] 5\.[16]"):
            house.register(smtp(server), f"{name}@example.org")
        assert server.mails == []
        assert house.record.status == Status.REFUSED
        assert "5." in (house.record.error or "")

    def test_that_refuses_the_sender_makes_a_dead_letter(
        self, house: House, mail_server: Callable[..., MailServer]
    ) -> None:
        with pytest.raises(Reject, match="550"):
            house.register(make_mailer(mail_server().url(), "banned@example.com"))

    def test_is_asked_again_when_somebody_retries_a_dead_letter(
        self, house: House, mail_server: Callable[..., MailServer]
    ) -> None:
        with pytest.raises(Reject):
            house.register(smtp(mail_server()), "refused@example.org")
        house.register(mailer := Recorder(), "refused@example.org")
        assert len(mailer.letters) == 1
        assert house.record.status == Status.SENT
        assert house.record.error is None

    @pytest.mark.parametrize(("name", "answer"), [("later", "451"), ("crowded", "452")])
    def test_that_is_busy_is_asked_again(
        self, house: House, mail_server: Callable[..., MailServer], name: str, answer: str
    ) -> None:
        with pytest.raises(MailUnavailableError, match=answer):
            house.register(smtp(mail_server()), f"{name}@example.org")
        assert house.record.status == Status.SENDING
        assert house.record.claimed_until is None

    def test_takes_the_second_attempt(
        self, house: House, mail_server: Callable[..., MailServer]
    ) -> None:
        server = mail_server()
        with pytest.raises(MailUnavailableError):
            house.register(smtp(server), "later@example.org")
        house.register(smtp(server), "later@example.org")
        assert len(server.mails) == 1
        assert house.record.status == Status.SENT

    def test_that_is_down_is_asked_again(
        self, house: House, mail_server: Callable[..., MailServer]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with pytest.raises(MailUnavailableError, match=str(port)):
            house.register(make_mailer(f"smtp://127.0.0.1:{port}", SENDER))
        server = mail_server()
        house.register(smtp(server))
        assert len(server.mails) == 1

    def test_takes_international_addresses(
        self, house: House, mail_server: Callable[..., MailServer]
    ) -> None:
        server = mail_server()
        house.register(smtp(server), "用户@例子.测试", first_name="小龍", last_name="李")
        (mail,) = server.mails
        assert mail["to"] == ["用户@xn--fsqu00a.xn--0zwm56d"]
        assert "SMTPUTF8" in mail["options"]
        assert server.letters[0]["Subject"] == "Welcome, 小龍"

    def test_that_knows_ascii_alone_takes_international_names_and_domains(
        self, house: House, mail_server: Callable[..., MailServer]
    ) -> None:
        server = mail_server("--no-smtputf8")
        house.register(smtp(server), "jorge@españa.example", first_name="José", last_name="Nuñez")
        assert server.mails[0]["to"] == ["jorge@xn--espaa-rta.example"]
        assert server.mails[0]["content"].isascii()
        assert "José Nuñez" in text_of(server.letters[0], "plain")

    def test_that_knows_ascii_alone_refuses_international_addresses(
        self, house: House, mail_server: Callable[..., MailServer]
    ) -> None:
        with pytest.raises(Reject, match="SMTPUTF8"):
            house.register(smtp(mail_server("--no-smtputf8")), "用户@example.org")


class TestSecurity:
    @pytest.fixture(autouse=True)
    def _trusted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))

    @pytest.mark.parametrize(("scheme", "tls"), [("smtp", "starttls"), ("smtps", "smtps")])
    def test_mails_go_over_tls(
        self, house: House, mail_server: Callable[..., MailServer], scheme: str, tls: str
    ) -> None:
        server = mail_server("--tls", tls)
        house.register(make_mailer(server.url(scheme), SENDER))
        assert server.mails[0]["tls"]

    @pytest.mark.filterwarnings("ignore:Exception ignored in. <eventlet.green.ssl")
    @pytest.mark.parametrize(("scheme", "tls"), [("smtp", "starttls"), ("smtps", "smtps")])
    def test_a_server_that_nobody_vouches_for_gets_no_mail(
        self,
        house: House,
        mail_server: Callable[..., MailServer],
        monkeypatch: pytest.MonkeyPatch,
        scheme: str,
        tls: str,
    ) -> None:
        monkeypatch.delenv("SSL_CERT_FILE")
        server = mail_server("--tls", tls)
        with pytest.raises(MailUnavailableError, match="certificate"):
            house.register(make_mailer(server.url(scheme), SENDER))
        # eventlet leaves the socket of a failed handshake to the garbage collector
        gc.collect()
        assert server.mails == []

    @pytest.mark.parametrize("near", [True, False])
    def test_logs_in(
        self,
        house: House,
        mail_server: Callable[..., MailServer],
        monkeypatch: pytest.MonkeyPatch,
        near: bool,
    ) -> None:
        monkeypatch.setattr(Address, "is_loopback", near)
        server = mail_server("--tls", "starttls", "--auth")
        house.register(make_mailer(server.url(login="us%20er:pass%2Fword@"), SENDER))
        assert server.mails[0]["user"] == "us er"

    def test_a_wrong_password_is_nobody_s_dead_letter(
        self, house: House, mail_server: Callable[..., MailServer]
    ) -> None:
        server = mail_server("--auth")
        with pytest.raises(MailUnavailableError, match="535"):
            house.register(make_mailer(server.url(login="us%20er:wrong@"), SENDER))

    def test_no_password_leaves_the_machine_in_clear(
        self,
        house: House,
        mail_server: Callable[..., MailServer],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(Address, "is_loopback", False)
        server = mail_server("--auth")
        with pytest.raises(MailUnavailableError, match="no TLS"):
            house.register(make_mailer(server.url(login="us%20er:pass%2Fword@"), SENDER))

    def test_reads_addresses_of_servers(self) -> None:
        assert Server.of("smtp://mail.example") == Server(
            "smtp", Address("mail.example", 25), "", ""
        )
        assert Server.of("SMTPS://u%40x:p%3Aq@[::1]") == Server(
            "smtps", Address("::1", 465), "u@x", "p:q"
        )


class TestOnce:
    def test_a_database_that_goes_away_after_the_mail_went_does_not_send_it_twice(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(outgoing, "LONGEST_PAUSE_SECONDS", 0.0)
        mailer = Recorder()
        with Session(house.engine) as db:
            commit, failures = db.commit, [1, 2, 3]

            def commit_when_back() -> None:
                if mailer.letters and failures:
                    failures.pop()
                    raise OperationalError("COMMIT", {}, Exception("gone away"))
                commit()

            db.commit = commit_when_back  # type: ignore[method-assign]
            house.handle(db, mailer, "ada@example.org")
        assert failures == []
        house.register(mailer)
        assert len(mailer.letters) == 1
        assert house.record.status == Status.SENT

    def test_two_workers_at_once_send_one_mail(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_its_way, kept_waiting, go_on = Signal(), Signal(), Signal()
        claim = outgoing._claim

        def watched_claim(*arguments: Any) -> outgoing.Claim:
            if (claimed := claim(*arguments)) is outgoing.Claim.HELD and not kept_waiting.ready():
                kept_waiting.send()
            return claimed

        def take() -> None:
            on_its_way.send()
            go_on.wait()

        monkeypatch.setattr(outgoing, "_claim", watched_claim)
        mailer = Recorder(take)
        with eventlet.Timeout(20):
            first = eventlet.spawn(house.register, mailer)
            on_its_way.wait()
            second = eventlet.spawn(house.register, mailer)
            kept_waiting.wait()
            go_on.send()
            first.wait()
            second.wait()
        assert len(mailer.letters) == 1

    def test_the_claim_of_one_who_died_ends(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die() -> None:
            raise SystemExit

        monkeypatch.setattr(outgoing, "CLAIM_SECONDS", 0.3)
        monkeypatch.setattr(outgoing, "POLL_SECONDS", 0.01)
        with pytest.raises(SystemExit):
            house.register(Recorder(die))
        assert house.record.claimed_until is not None
        house.register(mailer := Recorder())
        assert len(mailer.letters) == 1
        assert house.record.status == Status.SENT

    def test_no_transaction_is_open_while_the_mail_is_on_its_way(self, house: House) -> None:
        def write() -> None:
            with house.engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                connection.exec_driver_sql("ROLLBACK")

        house.register(Recorder(write))
        assert house.record.status == Status.SENT

    def test_each_message_is_a_mail_of_its_own(self, house: House) -> None:
        mailer = Recorder()
        house.register(mailer, id="m1")
        house.register(mailer, id="m2")
        assert len({letter["Message-ID"] for letter in mailer.letters}) == 2


class TestPatched:
    """In a process that is patched as ``nameko run`` patches it."""

    def send(self, url: str, recipient: str, seconds: float = 25.0) -> tuple[str, int]:
        command = [sys.executable, str(HERE / "send_mail.py"), url, recipient, str(seconds)]
        environ = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        environ["SSL_CERT_FILE"] = str(CERTIFICATE)
        done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
        outcome, turns = done.stdout.splitlines()
        return outcome, int(turns)

    @pytest.mark.parametrize(
        ("scheme", "options"),
        [("smtp", []), ("smtp", ["--tls", "starttls"]), ("smtps", ["--tls", "smtps"])],
    )
    def test_mails_are_sent_without_holding_up_others(
        self, mail_server: Callable[..., MailServer], scheme: str, options: list[str]
    ) -> None:
        server = mail_server(*options)
        outcome, turns = self.send(server.url(scheme), "slow@example.org")
        assert outcome == "sent"
        assert turns > 10
        assert server.mails[0]["tls"] == bool(options)

    def test_a_server_that_says_nothing_is_given_up(
        self, mail_server: Callable[..., MailServer]
    ) -> None:
        outcome, _ = self.send(mail_server().url(), "silent@example.org", 1.5)
        assert "took longer than 1.5 s" in outcome


def test_the_migrations_make_the_tables_of_the_models(tmp_path: Path) -> None:
    engine = make_engine(URL.create("sqlite", database=str(tmp_path / "n.db")), eventlet.sleep)
    upgrade(engine, service_migrations("notifications", Base))
    with engine.connect() as connection:
        ours = {"include_object": lambda _, name, kind, *__: not name.endswith("_version")}
        context = MigrationContext.configure(connection, opts=ours)
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()
