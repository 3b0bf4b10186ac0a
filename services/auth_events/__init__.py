"""Signs people up, in and out, and tells of it."""

from services.auth_events.service import AuthEventsService

__all__ = ["AuthEventsService"]
