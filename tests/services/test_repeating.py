"""The services with a fault at each point that their handlers come by."""

from __future__ import annotations

from email.message import EmailMessage
from pathlib import Path
from typing import Any

from services.company import CompanyService
from services.notifications import NotificationsService
from shared.settings import load_settings
from shared.testing.chaos import ChaosRunner, Point

WHO = {"user_id": "u1", "email": "ada@acme.example"}
ADA = {
    **WHO,
    "first_name": "Ada",
    "last_name": "Lovelace",
    "company_name": "Acme",
    "company_domain": "acme.example",
}
GRACE = {**ADA, "user_id": "u2", "email": "grace@acme.example", "first_name": "Grace"}


def registered(person: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    return "auth_events", "user.registered", person


def did(event_type: str, session_id: str, minute: int) -> tuple[str, str, dict[str, Any]]:
    at = f"2026-03-01T12:{minute:02}:00Z"
    return "auth_events", event_type, {**WHO, "session_id": session_id, "occurred_at": at}


class CountingMailer:
    """Tells two mails from one that is sent twice, as a mail server would not."""

    sender = "noreply@example.com"

    def send(self, message: EmailMessage) -> None:
        with Path("sent.txt").open("a") as sent:
            sent.write(f"{message['Message-ID']}\n")


class TestCompany:
    def test_is_safe_to_repeat(self, chaos_runner: ChaosRunner) -> None:
        events = [
            registered(ADA),
            registered(GRACE),
            did("user.logged_in", "s1", 1),
            did("user.logged_in", "s2", 2),
            did("user.logged_out", "s1", 3),
        ]
        report = chaos_runner(CompanyService, events)
        report.assert_safe()
        assert len(report.handlers) == 3


class TestNotifications:
    def test_is_safe_to_repeat(self, chaos_runner: ChaosRunner) -> None:
        chaos_runner(NotificationsService, [registered(ADA)]).assert_safe()

    def test_tells_of_alerts_and_is_safe_to_repeat(self, chaos_runner: ChaosRunner) -> None:
        alert = {
            "alert_id": 7,
            "status": "firing",
            "queue_name": "user-events",
            "rule": "dead_letters",
            "value": 12.0,
            "threshold": 10.0,
            "began_at": "2026-03-01T12:00:00.000Z",
            "ended_at": None,
            "subscribers": ["notifications.send_welcome"],
            "summary": "user-events has 12 dead letters.",
        }
        alerted = {"alerted": load_settings({"ALERT_MAIL_TO": "ops@example.org"}).alerting}
        events = [("queue_admin", "queue.alert", alert)]
        report = chaos_runner(NotificationsService, events, dependencies=alerted)
        report.assert_safe()
        assert len(report.handlers) == 2

    def test_sends_twice_only_what_was_taken_and_not_noted(self, chaos_runner: ChaosRunner) -> None:
        mail = {"mail": CountingMailer()}
        report = chaos_runner(NotificationsService, [registered(ADA)], dependencies=mail)
        # no sender can tell whether the server's last word would have come: docs/services.md
        assert {(each.point, each.effect) for each in report.unsafe} == {
            (Point.AFTER_EFFECT, "mail.send"),
            (Point.BEFORE_EFFECT, "db"),
            (Point.AFTER_EFFECT, "db"),
        }
