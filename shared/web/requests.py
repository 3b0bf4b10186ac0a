"""What comes in: the JSON object of a body, and the token of a header."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from marshmallow import Schema, ValidationError
from werkzeug.wrappers import Request

from shared.errors import PayloadError
from shared.types import MAX_JSON_DEPTH, check_json
from shared.web.problems import Problem, invalid


def bearer_token(request: Request) -> str | None:
    """Return the token of an ``Authorization: Bearer`` header (RFC 6750, 2.1), if there is one."""
    header = request.headers.get("Authorization", "")
    match = re.fullmatch(r"bearer +([A-Za-z0-9._~+/-]+=*) *", header, re.IGNORECASE)
    return match[1] if match else None


def read_json(request: Request, most_bytes: int) -> dict[str, Any]:
    """Read the JSON object that a request carries.

    Each of its members may nest as deep as a payload may.

    :raises Problem: 400, 408, 413 or 415.
    """
    if request.mimetype != "application/json":
        raise Problem(
            415,
            "unsupported-media-type",
            "The body must be JSON",
            detail="Content-Type must be application/json",
            headers={"Accept": "application/json"},
        )
    body = _parse(_read_body(request, most_bytes))
    if not isinstance(body, dict):
        raise _malformed("the body must be an object")
    return body


def _read_body(request: Request, most_bytes: int) -> bytes:
    expected = request.content_length or 0
    if expected > most_bytes:
        raise _too_large(most_bytes)
    try:
        raw: bytes = request.environ["wsgi.input"].read(most_bytes + 1)
    except TimeoutError as exc:
        raise Problem(408, "request-timeout", "The body did not arrive in time") from exc
    except (OSError, ValueError) as exc:
        raise _malformed("the body broke off") from exc
    if len(raw) > most_bytes:
        raise _too_large(most_bytes)
    if len(raw) < expected:
        raise _malformed("the body broke off")
    return raw


def read_query(request: Request) -> dict[str, str]:
    """Return the parameters of a query.

    :raises Problem: 422 for one that is given twice.
    """
    given = request.args.to_dict(flat=False)
    twice = {name: ["Must be given once."] for name, values in given.items() if len(values) > 1}
    if twice:
        raise invalid(twice)
    return {name: values[0] for name, values in given.items()}


def load(schema: type[Schema], body: dict[str, Any]) -> Any:
    """Return what a schema makes of a body.

    :raises Problem: 422.
    """
    try:
        return schema().load(body)
    except ValidationError as exc:
        raise invalid(exc.messages_dict) from exc


def _parse(raw: bytes) -> Any:
    try:
        text = raw.decode()
        body = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unambiguous,
        )
    except UnicodeDecodeError as exc:
        raise _malformed("the body is not UTF-8") from exc
    except json.JSONDecodeError as exc:
        raise _malformed(f"the body is not JSON: {exc}") from exc
    except RecursionError as exc:
        raise _malformed(f"the body nests deeper than {MAX_JSON_DEPTH} levels") from exc
    except ValueError as exc:
        # Python's own limit, 4300, is against work that grows with the square of it
        raise _malformed("the body has a number of too many digits") from exc
    _check(body, text)
    return body


def _check(body: Any, text: str) -> None:
    """Check what the parser lets pass: depth, NUL, halves of characters."""
    members = body if isinstance(body, dict) else {"body": body}
    try:
        check_json(list(members), "body")
        for name, value in members.items():
            check_json(value, name)
        if _SURROGATE.search(text):
            json.dumps(body, ensure_ascii=False).encode()
    except PayloadError as exc:
        raise _malformed(str(exc)) from exc
    except UnicodeEncodeError as exc:
        raise _malformed("the body has half of a surrogate pair") from exc


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _refuse_constant(name: str) -> NoReturn:
    raise _malformed(f"the body holds {name}, which is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _malformed("the body has a number that is out of range")
    return number


def _unambiguous(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; of two members of one name, RFC 8259, 4, leaves open which one counts."""
    made = dict(members)
    if len(made) < len(members):
        [(name, _)] = Counter(name for name, _ in members).most_common(1)
        raise _malformed(f"the body names {name[:100]!r} more than once in one object")
    return made


def _malformed(detail: str) -> Problem:
    return Problem(400, "malformed-json", "The body is not a JSON object", detail=detail)


def _too_large(most_bytes: int) -> Problem:
    detail = f"at most {most_bytes} bytes are allowed"
    return Problem(413, "payload-too-large", "The body is too large", detail=detail)
