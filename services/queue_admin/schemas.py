"""What ``queue_admin`` takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from marshmallow import Schema, ValidationError, fields, post_load, validate, validates_schema

from shared.lifecycle import MessageStatus
from shared.store import limits
from shared.store.listing import ANY, MOST_LISTED, PAYLOAD_PATH, Filters, scalar
from shared.store.measures import Rule
from shared.store.ramps import HIGHEST_RATE, USUAL_RATE
from shared.store.ramps import MOST_LISTED as RAMPS_LISTED
from shared.types import MAX_RETRIES_LIMIT, NAME, Priority

MOST_RETRIED = 10_000
"""Messages or dead letters that one call changes; the next one goes on."""

LONGEST_TEXT = 255

_name = validate.Regexp(
    NAME.pattern + r"\Z",
    error="Must match [A-Za-z0-9][A-Za-z0-9._-]* and have 1 to 200 characters.",
)
_word = validate.Length(1, LONGEST_TEXT)
_path = validate.Regexp(
    PAYLOAD_PATH.pattern + r"\Z",
    error="Must be a path such as $.user.email or $.items[0].id.",
)


class Time(fields.AwareDateTime):
    """A time with its zone, from 1971 to 2037: where MySQL's TIMESTAMP ends."""

    def __init__(self, **kwargs: Any) -> None:
        meaning = {"description": "With its zone, from 1971 to 2037."}
        super().__init__(format="iso", metadata=meaning, **kwargs)

    def _deserialize(self, *args: Any, **kwargs: Any) -> datetime:
        given = super()._deserialize(*args, **kwargs)
        try:
            plain = given.astimezone(UTC)
        except OverflowError as exc:
            raise ValidationError("Is out of range.") from exc
        if not 1971 <= plain.year <= 2037:
            raise ValidationError("Must lie between 1971 and 2037.")
        return plain


class QueryInt(fields.Int):
    """A whole number in a query, in digits: Python takes ``1_0`` and ``+10`` for one, too."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not re.fullmatch("-?[0-9]+", value, re.ASCII):
            raise self.make_error("invalid", input=value)
        return super()._deserialize(value, *args, **kwargs)


class PublishSchema(Schema):
    """The body of ``POST /queue/publish``."""

    queue_name = fields.Str(required=True, data_key="queueName", validate=_name)
    message_type = fields.Str(required=True, data_key="messageType", validate=_name)
    payload = fields.Raw(required=True, allow_none=True)
    priority = fields.Str(validate=validate.OneOf(list(Priority)))
    metadata = fields.Dict(keys=fields.Str())
    scheduled_at = Time(data_key="scheduledAt")
    max_retries = fields.Int(
        strict=True, data_key="maxRetries", validate=validate.Range(0, MAX_RETRIES_LIMIT)
    )


class FilterSchema(Schema):
    """Which messages are meant."""

    queue = fields.Str(validate=_name)
    message_type = fields.Str(data_key="type", validate=_name)
    subscriber = fields.Str(validate=_word)
    priority = fields.Str(validate=validate.OneOf(list(Priority)))
    created_from = Time(data_key="createdFrom")
    created_to = Time(data_key="createdTo")
    exception_type = fields.Str(data_key="exceptionType", validate=_word)
    text = fields.Str(validate=_word)
    payload_path = fields.Str(data_key="payloadPath", validate=_path)
    cursor = fields.Str(validate=validate.Length(1, LONGEST_TEXT))

    @validates_schema
    def _check_value(self, data: Mapping[str, Any], **_: Any) -> None:
        if ("payload_path" in data) != ("payload_value" in data):
            lacking = "payloadValue" if "payload_path" in data else "payloadPath"
            raise ValidationError({lacking: ["Must be given, too."]})
        value = data.get("payload_value")
        if isinstance(value, dict | list):
            raise ValidationError(
                {"payloadValue": ["Must be a text, a number, true, false or null."]}
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValidationError({"payloadValue": ["Must have 64 bits at most."]})

    @post_load
    def _gather(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        cursor, limit = data.pop("cursor", None), data.pop("limit")
        for name in ("created_from", "created_to"):
            if name in data:
                data[name] = data[name].replace(tzinfo=None)
        data.setdefault("payload_value", ANY)
        return {"filters": Filters(**data), "cursor": cursor, "limit": limit}


class ListSchema(FilterSchema):
    """The query of ``GET /queue/messages``."""

    status = fields.Str(validate=validate.OneOf(list(MessageStatus)))
    limit = QueryInt(load_default=50, validate=validate.Range(1, MOST_LISTED))
    # as JSON, or what is no JSON as text
    payload_value = fields.Str(data_key="payloadValue", validate=validate.Length(max=LONGEST_TEXT))

    @post_load
    def _gather(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        if "payload_value" in data:
            data["payload_value"] = scalar(data["payload_value"])
        return super()._gather(data)


class RetrySchema(FilterSchema):
    """The body of ``POST /queue/retry``."""

    payload_value = fields.Raw(
        data_key="payloadValue",
        allow_none=True,
        metadata={"type": ["string", "number", "boolean", "null"]},
    )
    limit = fields.Int(strict=True, load_default=1000, validate=validate.Range(1, MOST_RETRIED))


class BatchSchema(Schema):
    """The query of what changes a failure group."""

    limit = QueryInt(load_default=1000, validate=validate.Range(1, MOST_RETRIED))


class RampSchema(Schema):
    """The query of ``POST /queue/failures/<fingerprint>/ramp``."""

    rate = QueryInt(load_default=USUAL_RATE, validate=validate.Range(1, HIGHEST_RATE))


class RampListSchema(Schema):
    """The query of ``GET /queue/ramps``."""

    limit = QueryInt(load_default=RAMPS_LISTED, validate=validate.Range(1, RAMPS_LISTED))


class ThresholdsSchema(Schema):
    """The body of ``PUT /queue/alerts/thresholds/<queue>``; what is left out is as usual.

    As an answer shows them, too: then those that ``own`` does not name are as usual.
    """

    failure_percent = fields.Float(data_key="failurePercent", validate=validate.Range(0, 100))
    oldest_seconds = fields.Float(data_key="oldestSeconds", validate=validate.Range(0, 1e9))
    dead_letters = fields.Int(
        strict=True, data_key="deadLetters", validate=validate.Range(0, 10**9)
    )
    silent_consumers = fields.Int(
        strict=True, data_key="silentConsumers", validate=validate.Range(0, 10**9)
    )
    failing_schedules = fields.Int(
        strict=True, data_key="failingSchedules", validate=validate.Range(0, 10**9)
    )

    own = fields.List(fields.Str(validate=validate.OneOf([rule.value for rule in Rule])))
    queue_name = fields.Str(data_key="queueName")

    @validates_schema
    def _check_own(self, data: Mapping[str, Any], **_: Any) -> None:
        if lacking := set(data.get("own", ())) - set(data):
            raise ValidationError({"own": [f"Names {min(lacking)}, which is not given."]})

    @post_load
    def _by_rule(self, data: dict[str, Any], **_: Any) -> GivenThresholds:
        own = data.get("own", list(Rule))
        kept = {rule: data[rule] for rule in Rule if rule in own and rule in data}
        return GivenThresholds(data.get("queue_name"), kept)


class GivenThresholds(NamedTuple):
    """What a body says: of which queue, where it does, and which thresholds."""

    queue_name: str | None
    own: dict[Rule, float]


class ResendSchema(Schema):
    """The body of ``POST /queue/messages/<message_id>/resend``."""

    payload = fields.Raw(required=True, allow_none=True)


class RescheduleSchema(Schema):
    """The body of ``POST /queue/messages/<message_id>/reschedule``."""

    scheduled_at = Time(required=True, data_key="scheduledAt")


class ScheduleSchema(Schema):
    """The body of ``PUT /queue/schedules/<name>``."""

    queue_name = fields.Str(required=True, data_key="queueName", validate=_name)
    message_type = fields.Str(required=True, data_key="messageType", validate=_name)
    payload = fields.Raw(required=True, allow_none=True)
    cron = fields.Str(required=True, validate=_word)
    time_zone = fields.Str(load_default="UTC", data_key="timeZone", validate=_word)
    priority = fields.Str(load_default="normal", validate=validate.OneOf(list(Priority)))
    metadata = fields.Dict(keys=fields.Str())


class SubscriptionsSchema(Schema):
    """The query of ``GET /queue/subscriptions``."""

    queue = fields.Str(validate=_name)


class ReplaySchema(Schema):
    """The body of ``POST /queue/subscriptions/<subscription_id>/replay``."""

    since = Time(data_key="from")
    until = Time(data_key="to")
    again = fields.Bool(load_default=False, truthy={True}, falsy={False})
    # as an answer has them, null included
    mark = fields.Int(strict=True, allow_none=True, validate=validate.Range(0, 2**63 - 1))
    cursor = fields.Str(allow_none=True, validate=validate.Length(1, LONGEST_TEXT))
    limit = fields.Int(strict=True, load_default=1000, validate=validate.Range(1, MOST_RETRIED))

    @validates_schema
    def _check_mark(self, data: Mapping[str, Any], **_: Any) -> None:
        if data.get("mark") is not None and not data["again"]:
            raise ValidationError({"mark": ["Is for what is delivered again."]})

    @post_load
    def _plain(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        for name in ("since", "until"):
            if name in data:
                data[name] = data[name].replace(tzinfo=None)
        return {name: value for name, value in data.items() if value is not None}


class LimitsSchema(Schema):
    """The body of ``PUT /queue/subscriptions/<id>/limits``; what is left out is without a limit."""

    concurrency = fields.Int(
        strict=True,
        allow_none=True,
        load_default=None,
        validate=validate.Range(1, limits.MOST_AT_ONCE),
        metadata={"description": "Deliveries in hand at once, over all processes."},
    )
    rate = fields.Float(
        allow_none=True,
        load_default=None,
        validate=validate.Range(limits.LOWEST_RATE, limits.HIGHEST_RATE),
        metadata={"description": "Attempts that begin in a second, over all processes."},
    )
    burst = fields.Int(
        strict=True,
        allow_none=True,
        load_default=None,
        validate=validate.Range(1, limits.MOST_AT_ONCE),
        metadata={"description": "Attempts that may begin together; by default a tenth of rate."},
    )

    @validates_schema
    def _check_burst(self, data: Mapping[str, Any], **_: Any) -> None:
        if data.get("burst") is not None and data.get("rate") is None:
            raise ValidationError({"rate": ["Must be given, too."]})


class AuditLogSchema(Schema):
    """The query of ``GET /queue/audit-log``."""

    before = QueryInt(validate=validate.Range(1, 2**63 - 1))
    limit = QueryInt(load_default=50, validate=validate.Range(1, MOST_LISTED))
