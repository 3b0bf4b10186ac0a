"""Calls for schedules: events that are dispatched at the times of a cron expression."""

from __future__ import annotations

from typing import Any

from werkzeug.wrappers import Request

from services.queue_admin import answers
from services.queue_admin.routes import actor, http
from services.queue_admin.schemas import ScheduleSchema
from shared.events.schedules import ScheduleTimer


class ScheduleCalls:
    """See the module's docstring."""

    scheduling = ScheduleTimer()

    @http("GET", "/queue/schedules", answers=answers.ScheduleList)
    def schedules(self, _request: Request) -> Any:
        """Show the schedules: when they are next, and what each dispatched last."""
        return {"schedules": self.scheduling.schedules()}

    @http("GET", "/queue/schedules/<name>", answers=answers.Schedule, refusals=[404])
    def schedule(self, _request: Request, name: str) -> Any:
        """Show a schedule."""
        return self.scheduling.schedule(name)

    @http("PUT", "/queue/schedules/<name>", schema=ScheduleSchema, answers=answers.Schedule)
    def put_schedule(self, request: Request, body: dict[str, Any], name: str) -> Any:
        """Make a schedule, or change the one of that name; one that is paused stays so."""
        return self.scheduling.put(actor(request), name, **body)

    @http("DELETE", "/queue/schedules/<name>", answers=answers.ScheduleRemoved, refusals=[404])
    def remove_schedule(self, request: Request, name: str) -> Any:
        """Remove a schedule; what it dispatched goes on."""
        self.scheduling.remove(actor(request), name)
        return {"name": name, "removed": True}

    @http(
        "POST",
        "/queue/schedules/<name>/run",
        answers=answers.Published,
        status=202,
        refusals=[404, 422],
    )
    def run_schedule(self, request: Request, name: str) -> Any:
        """Dispatch what a schedule dispatches, now, beside its occurrences."""
        return 202, {"messageId": self.scheduling.run(actor(request), name)}

    @http("POST", "/queue/schedules/<name>/pause", answers=answers.Schedule, refusals=[404])
    def pause_schedule(self, request: Request, name: str) -> Any:
        """Have nothing more dispatched by a schedule."""
        return self.scheduling.pause(actor(request), name)

    @http("POST", "/queue/schedules/<name>/resume", answers=answers.Schedule, refusals=[404, 422])
    def resume_schedule(self, request: Request, name: str) -> Any:
        """Take back a pause; what was meanwhile is not made up for."""
        return self.scheduling.resume(actor(request), name)
