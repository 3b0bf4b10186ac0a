"""The notifications service: welcome mails, and what tells operations of alerts."""

from __future__ import annotations

from collections.abc import Callable
from email.message import EmailMessage
from functools import partial
from typing import Any

from services.notifications.episodes import telling
from services.notifications.letters import alert, rfc_message_id, welcome
from services.notifications.mail import MailTransport
from services.notifications.models import Base
from services.notifications.outgoing import Mail, send_once
from services.notifications.schemas import read_alert, read_new_user
from services.notifications.webhook import AlertTargets, post_json
from shared.contracts.alert import ALERT, SOURCE
from shared.events import MessageContext, event_handler
from shared.store import DatabaseSession


class NotificationsService:
    """Greets those who sign up, and tells operations of alerts."""

    name = "notifications"

    db = DatabaseSession(Base)
    # its own: a mail is not handled when it is claimed, which is committed first
    handled = DatabaseSession(Base)
    mail = MailTransport()
    alerted = AlertTargets()
    message = MessageContext()

    @event_handler("auth_events", "user.registered", inbox="handled")
    def send_welcome(self, payload: dict[str, Any]) -> None:
        """Send the welcome mail, once for each message.

        :raises Reject: when the address is refused.
        :raises MailUnavailableError: when the mail server is down.
        """
        user = read_new_user(payload)
        self._send("welcome", user.email, partial(welcome, user))

    # two handlers: what one of them has done is not done again when the other fails
    @event_handler(SOURCE, ALERT, inbox="handled")
    def mail_alert(self, payload: dict[str, Any]) -> None:
        """Send the mail of an alert, once for each message, where anybody is to get one.

        :raises Reject: when the address is refused.
        :raises MailUnavailableError: when the mail server is down.
        """
        told, recipient = read_alert(payload), self.alerted.mail_to
        if not recipient:
            return
        with telling(self.db, told, "mail") as is_wanted:
            if is_wanted:
                self._send("alert", recipient, partial(alert, told, recipient))

    @event_handler(SOURCE, ALERT, inbox="handled")
    def post_alert(self, payload: dict[str, Any]) -> None:
        """Post an alert to the webhook, where there is one.

        :raises Reject: when it breaks its contract.
        :raises WebhookError: when it does not take it.
        """
        told, url = read_alert(payload), self.alerted.webhook
        if not url:
            return
        with telling(self.db, told, "webhook") as is_wanted:
            if is_wanted:
                post_json(url, payload, self.message.id)

    def _send(self, kind: str, recipient: str, compose: Callable[[str, str], EmailMessage]) -> None:
        message_id, sender = self.message.id, self.mail.sender
        mail = Mail(
            message_id=message_id,
            kind=kind,
            recipient=recipient,
            rfc_message_id=rfc_message_id(message_id, kind, sender),
            compose=partial(compose, message_id, sender),
        )
        send_once(self.db, self.mail, mail)
