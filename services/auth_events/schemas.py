"""What comes in over HTTP."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from marshmallow import Schema, fields, pre_load, validate

from services.auth_events.passwords import LONGEST, SHORTEST, Password
from shared.contracts.user import mail_address, person_name

SPACES = " \u00a0\u3000"
"""What keyboards make where somebody wants a space: the common, no-break, ideographic one."""


class PasswordField(fields.Str):
    """Loads a :class:`~services.auth_events.passwords.Password` of so many characters."""

    def __init__(self, shortest: int, longest: int) -> None:
        super().__init__(required=True)
        self._has_right_length = validate.Length(shortest, longest)

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        text = super()._deserialize(value, *args, **kwargs)
        self._has_right_length(text)
        return Password(text)


class _Credentials(Schema):
    email = mail_address(required=True)

    @pre_load
    def spell_alike(self, data: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        """Spell alike what means the same: addresses are compared in lower case."""
        return {name: _spelled(name, value) for name, value in data.items()}


class LoginSchema(_Credentials):
    """The body of ``POST /auth/login``: a password too short for us is merely wrong."""

    password = PasswordField(1, LONGEST)


class RegisterSchema(_Credentials):
    """The body of ``POST /auth/register``. Roles are given by us: nobody names one."""

    password = PasswordField(SHORTEST, LONGEST)
    first_name = person_name(required=True)
    last_name = person_name(required=True)
    company_name = person_name(load_default=None, allow_none=True)
    company_domain = fields.Str(
        load_default=None,
        allow_none=True,
        validate=[
            validate.Length(1, 100),
            validate.Regexp(r"[^\s\x00-\x1f\x7f@/]*\Z", error="Not a domain."),
        ],
    )


def _lower(text: str) -> str:
    return unicodedata.normalize("NFC", text.lower())


def _trim(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip(SPACES)


_SPELLINGS = {
    "email": _lower,
    "company_domain": _lower,
    "company_name": _trim,
    "first_name": _trim,
    "last_name": _trim,
}


def _spelled(name: str, value: Any) -> Any:
    spell = _SPELLINGS.get(name)
    return spell(value) if spell and isinstance(value, str) else value
