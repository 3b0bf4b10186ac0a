"""What may be published over HTTP."""

from __future__ import annotations

from marshmallow import Schema, fields, validate

from shared.types import MAX_RETRIES_LIMIT, NAME, Priority

_name = validate.Regexp(
    NAME.pattern + r"\Z",
    error="Must match [A-Za-z0-9][A-Za-z0-9._-]* and have 1 to 200 characters.",
)


class PublishSchema(Schema):
    """The body of ``POST /queue/publish``."""

    queue_name = fields.Str(required=True, data_key="queueName", validate=_name)
    message_type = fields.Str(required=True, data_key="messageType", validate=_name)
    payload = fields.Raw(required=True, allow_none=True)
    priority = fields.Str(validate=validate.OneOf(list(Priority)))
    metadata = fields.Dict(keys=fields.Str())
    scheduled_at = fields.AwareDateTime(data_key="scheduledAt", format="iso")
    max_retries = fields.Int(
        strict=True, data_key="maxRetries", validate=validate.Range(0, MAX_RETRIES_LIMIT)
    )
