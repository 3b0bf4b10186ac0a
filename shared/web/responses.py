"""What goes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from werkzeug.wrappers import Response


def json_response(
    status: int,
    body: Any,
    headers: Mapping[str, str] | None = None,
    mimetype: str = "application/json",
) -> Response:
    """Return an answer with a JSON body, or with none where ``body`` is ``None``."""
    if body is None:
        empty = Response(status=status, headers=headers)
        del empty.headers["Content-Type"]
        return empty
    text = json.dumps(body, ensure_ascii=False, allow_nan=False)
    response = Response(text, status=status, headers=headers, mimetype=mimetype)
    # what is told here is true now, and some of it is secret
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    return response


def response_of(result: Any) -> Response:
    """Return the answer that a method's result means; see :mod:`shared.web`."""
    if isinstance(result, Response):
        return result
    if not isinstance(result, tuple):
        return json_response(200, result)
    status, *headers, body = result
    return json_response(status, body, *headers)
