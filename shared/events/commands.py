"""What the hub, the pump and the carrier tell each other to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shared.database import CommitUncertainError, Transaction
from shared.native import Promise
from shared.providers import QueueProvider
from shared.types import Delivery, Envelope, Lease, Settlement, Subscription

# --- hub to pump


@dataclass(slots=True)
class Append:
    """Store these events; the promise is resolved once they are."""

    envelopes: Sequence[Envelope]
    promise: Promise
    again: bool = False


@dataclass(slots=True)
class Doubt:
    """Find out whether these are stored: the answer to their COMMIT was lost."""

    append: Append
    error: CommitUncertainError


@dataclass(slots=True)
class Call:
    """Do something within a transaction of its own; deliveries that it returns are published."""

    function: Callable[[Transaction], tuple[Any, list[Delivery]]]
    promise: Promise


@dataclass(slots=True)
class Consume:
    """Consume these subscriptions, with so many workers; tell the hub once they are registered.

    ``batches`` says for each how many of its deliveries one worker takes together.
    """

    subscriptions: Sequence[Subscription]
    batches: Sequence[int]
    workers: int
    on_registered: Callable[[list[Subscription]], None]


@dataclass(slots=True)
class Check:
    """Say whether the provider answers."""

    promise: Promise


@dataclass(slots=True)
class Ask:
    """Do something with the provider, on the thread that owns it."""

    function: Callable[[QueueProvider], Any]
    promise: Promise


@dataclass(slots=True)
class StopConsuming:
    """Reserve nothing more."""


@dataclass(slots=True)
class Finish:
    """Store what is left, hand back what still runs, and end."""


# --- pump to carrier (beside Ask, Check, StopConsuming, Forget and Finish)


@dataclass(slots=True)
class Publish:
    """Publish these, and say whether it went well.

    ``setbacks`` says of how many :class:`Unpublished` was known when this was decided: what came
    of a later one is older, and has to be published before these.
    """

    deliveries: list[Delivery]
    is_backlog: bool = False
    setbacks: int | None = None
    is_stray: bool = False
    """Whether each goes to its subscription alone, since no queue got it as a new one."""


@dataclass(slots=True)
class Declare:
    """Make queues for these, and consume them."""

    subscriptions: Sequence[Subscription]
    batches: Sequence[int]
    workers: int


@dataclass(slots=True)
class Prepare:
    """Have a place for these before anything is published, and the pauses of some."""

    subscriptions: Sequence[Subscription]
    paused: Sequence[Subscription]


@dataclass(slots=True)
class Settle:
    """End these leases."""

    settlements: list[Settlement]


@dataclass(slots=True)
class Free:
    """The workers that had these leases are free; they are settled next.

    ``seconds`` is the longest time from being handed out to being handled.
    """

    keys: list[Any]
    seconds: float = 0.0


@dataclass(slots=True)
class Detach:
    """Acknowledge these: from now on the log keeps their leases."""

    leases: list[Lease]


@dataclass(slots=True)
class Forget:
    """Remove subscriptions that were retired; the carrier gives back those that it cannot."""

    subscriptions: list[Subscription]


@dataclass(slots=True)
class Keep:
    """Take these leases over from a carrier that hangs."""

    leases: list[Lease]


class Credit(NamedTuple):
    """What may be reserved of a subscription that has limits.

    :param total: how many since it was named first.
    :param until: when that runs out, as monotonic time.
    """

    total: int
    until: float


@dataclass(slots=True)
class Allow:
    """Reserve no more than that of these; of all others as much as there is room for.

    With a ``number`` it has to be answered.
    """

    credits: Mapping[int, Credit]
    number: int = 0


@dataclass(slots=True)
class Revive:
    """These have work waiting and get none: connect anew, unless they have a reason for it."""

    subscriptions: list[Subscription]


# --- carrier to pump


@dataclass(slots=True)
class Declared:
    """The queues are there."""


@dataclass(slots=True)
class Published:
    """The provider has these, but for those without a queue there."""

    deliveries: list[Delivery]
    homeless: list[Delivery]
    is_backlog: bool


@dataclass(slots=True)
class Refused:
    """The provider does not take these, as far as can be told: they are tried again later."""

    deliveries: list[Delivery]
    reason: str


@dataclass(slots=True)
class Unpublished:
    """The provider may not have these. ``setbacks`` counts how often that was said.

    ``reason`` says why, where it is not that the provider is down.
    """

    deliveries: list[Delivery]
    is_backlog: bool
    setbacks: int
    reason: str = ""


@dataclass(slots=True)
class Reserved:
    """These are to be handled."""

    leases: list[Lease]


@dataclass(slots=True)
class Allowed:
    """What was allowed under this number is kept to, with all that was reserved so far told."""

    number: int


@dataclass(slots=True)
class Lost:
    """The provider has these leases no longer; who handles them goes on."""

    leases: list[Lease]


@dataclass(slots=True)
class Stuck:
    """These get nothing for no reason that anybody knows of."""

    subscriptions: list[Subscription]


@dataclass(slots=True)
class Up:
    """The provider answers."""


@dataclass(slots=True)
class Down:
    """The provider does not answer."""

    reason: str


@dataclass(slots=True)
class Noticed:
    """The provider has something to be logged."""

    text: str


@dataclass(slots=True)
class Crashed:
    """The carrier ended by what nobody expected."""

    error: BaseException
