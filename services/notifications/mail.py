"""Hands mails over: to a mail server, or to a folder."""

from __future__ import annotations

import contextlib
import os
import re
import smtplib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from email import headerregistry
from email.message import EmailMessage
from email.policy import SMTP, SMTPUTF8
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import eventlet
import idna
from nameko.extensions import DependencyProvider

from shared.errors import QueueError
from shared.settings import Address, refuse_start, settings_or_exit

ANSWER_SECONDS = 10.0
"""How long a mail server may take for one answer."""

SEND_SECONDS = 25.0
"""How long one mail may take, from the connection to the server's last word on it."""

PORTS = {"smtp": 25, "smtps": 465}


class MailUnavailableError(QueueError):
    """Raised when a mail could not be handed over just now: try it again later."""


class MailRefusedError(QueueError):
    """Raised when a mail will never be taken: its address, sender or content is refused."""


class Mailer(Protocol):
    """What hands mails over."""

    sender: str
    """The address that mails come from."""

    def send(self, message: EmailMessage) -> None:
        """Hand over a mail to the one address in its To header.

        :raises MailUnavailableError: when it may be taken later.
        :raises MailRefusedError: when it never will.
        """


class MailTransport(DependencyProvider):
    """Injects the :class:`Mailer` that the setting ``MAIL_URL`` asks for."""

    mailer: Mailer

    def setup(self) -> None:
        settings = settings_or_exit(self.container.config)
        try:
            mail_address(settings.mail_from)
        except MailRefusedError as exc:
            refuse_start(f"MAIL_FROM: {exc}")
        self.mailer = make_mailer(settings.mail_url, settings.mail_from)

    def get_dependency(self, _worker_ctx: Any) -> Mailer:
        return self.mailer


def mail_address(text: str) -> headerregistry.Address:
    """Return an address as headers and servers take it, the domain in ASCII (IDNA 2008).

    :raises MailRefusedError: when its domain cannot be one.
    """
    user, _, domain = text.rpartition("@")
    try:
        plain = idna.encode(domain, uts46=True, std3_rules=True).decode("ascii").rstrip(".")
        return headerregistry.Address(username=user, domain=plain)
    except (idna.IDNAError, ValueError) as exc:
        raise MailRefusedError(f"{text!r} is not an address to send to: {exc}") from exc


def make_mailer(url: str, sender: str) -> Mailer:
    """Return what hands mails over as ``url`` says; connects to nothing yet.

    :param url: ``file:/path``, ``smtp://[user:password@]host[:port]`` or ``smtps://…``.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "file":
        return FolderMailer(Path(rest.removeprefix("//")), sender)
    return SmtpMailer(Server.of(url), sender)


class FolderMailer:
    """Writes each mail to a file named after its Message-ID; writing it again changes nothing."""

    def __init__(self, folder: Path, sender: str) -> None:
        self.folder = folder
        self.sender = sender

    def send(self, message: EmailMessage) -> None:
        name = re.sub(r"[^\w.@+-]", "_", message["Message-ID"].strip("<>"))
        policy = SMTP if recipient_of(message).isascii() else SMTPUTF8
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self.folder / f"{name}.eml", message.as_bytes(policy=policy))
        except OSError as exc:
            raise MailUnavailableError(f"{self.folder}: {exc.strerror}") from exc

    def _write(self, path: Path, content: bytes) -> None:
        # renamed when complete, so that no reader sees half of a mail
        part = path.with_name(f".{uuid4().hex}.tmp")
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Server:
    """A mail server and how to log in there; without ``user`` nobody does."""

    scheme: str
    address: Address
    user: str
    password: str

    @classmethod
    def of(cls, url: str) -> Server:
        """Read ``smtp://[user:password@]host[:port]``, user and password percent-encoded."""
        parts = urlsplit(url)
        return cls(
            scheme=parts.scheme,
            address=Address(parts.hostname or "", parts.port or PORTS[parts.scheme]),
            user=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
        )


class SmtpMailer:
    """Hands each mail to a mail server, over TLS where the server offers it.

    The server's certificate is checked; ``SSL_CERT_FILE`` names further authorities.
    A password leaves this machine over TLS alone.
    """

    def __init__(self, server: Server, sender: str) -> None:
        self.server = server
        self.sender = sender
        # asks the resolver for this machine's name: once, and not for each mail
        self._own_name = smtplib.SMTP().local_hostname
        self._tls = ssl.create_default_context()

    def send(self, message: EmailMessage) -> None:
        late = MailUnavailableError(f"{self.server.address}: took longer than {SEND_SECONDS:g} s")
        with eventlet.Timeout(SEND_SECONDS, late), self._connection() as smtp:
            try:
                smtp.send_message(message, address_of(message, "From"), [recipient_of(message)])
            except (smtplib.SMTPException, OSError) as exc:
                raise _translated(exc) from exc

    @contextlib.contextmanager
    def _connection(self) -> Iterator[smtplib.SMTP]:
        try:
            smtp = self._connect()
        except (smtplib.SMTPException, OSError) as exc:
            raise MailUnavailableError(f"{self.server.address}: {_answer(exc)[1]}") from exc
        try:
            yield smtp
            # said, but not waited for: the mail is the server's now, and to be noted as sent
            with contextlib.suppress(smtplib.SMTPException, OSError):
                smtp.putcmd("quit")
        finally:
            smtp.close()

    def _connect(self) -> smtplib.SMTP:
        with contextlib.ExitStack() as undo:
            smtp = self._open()
            undo.callback(smtp.close)
            smtp.ehlo_or_helo_if_needed()
            if self.server.scheme == "smtp" and smtp.has_extn("starttls"):
                smtp.starttls(context=self._tls)
                smtp.ehlo_or_helo_if_needed()
            if self.server.user:
                self._log_in(smtp)
            undo.pop_all()
            return smtp

    def _open(self) -> smtplib.SMTP:
        host, port = self.server.address.host, self.server.address.port
        if self.server.scheme == "smtps":
            return smtplib.SMTP_SSL(
                host, port, self._own_name, timeout=ANSWER_SECONDS, context=self._tls
            )
        return smtplib.SMTP(host, port, self._own_name, timeout=ANSWER_SECONDS)

    def _log_in(self, smtp: smtplib.SMTP) -> None:
        if not isinstance(smtp.sock, ssl.SSLSocket) and not self.server.address.is_loopback:
            raise smtplib.SMTPException("offers no TLS, without which no password is sent")
        smtp.login(self.server.user, self.server.password)


def address_of(message: EmailMessage, header: str) -> str:
    """Return the one address that a header holds."""
    return str(message[header].addresses[0].addr_spec)


def recipient_of(message: EmailMessage) -> str:
    """Return the address that a mail goes to."""
    return address_of(message, "To")


def _translated(exc: Exception) -> QueueError:
    """Return what a server's answer means: 5yz is its last word, all else is not."""
    code, text = _answer(exc)
    kind = MailRefusedError if 500 <= code < 600 else MailUnavailableError
    return kind(text)


def _answer(exc: Exception) -> tuple[int, str]:
    """Return the code and the text of a server's answer; 0 where there was none."""
    match exc:
        case smtplib.SMTPRecipientsRefused(recipients=answers):
            code, said = next(iter(answers.values()))
        case smtplib.SMTPResponseException(smtp_code=code, smtp_error=said):
            pass
        case smtplib.SMTPNotSupportedError():
            # an address beyond ASCII, and a server that knows none
            return 553, str(exc)
        case _:
            return 0, str(exc) or type(exc).__name__
    return code, f"{code} {said.decode(errors='replace') if isinstance(said, bytes) else said}"
