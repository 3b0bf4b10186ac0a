"""The services' HTTP interfaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import requests

from services.demo.processes import HOST, DemoError
from shared.settings import Address

ANSWER_SECONDS = 10.0
"""How long one answer may take."""

HEALTH = {"auth_events": "/health", "company": "/health", "queue_admin": "/queue/health"}
"""Where each service that speaks HTTP says how it is."""

UNSPECIFIED = {"0.0.0.0": HOST, "::": "::1", "": HOST}  # noqa: S104 - nothing is bound
"""Where a service is found that listens everywhere."""

Json = dict[str, Any]


class Client:
    """Calls the services.

    :param addresses: of those in :data:`HEALTH`.
    """

    def __init__(self, addresses: Mapping[str, Address]) -> None:
        self._urls = {service: url_of(addresses[service]) for service in HEALTH}
        self._session = requests.Session()
        # a proxy of the environment knows nothing of this machine's own ports
        self._session.trust_env = False

    def is_up(self, service: str) -> bool:
        """Say whether a service answers, however it is."""
        try:
            self._send("GET", service, HEALTH[service])
        except DemoError:
            return False
        return True

    def health(self) -> Json:
        """Return how the queue is."""
        return self._json("GET", "queue_admin", "/queue/health", 200, 503)

    def register(self, form: Json) -> Json:
        """Sign somebody up."""
        return self._json("POST", "auth_events", "/auth/register", 201, json=form)

    def login(self, email: str, password: str) -> str:
        """Log somebody in; return the access token."""
        form = {"email": email, "password": password}
        answer = self._json("POST", "auth_events", "/auth/login", 200, json=form)
        return str(answer["access_token"])

    def logout(self, token: str) -> None:
        """Log out."""
        headers = {"Authorization": f"Bearer {token}"}
        self._checked("POST", "auth_events", "/auth/logout", 204, headers=headers)

    def user(self, user_id: str) -> Json:
        """Return what company knows of a user; nothing where it knows nobody of that id."""
        answer = self._checked("GET", "company", f"/company/users/{user_id}", 200, 404)
        return dict(answer.json()) if answer.status_code == 200 else {}

    def stats(self, queue: str) -> Json | None:
        """Return the statistics of a queue; ``None`` while they cannot be had."""
        answer = self._checked("GET", "queue_admin", f"/queue/stats/{queue}", 200, 404, 503)
        return dict(answer.json()) if answer.status_code == 200 else None

    def message(self, message_id: str) -> Json:
        """Return a message and what became of it."""
        return self._json("GET", "queue_admin", f"/queue/messages/{message_id}", 200)

    def retry(self, message_id: str) -> int:
        """Let what failed of a message run again; return how many deliveries that is."""
        answer = self._json("POST", "queue_admin", f"/queue/retry/{message_id}", 202)
        return int(answer["retried"])

    def _json(self, method: str, service: str, path: str, *expected: int, **rest: Any) -> Json:
        return dict(self._checked(method, service, path, *expected, **rest).json())

    def _checked(
        self, method: str, service: str, path: str, *expected: int, **rest: Any
    ) -> requests.Response:
        answer = self._send(method, service, path, **rest)
        if answer.status_code not in expected:
            raise DemoError(f"{method} {path} was answered {answer.status_code}: {answer.text}")
        return answer

    def _send(self, method: str, service: str, path: str, **rest: Any) -> requests.Response:
        url = self._urls[service] + path
        try:
            return self._session.request(method, url, timeout=ANSWER_SECONDS, **rest)
        except requests.RequestException as exc:
            raise DemoError(f"{service} does not answer at {self._urls[service]}: {exc}") from exc


def url_of(address: Address) -> str:
    """Return the URL under which a service is found that listens on ``address``."""
    host = UNSPECIFIED.get(address.host, address.host)
    return f"http://[{host}]:{address.port}" if ":" in host else f"http://{host}:{address.port}"
