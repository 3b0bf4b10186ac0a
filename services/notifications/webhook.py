"""To whom alerts go, and how they are posted."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import eventlet
import requests
from nameko.extensions import DependencyProvider

from services.notifications.mail import MailRefusedError, mail_address
from shared.errors import QueueError
from shared.settings import Alerting, refuse_start, settings_or_exit

POST_SECONDS = 10.0
"""How long one post may take, from the connection to the status."""


class WebhookError(QueueError):
    """Raised when a post was not taken: try it again later."""


class AlertTargets(DependencyProvider):
    """Injects to whom alerts go: ``mail_to`` and ``webhook`` of the settings."""

    targets: Alerting

    def setup(self) -> None:
        self.targets = settings_or_exit(self.container.config).alerting
        if self.targets.mail_to:
            try:
                mail_address(self.targets.mail_to)
            except MailRefusedError as exc:
                refuse_start(f"ALERT_MAIL_TO: {exc}")

    def get_dependency(self, _worker_ctx: Any) -> Alerting:
        return self.targets


def post_json(url: str, body: Any, key: str) -> None:
    """Post a body.

    :param key: by which the other side knows what it has got already.
    :raises WebhookError: when it was not taken. It names the host alone: who knows the rest of
        the address may post there.
    """
    host = urlsplit(url).hostname
    late = WebhookError(f"{host}: took longer than {POST_SECONDS:g} s")
    try:
        with eventlet.Timeout(POST_SECONDS, late):
            status = _post(url, body, key)
    except requests.RequestException as exc:
        # without its cause, which has the address in it
        raise WebhookError(f"{host}: {type(exc).__name__}") from None
    if not 200 <= status < 300:
        raise WebhookError(f"{host}: HTTP status {status}")


def _post(url: str, body: Any, key: str) -> int:
    """Post, and return the status; what comes after that is not read."""
    with requests.post(
        url,
        json=body,
        headers={"Idempotency-Key": f'"{key}"'},
        timeout=POST_SECONDS,
        # it would be a GET, to whom nobody named
        allow_redirects=False,
        stream=True,
    ) as answer:
        return int(answer.status_code)
