"""What queue_admin tells of the queues."""

from __future__ import annotations

from marshmallow import Schema, fields, validate

from shared.contracts import contract

SOURCE = "queue_admin"

ALERT = "queue.alert"


@contract(SOURCE, ALERT, version=1)
class QueueAlert(Schema):
    """A queue has too much of something, or has no longer.

    Both are told once of each episode, by the same ``alert_id``.
    """

    alert_id = fields.Int(required=True, validate=validate.Range(1))
    status = fields.Str(required=True, validate=validate.OneOf(["firing", "resolved"]))
    queue_name = fields.Str(required=True, validate=validate.Length(1, 200))
    rule = fields.Str(required=True, validate=validate.Length(1, 30))
    value = fields.Float(required=True, allow_none=True)
    threshold = fields.Float(required=True)
    began_at = fields.AwareDateTime(required=True, format="iso")
    ended_at = fields.AwareDateTime(required=True, allow_none=True, format="iso")
    subscribers = fields.List(fields.Str(), required=True)
    summary = fields.Str(required=True, validate=validate.Length(1, 10_000))
