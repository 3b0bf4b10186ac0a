"""What comes in, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from marshmallow import EXCLUDE, ValidationError

from shared.contracts.alert import QueueAlert
from shared.contracts.user import UserRegistered
from shared.errors import Reject

_REGISTERED = UserRegistered(unknown=EXCLUDE)
_ALERT = QueueAlert(unknown=EXCLUDE)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewUser:
    """Who signed up."""

    email: str
    first_name: str
    last_name: str
    company_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """What an alert says that a person reads."""

    alert_id: str
    status: str
    queue_name: str
    rule: str
    began_at: str
    summary: str

    @property
    def is_firing(self) -> bool:
        """Whether it tells that an episode began, and not that it is over."""
        return self.status == "firing"

    @property
    def episode(self) -> str:
        """What names the episode that it tells of."""
        return f"{self.alert_id} {self.began_at}"


def read_alert(payload: Any) -> Alert:
    """Read ``queue.alert``.

    :raises Reject: when it breaks its contract.
    """
    if errors := _ALERT.validate(payload):
        raise Reject(f"the payload breaks its contract: {errors}")
    return Alert(**{name: str(payload[name]) for name in Alert.__slots__})


def read_new_user(payload: Any) -> NewUser:
    """Read ``user.registered``.

    :raises Reject: when it breaks its contract.
    """
    try:
        fields = _REGISTERED.load(payload)
    except ValidationError as exc:
        raise Reject(f"the payload breaks its contract: {exc.messages}") from exc
    return NewUser(**{name: fields.get(name) for name in NewUser.__slots__})
