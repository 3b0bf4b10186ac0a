"""The notifications service: one handler."""

from __future__ import annotations

from functools import partial
from typing import Any

from services.notifications.letters import rfc_message_id, welcome
from services.notifications.mail import MailTransport
from services.notifications.models import Base
from services.notifications.outgoing import Mail, send_once
from services.notifications.schemas import read_new_user
from shared.events import MessageContext, event_handler
from shared.store import DatabaseSession


class NotificationsService:
    """Greets those who sign up, by mail."""

    name = "notifications"

    db = DatabaseSession(Base)
    # its own: a mail is not handled when it is claimed, which is committed first
    handled = DatabaseSession(Base)
    mail = MailTransport()
    message = MessageContext()

    @event_handler("auth_events", "user.registered", inbox="handled")
    def send_welcome(self, payload: dict[str, Any]) -> None:
        """Send the welcome mail, once for each message.

        :raises Reject: when the address is refused.
        :raises MailUnavailableError: when the mail server is down.
        """
        user, message_id, sender = read_new_user(payload), self.message.id, self.mail.sender
        mail = Mail(
            message_id=message_id,
            kind="welcome",
            recipient=user.email,
            rfc_message_id=rfc_message_id(message_id, "welcome", sender),
            compose=partial(welcome, user, message_id, sender),
        )
        send_once(self.db, self.mail, mail)
