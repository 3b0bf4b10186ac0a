"""The one error tree of the suite::

    QueueError
    ├── SettingsError              a setting is wrong or missing
    ├── PayloadError               a payload or an option cannot be sent
    │   └── ContractError          a payload breaks its event's contract
    ├── DispatchError              an event was not stored
    │   ├── DispatchRefusedError   the log takes other events, and not this one
    │   └── DispatchUncertainError an event may or may not have been stored
    ├── DedupeConflictError        a key came again, with something else
    ├── MessageNotFoundError       no such message in the log
    ├── NothingToChangeError       what was to be changed is not in a state for it
    │   ├── NothingToRetryError    a message has no failed delivery
    │   └── RampRunningError       a group that is to be ramped up is already
    ├── RampNotFoundError          no such ramp
    ├── QueueNotKnownError         no such queue, for who is to be told of it
    ├── ScheduleNotFoundError      no such schedule
    ├── SubscriptionNotFoundError  no such subscription, or it is retired
    ├── SubscriptionLiveError      a subscription that is to be retired has a live consumer
    ├── StoreUnavailableError      the log's database does not answer
    ├── ProviderError              a provider could not do what was asked
    │   ├── ProviderUnavailableError
    │   │   └── ProviderBlockedError
    │   ├── ProviderRefusedError   it took all but some
    │   ├── UnsupportedByProviderError
    │   ├── QueueNotFoundError     nobody knows what the name of a queue means
    │   └── LeaseLostError         a lease was taken over
    ├── HandlerTimeoutError        a handler ran longer than it may
    ├── RpcTimeoutError            a call got no reply in time
    ├── HandlerAbortedError        a handler ended by what is no ordinary exception
    ├── Reject                     a handler: never try this again
    │   └── InboxError             a handler went on after its commit, and failed
    └── Retry                      a handler: try this again, later

``Reject`` and ``Retry`` are control flow of handlers, and therefore bear the
names of what they ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LONGEST_DELAY_SECONDS = 366 * 86_400
"""A year; what is further off has a date, hence ``scheduled_at``."""


class QueueError(Exception):
    """Raised when anything of the event suite fails; the root of the tree."""


class SettingsError(QueueError):
    """Raised when a setting has a value that it may not have.

    The text is one line that names the variable and what it may be.
    """


class PayloadError(QueueError, ValueError):
    """Raised when a payload, name or option cannot be dispatched as it is.

    ``errors`` maps a field (dotted where it is nested) to what is wrong.
    """

    def __init__(self, errors: Mapping[str, Any]) -> None:
        self.errors = dict(errors)
        super().__init__("; ".join(f"{field}: {said}" for field, said in self.errors.items()))


class ContractError(PayloadError):
    """Raised when a payload breaks the contract of its event type."""


class DispatchError(QueueError):
    """Raised when an event could not be stored: nothing was, nothing is sent."""


class DispatchRefusedError(DispatchError):
    """Raised when the log's database works, and refuses an event as it is."""


class DispatchUncertainError(DispatchError):
    """Raised when the fate of a COMMIT stayed unknown.

    ``message_ids`` are the ids that the events have if they were stored.
    """

    def __init__(self, message_ids: list[str], reason: str) -> None:
        self.message_ids = message_ids
        super().__init__(f"stored or not is unknown for {', '.join(message_ids)}: {reason}")


class DedupeConflictError(QueueError):
    """Raised when a key that has to mean the same each time comes with something else."""


class MessageNotFoundError(QueueError):
    """Raised when the message log has no message of that id."""


class NothingToChangeError(QueueError):
    """Raised when what is to be cancelled, put off or discarded is not in a state for it."""


class SubscriptionNotFoundError(QueueError):
    """Raised when there is no such subscription, or it was retired."""


class SubscriptionLiveError(QueueError):
    """Raised when a subscription that is to be retired has a live consumer."""


class NothingToRetryError(NothingToChangeError):
    """Raised when a message that is to be retried has no failed delivery."""


class RampRunningError(NothingToChangeError):
    """Raised when a failure group that is to be ramped up has a ramp that runs."""


class RampNotFoundError(QueueError):
    """Raised when there is no ramp of that id."""


class QueueNotKnownError(QueueError):
    """Raised when nothing is known of a queue, or there are no alerts of it."""


class ScheduleNotFoundError(QueueError):
    """Raised when there is no schedule of that name."""


class StoreUnavailableError(QueueError):
    """Raised when the database of the message log does not answer."""


class ProviderError(QueueError):
    """Raised when a provider could not do what was asked of it."""


class ProviderUnavailableError(ProviderError):
    """Raised when a provider's server does not answer."""


class ProviderBlockedError(ProviderUnavailableError):
    """Raised when a provider takes nothing more for the time being, and works otherwise."""


class ProviderRefusedError(ProviderError):
    """Raised when a provider took all but some of what it was to publish, and works otherwise.

    :param refused: what it did not take, or not all of it: it may be published again later.
    :param homeless: of what it took, that which no queue got.
    """

    def __init__(self, reason: str, refused: list[Any], homeless: list[Any]) -> None:
        self.refused = refused
        self.homeless = homeless
        super().__init__(reason)


class UnsupportedByProviderError(ProviderError):
    """Raised when a provider says by its capabilities that it cannot do this."""


class QueueNotFoundError(ProviderError):
    """Raised when the name of a provider's queue does not say whose events it is for."""


class LeaseLostError(ProviderError):
    """Raised when somebody settles or extends a lease that is no longer theirs."""


class HandlerTimeoutError(QueueError):
    """Raised in a handler that ran longer than its ``timeout``."""


class RpcTimeoutError(QueueError):
    """Raised when a call got no reply within its timeout.

    The method may have run, may still run, or may never have been reached.
    """


class HandlerAbortedError(QueueError):
    """Raised when a handler raised what is no ``Exception``: SystemExit, eventlet's Timeout.

    nameko does not see those, and the delivery would stay in hand for ever.
    """


class Reject(QueueError):  # noqa: N818 - named for what a handler asks for
    """Raised when a handler knows that a message can never succeed.

    The delivery becomes a dead letter at once, without further attempts.
    """


class InboxError(Reject):
    """Raised when a handler with an inbox failed after it had committed, or commits again.

    Its message counts as handled by that commit, so no attempt would run it again.
    """


class Retry(QueueError):  # noqa: N818 - named for what a handler asks for
    """Raised when a handler wants another attempt at a time of its own choice.

    :param after: seconds until the next attempt, at most a year; ``None`` leaves it to
        the backoff.
    """

    def __init__(self, reason: str = "", *, after: float | None = None) -> None:
        if after is not None and not 0 <= after <= LONGEST_DELAY_SECONDS:
            raise ValueError(f"after: must be 0 to {LONGEST_DELAY_SECONDS} seconds")
        self.after = after
        super().__init__(reason or "the handler asked for another attempt")


def by_field(errors: Mapping[str, Any], root: str) -> dict[str, list[str]]:
    """Return what marshmallow says is wrong by field, dotted where it is nested.

    :param root: what is named where something is wrong with all of it.
    """
    return dict(_by_field(errors, "", root))


def _by_field(errors: Any, path: str, root: str) -> Iterator[tuple[str, list[str]]]:
    if not isinstance(errors, Mapping):
        yield path or root, [errors] if isinstance(errors, str) else list(map(str, errors))
        return
    for key, below in errors.items():
        name = path if key == "_schema" else f"{path}.{key}".removeprefix(".")
        yield from _by_field(below, name, root)
