"""Calls for ramps: dead letters of a group that are retried step by step."""

from __future__ import annotations

from typing import Any

from werkzeug.wrappers import Request

from services.queue_admin import answers
from services.queue_admin.routes import actor, http
from services.queue_admin.schemas import RampListSchema, RampSchema
from shared.events.ramps import RampTimer


class RampCalls:
    """See the module's docstring."""

    ramping = RampTimer()

    @http(
        "POST",
        "/queue/failures/<fingerprint>/ramp",
        query=RampSchema,
        answers=answers.Ramp,
        status=202,
        refusals=[409],
    )
    def ramp_group(self, request: Request, query: dict[str, Any], fingerprint: str) -> Any:
        """Retry the dead letters of a group in steps of 1, 10, 100, … as long as that goes well."""
        return 202, self.ramping.begin(actor(request), fingerprint, query["rate"])

    @http("GET", "/queue/ramps", query=RampListSchema, answers=answers.RampList)
    def ramps(self, _request: Request, query: dict[str, Any]) -> Any:
        """Show the ramps, the newest first."""
        return {"ramps": self.ramping.ramps(query["limit"])}

    @http("GET", "/queue/ramps/<int:ramp_id>", answers=answers.Ramp, refusals=[404])
    def ramp(self, _request: Request, ramp_id: int) -> Any:
        """Show how far a ramp is, and why it ended."""
        return self.ramping.ramp(ramp_id)

    @http("POST", "/queue/ramps/<int:ramp_id>/cancel", answers=answers.Ramp, refusals=[404, 409])
    def cancel_ramp(self, request: Request, ramp_id: int) -> Any:
        """End a ramp; what it retried goes on."""
        return self.ramping.cancel(actor(request), ramp_id)
