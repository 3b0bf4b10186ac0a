"""What ``queue_admin`` answers, as ``/openapi.json`` tells it."""

from __future__ import annotations

from typing import Any

from marshmallow import Schema, fields, validate

from shared.lifecycle import DeliveryStatus, MessageStatus
from shared.store.alerts import AlertStatus
from shared.store.measures import Rule
from shared.store.ramps import RampStatus
from shared.types import Priority


def _text(**kwargs: Any) -> fields.Str:
    return fields.Str(required=True, **kwargs)


def _maybe(**kwargs: Any) -> fields.Str:
    return fields.Str(required=True, allow_none=True, **kwargs)


def _count(**kwargs: Any) -> fields.Int:
    return fields.Int(required=True, validate=validate.Range(0), **kwargs)


def _status(statuses: Any = MessageStatus) -> fields.Str:
    return _text(validate=validate.OneOf([status.value for status in statuses]))


class Problem(Schema):
    """Problem details (RFC 9457)."""

    type = _text()
    title = _text()
    status = fields.Int(required=True)
    detail = _text()
    errors = fields.Dict(
        keys=fields.Str(),
        values=fields.List(fields.Str()),
        metadata={"description": "What is wrong with which field."},
    )


class Published(Schema):
    messageId = _text()


class SubscriptionCounts(Schema):
    subscriber = _text()
    waiting = _count()
    active = _count()
    scheduled = _count()
    dead = _count()


class Stats(Schema):
    queueName = _text()
    pending = _count()
    processing = _count()
    completed = _count()
    failed = _count()
    retry = _count()
    total = _count()
    unrouted = _count()
    avgProcessingSeconds = fields.Float(required=True, allow_none=True)
    subscriptions = fields.List(fields.Nested(SubscriptionCounts), required=True)


def _slices() -> fields.List[Any]:
    return fields.List(fields.Int(), required=True)


class Recent(Schema):
    pending = _slices()
    processing = _slices()
    completed = _slices()
    failed = _slices()
    retry = _slices()


class QueueShown(Schema):
    queueName = _text()
    subscriptions = _count()
    paused = _count(metadata={"description": "Subscriptions that are paused."})
    silent = _count(metadata={"description": "Those with work waiting and no live consumer."})
    waiting = _count()
    scheduled = _count()
    active = _count()
    dead = _count()
    oldestWaitingSeconds = fields.Float(required=True, allow_none=True)
    dispatchedPerSecond = fields.Float(required=True)
    recent = fields.Nested(
        Recent,
        required=True,
        metadata={
            "description": "Messages stored in the last minute, by their status now, each in "
            "slices of sliceSeconds, the oldest first."
        },
    )


class Overview(Schema):
    at = _text()
    recentSeconds = _count()
    sliceSeconds = _count()
    queues = fields.List(fields.Nested(QueueShown), required=True)


class Listed(Schema):
    messageId = _text()
    queueName = _text()
    messageType = _text()
    status = _status()
    priority = _text(validate=validate.OneOf([each.value for each in Priority]))
    retryCount = _count()
    maxRetries = _count()
    createdAt = _text()
    scheduledAt = _maybe()
    processedAt = _maybe()
    errorMessage = _maybe()


class MessageList(Schema):
    messages = fields.List(fields.Nested(Listed), required=True)
    nextCursor = _maybe(
        metadata={"description": "Where to go on; null at the end. A page may be short before it."}
    )


class Attempt(Schema):
    attempt = fields.Int(required=True)
    outcome = _text()
    startedAt = _maybe()
    endedAt = _text()
    retryAt = _maybe()
    worker = _maybe()
    errorType = _maybe()
    errorMessage = _maybe()
    traceback = _maybe()


class Delivery(Schema):
    subscriber = _text()
    status = _status(DeliveryStatus)
    attempts = _count()
    takeovers = _count()
    availableAt = _maybe()
    startedAt = _maybe()
    processedAt = _maybe()
    worker = _maybe()
    errorType = _maybe()
    errorMessage = _maybe()
    history = fields.List(fields.Nested(Attempt), required=True)


class Cause(Schema):
    messageId = _text()
    queueName = fields.Str()
    messageType = fields.Str()
    status = fields.Str()
    createdAt = fields.Str()


class Effect(Cause):
    caused = fields.List(fields.Nested(lambda: Effect()), required=True)


class Message(Listed):
    payload = fields.Raw(required=True, allow_none=True)
    metadata = fields.Dict(required=True)
    deliveries = fields.List(fields.Nested(Delivery), required=True)
    origin = _maybe(metadata={"description": "The message that this one was sent in place of."})
    causedBy = fields.List(
        fields.Nested(Cause),
        required=True,
        metadata={"description": "The message whose handler dispatched this one, its cause, …"},
    )
    caused = fields.List(fields.Nested(Effect), required=True)
    causedMore = fields.Bool(required=True)


class Reason(Schema):
    subscriber = _maybe()
    status = _maybe()
    reason = _text()
    sentence = _text()
    evidence = fields.Dict(required=True)


class Reasons(Schema):
    messageId = _text()
    status = _status()
    reasons = fields.List(fields.Nested(Reason), required=True)


class Retried(Schema):
    messageId = _text()
    retried = _count()


class Discarded(Schema):
    messageId = _text()
    discarded = _count()


class Cancelled(Schema):
    messageId = _text()
    cancelled = _count()


class Rescheduled(Schema):
    messageId = _text()
    rescheduled = _count()


class Resent(Schema):
    messageId = _text(metadata={"description": "The new message."})
    origin = _text()
    sent = _count()


class RetriedMany(Schema):
    messages = _count(metadata={"description": "Messages that were found."})
    retried = _count(metadata={"description": "Deliveries that run again."})
    nextCursor = _maybe()


class Example(Schema):
    messageId = _text()
    queueName = _text()
    messageType = _text()
    subscriber = _text()
    errorMessage = _maybe()


class FailureGroup(Schema):
    fingerprint = _text()
    count = _count()
    firstSeenAt = _text()
    lastSeenAt = _text()
    errorType = _text()
    place = _maybe()
    example = fields.Nested(Example, required=True)


class FailureGroups(Schema):
    failures = fields.List(fields.Nested(FailureGroup), required=True)


class GroupRetried(Schema):
    retried = _count()
    remaining = _count()


class GroupDiscarded(Schema):
    discarded = _count()
    remaining = _count()


class Ramp(Schema):
    id = fields.Int(required=True)
    fingerprint = _text()
    status = _status(RampStatus)
    startedBy = _text()
    rate = _count(metadata={"description": "Dead letters a second, at most."})
    total = _count(metadata={"description": "Dead letters that the group had at first."})
    step = _count(metadata={"description": "How many dead letters the step has."})
    retried = _count()
    completed = _count()
    failed = _count(metadata={"description": "Of those retried, dead letters again."})
    waiting = _count(metadata={"description": "Of those retried, under way."})
    remaining = _count(metadata={"description": "Dead letters that the group has now."})
    startedAt = _text()
    endedAt = _maybe()
    sentence = _text()


class RampList(Schema):
    ramps = fields.List(fields.Nested(Ramp), required=True)


class Alert(Schema):
    id = fields.Int(required=True)
    queueName = _text()
    rule = _text(validate=validate.OneOf([rule.value for rule in Rule]))
    status = _status([AlertStatus.FIRING, AlertStatus.RESOLVED])
    value = fields.Float(
        required=True,
        allow_none=True,
        metadata={"description": "The most that it was."},
    )
    threshold = fields.Float(required=True)
    subscribers = fields.List(fields.Str(), required=True)
    beganAt = _text()
    endedAt = _maybe()
    messageId = _maybe(metadata={"description": "The message that told of its beginning."})
    endMessageId = _maybe()
    sentence = _text()


class AlertList(Schema):
    firing = fields.List(fields.Nested(Alert), required=True)
    resolved = fields.List(
        fields.Nested(Alert), required=True, metadata={"description": "The newest first."}
    )


class Thresholds(Schema):
    failurePercent = fields.Float(required=True)
    oldestSeconds = fields.Float(required=True)
    deadLetters = _count()
    silentConsumers = _count()
    failingSchedules = _count()


class QueueThresholds(Thresholds):
    queueName = _text()
    own = fields.List(
        fields.Str(),
        required=True,
        metadata={"description": "Which of them are the queue's own."},
    )


class ThresholdList(Schema):
    usual = fields.Nested(Thresholds, required=True)
    queues = fields.List(fields.Nested(QueueThresholds), required=True)


class Removed(Schema):
    messages = _count()
    deliveries = _count()


class Retention(Schema):
    completedDays = fields.Float(
        required=True,
        metadata={"description": "How long completed messages are kept; 0 is for ever."},
    )
    deadDays = fields.Float(
        required=True,
        metadata={"description": "How long messages with dead letters are; 0 is for ever."},
    )
    inboxDays = fields.Float(required=True)
    dedupeKeyHours = fields.Float(required=True)
    lastRunAt = _maybe()
    lastResult = fields.Nested(Removed, required=True, allow_none=True)
    nextRunAt = _maybe()


class Limits(Schema):
    concurrency = fields.Int(required=True, allow_none=True)
    rate = fields.Float(required=True, allow_none=True)
    burst = fields.Int(required=True, allow_none=True)


class Limited(Schema):
    subscription = fields.Int(required=True)
    limits = fields.Nested(Limits, required=True, allow_none=True)


class SubscriptionShown(Schema):
    id = fields.Int(required=True)
    queueName = _text()
    source = _text()
    messageType = _text()
    subscriber = _text()
    handlerType = _text()
    reliable = fields.Bool(required=True)
    consumer = _text(validate=validate.OneOf(["live", "silent"]))
    lastSeenAt = _maybe()
    pausedAt = _maybe()
    pausedBy = _maybe()
    waiting = _count()
    scheduled = _count()
    active = _count()
    dead = _count()
    oldestWaitingAt = _maybe()
    oldestWaitingSeconds = fields.Float(required=True, allow_none=True)
    limits = fields.Nested(Limits, required=True, allow_none=True)


class SubscriptionList(Schema):
    subscriptions = fields.List(fields.Nested(SubscriptionShown), required=True)


class Paused(Schema):
    subscriptions = fields.List(fields.Int(), required=True)
    paused = fields.Bool(required=True)


class Retired(Schema):
    subscriptions = fields.List(fields.Int(), required=True)
    retired = fields.Bool(required=True)


class Replayed(Schema):
    messages = _count(metadata={"description": "Messages of its type that were looked at."})
    replayed = _count(metadata={"description": "Deliveries that were added."})
    mark = fields.Int(
        required=True,
        allow_none=True,
        metadata={"description": "What to go on with, where they are delivered again."},
    )
    nextCursor = _maybe()


class Schedule(Schema):
    name = _text()
    queueName = _text()
    messageType = _text()
    payload = fields.Raw(required=True, allow_none=True)
    priority = _text(validate=validate.OneOf([each.value for each in Priority]))
    metadata = fields.Dict(required=True)
    cron = _text()
    timeZone = _text()
    sentence = _text(metadata={"description": "What the expression means."})
    enabled = fields.Bool(required=True, metadata={"description": "Whether it is not paused."})
    nextAt = _maybe()
    lastAt = _maybe()
    lastMessageId = _maybe()
    skipped = _count(
        metadata={"description": "Occurrences that were missed, and for which a later one stands."}
    )
    error = _maybe(metadata={"description": "Why the last occurrence was not dispatched."})
    errorAt = _maybe()
    updatedBy = _text()
    updatedAt = _text()


class ScheduleList(Schema):
    schedules = fields.List(fields.Nested(Schedule), required=True)


class ScheduleRemoved(Schema):
    name = _text()
    removed = fields.Bool(required=True)


class Entry(Schema):
    id = fields.Int(required=True)
    at = _text()
    actor = _text()
    action = _text()
    target = _text()
    detail = fields.Dict(required=True, allow_none=True)


class AuditLog(Schema):
    entries = fields.List(fields.Nested(Entry), required=True)
    nextBefore = fields.Int(required=True, allow_none=True)


class ProviderHealth(Schema):
    name = _text()
    status = _text()


class DatabaseHealth(Schema):
    status = _text()


class ConsumersHealth(Schema):
    status = _text()
    silent = fields.List(fields.Str(), required=True)


class DrainingHealth(Schema):
    name = _text()
    status = _text()
    left = fields.Int(
        required=True,
        allow_none=True,
        metadata={"description": "What it still has; null while it does not answer."},
    )


class Health(Schema):
    status = _text()
    provider = fields.Nested(ProviderHealth, required=True)
    database = fields.Nested(DatabaseHealth, required=True)
    consumers = fields.Nested(ConsumersHealth, required=True)
    draining = fields.Nested(
        DrainingHealth,
        metadata={"description": "The provider that is moved away from, where one is."},
    )
