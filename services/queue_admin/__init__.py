"""Operations of the queue over HTTP."""

from services.queue_admin.service import QueueAdminService

__all__ = ["QueueAdminService"]
