"""What auth_events tells of its users."""

from __future__ import annotations

import re
import unicodedata

import idna
from marshmallow import Schema, ValidationError, fields, validate

from shared.contracts import contract

SOURCE = "auth_events"

_LOCAL_PART = re.compile(r"""[^@\s.<>()\[\],;:\\"]+(\.[^@\s.<>()\[\],;:\\"]+)*""")
"""RFC 5322's dot-atom, with letters of any script (RFC 6531)."""

_PLAIN_DOMAIN = re.compile(r"[a-z0-9]{1,60}(\.[a-z0-9]{1,60}){0,3}", re.ASCII | re.IGNORECASE)
"""What is a domain for sure: most are, and to ask for the others takes a while."""

LONGEST_LOCAL_BYTES = 64
"""RFC 5321, 4.5.3.1.1."""

_ID = validate.Length(1, 100)
_NAME = validate.And(
    validate.Length(1, 100),
    validate.Regexp(
        r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z", error="Must not contain control characters."
    ),
)


def mail_address(**kwargs: object) -> fields.Str:
    """A mail address, of any script, of at most 254 characters (RFC 5321, 4.5.3.1.3)."""
    checks = [validate.Length(3, 254), _check_address]
    return fields.Str(validate=checks, **kwargs)  # type: ignore[arg-type]


def _check_address(address: str) -> None:
    local, _, domain = address.rpartition("@")
    is_local_part = _LOCAL_PART.fullmatch(local) and len(local.encode()) <= LONGEST_LOCAL_BYTES
    if _has_hidden(address) or not is_local_part or not _is_domain(domain):
        raise ValidationError("Not a mail address.")


def _has_hidden(address: str) -> bool:
    """Say whether there is anything that cannot be seen: it makes two addresses of one."""
    if address.isascii() and address.isprintable():
        return False
    return any(unicodedata.category(each) in ("Cc", "Cf", "Zl", "Zp") for each in address)


def _is_domain(domain: str) -> bool:
    if _PLAIN_DOMAIN.fullmatch(domain):
        return True
    try:
        return bool(idna.encode(domain, uts46=True, std3_rules=True))
    except (idna.IDNAError, UnicodeError):
        return False


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
