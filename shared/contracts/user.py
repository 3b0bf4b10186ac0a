"""What auth_events tells of its users."""

from __future__ import annotations

from marshmallow import Schema, fields, validate

from shared.contracts import contract

SOURCE = "auth_events"

ADDRESS = r"[^@\s\x00-\x1f\x7f-\x9f]{1,190}@[^@\s\x00-\x1f\x7f-\x9f]{1,190}"
"""As much as can be said of a mail address everywhere: one @, no space, no control character."""

_ID = validate.Length(1, 100)
_NAME = validate.And(
    validate.Length(1, 100),
    validate.Regexp(
        r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z", error="Must not contain control characters."
    ),
)


def mail_address(**kwargs: object) -> fields.Str:
    """A mail address, of any script, of at most 254 characters (RFC 5321, 4.5.3.1.3)."""
    checks = [
        validate.Length(3, 254),
        validate.Regexp(ADDRESS + r"\Z", error="Not a mail address."),
    ]
    return fields.Str(validate=checks, **kwargs)  # type: ignore[arg-type]


def person_name(**kwargs: object) -> fields.Str:
    """A name of 1 to 100 characters, none of them a control character."""
    return fields.Str(validate=_NAME, **kwargs)  # type: ignore[arg-type]


@contract(SOURCE, "user.registered", version=1)
class UserRegistered(Schema):
    """Somebody signed up."""

    user_id = fields.Str(required=True, validate=_ID)
    email = mail_address(required=True)
    first_name = person_name(required=True)
    last_name = person_name(required=True)
    role = person_name(allow_none=True)
    company_name = person_name(allow_none=True)
    company_domain = person_name(allow_none=True)


@contract(SOURCE, "user.logged_in", version=1)
class UserLoggedIn(Schema):
    """Somebody logged in."""

    user_id = fields.Str(required=True, validate=_ID)
    email = mail_address(required=True)
    ip_address = fields.Str(allow_none=True, validate=validate.Length(max=45))
    user_agent = fields.Str(allow_none=True, validate=validate.Length(max=512))
    session_id = fields.Str(allow_none=True, validate=_ID)
    occurred_at = fields.AwareDateTime(default_timezone=None, allow_none=True)


@contract(SOURCE, "user.logged_out", version=1)
class UserLoggedOut(Schema):
    """Somebody logged out, or was."""

    user_id = fields.Str(required=True, validate=_ID)
    email = mail_address(allow_none=True)
    session_id = fields.Str(allow_none=True, validate=_ID)
    occurred_at = fields.AwareDateTime(default_timezone=None, allow_none=True)
