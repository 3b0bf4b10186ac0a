"""Renders mails. Nothing that a user chose can become a header or a tag."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import asdict
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from services.notifications.mail import mail_address
from services.notifications.schemas import Alert, NewUser

TEMPLATES = Path(__file__).parent / "templates"

POLICY = SMTP.clone(cte_type="7bit")
"""Bodies in ASCII alone: any server takes them."""

LINE_BREAKING = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Categories of characters that end a line somewhere, or are none at all."""


def welcome(user: NewUser, message_id: str, sender: str) -> EmailMessage:
    """Compose the mail that greets a new user.

    :param message_id: of the event that told of the user; see :func:`rfc_message_id`.
    :param sender: the address in From.
    :raises MailRefusedError: when no mail can have the user's address.
    """
    return _letter("welcome", user.email, asdict(user), message_id, sender)


def alert(told: Alert, recipient: str, message_id: str, sender: str) -> EmailMessage:
    """Compose the mail that tells of an alert, or of its end; parameters as for :func:`welcome`."""
    return _letter("alert", recipient, asdict(told), message_id, sender)


def _letter(
    kind: str, recipient: str, told: Mapping[str, str | None], message_id: str, sender: str
) -> EmailMessage:
    words = {name: _one_line(value or "") for name, value in told.items()}
    message = EmailMessage(policy=POLICY)
    message["From"] = mail_address(sender)
    # without the name: the email package loses quotes where it folds a long one
    message["To"] = mail_address(recipient)
    message["Subject"] = _render(f"{kind}.subject", words).strip()
    message["Date"] = localtime()
    message["Message-ID"] = rfc_message_id(message_id, kind, sender)
    # keeps automatic answers from coming back (RFC 3834)
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(_render(f"{kind}.txt", words))
    message.add_alternative(_render(f"{kind}.html", words), subtype="html")
    return message


def rfc_message_id(message_id: str, kind: str, sender: str) -> str:
    """Return the Message-ID of a mail: the same whenever the same message asks for it."""
    return f"<{message_id}.{kind}@{mail_address(sender).domain}>"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )


def _render(template: str, words: dict[str, str]) -> str:
    return _environment().get_template(template).render(words)


def _one_line(text: str) -> str:
    kept = (" " if unicodedata.category(c) in LINE_BREAKING else c for c in text)
    return "".join(kept).strip()
