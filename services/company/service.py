"""The company service: three handlers, two methods to call, two routes."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import joinedload

from services.company.models import Base, Company, User
from services.company.records import plain_domain, record
from services.company.schemas import (
    read_logged_in,
    read_logged_out,
    read_registered,
    user_as_json,
)
from services.company.sessions import open_sessions
from shared.events import MessageContext, event_handler
from shared.rpc import rpc
from shared.store import DatabaseSession
from shared.web import Problem, http

MOST_USERS = 1000
"""Users in one answer of :meth:`CompanyService.list_users`."""


class CompanyService:
    """Knows companies and users, and who is logged in, from the events of auth_events."""

    name = "company"

    db = DatabaseSession(Base)
    message = MessageContext()

    @event_handler("auth_events", "user.registered", inbox="db")
    def handle_user_registered(self, payload: dict[str, Any]) -> None:
        """Create the user and the company."""
        record(self.db, read_registered(payload, self.message))

    @event_handler("auth_events", "user.logged_in", inbox="db")
    def handle_user_logged_in(self, payload: dict[str, Any]) -> None:
        """Note the login and open a session."""
        record(self.db, read_logged_in(payload, self.message))

    @event_handler("auth_events", "user.logged_out", inbox="db")
    def handle_user_logged_out(self, payload: dict[str, Any]) -> None:
        """Close a session."""
        record(self.db, read_logged_out(payload, self.message))

    @rpc
    def get_user(self, user_id: str) -> dict[str, Any] | None:
        """Return a user as :func:`~services.company.schemas.user_as_json` shows it.

        :returns: ``None`` for a user of whom no event told.
        """
        users = self._show(select(User).where(User.user_id == user_id))
        return users[0] if users else None

    @rpc(expected_exceptions=ValueError)
    def list_users(
        self, company_domain: str | None = None, limit: int = 100, after: str | None = None
    ) -> list[dict[str, Any]]:
        """Return users in the order of their ids.

        :param company_domain: only those of this company.
        :param limit: the most to return, 1 to :data:`MOST_USERS`.
        :param after: the last id of the page before.
        :raises ValueError: when ``limit`` is outside of that.
        """
        if not 1 <= limit <= MOST_USERS:
            raise ValueError(f"limit: must be 1 to {MOST_USERS}")
        users = select(User).order_by(User.user_id).limit(limit)
        if company_domain is not None:
            domain = plain_domain(company_domain)
            users = users.join(User.company).where(Company.domain == domain)
        if after is not None:
            users = users.where(User.user_id > after)
        return self._show(users)

    @http("GET", "/company/users/<user_id>")
    def show_user(self, _request: Any, user_id: str) -> tuple[int, dict[str, Any]]:
        """Answer with a user, or 404."""
        user = self.get_user(user_id)
        if user is None:
            raise Problem(404, "user-not-found", "No such user", detail=f"no user {user_id}")
        return 200, user

    @http("GET", "/health")
    def health(self, _request: Any) -> tuple[int, dict[str, Any]]:
        """Answer 200 while the database answers."""
        self.db.execute(text("SELECT 1"))
        return 200, {"status": "ok"}

    def _show(self, query: Any) -> list[dict[str, Any]]:
        users = self.db.scalars(query.options(joinedload(User.company))).all()
        counts = open_sessions(self.db, [user.user_id for user in users])
        return [user_as_json(user, counts.get(user.user_id, 0)) for user in users]
