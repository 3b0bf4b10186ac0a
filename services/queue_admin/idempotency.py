"""The header ``Idempotency-Key``, by which a request is known that is sent again.

As draft-ietf-httpapi-idempotency-key-header says, which makes it a string of structured
fields (RFC 9651), in quotes. Most clients leave these out, so both are taken, for the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from werkzeug.wrappers import Request

from shared.types import LONGEST_DEDUPE_KEY, Dedupe
from shared.web import Problem

SCOPE = ""
"""Where its keys are unique: over all queues, none of which has this name."""

_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_BARE = re.compile(r"[!#-+\--\[\]-~]+")


def dedupe_of(request: Request, body: Mapping[str, Any]) -> Dedupe | None:
    """Return what a request is known by, if it says so.

    :param body: has to be the same each time that the key is.
    :raises Problem: 400 when the header is not what it may be.
    """
    header = request.headers.get("Idempotency-Key")
    if header is None:
        return None
    # two headers come as one, with a comma between
    key = _key(header.strip())
    if key is None or not 1 <= len(key) <= LONGEST_DEDUPE_KEY or key != key.strip():
        raise Problem(
            400,
            "idempotency-key-malformed",
            "The Idempotency-Key is not valid",
            detail=f"Idempotency-Key must be one string of 1 to {LONGEST_DEDUPE_KEY} characters;"
            " with a comma or a space in it, it must stand in quotes",
        )
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, default=str)
    return Dedupe(SCOPE, key, sha256(text.encode()).hexdigest())


def _key(header: str) -> str | None:
    if quoted := _QUOTED.fullmatch(header):
        return re.sub(r'\\(["\\])', r"\1", quoted[1])
    return header if _BARE.fullmatch(header) else None
