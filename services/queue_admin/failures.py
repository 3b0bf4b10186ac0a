"""Calls for groups of dead letters, and the audit log."""

from __future__ import annotations

from typing import Any

from werkzeug.wrappers import Request

from services.queue_admin import answers
from services.queue_admin.routes import Calls, actor, http
from services.queue_admin.schemas import AuditLogSchema, BatchSchema


class FailureCalls(Calls):
    """See the module's docstring."""

    @http("GET", "/queue/failures", answers=answers.FailureGroups)
    def failures(self, _request: Request) -> Any:
        """Show the groups of dead letters, the largest first."""
        return {"failures": self.operations.failures()}

    @http(
        "POST",
        "/queue/failures/<fingerprint>/retry",
        query=BatchSchema,
        answers=answers.GroupRetried,
        status=202,
        refusals=[409],
    )
    def retry_group(self, request: Request, query: dict[str, Any], fingerprint: str) -> Any:
        """Let the dead letters of a group run again."""
        return 202, self.operations.retry_group(actor(request), fingerprint, query["limit"])

    @http(
        "POST",
        "/queue/failures/<fingerprint>/discard",
        query=BatchSchema,
        answers=answers.GroupDiscarded,
        refusals=[409],
    )
    def discard_group(self, request: Request, query: dict[str, Any], fingerprint: str) -> Any:
        """Give up the dead letters of a group."""
        return self.operations.discard_group(actor(request), fingerprint, query["limit"])

    @http("GET", "/queue/audit-log", query=AuditLogSchema, answers=answers.AuditLog)
    def audit_log(self, _request: Request, query: dict[str, Any]) -> Any:
        """Show who did what, the newest first."""
        return self.operations.audit_log(query.get("before"), query["limit"])
