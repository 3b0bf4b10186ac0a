"""The web page: files that the browser fetches once, and that ask the calls for all they show.

Nothing is made of data here, so that the files are no secret: without a token, too, they are
served, and the page asks for one.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from werkzeug.wrappers import Request, Response

from shared.web import Problem, http

FOLDER = Path(__file__).parent / "page"

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        # a browser that knows it lets no text become HTML, whatever a script does
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
"""What comes from this service runs, and nothing else does, wherever it came from."""


class PageCalls:
    """See the module's docstring."""

    @http("GET", "/")
    def page(self, request: Request) -> Response:
        """Serve the web page."""
        return _served(request, "index.html")

    @http("GET", "/page/<name>")
    def page_file(self, request: Request, name: str) -> Response:
        """Serve what belongs to the web page."""
        return _served(request, name)


def _served(request: Request, name: str) -> Response:
    if name not in _files():
        raise Problem(404, "not-found", "Nothing is here", detail=f"nothing is at {request.path}")
    body, digest = _files()[name]
    response = Response(body, content_type=TYPES[Path(name).suffix])
    response.set_etag(digest)
    # asked for anew each time, and sent only after an update: all files are of one version
    response.headers["Cache-Control"] = "no-cache"
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    answered: Any = response.make_conditional(request)
    return answered


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Return what there is to be served, by name, each with its digest."""
    bodies = {each.name: each.read_bytes() for each in FOLDER.iterdir() if each.suffix in TYPES}
    return {name: (body, hashlib.sha256(body).hexdigest()) for name, body in bodies.items()}
