"""Writes to people by mail about what auth_events tells."""

from services.notifications.service import NotificationsService

__all__ = ["NotificationsService"]
